// What the CPU kernels share: SIMD vectors of one width on every machine, so that sums have one order whatever the
// compiler may use, and loads and stores that convert.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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
};

template <class C>
inline Vector<C> broadcast(C value) {
  return Vector<C>{} + value;
}

template <class C>
inline Vector<C> select(typename Vector<C>::Mask mask, Vector<C> yes, Vector<C> no) {
  return {mask.low ? yes.low : no.low, mask.high ? yes.high : no.high};
}
// b where either is NaN, which is what the instruction does and a compiler does not see.
template <class Part>
inline Part larger_part(Part a, Part b) {
#ifdef __AVX2__
  if constexpr (std::is_same_v<Part, Register<float>::type>)
    return (Part)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Part)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
template <class Part>
inline Part smaller_part(Part a, Part b) {
#ifdef __AVX2__
  if constexpr (std::is_same_v<Part, Register<float>::type>)
    return (Part)_mm256_min_ps((__m256)a, (__m256)b);
  else
    return (Part)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}
template <class C>
inline Vector<C> larger(Vector<C> a, Vector<C> b) {
  return {larger_part(a.low, b.low), larger_part(a.high, b.high)};
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

// Where a vector loaded from S keeps element i of a row, as an offset in the same row of compute_t<S>: rows of
// parameters are laid down in this order for loops whose vectors span channels.
template <class S>
constexpr std::int64_t place(std::int64_t i) {
  if constexpr (std::is_same_v<S, bf16>) return (i & ~std::int64_t{15}) | (i & 1) << 3 | (i & 15) >> 1;
  return i;
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
#ifdef __AVX2__
// All bits of the first `count` elements of a register, which may be fewer than none and more than all.
template <class C>
inline __m256i first(int count) {
  static constexpr std::int32_t bits[] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  constexpr int words = sizeof(C) / sizeof *bits;
  count = count < 0 ? 0 : count < 8 / words ? count : 8 / words;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + 8 - count * words));
}
inline Vector<float> load(const float* p, int count) {
  using Part = Vector<float>::Part;
  return {(Part)_mm256_maskload_ps(p, first<float>(count)), (Part)_mm256_maskload_ps(p + 8, first<float>(count - 8))};
}
inline Vector<double> load(const double* p, int count) {
  using Part = Vector<double>::Part;
  return {(Part)_mm256_maskload_pd(p, first<double>(count)), (Part)_mm256_maskload_pd(p + 4, first<double>(count - 4))};
}
inline void store(float* p, Vector<float> v, int count) {
  _mm256_maskstore_ps(p, first<float>(count), (__m256)v.low);
  _mm256_maskstore_ps(p + 8, first<float>(count - 8), (__m256)v.high);
}
inline void store(double* p, Vector<double> v, int count) {
  _mm256_maskstore_pd(p, first<double>(count), (__m256d)v.low);
  _mm256_maskstore_pd(p + 4, first<double>(count - 4), (__m256d)v.high);
}
#endif
// Zeros beyond the end: they add nothing to most sums.
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

// The vector where elements exist and `beyond` behind them, whatever was computed from the zeros there.
template <class S>
inline Vector<compute_t<S>> existing(Vector<compute_t<S>> v, All, Vector<compute_t<S>> = {}) {
  return v;
}
template <class S>
inline Vector<compute_t<S>> existing(Vector<compute_t<S>> v, int count, Vector<compute_t<S>> beyond = {}) {
  using C = compute_t<S>;
#ifdef __AVX2__
  using Bits = typename Register<C>::mask;
  constexpr bool alternate = std::is_same_v<S, bf16>;
  const int low = alternate ? (count + 1) / 2 : count, high = alternate ? count / 2 : count - Vector<C>::lanes / 2;
  return select({(Bits)first<C>(low), (Bits)first<C>(high)}, v, beyond);
#else
  C ones[Vector<C>::lanes] = {};
  for (int i = 0; i < count; ++i) ones[place<S>(i)] = 1;
  return select(load(ones) == C(1), v, beyond);
#endif
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

// Sums over a row that may be long run in chunks of this many elements; the chunks' totals are added in double.
constexpr std::int64_t kChunk = 4096;

// totals[k] += the sum over elements of what add(offset, count, sums) puts into sums[k].
template <class C, int Sums, int Unroll, class Add>
inline void add_sums(std::int64_t width, double* totals, Add&& add) {
  for (std::int64_t start = 0; start < width; start += kChunk) {
    Vector<C> sums[Unroll][Sums] = {};
    for_each_vector<C, Unroll>(start, start + kChunk < width ? start + kChunk : width,
                               [&](std::int64_t j, auto count, int u) { add(j, count, sums[u]); });
    for (int k = 0; k < Sums; ++k)
      for (int u = 0; u < Unroll; ++u) totals[k] += sum_lanes(sums[u][k]);
  }
}

// What e^-x is made of: 2^n (1 + w) with -x = n ln 2 - r, w = r^2 q(r) - r, and q of least relative error in e^-r
// (Remez; 5e-11 for float, 4e-18 for double). `shift` leaves n in the last bits of a sum, with the bias of an exponent
// and the logarithm of `scale` added. Below `least` the sigmoid is 0, and at `most` it is 1 to the last bit.
template <class C>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr int bits = 23;
  static constexpr float least = -104, most = 40, scale = 0x1p-64f, shift = 0x1.8p23f + 127 - 64;
  static constexpr float log2e = 0x1.715476p+0f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr float q[] = {0x1p-1f,         -0x1.555554p-3f, 0x1.55548ep-5f,
                                -0x1.111272p-7f, 0x1.6d8d52p-10f, -0x1.9f085ap-13f};
};
template <>
struct Exponential<double> {
  static constexpr int bits = 52;
  static constexpr double least = -746, most = 300, scale = 0x1p-512, shift = 0x1.8p52 + 1023 - 512;
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double q[] = {0x1.000000000000ap-1,  -0x1.55555555554f9p-3,  0x1.555555555083ep-5,
                                 -0x1.1111111127d10p-7, 0x1.6c16c18438b84p-10,  -0x1.a01a012a0eeb0p-13,
                                 0x1.a01999e24fa53p-16, -0x1.71df25b383d61p-19, 0x1.28ad9b964f933p-22,
                                 -0x1.ad7f3e5c6e47dp-26};
};

// 1 / (1 + e^-x) as scale / (sum + w 2^n scale) with sum = scale + 2^n scale and what its rounding lost: two roundings
// beside those in w, for either sign of x. Nothing overflows, and a denormal result comes out of the division.
// n ln2_high is exact, with or without a fused multiply-add.
template <class C>
inline typename Register<C>::type sigmoid_of(typename Register<C>::type x) {
  using Part = typename Register<C>::type;
  using Bits = typename Register<C>::mask;
  using E = Exponential<C>;
  x = smaller_part(E::most + Part{}, larger_part(E::least + Part{}, x));  // a NaN stays
  const Part shifted = x * -E::log2e + E::shift, n = shifted - E::shift;
  const Part r = (x + n * E::ln2_high) + n * E::ln2_low;
  const Part square = r * r;
  constexpr int last = sizeof(E::q) / sizeof(C) - 2;
  Part q = r * E::q[last + 1] + E::q[last];
#pragma GCC unroll 16
  for (int k = last - 2; k >= 0; k -= 2) q = q * square + (r * E::q[k + 1] + E::q[k]);  // pairs: half the latency
  const Part w = q * square - r;
  const Part power = reinterpret_cast<Part>(reinterpret_cast<Bits>(shifted) << E::bits);
  const Part sum = power + E::scale, lost = E::scale - (sum - power);
  return (E::scale + Part{}) / (sum + (power * w + lost));
}

template <class C>
inline Vector<C> sigmoid(Vector<C> x) {
  return {sigmoid_of<C>(x.low), sigmoid_of<C>(x.high)};
}

// Where n, rounded, still leaves half of 2^n a normal number: e^x is 1.42 times the smallest one.
template <class C>
constexpr C kLeastExponent = std::is_same_v<C, float> ? C(-86.985) : C(-708.043);

// e^x as 2 half (1 + w): half of 2^n is finite for every x, and the product overflows where e^x does.
template <class C>
struct Power {
  typename Register<C>::type half, w;
};

template <class C>
inline Power<C> power_of(typename Register<C>::type x) {
  using Part = typename Register<C>::type;
  using Bits = typename Register<C>::mask;
  using E = Exponential<C>;
  constexpr C shift = std::is_same_v<C, float> ? C(0x1.8p23 + 127 - 1) : C(0x1.8p52 + 1023 - 1);
  constexpr C most = std::is_same_v<C, float> ? C(89) : C(710);  // whose power of two still has an exponent
  const Part bounded = smaller_part(most + Part{}, x);           // a NaN stays
  const Part shifted = bounded * E::log2e + shift, n = shifted - shift;
  const Part r = (n * E::ln2_high - bounded) + n * E::ln2_low;
  const Part square = r * r;
  constexpr int last = sizeof(E::q) / sizeof(C) - 2;
  Part q = r * E::q[last + 1] + E::q[last];
#pragma GCC unroll 16
  for (int k = last - 2; k >= 0; k -= 2) q = q * square + (r * E::q[k + 1] + E::q[k]);
  return {reinterpret_cast<Part>(reinterpret_cast<Bits>(shifted) << E::bits), q * square - r};
}

// e^x within two places, inf where it overflows and 0 where x < least: denormal numbers are slow on many processors. A
// caller that multiplies the result asks for a larger `least` than kLeastExponent.
template <class C>
inline typename Register<C>::type exponential_of(typename Register<C>::type x, typename Register<C>::type least) {
  const auto power = power_of<C>(x);
  const auto result = (power.w + power.w + C(2)) * power.half;
  return x < least ? typename Register<C>::type{} : result;
}

template <class C>
inline Vector<C> exponential(Vector<C> x, Vector<C> least) {
  return {exponential_of<C>(x.low, least.low), exponential_of<C>(x.high, least.high)};
}

// e^x - 1, also where little is left of it: -1 far below 0, inf where it overflows, and a NaN stays.
template <class C>
inline typename Register<C>::type exponential_minus_one_of(typename Register<C>::type x) {
  const auto power = power_of<C>(larger_part(C(-64) + typename Register<C>::type{}, x));
  const auto half_result = power.half * power.w + (power.half - C(0.5));
  return half_result + half_result;
}

// Logarithms are 2 atanh(t / 2) = t + t^3 p(t^2), with p of least relative error in this sum for |t| <= 2/3 (Remez with
// 60 digits; as rounded here, 6e-10 for float and 2e-18 for double). The other numbers are the bits of 1/2, by how much
// those of sqrt(1/2) are more, and a number whose last bits count in ones, with its bits.
template <class C>
struct Logarithm;
template <>
struct Logarithm<float> {
  static constexpr std::int32_t half_bits = 0x3f000000, beyond_half = 0x003504f3, large_bits = 0x4b000000;
  static constexpr float large = 0x1p23f;
  static constexpr float p[] = {0x1.555558p-4f, 0x1.9996bp-7f, 0x1.2508bp-9f, 0x1.b6e6cep-12f, 0x1.f1733cp-14f};
};
template <>
struct Logarithm<double> {
  static constexpr std::int64_t half_bits = 0x3fe0000000000000, beyond_half = 0x0006a09e667f3bcd;
  static constexpr std::int64_t large_bits = 0x4330000000000000;
  static constexpr double large = 0x1p52;
  static constexpr double p[] = {0x1.5555555555535p-4,  0x1.99999999a06c1p-7,  0x1.249249209112ep-9,
                                 0x1.c71c741a0669fp-12, 0x1.745cb459b54a3p-14, 0x1.3b1dd3ac7fcdep-16,
                                 0x1.10682edcb88dfp-18, 0x1.efd18cf6f03c6p-21, 0x1.55cf59cdb1437p-23,
                                 0x1.5c5c218c8aedap-24};
};

template <class C>
inline typename Register<C>::type twice_atanh_of_half(typename Register<C>::type t) {
  using L = Logarithm<C>;
  const auto square = t * t;
  constexpr int last = sizeof(L::p) / sizeof(C) - 1;
  auto p = square * L::p[last] + L::p[last - 1];
#pragma GCC unroll 16
  for (int k = last - 2; k >= 0; --k) p = p * square + L::p[k];
  return t + t * (square * p);
}

// log(1 + u) for u in [0, 1], relative to itself also where u is small.
template <class C>
inline typename Register<C>::type log_one_plus_of(typename Register<C>::type u) {
  return twice_atanh_of_half<C>((u + u) / (u + C(2)));
}

// log x for x >= 0, where x = 2^n f with f from sqrt(1/2) to sqrt(2); a NaN stays. A denormal number is taken for one
// near the smallest normal one.
template <class C>
inline typename Register<C>::type logarithm_of(typename Register<C>::type x) {
  using Part = typename Register<C>::type;
  using Bits = typename Register<C>::mask;
  using E = Exponential<C>;
  using L = Logarithm<C>;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  const Bits bits = reinterpret_cast<Bits>(x), exponent = (bits - L::beyond_half) >> E::bits;  // of half of 2^n
  const Part n = reinterpret_cast<Part>(exponent + L::large_bits) - (L::large + C(L::half_bits >> E::bits));
  const Part f = reinterpret_cast<Part>(bits - (exponent << E::bits) + L::half_bits);
  const Part of_f = twice_atanh_of_half<C>((f - C(1)) * C(2) / (f + C(1)));
  const Part result = n * E::ln2_high + (n * E::ln2_low + of_f);
  return x == C(0) ? Part{} - infinity : x < infinity ? result : x;
}

template <class C>
inline Vector<C> exponential_minus_one(Vector<C> x) {
  return {exponential_minus_one_of<C>(x.low), exponential_minus_one_of<C>(x.high)};
}
template <class C>
inline Vector<C> log_one_plus(Vector<C> u) {
  return {log_one_plus_of<C>(u.low), log_one_plus_of<C>(u.high)};
}
template <class C>
inline Vector<C> logarithm(Vector<C> x) {
  return {logarithm_of<C>(x.low), logarithm_of<C>(x.high)};
}

}  // namespace zoo::cpu
