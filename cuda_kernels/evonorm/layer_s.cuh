// What an element of an S layer has to know (formulas: math.h).
#pragma once

#include "common/portable.h"
#include "evonorm/math.h"

namespace zoo::evonorm {

typedef long long int64;

// 1 / (1 + exp(-z)); exp overflows to inf for z far below 0, and 1 / inf is the 0 it should be.
ZOO_HD float sigmoid(float z) {
#ifdef __CUDA_ARCH__
  // Two units in the last place; the exact division costs as much as the exponential.
  return __fdividef(1.0f, 1.0f + expf(-z));
#else
  return 1.0f / (1.0f + expf(-z));
#endif
}
ZOO_HD double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

template <class C>
struct LayerS {
  static constexpr int quantities = 3;  // sums of g u, g, g du/dv

  const void *v, *weight, *bias;  // [C] and [C] or [N, C]; null for 1, 1, 0
  int v_dtype, weight_dtype, bias_dtype;
  bool per_sample;
  const C* stats;  // [2, N G]: mean and r
  const C* pull;   // [N G], for the gradient
  int64 groups;    // of all samples
  int channels, group_channels;
  bool linear;

  struct Plane {
    C v, gamma, beta, mean, r, pull;
  };

  ZOO_HD Plane plane(int64 n, int c, C mean, C r) const {
    const int64 of_sample = per_sample ? n * channels + c : c;
    return {v ? read_as<C>(v, v_dtype, c) : C(1), weight ? read_as<C>(weight, weight_dtype, of_sample) : C(1),
            bias ? read_as<C>(bias, bias_dtype, of_sample) : C(0), mean, r, C(0)};
  }
  ZOO_HD Plane plane(int64 n, int c) const {
    const int64 group = (n * channels + c) / group_channels;
    Plane found = plane(n, c, stats[group], stats[groups + group]);
    if (pull) found.pull = pull[group];
    return found;
  }
  ZOO_HD Gated<C> gate(const Plane& plane, C x) const {
    if (linear) return {x, C(1), C(0)};
    const C z = plane.v * x;
    return gated(x, z, sigmoid(z));
  }
  ZOO_HD C apply(const Plane& plane, C x) const {
    const C u = linear ? x : x * sigmoid(plane.v * x);
    return plane.gamma * (u * plane.r) + plane.beta;
  }
  ZOO_HD void add(const Plane& plane, C x, C g, C (&sums)[quantities]) const {
    const Gated<C> at = gate(plane, x);
    sums[0] += g * at.u;
    sums[1] += g;
    sums[2] += g * at.by_v;
  }
  ZOO_HD C gradient(const Plane& plane, C x, C g) const {
    return s_gradient(g * plane.gamma, gate(plane, x).slope, x, plane.mean, plane.r, plane.pull);
  }
};

}  // namespace zoo::evonorm
