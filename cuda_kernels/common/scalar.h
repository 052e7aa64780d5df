// Storage types of tensors and their conversion to the type arithmetic is done in: float for everything but double.
#pragma once

#ifndef ZOO_HD  // the CPU library includes this without portable.h
#define ZOO_HD inline __attribute__((always_inline))
#endif

#ifndef __CUDACC__
#include <cmath>
#include <cstring>
#endif

namespace zoo {

struct bf16 {
  unsigned short bits;
};
struct half {
  unsigned short bits;
};

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class S>
using compute_t = typename Compute<S>::type;

#ifdef __CUDACC__
ZOO_HD unsigned bits_of(float value) { return __float_as_uint(value); }
ZOO_HD float float_of(unsigned bits) { return __uint_as_float(bits); }
#else
ZOO_HD unsigned bits_of(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
ZOO_HD float float_of(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

// IEEE binary16 without hardware, round to nearest even. Denormals are exact: a float holds them as normal numbers.
ZOO_HD float half_to_float(unsigned short h) {
  const unsigned sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // Shifted into float's exponent field the number is 2^-112 of itself, and the product is exact; inf and NaN stay
  // what they are with all exponent bits set.
  const float value = float_of(magnitude << 13) * 0x1p112f;
  return float_of(bits_of(value) | sign | (magnitude >= 0x7c00u ? 0x7f800000u : 0u));
}
ZOO_HD unsigned short float_to_half(float value) {
  const unsigned bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<unsigned short>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // 65520 and above round to inf
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the last place of a half is 2^-24, that of a float at 0.5 is the same: the sum rounds for us.
    const unsigned rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<unsigned short>(sign | rounded);
  }
  const unsigned odd = (magnitude >> 13) & 1u;
  return static_cast<unsigned short>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

ZOO_HD float widen(float value) { return value; }
ZOO_HD double widen(double value) { return value; }
ZOO_HD float widen(bf16 value) { return float_of(static_cast<unsigned>(value.bits) << 16); }
ZOO_HD float widen(half value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return half_to_float(value.bits);
#endif
}

// Rounds to nearest even. The second argument only names the type.
ZOO_HD float narrow(float value, float) { return value; }
ZOO_HD double narrow(double value, double) { return value; }
ZOO_HD bf16 narrow(float value, bf16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const unsigned bits = bits_of(value), odd = (bits >> 16) & 1u;
  const unsigned rounded = value != value ? 0x7fc00000u : bits + 0x7fffu + odd;
  return bf16{static_cast<unsigned short>(rounded >> 16)};
#endif
}
ZOO_HD half narrow(float value, half) {
#ifdef __CUDA_ARCH__
  half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return half{float_to_half(value)};
#endif
}

// A tensor whose dtype the caller names: parameters keep their own beside inputs of another.
enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

template <class C>
ZOO_HD C read_as(const void* data, int dtype, long long index) {
  switch (dtype) {
    case kFloat64:
      return static_cast<C>(static_cast<const double*>(data)[index]);
    case kBFloat16:
      return static_cast<C>(widen(static_cast<const bf16*>(data)[index]));
    case kFloat16:
      return static_cast<C>(widen(static_cast<const half*>(data)[index]));
    default:
      return static_cast<C>(static_cast<const float*>(data)[index]);
  }
}

}  // namespace zoo
