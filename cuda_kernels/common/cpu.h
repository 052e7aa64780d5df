// What the CPU kernels share: SIMD vectors of one width on every machine, so that sums have one order whatever the
// compiler may use, and loads and stores that convert.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common/scalar.h"

namespace zoo::cpu {

template <class C>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(32)));
  typedef std::int32_t mask __attribute__((vector_size(32)));
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef std::int64_t mask __attribute__((vector_size(32)));
};

// Two registers. Which element lies where is the business of load and store: nothing else may depend on it.
template <class C>
struct Vector {
  using Part = typename Register<C>::type;
  using MaskPart = typename Register<C>::mask;
  static constexpr int lanes = 2 * sizeof(Part) / sizeof(C);
  struct Mask {
    MaskPart low, high;
  };
  Part low{}, high{};

  friend Vector operator+(Vector a, Vector b) { return {a.low + b.low, a.high + b.high}; }
  friend Vector operator-(Vector a, Vector b) { return {a.low - b.low, a.high - b.high}; }
  friend Vector operator*(Vector a, Vector b) { return {a.low * b.low, a.high * b.high}; }
  friend Vector operator/(Vector a, Vector b) { return {a.low / b.low, a.high / b.high}; }
  friend Vector operator+(Vector a, C b) { return {a.low + b, a.high + b}; }
  friend Vector operator*(Vector a, C b) { return {a.low * b, a.high * b}; }
  Vector& operator+=(Vector b) { return *this = *this + b; }
  Vector& operator*=(Vector b) { return *this = *this * b; }
  friend Mask operator>(Vector a, Vector b) { return {a.low > b.low, a.high > b.high}; }
  friend Mask operator<=(Vector a, C b) { return {a.low <= b, a.high <= b}; }
  friend Mask operator==(Vector a, C b) { return {a.low == b, a.high == b}; }
  friend Mask operator==(Vector a, Vector b) { return {a.low == b.low, a.high == b.high}; }
  static Vector all(C value) { return Vector{} + value; }
};

template <class C>
inline Vector<C> select(typename Vector<C>::Mask mask, Vector<C> yes, Vector<C> no) {
  return {mask.low ? yes.low : no.low, mask.high ? yes.high : no.high};
}
template <class C>
inline Vector<C> magnitude(Vector<C> v) {
  return {v.low < 0 ? -v.low : v.low, v.high < 0 ? -v.high : v.high};
}
template <class C>
inline Vector<C> clamp(Vector<C> v, C bound) {
  const Vector<C> high = Vector<C>{} + bound, low = Vector<C>{} - high;
  v = select(v > high, high, v);
  return select(low > v, low, v);
}
template <class C>
inline C sum_lanes(Vector<C> v) {
  const auto both = v.low + v.high;
  C sum = 0;
  for (int i = 0; i < Vector<C>::lanes / 2; ++i) sum += both[i];
  return sum;
}
template <class C>
inline C largest_lane(Vector<C> v) {
  const auto both = v.low > v.high ? v.low : v.high;
  C largest = both[0];
  for (int i = 1; i < Vector<C>::lanes / 2; ++i) largest = both[i] > largest ? both[i] : largest;
  return largest;
}

// exp as 2^n e^r with |r| <= ln 2 / 2 and the terms of its series below a tenth of the last place.
template <class C>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr int terms = 7, shift = 23, bias = 127;
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: the sum's last place is 1
  static constexpr float largest = 87.33f;       // of either sign: the result and its inverse are normal numbers
};
template <>
struct Exponential<double> {
  static constexpr int terms = 13, shift = 52, bias = 1023;
  static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93145751953125e-1, ln2_low = 1.4286068203094172321e-6;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double largest = 708.0;
};

// Beyond +-largest it stays at its value there; a NaN stays one.
template <class C>
inline typename Register<C>::type exp_bounded(typename Register<C>::type x) {
  using Facts = Exponential<C>;
  using Part = typename Register<C>::type;
  using Bits = typename Register<C>::mask;
  const Part high = Part{} + Facts::largest;
  x = x > high ? high : x;
  x = x < -high ? -high : x;
  const Part shifted = x * Facts::log2e + Facts::rounder, n = shifted - Facts::rounder;
  const Part r = x - n * Facts::ln2_high - n * Facts::ln2_low;
  Part sum = Part{} + C(1);
  // 1 + r (1 + r/2 (1 + r/3 (...)))
#pragma GCC unroll 16
  for (int k = Facts::terms; k >= 1; --k) sum = sum * r * (C(1) / C(k)) + C(1);
  const Bits exponent = reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(Part{} + Facts::rounder) + Facts::bias;
  return sum * reinterpret_cast<Part>(exponent << Facts::shift);
}
template <class C>
inline Vector<C> sigmoid(Vector<C> z) {
  using Part = typename Register<C>::type;
  const auto of = [](Part part) -> Part {
    const Part s = C(1) / (exp_bounded<C>(-part) + C(1));
    return part < Part{} - Exponential<C>::largest ? Part{} : s;
  };
  return {of(z.low), of(z.high)};
}

template <class C, class = std::enable_if_t<std::is_floating_point_v<C>>>
inline Vector<C> load(const C* p) {
  Vector<C> v;
  std::memcpy(&v.low, p, sizeof v.low);
  std::memcpy(&v.high, p + Vector<C>::lanes / 2, sizeof v.high);
  return v;
}
template <class C, class = std::enable_if_t<std::is_floating_point_v<C>>>
inline void store(C* p, Vector<C> v) {
  std::memcpy(p, &v.low, sizeof v.low);
  std::memcpy(p + Vector<C>::lanes / 2, &v.high, sizeof v.high);
}

// The elements of even index in `low`, the others in `high`: a shift and a mask, where their order would take shuffles.
typedef std::uint32_t Words __attribute__((vector_size(32)));

inline Vector<float> load(const bf16* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  using Part = Vector<float>::Part;
  return {reinterpret_cast<Part>(words << 16), reinterpret_cast<Part>(words & 0xffff0000u)};
}
// To nearest even. A NaN keeps its upper half: what arithmetic makes has its quiet bit there.
inline Words rounded(Vector<float>::Part v) {
  const Words words = reinterpret_cast<Words>(v), is_nan = reinterpret_cast<Words>(v != v);
  return words + (((words >> 16 & 1u) + 0x7fffu) & ~is_nan);
}
inline void store(bf16* p, Vector<float> v) {
  const Words words = (rounded(v.low) >> 16) | (rounded(v.high) & 0xffff0000u);
  std::memcpy(p, &words, sizeof words);
}

inline Vector<float> load(const half* p) {
#ifdef __AVX2__  // F16C came before
  const auto* from = reinterpret_cast<const __m128i*>(p);
  using Part = Vector<float>::Part;
  return {(Part)_mm256_cvtph_ps(_mm_loadu_si128(from)), (Part)_mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
#else
  float values[Vector<float>::lanes];
  for (int i = 0; i < Vector<float>::lanes; ++i) values[i] = widen(p[i]);
  return load(values);
#endif
}
inline void store(half* p, Vector<float> v) {
#ifdef __AVX2__
  auto* to = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(to, _mm256_cvtps_ph((__m256)v.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(to + 1, _mm256_cvtps_ph((__m256)v.high, _MM_FROUND_TO_NEAREST_INT));
#else
  float values[Vector<float>::lanes];
  store(values, v);
  for (int i = 0; i < Vector<float>::lanes; ++i) p[i] = narrow(values[i], half{});
#endif
}

// The next row on its way while this one is written; beyond the last row it is a no-op.
template <class S>
inline void prefetch(const S* p) {
  __builtin_prefetch(p, 0, 3);
}

// How many elements of a vector exist: all, known when compiling, or the rest of a row.
struct All {};

template <class S>
inline Vector<compute_t<S>> load(const S* p, All) {
  return load(p);
}
template <class S>
inline void store(S* p, Vector<compute_t<S>> v, All) {
  store(p, v);
}
// Zeros beyond the end: they add nothing to any sum of ours.
template <class S>
inline Vector<compute_t<S>> load(const S* p, int count) {
  S values[Vector<compute_t<S>>::lanes] = {};
  std::memcpy(values, p, count * sizeof(S));
  return load(values);
}
template <class S>
inline void store(S* p, Vector<compute_t<S>> v, int count) {
  S values[Vector<compute_t<S>>::lanes];
  store(values, v);
  std::memcpy(p, values, count * sizeof(S));
}

// Numbers of the compute type that belong to elements of a tensor of S: each in the lane where load puts its element.
template <class S>
inline Vector<compute_t<S>> load_like(const compute_t<S>* p, int count) {
  using C = compute_t<S>;
  C values[Vector<C>::lanes] = {};
  std::memcpy(values, p, count * sizeof(C));
  if constexpr (std::is_same_v<S, bf16>) {
    C placed[Vector<C>::lanes];
    for (int i = 0; i < Vector<C>::lanes; ++i) placed[i % 2 * (Vector<C>::lanes / 2) + i / 2] = values[i];
    return load(placed);
  } else {
    return load(values);
  }
}
template <class S>
inline void store_like(compute_t<S>* p, Vector<compute_t<S>> v, int count) {
  using C = compute_t<S>;
  C values[Vector<C>::lanes];
  store(values, v);
  if constexpr (std::is_same_v<S, bf16>) {
    C placed[Vector<C>::lanes];
    for (int i = 0; i < Vector<C>::lanes; ++i) placed[i] = values[i % 2 * (Vector<C>::lanes / 2) + i / 2];
    std::memcpy(p, placed, count * sizeof(C));
  } else {
    std::memcpy(p, values, count * sizeof(C));
  }
}
// The elements of a tail, and `rest` in the lanes beyond it.
template <class S>
inline Vector<compute_t<S>> load_or(const S* p, int count, compute_t<S> rest) {
  using C = compute_t<S>;
  C values[Vector<C>::lanes];
  for (int i = 0; i < Vector<C>::lanes; ++i) values[i] = i < count ? static_cast<C>(widen(p[i])) : rest;
  return load_like<S>(values, Vector<C>::lanes);
}
template <class S>
inline Vector<compute_t<S>> load_or(const S* p, All, compute_t<S>) {
  return load(p);
}

// Calls body(offset, count, u) for every vector of elements [start, stop), `Unroll` of them at a time with u = 0, 1, ...:
// a sum that keeps one vector for each u does not wait for its last addition.
template <class C, int Unroll, class Body>
inline void for_each_vector(std::int64_t start, std::int64_t stop, Body&& body) {
  constexpr int width = Vector<C>::lanes;
  std::int64_t j = start;
  for (; j + Unroll * width <= stop; j += Unroll * width) {
#pragma GCC unroll 4
    for (int u = 0; u < Unroll; ++u) body(j + u * width, All{}, u);
  }
  for (; j + width <= stop; j += width) body(j, All{}, 0);
  if (j < stop) body(j, static_cast<int>(stop - j), 0);
}

}  // namespace zoo::cpu
