// The formulas of PolyReLU and PolyNorm (Zhuo et al. 2025, eq. 2 and 3) for one element, and for the few numbers a row
// has. V is a scalar on the GPU and a SIMD vector on the CPU; C is its element type. Coefficients are in descending
// order of power, c[0] belongs to t^order.
//
// N is the order where it is known when compiling; N = 0 takes it from the argument, up to kMostPowers.
#pragma once

#include "common/scalar.h"

namespace zoo::polycom {

constexpr int kMostPowers = 32;
template <int N>
constexpr int capacity = N > 0 ? N : kMostPowers;
template <int N>
ZOO_HD int powers(int order) {
  return N > 0 ? N : order;
}

// A sum of t^2r below 2^60 shows that no |t| is above 2^(30/r): the row may stay as it is. Up to there the sums, the
// cubes of their inverse roots and the products between stay far from the ends of float.
template <class C>
ZOO_HD bool is_ordinary(C largest_sum) {
  return largest_sum < C(1152921504606846976.0);  // 2^60; false for NaN
}

// 1 / scale, with scale the power of two above the row's largest magnitude: PolyNorm of t / c with eps / c^2p is PolyNorm
// of t. A row with inf or NaN stays as it is: the formula then gives the NaNs it must.
ZOO_HD float inverse_scale(float largest, float threshold) {
  if (!(largest > threshold) || largest > 3.402823466e38f) return 1.0f;
  int exponent;
  frexpf(largest, &exponent);
  return ldexpf(1.0f, -(exponent < 126 ? exponent : 126));  // 2^-126 is the smallest normal number
}
ZOO_HD double inverse_scale(double largest, double threshold) {
  if (!(largest > threshold) || largest > 1.7976931348623157e308) return 1.0;
  int exponent;
  frexp(largest, &exponent);
  return ldexp(1.0, -(exponent < 1022 ? exponent : 1022));
}

ZOO_HD float inverse_root(float value) { return 1.0f / sqrtf(value); }
ZOO_HD double inverse_root(double value) { return 1.0 / sqrt(value); }

// sums[k] += t^2p, p = order - k.
template <int N, class V>
ZOO_HD void add_power_sums(V t, V* sums, int order) {
  const V square = t * t;
  V power = square;
  sums[powers<N>(order) - 1] += power;
  for (int k = powers<N>(order) - 2; k >= 0; --k) {
    power *= square;
    sums[k] += power;
  }
}

// rho[k] = (sum_k / count + eps inverse^2p)^-1/2 from sums of the scaled row; count is 1 for the Euclidean norm.
template <int N, class C>
ZOO_HD void inverse_norms(const C* sums, C* rho, C inverse, C count, C eps, int order) {
  const C square = inverse * inverse;
  C floor = eps;
  for (int k = powers<N>(order) - 1; k >= 0; --k) {
    floor *= square;
    rho[k] = inverse_root(sums[k] / count + floor);
  }
}

// sum_k c[k] t^(order - k) + constant.
template <int N, class V, class C>
ZOO_HD V polynomial(V t, const C* c, C constant, int order) {
  V y = t * c[0];
  for (int k = 1; k < powers<N>(order); ++k) y = (y + c[k]) * t;
  return y + constant;
}

// sum_k c[k] u^(order - 1 - k).
template <int N, class V, class C>
ZOO_HD V polynomial_without_root(V u, const C* c, int order) {
  V y = V{} + c[0];
  for (int k = 1; k < powers<N>(order); ++k) y = y * u + c[k];
  return y;
}

// moments[k] += g t^(order - k), moments[order] += g.
template <int N, class V>
ZOO_HD void add_moments(V t, V g, V* moments, int order) {
  V power = g;
  moments[powers<N>(order)] += power;
  for (int k = powers<N>(order) - 1; k >= 0; --k) {
    power *= t;
    moments[k] += power;
  }
}

// What the gradient of a row needs beside its elements.
template <int N, class C>
struct RowGradient {
  C slopes[capacity<N>];  // p w_p rho_p
  C pull[capacity<N>];    // p w_p rho_p^3 S_p / count
};

// moments[k] arrives as S_p = sum_j g_j t_j^p and leaves as rho_p S_p, the gradient of w_p.
template <int N, class C>
ZOO_HD RowGradient<N, C> row_gradient(const C* weight, const C* rho, C* moments, C count, int order) {
  RowGradient<N, C> row;
  for (int k = 0; k < powers<N>(order); ++k) {
    moments[k] *= rho[k];
    row.slopes[k] = C(powers<N>(order) - k) * weight[k] * rho[k];
    // rho S first: rho^3 alone leaves float for large rows.
    row.pull[k] = row.slopes[k] * (moments[k] * rho[k] / count);
  }
  return row;
}

// dt_j = g_j sum_p p k_p t_j^(p-1) - t_j sum_p c_p t_j^(2p-2), k_p = w_p rho_p, c_p = p k_p rho_p^2 S_p / count.
template <int N, class V, class C>
ZOO_HD V element_gradient(V t, V g, const RowGradient<N, C>& row, int order) {
  const V slope = polynomial_without_root<N>(t, row.slopes, order);
  const V pull = polynomial_without_root<N>(V(t * t), row.pull, order);
  return g * slope - t * pull;
}

}  // namespace zoo::polycom
