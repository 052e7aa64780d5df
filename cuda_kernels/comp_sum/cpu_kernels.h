// Comp-sum losses on the CPU. Rows lie along the classes ([R, C], S = 1), or across them ([C, S] a sample), where a
// vector holds positions and the classes are walked one after the other.
//
// The sum of exponentials runs online: over a chunk of scores that stays in the innermost cache the maximum is taken,
// then the sum, and what was summed before is rescaled when the maximum rises. Chunks are summed in the compute type,
// their totals in double, everything in an order that depends on the shape alone.
#pragma once

#include <algorithm>

#include "comp_sum/row_numbers.h"

namespace zoo::comp_sum {

using cpu::existing;

// Along a row

// The maximum of scores and the sum of exp(z - maximum), so far.
template <class C>
struct Sum {
  C top = -kInfinity<C>;
  double total = 0;

  // Takes scores that fill whole vectors.
  void add(const C* scores, int64_t count) {
    constexpr int lanes = Vector<C>::lanes;
    const Vector<C> none = broadcast(-kInfinity<C>), least = broadcast(cpu::kLeastExponent<C>);
    Vector<C> highest[2] = {none, none}, sum = {};
    const int64_t last = count - lanes;
    for (int64_t j = 0; j < last; j += 2 * lanes)  // a NaN is passed over
      for (int u = 0; u < 2; ++u) highest[u] = cpu::larger(load(scores + j + u * lanes), highest[u]);
    highest[0] = cpu::larger(load(scores + last), highest[0]);
    const C risen = cpu::largest_lane(cpu::larger(highest[0], highest[1]));
    if (risen > top) {
      if (total > 0) total *= std::exp(static_cast<double>(top) - risen);
      top = risen;
    }
    // All may be -inf: they add nothing then, but a NaN among them does.
    const Vector<C> from = broadcast(top == -kInfinity<C> ? C(0) : top);
    for (int64_t j = 0; j < count; j += lanes) sum += cpu::exponential(load(scores + j) - from, least);
    total += cpu::sum_lanes(sum);
  }
};

constexpr int64_t kScores = 2048;  // at a time, so that they and their copy stay in the innermost cache

// Scores are copied, with -inf at the target and behind the last: then short rows, too, are whole vectors without a
// branch that depends on the target. Of short rows many are copied before the first is read: it would have to wait for
// the store at the target, which is narrower.
template <class S>
void forward_rows(const Loss<compute_t<S>>& in, const Statistics<compute_t<S>>& to, const S* scores, int64_t first,
                  int64_t count) {
  using C = compute_t<S>;
  constexpr int lanes = Vector<C>::lanes;
  alignas(64) C copies[kScores];
  Sum<C> others[kRows];
  Forward<C> numbers;
  const Vector<C> none = broadcast(-kInfinity<C>);
  const int64_t width = std::min(kScores, (in.classes + lanes - 1) / lanes * lanes);
  for (int64_t done = 0, size = kScores / width; done < count; done += size) {
    const int64_t group = first + done, rows = std::min(size, count - done);
    for (int64_t begin = 0; begin < in.classes; begin += width) {
      const int64_t length = std::min(width, in.classes - begin), padded = (length + lanes - 1) / lanes * lanes;
      in.each_kept(group, rows, [&](int64_t i, int64_t y) {
        const S* z = scores + (group + i) * in.classes + begin;
        C* const copy = copies + i * width;
        cpu::for_each_vector<C, 2>(0, length, [&](int64_t j, auto some, int) {
          store(copy + j, existing<S>(load(z + j, some), some, none));
        });
        if (y >= begin && y < begin + length) copy[cpu::place<S>(y - begin)] = -kInfinity<C>;
      });
      in.each_kept(group, rows, [&](int64_t i, int64_t) { others[done + i].add(copies + i * width, padded); });
    }
  }
  in.each_kept(first, count, [&](int64_t i, int64_t y) {
    const int64_t row = first + i;
    numbers.set(in, i, row, others[i].top, others[i].total, widen(scores[row * in.classes + y]));
  });
  numbers.finish(in, to, first, count);
}

template <class S>
void backward_rows(const Loss<compute_t<S>>& in, const compute_t<S>* grad, const compute_t<S>* statistics, int64_t rows,
                   const S* scores, S* gradient, int64_t first, int64_t count) {
  using C = compute_t<S>;
  Slopes<C> slopes;
  in.each_kept(first, count, [&](int64_t i, int64_t y) {
    slopes.set(in, i, first + i, grad[first + i], widen(scores[(first + i) * in.classes + y]));
  });
  slopes.finish(in, statistics, rows, first, count);
  for (int64_t i = 0; i < count; ++i) {
    const S* z = scores + (first + i) * in.classes;
    S* to = gradient + (first + i) * in.classes;
    if (slopes.factor[i] == 0) {
      std::memset(to, 0, in.classes * sizeof(S));
      continue;
    }
    const Vector<C> top = broadcast(slopes.top[i]), shift = broadcast(slopes.shift[i]);
    const Vector<C> least = broadcast(slopes.least[i]);
    cpu::for_each_vector<C, 2>(0, in.classes, [&](int64_t j, auto some, int) {
      store(to + j, cpu::exponential((load(z + j, some) - top) - shift, least) * slopes.factor[i], some);
    });
    to[in.target[first + i]] = narrow(slopes.at_target[i], S{});
  }
}

// Across rows

constexpr int64_t kClasses = 32;  // whose scores at kRows positions, widened, are half of the innermost cache

// From the order of rows to that in which vectors loaded from S hold them.
template <class S>
void lay_down(compute_t<S> (&numbers)[kRows]) {
  if constexpr (cpu::place<S>(1) != 1) {
    compute_t<S> copy[kRows];
    std::memcpy(copy, numbers, sizeof copy);
    for (int64_t i = 0; i < kRows; ++i) numbers[cpu::place<S>(i)] = copy[i];
  }
}

// Positions [first, first + count) of a sample, whose scores are [classes, length].
template <class S>
struct Block {
  const S* scores;
  int64_t classes, length, first, count;

  const S* at(int64_t c) const { return scores + c * length + first; }
};

// The scores of some classes are copied, with -inf at the targets: planes are often a power of two apart, where a few
// classes share all places of the cache.
template <class S>
void forward_block(const Loss<compute_t<S>>& in, const Statistics<compute_t<S>>& to, const Block<S>& block,
                   int64_t first_row) {
  using C = compute_t<S>;
  constexpr int lanes = Vector<C>::lanes;
  alignas(64) C scores[kClasses * kRows];
  C top[kRows];
  double total[kRows] = {};
  Forward<C> numbers;
  const Vector<C> none = broadcast(-kInfinity<C>), least = broadcast(cpu::kLeastExponent<C>);
  for (C& lane : top) lane = -kInfinity<C>;
  for (int64_t begin = 0; begin < block.classes; begin += kClasses) {
    const int64_t classes = std::min(kClasses, block.classes - begin);
    for (int64_t c = 0; c < classes; ++c)
      cpu::for_each_vector<C, 1>(0, block.count, [&](int64_t i, auto some, int) {
        store(scores + c * kRows + i, load(block.at(begin + c) + i, some));
      });
    in.each_kept(first_row, block.count, [&](int64_t i, int64_t y) {
      if (y >= begin && y < begin + classes) scores[(y - begin) * kRows + cpu::place<S>(i)] = -kInfinity<C>;
    });
    for (int64_t i = 0; i < block.count; i += lanes) {
      Vector<C> highest = none, sum = {};
      for (int64_t c = 0; c < classes; ++c)  // a NaN is passed over
        highest = cpu::larger(load(scores + c * kRows + i), highest);
      const Vector<C> before = load(top + i), now = cpu::larger(highest, before);
      const Vector<C> from = select(now == -kInfinity<C>, Vector<C>{}, now);
      for (int64_t c = 0; c < classes; ++c)
        sum += cpu::exponential(load(scores + c * kRows + i) - from, least);
      C summed[lanes], scale[lanes] = {};
      store(summed, sum);
      // 1 where the maximum stays, and 0 for the first score
      if (begin > 0) store(scale, cpu::exponential(before - from, least));
      for (int k = 0; k < lanes; ++k) total[i + k] = total[i + k] * scale[k] + summed[k];
      store(top + i, now);
    }
  }
  in.each_kept(first_row, block.count, [&](int64_t i, int64_t y) {
    const int64_t at = cpu::place<S>(i);
    numbers.set(in, i, first_row + i, top[at], total[at], widen(block.at(y)[i]));
  });
  numbers.finish(in, to, first_row, block.count);
}

template <class S>
void backward_block(const Loss<compute_t<S>>& in, const compute_t<S>* grad, const compute_t<S>* statistics,
                    int64_t rows, const Block<S>& block, S* gradient, int64_t first_row) {
  using C = compute_t<S>;
  Slopes<C> slopes;
  in.each_kept(first_row, block.count, [&](int64_t i, int64_t y) {
    slopes.set(in, i, first_row + i, grad[first_row + i], widen(block.at(y)[i]));
  });
  slopes.finish(in, statistics, rows, first_row, block.count);
  for (auto* numbers : {&slopes.top, &slopes.shift, &slopes.least, &slopes.factor}) lay_down<S>(*numbers);
  S* const to = gradient + block.first;
  for (int64_t c = 0; c < block.classes; ++c)
    cpu::for_each_vector<C, 1>(0, block.count, [&](int64_t i, auto some, int) {
      const Vector<C> z = load(block.at(c) + i, some), by = load(slopes.factor + i);
      const Vector<C> exponent = (z - load(slopes.top + i)) - load(slopes.shift + i);
      const Vector<C> slope = cpu::exponential(exponent, load(slopes.least + i)) * by;
      store(to + c * block.length + i, select(by == C(0), Vector<C>{}, slope), some);
    });
  in.each_kept(first_row, block.count, [&](int64_t i, int64_t y) {
    to[y * block.length + i] = narrow(slopes.at_target[i], S{});
  });
}

}  // namespace zoo::comp_sum
