// PolyReLU and PolyNorm on the CPU: rows [begin, end) of contiguous tensors [rows, width].
//
// Two passes over a row, the second out of the cache: sums, then elements. Sums run in chunks of kChunk elements, the
// chunks' totals are added in double, everything in an order that depends on the shape alone.
#pragma once

#include "common/cpu.h"
#include "polycom/math.h"

namespace zoo::polycom {

using cpu::for_each_vector;
using cpu::load;
using cpu::store;
using cpu::Vector;
using std::int64_t;

constexpr int64_t kChunk = 4096;

// Steps of the sums that are under way at once, each with a vector of its own for every power: AVX2 has 16 registers.
template <int N>
constexpr int forward_unroll = N == 0 ? 1 : N <= 3 ? 2 : 1;

// totals[k] = the sum over elements of what add(offset, count, sums) puts into sums[k].
template <class C, int Sums, int Unroll, class Add>
inline void sum_row(int64_t width, int sums_used, C* totals, Add&& add) {
  double total[Sums] = {};
  for (int64_t start = 0; start < width; start += kChunk) {
    Vector<C> sums[Unroll][Sums] = {};
    for_each_vector<C, Unroll>(start, start + kChunk < width ? start + kChunk : width,
                               [&](int64_t j, auto count, int u) { add(j, count, sums[u]); });
    for (int k = 0; k < sums_used; ++k)
      for (int u = 0; u < Unroll; ++u) total[k] += cpu::sum_lanes(sums[u][k]);
  }
  for (int k = 0; k < sums_used; ++k) totals[k] = static_cast<C>(total[k]);
}

// Almost every row has scale 1. The body is compiled a second time for those, without the multiplications: they are a
// tenth of the time for types of two bytes.
struct One {};
template <class C>
inline Vector<C> operator*(Vector<C> v, One) {
  return v;
}
template <class C, class Body>
inline void with_factor(C inverse, Body&& body) {
  if (inverse == 1)
    body(One{});
  else
    body(inverse);
}

// Coefficients of a row: one set for all, or one set a row.
template <class C>
struct Coefficients {
  const void* weight;
  const void* bias;  // null: no constant term
  int weight_dtype, bias_dtype;
  bool per_row, bias_per_row;
  int order;

  void read(int64_t row, C* w) const {
    for (int k = 0; k < order; ++k) w[k] = read_as<C>(weight, weight_dtype, (per_row ? row * order : 0) + k);
  }
  C constant(int64_t row) const {
    return bias == nullptr ? C(0) : read_as<C>(bias, bias_dtype, bias_per_row ? row : 0);
  }
};

template <class S>
struct Rows {
  using C = compute_t<S>;
  int64_t rows, width;
  Coefficients<C> coefficients;
  C* stats;  // [order + 1, rows], see eager.py
  C count;   // what sums are divided by: width, or 1 for the Euclidean norm
  C eps;
  C clamp;  // of the gated form; 0 for none
};

// rho of one row into stats; returns 1 / scale.
template <int N, class S, class Load>
inline compute_t<S> row_statistics(const Rows<S>& in, int64_t row, compute_t<S>* rho, Load&& load) {
  using C = compute_t<S>;
  const int order = powers<N>(in.coefficients.order);
  C sums[capacity<N>] = {}, inverse = 1;
  auto sum_powers = [&](auto factor) {
    sum_row<C, capacity<N>, forward_unroll<N>>(in.width, order, sums, [&](int64_t j, auto count, Vector<C>* into) {
      add_power_sums<N>(load(j, count) * factor, into, order);
    });
  };
  sum_powers(One{});
  if (!is_ordinary(sums[0]) && sums[0] == sums[0]) {
    Vector<C> most = {};
    for_each_vector<C, 1>(0, in.width, [&](int64_t j, auto count, int) {
      const Vector<C> size = cpu::magnitude(load(j, count));
      most = cpu::select(size > most, size, most);
    });
    inverse = inverse_scale(cpu::largest_lane(most), static_cast<C>(std::exp2(30.0 / order)));
    if (inverse != 1) sum_powers(inverse);
  }
  inverse_norms<N>(sums, rho, inverse, in.count, in.eps, order);
  for (int k = 0; k < order; ++k) in.stats[k * in.rows + row] = rho[k];
  in.stats[order * in.rows + row] = inverse;
  return inverse;
}

template <int N, class S>
void poly_norm_rows(const Rows<S>& in, const S* x, S* y, int64_t begin, int64_t end) {
  using C = compute_t<S>;
  const int order = powers<N>(in.coefficients.order);
  for (int64_t row = begin; row < end; ++row) {
    const S* from = x + row * in.width;
    S* to = y + row * in.width;
    C k[capacity<N>], rho[capacity<N>];
    const C inverse = row_statistics<N>(in, row, rho, [&](int64_t j, auto count) { return load(from + j, count); });
    in.coefficients.read(row, k);
    for (int i = 0; i < order; ++i) k[i] *= rho[i];
    const C constant = in.coefficients.constant(row);
    with_factor(inverse, [&](auto factor) {
      for_each_vector<C, 1>(0, in.width, [&](int64_t j, auto count, int) {
        const Vector<C> t = load(from + j, count) * factor;
        store(to + j, polynomial<N>(t, k, constant, order), count);
      });
    });
  }
}

// The numbers of a row the backward needs: w, rho and 1 / scale as the forward left it.
template <int N, class S>
inline compute_t<S> saved(const Rows<S>& in, int64_t row, compute_t<S>* weight, compute_t<S>* rho) {
  const int order = powers<N>(in.coefficients.order);
  in.coefficients.read(row, weight);
  for (int k = 0; k < order; ++k) rho[k] = in.stats[k * in.rows + row];
  return in.stats[order * in.rows + row];
}

// `moments` [order + 1, rows]: rho_p S_p and S_0 of every row, the summands of the parameters' gradients.
template <int N, class S>
void poly_norm_backward_rows(const Rows<S>& in, const S* grad, const S* x, S* dx, compute_t<S>* moments, int64_t begin,
                             int64_t end) {
  using C = compute_t<S>;
  const int order = powers<N>(in.coefficients.order);
  for (int64_t row = begin; row < end; ++row) {
    const S *from = x + row * in.width, *g = grad + row * in.width;
    S* to = dx + row * in.width;
    C weight[capacity<N>], rho[capacity<N>], sums[capacity<N> + 1];
    const C inverse = saved<N>(in, row, weight, rho);
    with_factor(inverse, [&](auto factor) {
      sum_row<C, capacity<N> + 1, 1>(in.width, order + 1, sums, [&](int64_t j, auto count, auto* into) {
        add_moments<N>(load(from + j, count) * factor, load(g + j, count), into, order);
      });
    });
    const RowGradient<N, C> row_terms = row_gradient<N>(weight, rho, sums, in.count, order);
    for (int k = 0; k <= order; ++k) moments[k * in.rows + row] = sums[k];
    with_factor(inverse, [&](auto factor) {
      for_each_vector<C, 1>(0, in.width, [&](int64_t j, auto count, int) {
        const Vector<C> t = load(from + j, count) * factor;
        store(to + j, element_gradient<N>(t, load(g + j, count), row_terms, order) * factor, count);
      });
    });
  }
}

template <class C>
inline Vector<C> clamped(Vector<C> v, C bound) {
  return bound > 0 ? cpu::clamp(v, bound) : v;
}
// The gradient stops beyond the clamp.
template <class C>
inline Vector<C> masked(Vector<C> gradient, Vector<C> argument, C bound) {
  return bound > 0 ? cpu::select(cpu::magnitude(argument) <= bound, gradient, Vector<C>{}) : gradient;
}

template <int N, class S>
void poly_norm_mul_rows(const Rows<S>& in, const S* x, const S* mul, const compute_t<S>* scores, S* out, int64_t begin,
                        int64_t end) {
  using C = compute_t<S>;
  const int order = powers<N>(in.coefficients.order);
  for (int64_t row = begin; row < end; ++row) {
    const S *from = x + row * in.width, *by = mul + row * in.width;
    S* to = out + row * in.width;
    C k[capacity<N>], rho[capacity<N>];
    auto gate = [&](int64_t j, auto count) { return clamped<C>(load(from + j, count), in.clamp); };
    const C inverse = row_statistics<N>(in, row, rho, gate);
    in.coefficients.read(row, k);
    for (int i = 0; i < order; ++i) k[i] *= rho[i];
    const C constant = in.coefficients.constant(row), score = scores == nullptr ? C(1) : scores[row];
    for_each_vector<C, 1>(0, in.width, [&](int64_t j, auto count, int) {
      const Vector<C> y = polynomial<N>(Vector<C>(gate(j, count) * inverse), k, constant, order);
      store(to + j, y * clamped<C>(load(by + j, count), in.clamp) * score, count);
    });
  }
}

template <int N, class S>
void poly_norm_mul_backward_rows(const Rows<S>& in, const S* grad, const S* x, const S* mul, const compute_t<S>* scores,
                                 S* dx, S* dmul, compute_t<S>* moments, compute_t<S>* dscores, int64_t begin,
                                 int64_t end) {
  using C = compute_t<S>;
  const int order = powers<N>(in.coefficients.order);
  for (int64_t row = begin; row < end; ++row) {
    const S *from = x + row * in.width, *by = mul + row * in.width, *g = grad + row * in.width;
    S *to = dx + row * in.width, *to_mul = dmul + row * in.width;
    C weight[capacity<N>], rho[capacity<N>], k[capacity<N>], sums[capacity<N> + 2];
    const C inverse = saved<N>(in, row, weight, rho);
    for (int i = 0; i < order; ++i) k[i] = weight[i] * rho[i];
    const C constant = in.coefficients.constant(row), score = scores == nullptr ? C(1) : scores[row];
    // dmul needs nothing of the sums, so the first pass writes it.
    sum_row<C, capacity<N> + 2, 1>(in.width, order + 2, sums, [&](int64_t j, auto count, auto* into) {
      const Vector<C> t = clamped<C>(load(from + j, count), in.clamp) * inverse;
      const Vector<C> m = load(by + j, count), bounded = clamped<C>(m, in.clamp);
      const Vector<C> o = load(g + j, count), with_y = o * polynomial<N>(t, k, constant, order);
      store(to_mul + j, masked<C>(with_y * score, m, in.clamp), count);
      into[order + 1] += with_y * bounded;
      add_moments<N>(t, Vector<C>(o * bounded * score), into, order);
    });
    const RowGradient<N, C> row_terms = row_gradient<N>(weight, rho, sums, in.count, order);
    for (int i = 0; i <= order; ++i) moments[i * in.rows + row] = sums[i];
    dscores[row] = sums[order + 1];
    for_each_vector<C, 1>(0, in.width, [&](int64_t j, auto count, int) {
      const Vector<C> raw = load(from + j, count), t = clamped<C>(raw, in.clamp) * inverse;
      const Vector<C> bounded = clamped<C>(load(by + j, count), in.clamp);
      const Vector<C> incoming = load(g + j, count) * bounded * score;
      const Vector<C> gradient = element_gradient<N>(t, incoming, row_terms, order) * inverse;
      store(to + j, masked<C>(gradient, raw, in.clamp), count);
    });
  }
}

template <class C>
inline Vector<C> rectified(Vector<C> v) {
  return cpu::select(v <= C(0), Vector<C>{}, v);  // a NaN stays
}

template <int N, class S>
void poly_relu_elements(const compute_t<S>* weight, compute_t<S> constant, int order, const S* x, S* y, int64_t begin,
                        int64_t end) {
  using C = compute_t<S>;
  for_each_vector<C, 1>(begin, end, [&](int64_t j, auto count, int) {
    store(y + j, polynomial<N>(rectified<C>(load(x + j, count)), weight, constant, order), count);
  });
}

// One block of elements; sums[k] = sum g r^(order - k), sums[order] = sum g. The slope at 0 is 0, as torch has it.
template <int N, class S>
void poly_relu_backward_elements(const compute_t<S>* slopes, int order, const S* grad, const S* x, S* dx,
                                 compute_t<S>* sums, int64_t begin, int64_t end) {
  using C = compute_t<S>;
  sum_row<C, capacity<N> + 1, 1>(end - begin, order + 1, sums, [&](int64_t j, auto count, auto* into) {
    const Vector<C> r = rectified<C>(load(x + begin + j, count)), g = load(grad + begin + j, count);
    const Vector<C> slope = g * polynomial_without_root<N>(r, slopes, order);
    store(dx + begin + j, cpu::select(r == C(0), Vector<C>{}, slope), count);
    add_moments<N>(r, g, into, order);
  });
}

}  // namespace zoo::polycom
