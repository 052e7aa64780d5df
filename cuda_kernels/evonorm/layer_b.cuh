// What an element of a B layer has to know (formulas: math.h).
#pragma once

#include "common/portable.h"
#include "evonorm/math.h"

namespace zoo::evonorm {

typedef long long int64;

template <int V, class C>
struct LayerB {
  static constexpr int quantities = 5;  // sums of eR (B1: eR (x + 1)), eL, eR x, g x / D, g

  const void *v, *weight, *bias;  // [C] and [C] or [N, C]; null for 1, 1, 0
  int v_dtype, weight_dtype, bias_dtype;
  bool per_sample;
  const C *moments, *left;  // [2, N, C], [C]
  C eps;
  int64 planes;
  int channels;
  const C *centre, *pull, *batch_pull;  // [C], [N, C], [C], for the gradient

  struct Plane {
    C v, gamma, beta, left, t, mean, centre, pull, batch_pull;
  };

  ZOO_HD Plane plane(int64 n, int c) const {
    const int64 at = n * channels + c, of_sample = per_sample ? at : c;
    Plane found;
    found.v = v ? read_as<C>(v, v_dtype, c) : C(1);
    found.gamma = weight ? read_as<C>(weight, weight_dtype, of_sample) : C(1);
    found.beta = bias ? read_as<C>(bias, bias_dtype, of_sample) : C(0);
    found.left = left[c];
    const C mean = moments[at], variance = moments[planes + at];
    found.mean = V == kB0 ? mean : C(0);
    found.t = sqrt((V == kB0 ? variance : variance + mean * mean) + eps);
    found.centre = pull ? centre[c] : C(0);
    found.pull = pull ? pull[at] : C(0);
    found.batch_pull = pull ? batch_pull[c] : C(0);
    return found;
  }
  // 1 / D, and the share of the maximum that is the left side's: 1/2 where both are equal, 0 where one is NaN.
  ZOO_HD C inverse(const Plane& plane, C x, C& share) const {
    const C other = right<V>(x, plane.v, plane.t);
    share = plane.left > other ? C(1) : plane.left == other ? C(0.5) : C(0);
    return 1 / (plane.left >= other ? plane.left : plane.left == plane.left ? other : plane.left);
  }
  ZOO_HD C apply(const Plane& plane, C x) const {
    C share;
    return plane.gamma * (x * inverse(plane, x, share)) + plane.beta;
  }
  ZOO_HD void add(const Plane& plane, C x, C g, C (&sums)[quantities]) const {
    C share;
    const C over = inverse(plane, x, share), normed = x * over, e = -(g * plane.gamma) * normed * over;
    const C to_left = share * e, to_right = e - to_left, with_x = to_right * x;
    sums[0] += V == kB1 ? with_x + to_right : to_right;
    sums[1] += to_left;
    sums[2] += with_x;
    sums[3] += g * normed;
    sums[4] += g;
  }
  ZOO_HD C gradient(const Plane& plane, C x, C g) const {
    C share;
    const C over = inverse(plane, x, share), h = g * plane.gamma, e = -h * x * over * over;
    return b_gradient<V>(h, over, e - share * e, x, plane.v, plane.t, plane.mean, plane.pull, plane.centre,
                         plane.batch_pull);
  }
};

}  // namespace zoo::evonorm
