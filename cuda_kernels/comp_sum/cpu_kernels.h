// Comp-sum losses on the CPU. Rows lie along the classes ([R, C], S = 1), or across them ([C, S] a sample), where a
// vector holds positions and the classes are walked one after the other.
//
// The sum of exponentials runs online: over a chunk of scores that stays in the innermost cache the maximum is taken,
// then the sum, and what was summed before is rescaled when the maximum rises. Chunks are summed in the compute type,
// their totals in double, everything in an order that depends on the shape alone.
#pragma once

#include <algorithm>
#include <limits>

#include "common/cpu.h"
#include "comp_sum/math.h"

namespace zoo::comp_sum {

using cpu::broadcast;
using cpu::existing;
using cpu::load;
using cpu::select;
using cpu::store;
using cpu::Vector;
using std::int64_t;

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// What all rows have in common, and where their numbers are: [B, S], one after the other.
template <class C>
struct Loss {
  int64_t classes, ignore_index;
  const int64_t* target;
  const C* taus;  // null: one for all
  C a, cap;       // a = 1 - tau of that one

  bool ignored(int64_t row) const { return target[row] == ignore_index; }
  C a_of(int64_t row) const { return taus == nullptr ? a : 1 - taus[row]; }
};

// Where the results of a row go.
template <class C>
struct Statistics {
  C *loss, *top, *log_total;

  void set(const Loss<C>& in, int64_t row, C m, double total, C mine) const {
    const bool ignored = in.ignored(row);
    const C log_sum = static_cast<C>(std::log(total));
    top[row] = ignored ? C(0) : m;
    log_total[row] = ignored ? C(0) : log_sum;
    loss[row] = ignored ? C(0) : loss_of(off_target(m, log_sum, mine), in.a_of(row), in.cap);
  }
};

// The gradient of a row: at j != y it is grad exp((z_j - top) - shift), at the target `at_target`, or 0 everywhere.
template <class C>
struct Slope {
  C grad, top, shift, at_target, least;
  bool silent;

  Slope(const Loss<C>& in, int64_t row, C grad, C top, C log_total, C mine) : grad(grad), top(top) {
    const C weight = log_weight_of(off_target(top, log_total, mine), in.a_of(row), in.cap);
    silent = in.ignored(row) || grad == 0 || weight == -kInfinity<C>;
    // Finite, so that a score of -inf is none at all also where the weight is infinite.
    const C distance = log_total - weight;
    shift = distance < std::numeric_limits<C>::lowest() ? std::numeric_limits<C>::lowest() : distance;
    at_target = -grad * exp_(weight);
    // The product with a small grad is to be no denormal number either; of a NaN the bound stays what it is.
    least = std::max(cpu::kLeastExponent<C>, cpu::kLeastExponent<C> - log_(std::abs(grad)));
  }
};

// Along a row

// The maximum of scores and the sum of exp(z - maximum), so far.
template <class C>
struct Sum {
  static constexpr int64_t most = 2048;  // scores at a time, so that they and their copy stay in the innermost cache
  static constexpr int lanes = Vector<C>::lanes, step = 2 * lanes;

  C top = -kInfinity<C>;
  double total = 0;

  // Takes `count` scores but the one at y, which may lie outside. They are copied, with -inf at y and behind the last:
  // then short rows, too, are whole vectors without a branch that depends on y.
  template <class S>
  void add(const S* z, int64_t count, int64_t y) {
    alignas(64) C scores[most];
    const Vector<C> none = broadcast(-kInfinity<C>);
    const int64_t padded = (count + step - 1) / step * step;
    store(scores + padded - lanes, none);
    cpu::for_each_vector<C, 2>(0, count, [&](int64_t j, auto some, int) {
      store(scores + j, existing<S>(load(z + j, some), some, none));
    });
    if (y >= 0 && y < count) scores[cpu::place<S>(y)] = -kInfinity<C>;

    Vector<C> highest[2] = {none, none}, sum[2] = {};
    for (int64_t j = 0; j < padded; j += step)  // a NaN is passed over
      for (int u = 0; u < 2; ++u) highest[u] = cpu::larger(load(scores + j + u * lanes), highest[u]);
    const C risen = cpu::largest_lane(cpu::larger(highest[0], highest[1]));
    if (risen > top) {
      if (total > 0) total *= std::exp(static_cast<double>(top) - risen);
      top = risen;
    }
    // All may be -inf: they add nothing then, but a NaN among them does.
    const Vector<C> from = broadcast(top == -kInfinity<C> ? C(0) : top), least = broadcast(cpu::kLeastExponent<C>);
    for (int64_t j = 0; j < padded; j += step)
      for (int u = 0; u < 2; ++u) sum[u] += cpu::exponential(load(scores + j + u * lanes) - from, least);
    total += cpu::sum_lanes(sum[0] + sum[1]);
  }
};

template <class S>
void forward_row(const Loss<compute_t<S>>& in, const Statistics<compute_t<S>>& to, const S* scores, int64_t row) {
  using C = compute_t<S>;
  if (in.ignored(row)) return to.set(in, row, C(0), 1, C(0));
  const S* z = scores + row * in.classes;
  const int64_t y = in.target[row];
  Sum<C> others;
  for (int64_t begin = 0; begin < in.classes; begin += others.most)
    others.add(z + begin, std::min(others.most, in.classes - begin), y - begin);
  to.set(in, row, others.top, others.total, widen(z[y]));
}

template <class S>
void backward_row(const Loss<compute_t<S>>& in, const compute_t<S>* grad, const compute_t<S>* statistics, int64_t rows,
                  const S* scores, S* gradient, int64_t row) {
  using C = compute_t<S>;
  const S* z = scores + row * in.classes;
  S* to = gradient + row * in.classes;
  const int64_t y = in.ignored(row) ? 0 : in.target[row];
  const Slope<C> slope(in, row, grad[row], statistics[row], statistics[rows + row], widen(z[y]));
  if (slope.silent) {
    std::memset(to, 0, in.classes * sizeof(S));
    return;
  }
  const Vector<C> top = broadcast(slope.top), shift = broadcast(slope.shift), least = broadcast(slope.least);
  cpu::for_each_vector<C, 2>(0, in.classes, [&](int64_t j, auto some, int) {
    store(to + j, cpu::exponential((load(z + j, some) - top) - shift, least) * slope.grad, some);
  });
  to[y] = narrow(slope.at_target, S{});
}

// Across rows

constexpr int64_t kPositions = 128;  // that are walked together
constexpr int64_t kClasses = 32;     // whose scores at them, widened, are half of the innermost cache

// A number for each of the positions of a block, in the order in which vectors loaded from S hold them. Those behind
// the last position are there, too, so that nothing needs to ask.
template <class S>
struct Lanes {
  compute_t<S> of[kPositions] = {};

  compute_t<S>& operator[](int64_t i) { return of[cpu::place<S>(i)]; }
  Vector<compute_t<S>> at(int64_t i) const { return load(of + i); }
};

// Positions [first, first + count) of a sample, whose scores are [classes, length].
template <class S>
struct Block {
  const S* scores;
  int64_t classes, length, first, count;

  const S* at(int64_t c) const { return scores + c * length + first; }
  // The score of a row's target, or of some class where that is ignored.
  compute_t<S> mine(const Loss<compute_t<S>>& in, int64_t row, int64_t i) const {
    return widen(at(in.ignored(row) ? 0 : in.target[row])[i]);
  }
};

// The scores of some classes are copied, with -inf at the targets: planes are often a power of two apart, where a few
// classes share all places of the cache.
template <class S>
void forward_block(const Loss<compute_t<S>>& in, const Statistics<compute_t<S>>& to, const Block<S>& block,
                   int64_t first_row) {
  using C = compute_t<S>;
  constexpr int lanes = Vector<C>::lanes;
  alignas(64) C scores[kClasses * kPositions];
  Lanes<S> top;
  double total[kPositions] = {};
  const Vector<C> none = broadcast(-kInfinity<C>), least = broadcast(cpu::kLeastExponent<C>);
  for (C& lane : top.of) lane = -kInfinity<C>;
  for (int64_t begin = 0; begin < block.classes; begin += kClasses) {
    const int64_t classes = std::min(kClasses, block.classes - begin);
    for (int64_t c = 0; c < classes; ++c)
      cpu::for_each_vector<C, 1>(0, block.count, [&](int64_t i, auto some, int) {
        store(scores + c * kPositions + i, load(block.at(begin + c) + i, some));
      });
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t y = in.ignored(first_row + i) ? -1 : in.target[first_row + i] - begin;
      if (y >= 0 && y < classes) scores[y * kPositions + cpu::place<S>(i)] = -kInfinity<C>;
    }
    for (int64_t i = 0; i < block.count; i += lanes) {
      Vector<C> highest = none, sum = {};
      for (int64_t c = 0; c < classes; ++c)  // a NaN is passed over
        highest = cpu::larger(load(scores + c * kPositions + i), highest);
      const Vector<C> before = top.at(i), now = cpu::larger(highest, before);
      const Vector<C> from = select(now == -kInfinity<C>, Vector<C>{}, now);
      for (int64_t c = 0; c < classes; ++c)
        sum += cpu::exponential(load(scores + c * kPositions + i) - from, least);
      if (begin > 0) {
        C scale[lanes];
        store(scale, cpu::exponential(before - from, least));  // 1 where the maximum stays, and 0 for the first score
        for (int k = 0; k < lanes; ++k) total[i + k] *= scale[k];
      }
      C summed[lanes];
      store(summed, sum);
      for (int k = 0; k < lanes; ++k) total[i + k] += summed[k];
      store(top.of + i, now);
    }
  }
  for (int64_t i = 0; i < block.count; ++i)
    to.set(in, first_row + i, top[i], total[cpu::place<S>(i)], block.mine(in, first_row + i, i));
}

template <class S>
void backward_block(const Loss<compute_t<S>>& in, const compute_t<S>* grad, const compute_t<S>* statistics,
                    int64_t rows, const Block<S>& block, S* gradient, int64_t first_row) {
  using C = compute_t<S>;
  Lanes<S> top, shift, least, factor;  // a factor of 0: a silent row
  S at_target[kPositions];
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t row = first_row + i;
    const Slope<C> slope(in, row, grad[row], statistics[row], statistics[rows + row], block.mine(in, row, i));
    top[i] = slope.top;
    shift[i] = slope.shift;
    least[i] = slope.least;
    factor[i] = slope.silent ? C(0) : slope.grad;
    at_target[i] = narrow(slope.silent ? C(0) : slope.at_target, S{});
  }
  S* const to = gradient + block.first;
  for (int64_t c = 0; c < block.classes; ++c)
    cpu::for_each_vector<C, 1>(0, block.count, [&](int64_t i, auto some, int) {
      const Vector<C> z = load(block.at(c) + i, some), by = factor.at(i);
      const Vector<C> slope = cpu::exponential((z - top.at(i)) - shift.at(i), least.at(i)) * by;
      store(to + c * block.length + i, select(by == C(0), Vector<C>{}, slope), some);
    });
  for (int64_t i = 0; i < block.count; ++i)
    if (!in.ignored(first_row + i)) to[in.target[first_row + i] * block.length + i] = at_target[i];
}

}  // namespace zoo::comp_sum
