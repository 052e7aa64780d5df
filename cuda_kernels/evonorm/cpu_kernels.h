// EvoNorm on the CPU. What is done to an element is written once, as a Step, for two ways to walk: along the planes of
// contiguous tensors [N, C, L], where parameters are numbers, and across the channels of channels-last ones [N, L, C],
// where they are rows of memory.
//
// Sums run in the compute type over a few thousand elements at most and further in double, everything in an order that
// depends on the shape alone.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/cpu.h"
#include "evonorm/math.h"

namespace zoo::evonorm {

using cpu::broadcast;
using cpu::existing;
using cpu::load;
using cpu::select;
using cpu::store;
using cpu::Vector;
using std::int64_t;

// Results between two passes, in the compute type whatever S is. Vectors keep the order they have in registers, the
// last elements of a row that of the row, so that nothing is written beyond its end: both passes have to take the same
// rows.
template <class S>
inline void keep(compute_t<S>* p, Vector<compute_t<S>> v, cpu::All) {
  store(p, v);
}
template <class S>
inline void keep(compute_t<S>* p, Vector<compute_t<S>> v, int count) {
  if constexpr (std::is_same_v<S, compute_t<S>>) return store(p, v, count);
  compute_t<S> lanes[Vector<compute_t<S>>::lanes];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[cpu::place<S>(i)];
}
template <class S>
inline Vector<compute_t<S>> kept(const compute_t<S>* p, cpu::All) {
  return load(p);
}
template <class S>
inline Vector<compute_t<S>> kept(const compute_t<S>* p, int count) {
  if constexpr (std::is_same_v<S, compute_t<S>>) return load(p, count);
  compute_t<S> lanes[Vector<compute_t<S>>::lanes] = {};
  for (int i = 0; i < count; ++i) lanes[cpu::place<S>(i)] = p[i];
  return load(lanes);
}

// Steps. `of` holds the `tables` parameters of the elements at `j`, `sum` is what their `sums` are added to; `unroll`
// sums run side by side where one alone would wait for its last addition.

template <class S>
struct Sum {
  using C = compute_t<S>;
  static constexpr int tables = 0, sums = 1, unroll = 4;
  static constexpr bool writes = false;
  const S* x;
  template <class Count>
  void operator()(const Vector<C>*, Vector<C>* sum, int64_t j, Count count) const {
    sum[0] += load(x + j, count);
  }
};

// Distances from a centre, and their squares.
template <class S>
struct Centred {
  using C = compute_t<S>;
  static constexpr int tables = 1, sums = 2, unroll = 2;
  static constexpr bool writes = false;
  const S* x;
  template <class Count>
  void operator()(const Vector<C>* of, Vector<C>* sum, int64_t j, Count count) const {
    const Vector<C> d = existing<S>(load(x + j, count) - of[0], count);
    sum[0] += d;
    sum[1] += d * d;
  }
};

template <bool Linear, class C>
inline Gated<Vector<C>> gated_or_linear(Vector<C> x, Vector<C> v) {
  if constexpr (Linear) {
    return {x, broadcast(C(1)), {}};
  } else {
    const Vector<C> z = v * x;
    return gated(x, z, cpu::sigmoid(z));
  }
}

// y of an S layer, given v, r gamma and beta.
template <class S, bool Linear>
struct SApply {
  using C = compute_t<S>;
  static constexpr int tables = 3, sums = 0, unroll = 1;
  static constexpr bool writes = true;
  const S* x;
  S* y;
  template <class Count>
  void operator()(const Vector<C>* of, Vector<C>*, int64_t j, Count count) const {
    store(y + j, gated_or_linear<Linear>(load(x + j, count), of[0]).u * of[1] + of[2], count);
  }
};

// g u, g and g du/dv, given v and r gamma; keeps h u' r.
template <class S, bool Linear>
struct SSums {
  using C = compute_t<S>;
  static constexpr int tables = 2, sums = 3, unroll = 1;
  static constexpr bool writes = true;
  const S *grad, *x;
  C* direct;
  template <class Count>
  void operator()(const Vector<C>* of, Vector<C>* sum, int64_t j, Count count) const {
    const Vector<C> g = load(grad + j, count);
    const Gated<Vector<C>> at = gated_or_linear<Linear>(load(x + j, count), of[0]);
    sum[0] += g * at.u;
    sum[1] += g;
    sum[2] += g * at.by_v;
    keep<S>(direct + j, g * at.slope * of[1], count);
  }
};

// dx of an S layer from what SSums kept, given the group's mean and pull.
template <class S>
struct SFinish {
  using C = compute_t<S>;
  static constexpr int tables = 2, sums = 0, unroll = 1;
  static constexpr bool writes = true;
  const C* direct;
  const S* x;
  S* dx;
  template <class Count>
  void operator()(const Vector<C>* of, Vector<C>*, int64_t j, Count count) const {
    store(dx + j, kept<S>(direct + j, count) - (load(x + j, count) - of[0]) * of[1], count);
  }
};

// The right side of a B layer's maximum is a x + t in every variant, with a = v (B0), t (B1), -1 (B2): B0's formulas
// serve them all. Both sides get half of what enters the maximum where they are equal.
template <class C>
inline Vector<C> share_of_right(Vector<C> e, Vector<C> left, Vector<C> right) {
  return select(left > right, Vector<C>{}, select(left == right, e * C(0.5), e));  // all of a NaN
}

// y of a B layer, given a, t, L, gamma and beta.
template <class S>
struct BApply {
  using C = compute_t<S>;
  static constexpr int tables = 5, sums = 0, unroll = 1;
  static constexpr bool writes = true;
  const S* x;
  S* y;
  template <class Count>
  void operator()(const Vector<C>* of, Vector<C>*, int64_t j, Count count) const {
    const Vector<C> t = load(x + j, count);
    store(y + j, t / cpu::larger(of[2], right<kB0>(t, of[0], of[1])) * of[3] + of[4], count);
  }
};

constexpr int64_t kAhead = 512;  // elements; half of the time in a plane without, where nothing is written

// Given a, t and L: -eR / gamma, -eL / gamma and -eR x / gamma; g x / D; g.
template <class S>
struct BSums {
  using C = compute_t<S>;
  static constexpr int tables = 3, sums = 5, unroll = 1;
  static constexpr bool writes = false;
  const S *grad, *x;
  template <class Count>
  void operator()(const Vector<C>* of, Vector<C>* sum, int64_t j, Count count) const {
    cpu::prefetch(grad + j + kAhead);
    cpu::prefetch(x + j + kAhead);
    const Vector<C> g = load(grad + j, count), t = load(x + j, count), to_right = right<kB0>(t, of[0], of[1]);
    // Beyond the end of a row the maximum may be 0.
    const Vector<C> inverse = existing<S>(broadcast(C(1)) / cpu::larger(of[2], to_right), count);
    const Vector<C> by_weight = g * t * inverse, e = by_weight * inverse, share = share_of_right(e, of[2], to_right);
    sum[0] += share;
    sum[1] += e - share;
    sum[2] += share * t;
    sum[3] += by_weight;
    sum[4] += g;
  }
};

// dx of a B layer, given a, t, L, gamma, m, pull, centre and the batch's pull.
template <class S>
struct BGrad {
  using C = compute_t<S>;
  static constexpr int tables = 8, sums = 0, unroll = 1;
  static constexpr bool writes = true;
  const S *grad, *x;
  S* dx;
  template <class Count>
  void operator()(const Vector<C>* of, Vector<C>*, int64_t j, Count count) const {
    const Vector<C> h = load(grad + j, count) * of[3], t = load(x + j, count), to_right = right<kB0>(t, of[0], of[1]);
    const Vector<C> inverse = broadcast(C(1)) / cpu::larger(of[2], to_right), e = h * t * inverse * inverse;
    const Vector<C> minus = Vector<C>{} - share_of_right(e, of[2], to_right);
    store(dx + j, b_gradient<kB0>(h, inverse, minus, t, of[0], of[1], of[4], of[5], of[6], of[7]), count);
  }
};

// Along a plane

// The step at elements [start, start + length); `of` holds a number for each of its tables, `totals` takes its sums.
template <class Step, class C = typename Step::C>
void along(const Step& step, const C* of, int64_t start, int64_t length, double* totals) {
  Vector<C> parameters[std::max(1, Step::tables)];
  for (int k = 0; k < Step::tables; ++k) parameters[k] = broadcast(of[k]);
  if constexpr (Step::sums == 0) {
    cpu::for_each_vector<C, Step::unroll>(start, start + length,
                                          [&](int64_t j, auto count, int) { step(parameters, nullptr, j, count); });
  } else {
    cpu::add_sums<C, Step::sums, Step::unroll>(length, totals, [&](int64_t j, auto count, Vector<C>* sums) {
      step(parameters, sums, start + j, count);
    });
  }
}

// Mean and sum of squared distances from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // Of elements whose distances from a centre near their mean are known by their sum and that of their squares; with
  // `rms`, and 0 for a centre, mean 0 and the sum of squares.
  static Moments of(bool rms, double centre, double count, const double* distances) {
    if (rms) return {count, 0, distances[1]};
    const double rest = distances[0] / count, about_mean = distances[1] - distances[0] * rest;
    return {count, centre + rest, about_mean < 0 ? 0 : about_mean};  // a NaN stays
  }
  void merge(const Moments& other) {
    const double all = count + other.count, apart = other.mean - mean;
    if (count == 0) {
      *this = other;
      return;
    }
    squares += other.squares + apart * apart * count * (other.count / all);
    mean += apart * (other.count / all);
    count = all;
  }
  // Of sets of the same size.
  static Moments together(const Moments* sets, int64_t count) {
    Moments all{sets->count * static_cast<double>(count), 0, 0};
    for (int64_t i = 0; i < count; ++i) all.mean += sets[i].mean;
    all.mean /= static_cast<double>(count);
    for (int64_t i = 0; i < count; ++i) {
      const double apart = sets[i].mean - all.mean;
      all.squares += sets[i].squares + sets->count * apart * apart;
    }
    return all;
  }
  double variance() const { return squares / count; }
};

// Of a run of elements; with `rms` mean 0 and the sum of squares. Twice over a chunk in the cache: E[x^2] - E[x]^2 has
// no digits left where the mean is a thousand deviations.
template <class S>
Moments moments_along(const S* x, int64_t length, bool rms) {
  using C = compute_t<S>;
  Moments all;
  for (int64_t start = 0; start < length; start += cpu::kChunk) {
    const int64_t count = std::min(cpu::kChunk, length - start);
    double sum = 0, about[2] = {};
    if (!rms) along(Sum<S>{x}, static_cast<const C*>(nullptr), start, count, &sum);
    const C centre = static_cast<C>(sum / static_cast<double>(count));
    along(Centred<S>{x}, &centre, start, count, about);
    all.merge(Moments::of(rms, centre, static_cast<double>(count), about));
  }
  return all;
}

// Across channels

// How the pixels of a sample [L, C] are taken: `pixels` together as a row of so many channels that no vector is left
// half empty, rows in tasks of a fixed number, and what is left over behind the last row as a shorter one.
struct Rows {
  static constexpr int64_t task_elements = 32768, most_rows = 256;  // of a task: its sums are not in double
  static constexpr int64_t tile_elements = 4096;                    // stay in the innermost cache
  int64_t channels, pixels, width, padded, count, rest, task_rows, tile_rows, tasks;

  Rows(int64_t length, int64_t channels, int64_t lanes) : channels(channels) {
    pixels = channels >= 8 * lanes ? 1 : lanes / std::gcd(channels, lanes);
    width = pixels * channels;
    padded = (width + lanes - 1) / lanes * lanes;
    count = length / pixels;
    rest = length % pixels * channels;
    task_rows = std::clamp<int64_t>(task_elements / width, 1, most_rows);
    tile_rows = std::max<int64_t>(1, tile_elements / width);
    tasks = std::max<int64_t>(1, (count + task_rows - 1) / task_rows);
  }
};

// The step at `rows` rows from `start` on, each `width` wide. `tables` and `sums` are rows of `in.padded` numbers.
// Steps that only read go down the tile with their sums in registers; stores down a column would miss the cache, so
// those that write go along its rows.
template <class Step, class C = typename Step::C>
void tile(const Step& step, const Rows& in, const C* tables, C* sums, int64_t start, int64_t rows, int64_t width) {
  if constexpr (Step::writes) {
    for (int64_t row = 0; row < rows; ++row)
      cpu::for_each_vector<C, 1>(0, width, [&](int64_t w, auto count, int) {
        Vector<C> of[Step::tables], sum[std::max(1, Step::sums)];
        for (int k = 0; k < Step::tables; ++k) of[k] = load(tables + k * in.padded + w);
        for (int k = 0; k < Step::sums; ++k) sum[k] = load(sums + k * in.padded + w);
        step(of, sum, start + row * in.width + w, count);
        for (int k = 0; k < Step::sums; ++k) store(sums + k * in.padded + w, sum[k]);
      });
  } else {
    for (int64_t w = 0; w < width; w += Vector<C>::lanes) {
      Vector<C> of[Step::tables], sum[Step::unroll][Step::sums] = {};
      for (int k = 0; k < Step::tables; ++k) of[k] = load(tables + k * in.padded + w);
      auto down = [&](auto count) {
        int64_t row = 0, j = start + w;
        for (; row + Step::unroll <= rows; row += Step::unroll)
#pragma GCC unroll 4
          for (int u = 0; u < Step::unroll; ++u, j += in.width) step(of, sum[u], j, count);
        for (; row < rows; ++row, j += in.width) step(of, sum[0], j, count);
      };
      if (w + Vector<C>::lanes <= width)
        down(cpu::All{});
      else
        down(static_cast<int>(width - w));
      for (int k = 0; k < Step::sums; ++k) {
        for (int u = 1; u < Step::unroll; ++u) sum[0][k] += sum[u][k];
        C* to = sums + k * in.padded + w;
        store(to, load(to) + sum[0][k]);
      }
    }
  }
}

// One task of a sample.
template <class Step, class C = typename Step::C>
void across(const Step& step, const Rows& in, const C* tables, C* sums, int64_t task) {
  const int64_t last = std::min(in.count, (task + 1) * in.task_rows);
  for (int64_t row = task * in.task_rows; row < last; row += in.tile_rows)
    tile(step, in, tables, sums, row * in.width, std::min(in.tile_rows, last - row), in.width);
  if (task == in.tasks - 1 && in.rest > 0) tile(step, in, tables, sums, in.count * in.width, 1, in.rest);
}

// A number near each channel's mean in a sample [L, C]: the mean of pixels all over it. If these few differ from all
// others the variance of the channel is large, too, so that a factor L / pixels of precision is lost at most.
template <class S>
void centres(const S* x, int64_t length, int64_t channels, compute_t<S>* means) {
  using C = compute_t<S>;
  const int64_t pixels = std::min<int64_t>(length, 32);
  std::fill_n(means, channels, C(0));
  for (int64_t i = 0; i < pixels; ++i) {
    const S* pixel = x + length * i / pixels * channels;
    for (int64_t c = 0; c < channels; ++c) means[c] += widen(pixel[c]) * (C(1) / static_cast<C>(pixels));
  }
}

}  // namespace zoo::evonorm
