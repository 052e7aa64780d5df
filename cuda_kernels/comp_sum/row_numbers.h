// The formulas of eager.py for many rows at a time, on the CPU: where classes are few, those of one row would cost more
// than its scores. A vector holds one number of as many rows, and a row's results do not depend on the rows beside it.
#pragma once

#include <cmath>
#include <limits>

#include "common/cpu.h"

namespace zoo::comp_sum {

using cpu::broadcast;
using cpu::load;
using cpu::select;
using cpu::store;
using cpu::Vector;
using std::int64_t;

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

constexpr int64_t kRows = 128;  // whose numbers are computed together

// What all rows have in common, and where their numbers are: [B, S], one after the other.
template <class C>
struct Loss {
  int64_t classes, ignore_index;
  const int64_t* target;
  const C* taus;  // null: one for all
  C a, cap;       // a = 1 - tau of that one

  C a_of(int64_t row) const { return taus == nullptr ? a : 1 - taus[row]; }
  bool is_cross_entropy() const { return taus == nullptr && a == 0; }

  // Calls body(i, y) for each of `count` rows first + i that is not ignored, with its target.
  template <class Body>
  void each_kept(int64_t first, int64_t count, Body&& body) const {
    for (int64_t i = 0; i < count; ++i)
      if (target[first + i] != ignore_index) body(i, target[first + i]);
  }
};

// What s says: c = softplus(s) and log sigmoid(s), which share t = log(1 + exp(-|s|)). A NaN stays one.
template <class C>
struct Odds {
  Vector<C> c, log_off;

  Odds(Vector<C> top, Vector<C> log_total, Vector<C> mine) {
    const Vector<C> s = (top - mine) + log_total;  // in this order: log E would be lost beside a large m
    const Vector<C> zero = {}, least = broadcast(cpu::kLeastExponent<C>);
    const Vector<C> t = cpu::log_one_plus(cpu::exponential(zero - cpu::magnitude(s), least));
    c = cpu::larger(s, zero) + t;
    log_off = select(zero > s, s, zero) - t;
  }
};

// Where the results of the rows go.
template <class C>
struct Statistics {
  C *loss, *top, *log_total;
};

// m, E and z_y of rows, then their losses. A row that is not set has no loss, and zeros for statistics.
template <class C>
struct Forward {
  C top[kRows] = {}, total[kRows], mine[kRows], a[kRows] = {};

  Forward() {
    for (C& sum : total) sum = 1;
    for (C& score : mine) score = kInfinity<C>;
  }
  void set(const Loss<C>& in, int64_t i, int64_t row, C m, double sum, C score) {
    top[i] = m, total[i] = static_cast<C>(sum), mine[i] = score, a[i] = in.a_of(row);
  }

  __attribute__((noinline)) void finish(const Loss<C>& in, const Statistics<C>& to, int64_t first,
                                        int64_t count) const {
    const C at_cap = std::expm1(in.cap), slope_at_cap = std::exp(in.cap);
    cpu::for_each_vector<C, 1>(0, count, [&](int64_t i, auto some, int) {
      const Vector<C> m = load(top + i), log_total = cpu::logarithm(load(total + i));
      const Odds<C> odds(m, log_total, load(mine + i));
      store(to.top + first + i, m, some);
      store(to.log_total + first + i, log_total, some);
      const Vector<C> loss = in.is_cross_entropy() ? odds.c : family(in.cap, at_cap, slope_at_cap, odds.c, i);
      store(to.loss + first + i, loss, some);
    });
  }

 private:
  Vector<C> family(C cap, C at_cap, C slope_at_cap, Vector<C> c, int64_t i) const {
    const Vector<C> by = load(a + i), exponent = by * c, most = broadcast(cap);
    const Vector<C> beyond = (exponent - most) * slope_at_cap + at_cap;
    const Vector<C> inside = cpu::exponential_minus_one(exponent);
    return select(by == C(0), c, select(exponent > most, beyond, inside) / by);
  }
};

// The gradient of rows: at j != y it is factor exp((z_j - top) - shift), at the target `at_target`, and 0 everywhere
// where the factor is 0, as it is of a row that is not set.
template <class C>
struct Slopes {
  C factor[kRows] = {}, mine[kRows] = {}, a[kRows] = {};
  C top[kRows] = {}, shift[kRows] = {}, least[kRows] = {}, at_target[kRows] = {};

  void set(const Loss<C>& in, int64_t i, int64_t row, C grad, C score) {
    factor[i] = grad, mine[i] = score, a[i] = in.a_of(row);
  }

  __attribute__((noinline)) void finish(const Loss<C>& in, const C* statistics, int64_t rows, int64_t first,
                                        int64_t count) {
    cpu::for_each_vector<C, 1>(0, count, [&](int64_t i, auto some, int) {
      const Vector<C> m = load(statistics + first + i, some), log_total = load(statistics + rows + first + i, some);
      const Odds<C> odds(m, log_total, load(mine + i));
      const Vector<C> weight = in.is_cross_entropy() ? odds.log_off : log_weight(in.cap, odds, i);
      const Vector<C> zero = {}, grad = load(factor + i), lowest = broadcast(std::numeric_limits<C>::lowest());
      // The product with a small grad is to be no denormal number either; of a NaN the bound stays what it is.
      const Vector<C> usual = broadcast(cpu::kLeastExponent<C>);
      const Vector<C> bound = cpu::larger(usual - cpu::logarithm(cpu::magnitude(grad)), usual);
      const Vector<C> own = (zero - grad) * cpu::exponential(weight, bound);
      const auto silent = weight == -kInfinity<C>;
      const Vector<C> by = select(silent, zero, grad);
      store(top + i, m);
      // Finite, so that a score of -inf is none at all also where the weight is infinite.
      store(shift + i, cpu::larger(lowest, log_total - weight));
      store(least + i, bound);
      store(factor + i, by);
      store(at_target + i, select(by == C(0), zero, own));
    });
  }

 private:
  Vector<C> log_weight(C cap, const Odds<C>& odds, int64_t i) const {
    const Vector<C> by = load(a + i), exponent = by * odds.c, most = broadcast(cap);
    // a c would be 0 * inf where c is infinite
    return select(by == C(0), odds.log_off, select(exponent > most, most, exponent) + odds.log_off);
  }
};

}  // namespace zoo::comp_sum
