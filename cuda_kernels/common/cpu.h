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

// a b + c with one rounding where the processor has it, else two.
template <class Part>
inline Part multiply_add(Part a, Part b, Part c) {
#ifdef __FMA__
  if constexpr (std::is_same_v<Part, Register<float>::type>)
    return (Part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (Part)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
// The number, or the end of [-bound, bound] that it lies beyond; a NaN stays.
template <class Part, class C>
inline Part bounded(Part x, C bound) {
  const Part high = Part{} + bound, low = -high;
#ifdef __AVX__
  if constexpr (std::is_same_v<Part, Register<float>::type>)
    return (Part)_mm256_max_ps((__m256)low, _mm256_min_ps((__m256)high, (__m256)x));
  else
    return (Part)_mm256_max_pd((__m256d)low, _mm256_min_pd((__m256d)high, (__m256d)x));
#else
  x = high < x ? high : x;
  return low > x ? low : x;
#endif
}

// e^r for |r| <= ln 2 / 2 by the polynomial of the smallest relative error of its degree, 1.9e-9 and 3.1e-18.
template <class C>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr int degree = 6, shift = 23, bias = 127;
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: the sum's last place is 1
  static constexpr float largest = 87.33f;       // of either sign: e^x and its inverse are normal numbers
  static constexpr float coefficients[degree + 1] = {1.0f,           1.000000036f,   0.49999992075f, 0.16666420072f,
                                                     0.04166822619f, 0.00837482403f, 0.00138368357f};
};
template <>
struct Exponential<double> {
  static constexpr int degree = 11, shift = 52, bias = 1023;
  static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93145751953125e-1, ln2_low = 1.4286068203094172321e-6;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double largest = 708.0;
  static constexpr double coefficients[degree + 1] = {1.0,
                                                      1.0,
                                                      0.5000000000000017703,
                                                      0.166666666666661682,
                                                      0.04166666666649262968,
                                                      0.008333333333559433932,
                                                      0.001388888895126104161,
                                                      0.0001984126943247048834,
                                                      0.00002480148648143640087,
                                                      2.755762262047198039e-6,
                                                      2.763230817489448582e-7,
                                                      2.499430327381439512e-8};
};

// The terms First ... First + Count - 1 of the polynomial in r, over r^First, from powers of -r: 1st, 2nd, 4th, 8th. Half
// by half, since what limits a loop over elements is how long each has to wait for its own last operation.
template <class C, int First, int Count>
inline typename Register<C>::type estrin(const typename Register<C>::type* powers) {
  using Part = typename Register<C>::type;
  if constexpr (Count == 1) {
    constexpr C coefficient = Exponential<C>::coefficients[First];
    return Part{} + (First % 2 ? -coefficient : coefficient);
  } else {
    constexpr int log = Count > 8 ? 3 : Count > 4 ? 2 : Count > 2 ? 1 : 0, half = 1 << log;
    return multiply_add(estrin<C, First + half, Count - half>(powers), powers[log], estrin<C, First, half>(powers));
  }
}

// 1 / (1 + e^-z) with e^-z = 2^n e^r. Beyond +-largest it stays at its value there, which is the smallest normal number on
// the left; a NaN stays one.
template <class C>
inline typename Register<C>::type sigmoid(typename Register<C>::type z) {
  using Facts = Exponential<C>;
  using Part = typename Register<C>::type;
  using Bits = typename Register<C>::mask;
  const auto all = [](C value) { return Part{} + value; };
  z = bounded(z, Facts::largest);
  const Part shifted = multiply_add(z, all(-Facts::log2e), all(Facts::rounder)), n = shifted - Facts::rounder;
  const Part minus_r = multiply_add(n, all(Facts::ln2_low), multiply_add(n, all(Facts::ln2_high), z));
  const Part square = minus_r * minus_r, fourth = square * square, powers[] = {minus_r, square, fourth, fourth * fourth};
  const Part sum = estrin<C, 0, Facts::degree + 1>(powers);
  const Bits exponent = reinterpret_cast<Bits>(shifted) - (reinterpret_cast<Bits>(all(Facts::rounder)) - Facts::bias);
  return 1 / multiply_add(sum, reinterpret_cast<Part>(exponent << Facts::shift), all(1));
}
template <class C>
inline Vector<C> sigmoid(Vector<C> z) {
  return {sigmoid<C>(z.low), sigmoid<C>(z.high)};
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
