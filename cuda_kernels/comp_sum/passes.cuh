// What the kernels of this family share: what they are told, the maximum and the sum of a row in one reading, and what
// an element of the gradient has to know of its row. The contract is written in eager.py.
#pragma once

#include "common/rows.cuh"
#include "comp_sum/math.h"

namespace zoo::comp_sum {

constexpr int kDeep = 4;  // loads that a thread has under way at once

template <class C>
ZOO_HD C minus_infinity() {
  return C(float_of(0xff800000u));
}
template <class C>
ZOO_HD C not_a_number() {
  return C(float_of(0x7fc00000u));
}
ZOO_HD float lowest(float) { return -0x1.fffffep127f; }
ZOO_HD double lowest(double) { return -0x1.fffffffffffffp1023; }

// A row's target. One outside of [0, classes) that is not ignore_index makes loss, statistics and gradient of its row
// NaN: the host cannot look at targets without waiting for the device, and a trap would end the process.
struct Label {
  bool ignored, valid;
  int column;
};

template <class S>
struct Problem {
  using C = compute_t<S>;
  const S* scores;      // [rows, classes], or [samples, classes, inner]
  const int64* target;  // one a row
  const C* taus;        // one a row, or null
  C a, cap;             // a = 1 - tau of all rows
  int64 ignore_index, rows;
  int classes;

  ZOO_HD Label label(int64 row) const {
    if (row >= rows) return {true, false, 0};
    const int64 y = target[row];
    const bool ignored = y == ignore_index, valid = !ignored && y >= 0 && y < classes;
    return {ignored, valid, valid ? static_cast<int>(y) : 0};
  }
  ZOO_HD C a_of(int64 row) const { return taus ? 1 - taus[row] : a; }
};

// m and sum exp(z - m) of what was added so far. A NaN is no maximum, and ends up in the sum; so does +inf.
template <class C>
struct Running {
  C top, total;

  ZOO_HD Running() : top(minus_infinity<C>()), total(0) {}
  ZOO_HD Running(C top, C total) : top(top), total(total) {}
  // Where there is no score but -inf, 0 stands for the maximum: -inf - -inf would be a NaN.
  static ZOO_HD C finite(C top) { return top == minus_infinity<C>() ? C(0) : top; }

  template <int Count>
  ZOO_HD void add(const C (&values)[Count]) {
    C highest = top, sum = 0;
    for (int i = 0; i < Count; ++i) highest = values[i] > highest ? values[i] : highest;
    if (highest > top) {
      total = total_at(highest);
      top = highest;
    }
    const C base = finite(top);
    for (int i = 0; i < Count; ++i) sum += exp_(values[i] - base);
    total += sum;
  }
  ZOO_HD void merge(const Running& other) {
    const C highest = other.top > top ? other.top : top;
    total = total_at(highest) + other.total_at(highest);
    top = highest;
  }
  // The sum as if `highest`, not below top, had been the maximum.
  ZOO_HD C total_at(C highest) const { return total * exp_(top - finite(highest)); }
};

// Loss and statistics [2, rows] of one row.
template <class S, class C>
ZOO_HD void write_row(const Problem<S>& in, int64 row, const Label& label, C top, C total, C mine, C* loss,
                      C* statistics) {
  C value = 0, log_total = 0;
  if (label.valid) {
    log_total = log_(total);
    value = loss_of(off_target(top, log_total, mine), in.a_of(row), in.cap);
  } else {
    top = value = log_total = label.ignored ? C(0) : not_a_number<C>();
  }
  loss[row] = value;
  statistics[row] = top;
  statistics[in.rows + row] = log_total;
}

// Elements of the gradient of one row.
template <class C>
struct Slopes {
  bool silent;  // all are 0, whatever the scores
  C top, shift, grad, at_target;

  template <class S>
  ZOO_HD Slopes(const Problem<S>& in, int64 row, const Label& label, const C* incoming, const C* statistics, C mine) {
    silent = label.ignored;
    if (silent) return;
    top = statistics[row];
    grad = incoming[row];
    const C log_total = statistics[in.rows + row];
    const C log_weight = log_weight_of(off_target(top, log_total, mine), in.a_of(row), in.cap);
    silent = grad == 0 || log_weight == minus_infinity<C>();
    shift = log_total - log_weight;
    if (shift < lowest(C())) shift = lowest(C());  // finite: a score of -inf is none at all also where w is infinite
    at_target = -grad * exp_(log_weight);
  }
  ZOO_HD C of(C score) const { return grad * exp_((score - top) - shift); }
  ZOO_HD C at(int column, int target, C score) const {
    return silent ? C(0) : column == target ? at_target : of(score);
  }
};

}  // namespace zoo::comp_sum
