// EvoNorm of one element. T is a number, or a vector of them on the CPU: only + - * and the functions named here are used.
//
//   S: y = x s r gamma + beta,  s = sigmoid(v x),  r = 1 / sqrt(variance or mean square of the group + eps)
//   B: y = x / max(L, R) gamma + beta,  L = sqrt(batch or running variance + eps),
//      R = v x + t (B0), (x + 1) t (B1), t - x (B2),  t = sqrt(variance (B0) or mean square of the sample's channel + eps)
//
// u is what S divides, h = gamma g, and e = -h x / D^2 what enters the maximum D; eL and eR are its two sides' shares.
#pragma once

#include "common/scalar.h"

namespace zoo::evonorm {

enum Variant : int { kB0 = 0, kB1 = 1, kB2 = 2 };

// u = x s, du/dx and du/dv, given z = v x and s = sigmoid(z).
template <class T>
struct Gated {
  T u, slope, by_v;
};
template <class T>
ZOO_HD Gated<T> gated(T x, T z, T s) {
  const T rest = s - s * s;  // s (1 - s)
  return {x * s, s + z * rest, x * x * rest};
}

// dx of an S layer: h u' r - (x - mean) pull, where pull = r^3 / n sum h u over the group.
template <class T>
ZOO_HD T s_gradient(T h, T slope, T x, T mean, T r, T pull) {
  return h * slope * r - (x - mean) * pull;
}

// The right side of the maximum, and its slope in x while the statistics are held.
template <int V, class T>
ZOO_HD T right(T x, T v, T t) {
  if constexpr (V == kB0) return v * x + t;
  if constexpr (V == kB1) return x * t + t;
  if constexpr (V == kB2) return t - x;
}

// dx of a B layer: h / D + eR dR/dx + (x - m) pull + (x - centre) batch_pull. `m` is 0 but for B0.
template <int V, class T>
ZOO_HD T b_gradient(T h, T inverse, T to_right, T x, T v, T t, T m, T pull, T centre, T batch_pull) {
  T direct = h * inverse;
  if constexpr (V == kB0) direct = direct + to_right * v + (x - m) * pull;
  if constexpr (V == kB1) direct = direct + to_right * t + x * pull;
  if constexpr (V == kB2) direct = direct - to_right + x * pull;
  return direct + (x - centre) * batch_pull;
}

}  // namespace zoo::evonorm
