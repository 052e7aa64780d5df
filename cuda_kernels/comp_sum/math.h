// The comp-sum loss of one row, once m = max z_j and E = sum exp(z_j - m) over j != y are known (eager.py has the
// contract, row_numbers.h the same for vectors of the CPU):
//
//   s = (m - z_y) + log E,  c = softplus(s),  loss = expm1((1 - tau) c) / (1 - tau),  log w = (1 - tau) c + log sigmoid(s)
#pragma once

#include "common/scalar.h"

namespace zoo::comp_sum {

// Names for what nvcc and NVRTC have built in and g++ has in <cmath>, in both precisions.
ZOO_HD float exp_(float x) { return expf(x); }
ZOO_HD double exp_(double x) { return exp(x); }
ZOO_HD float expm1_(float x) { return expm1f(x); }
ZOO_HD double expm1_(double x) { return expm1(x); }
ZOO_HD float log1p_(float x) { return log1pf(x); }
ZOO_HD double log1p_(double x) { return log1p(x); }
ZOO_HD float log_(float x) { return logf(x); }
ZOO_HD double log_(double x) { return log(x); }

template <class C>
ZOO_HD C off_target(C m, C log_total, C mine) {
  return (m - mine) + log_total;  // in this order: log E would be lost beside a large m
}

// log(1 + exp(-|s|)), the part that softplus and log sigmoid share. A NaN stays one.
template <class C>
ZOO_HD C tail(C s) {
  return log1p_(exp_(s > 0 ? -s : s));
}

// The family and the logarithm of its slope, for a = 1 - tau. The host takes that difference in float64: of a tau near 1
// in float, little would be left of it.
template <class C>
ZOO_HD C loss_of(C s, C a, C cap) {
  const C c = (s > 0 ? s : C(0)) + tail(s);
  if (a == 0) return c;
  const C exponent = a * c;
  if (exponent > cap) return (expm1_(cap) + exp_(cap) * (exponent - cap)) / a;
  return expm1_(exponent) / a;
}
template <class C>
ZOO_HD C log_weight_of(C s, C a, C cap) {
  const C small = tail(s), log_off = (s < 0 ? s : C(0)) - small;
  if (a == 0) return log_off;  // a c would be 0 * inf where c is infinite
  const C exponent = a * ((s > 0 ? s : C(0)) + small);
  return (exponent > cap ? cap : exponent) + log_off;
}

}  // namespace zoo::comp_sum
