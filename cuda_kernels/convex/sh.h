// Real spherical harmonics up to degree 4 in the order of 3D Gaussian splatting, and their derivative by the direction.
#pragma once

#include "common/scalar.h"

#ifndef __CUDACC__
#include <math.h>
#endif

namespace zoo::convex {

constexpr int kMostDegree = 4, kMostBasis = 25;

// sqrt of these over pi, times the factor of each function's normalisation.
constexpr double kSH0 = 0.28209479177387814, kSH1 = 0.48860251190291992;
constexpr double kSH2a = 1.0925484305920792, kSH2b = 0.31539156525252005, kSH2c = 0.54627421529603959;
constexpr double kSH3a = 0.59004358992664352, kSH3b = 2.8906114426405538, kSH3c = 0.45704579946446572,
                 kSH3d = 0.3731763325901154, kSH3e = 1.4453057213202769;
constexpr double kSH4a = 2.5033429417967046, kSH4b = 1.7701307697799304, kSH4c = 0.94617469575756008,
                 kSH4d = 0.66904654355728921, kSH4e = 0.10578554691520431, kSH4f = 0.47308734787878004,
                 kSH4g = 0.62583573544917614;

// The (degree + 1)^2 functions at a unit vector, and their gradients as polynomials in x, y, z, [basis][3].
template <class T>
ZOO_HD void sh_basis(int degree, T x, T y, T z, T* basis, T (*slope)[3]) {
  auto put = [&](int i, double constant, T value, T dx, T dy, T dz) {
    const T c = static_cast<T>(constant);
    basis[i] = c * value;
    if (slope != nullptr) slope[i][0] = c * dx, slope[i][1] = c * dy, slope[i][2] = c * dz;
  };
  const T xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, xz = x * z;
  put(0, kSH0, T(1), T(0), T(0), T(0));
  if (degree < 1) return;
  put(1, -kSH1, y, T(0), T(1), T(0));
  put(2, kSH1, z, T(0), T(0), T(1));
  put(3, -kSH1, x, T(1), T(0), T(0));
  if (degree < 2) return;
  put(4, kSH2a, xy, y, x, T(0));
  put(5, -kSH2a, yz, T(0), z, y);
  put(6, kSH2b, 2 * zz - xx - yy, -2 * x, -2 * y, 4 * z);
  put(7, -kSH2a, xz, z, T(0), x);
  put(8, kSH2c, xx - yy, 2 * x, -2 * y, T(0));
  if (degree < 3) return;
  put(9, -kSH3a, y * (3 * xx - yy), 6 * xy, 3 * (xx - yy), T(0));
  put(10, kSH3b, xy * z, yz, xz, xy);
  put(11, -kSH3c, y * (4 * zz - xx - yy), -2 * xy, 4 * zz - xx - 3 * yy, 8 * yz);
  put(12, kSH3d, z * (2 * zz - 3 * xx - 3 * yy), -6 * xz, -6 * yz, 6 * zz - 3 * xx - 3 * yy);
  put(13, -kSH3c, x * (4 * zz - xx - yy), 4 * zz - 3 * xx - yy, -2 * xy, 8 * xz);
  put(14, kSH3e, z * (xx - yy), 2 * xz, -2 * yz, xx - yy);
  put(15, -kSH3a, x * (xx - 3 * yy), 3 * (xx - yy), -6 * xy, T(0));
  if (degree < 4) return;
  put(16, kSH4a, xy * (xx - yy), y * (3 * xx - yy), x * (xx - 3 * yy), T(0));
  put(17, -kSH4b, yz * (3 * xx - yy), 6 * xy * z, 3 * z * (xx - yy), y * (3 * xx - yy));
  put(18, kSH4c, xy * (7 * zz - 1), y * (7 * zz - 1), x * (7 * zz - 1), 14 * xy * z);
  put(19, -kSH4d, yz * (7 * zz - 3), T(0), z * (7 * zz - 3), y * (21 * zz - 3));
  // The last term is 3, but 0 where there is no direction; its gradient is radial, which normalize_derivative drops.
  put(20, kSH4e, 35 * zz * zz - 30 * zz + 3 * (xx + yy + zz), T(0), T(0), 140 * z * zz - 60 * z);
  put(21, -kSH4d, xz * (7 * zz - 3), z * (7 * zz - 3), T(0), x * (21 * zz - 3));
  put(22, kSH4f, (xx - yy) * (7 * zz - 1), 2 * x * (7 * zz - 1), -2 * y * (7 * zz - 1), 14 * z * (xx - yy));
  put(23, -kSH4b, xz * (xx - 3 * yy), 3 * z * (xx - yy), -6 * xy * z, x * (xx - 3 * yy));
  put(24, kSH4g, xx * (xx - 3 * yy) - yy * (3 * xx - yy), 4 * x * (xx - 3 * yy), -4 * y * (3 * xx - yy), T(0));
}

// The gradient by a vector d of a function of d / |d|, given the one by the unit vector u = d / |d|.
template <class T>
ZOO_HD void normalize_derivative(const T* u, T inverse, T* grad) {
  const T along = u[0] * grad[0] + u[1] * grad[1] + u[2] * grad[2];
  for (int i = 0; i < 3; ++i) grad[i] = (grad[i] - along * u[i]) * inverse;
}

}  // namespace zoo::convex
