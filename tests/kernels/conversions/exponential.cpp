// The exponential of cpu.h over memory, and what stands in for elements behind the end of a row, for a test that knows
// the answers.
#include <cstdint>

#include "common/cpu.h"

using namespace zoo;

namespace {

template <class C>
void exponential_all(const C* from, C least, C* to, std::int64_t count) {
  cpu::for_each_vector<C, 1>(0, count, [&](std::int64_t j, auto some, int) {
    cpu::store(to + j, cpu::exponential(cpu::load(from + j, some), cpu::broadcast(least)), some);
  });
}

// Ones for the first `count` elements of a vector and sevens behind them, in the order of a row.
template <class S>
void beyond(int count, S* to) {
  using C = compute_t<S>;
  cpu::store(to, cpu::existing<S>(cpu::broadcast(C(1)), count, cpu::broadcast(C(7))));
}

}  // namespace

extern "C" {
void exponential_float(const float* from, float least, float* to, std::int64_t n) {
  exponential_all(from, least, to, n);
}
void exponential_double(const double* from, double least, double* to, std::int64_t n) {
  exponential_all(from, least, to, n);
}
void beyond_float(int count, float* to) { beyond(count, to); }
void beyond_double(int count, double* to) { beyond(count, to); }
void beyond_bf16(int count, bf16* to) { beyond(count, to); }
void beyond_half(int count, half* to) { beyond(count, to); }
float least_float() { return cpu::kLeastExponent<float>; }
double least_double() { return cpu::kLeastExponent<double>; }
}
