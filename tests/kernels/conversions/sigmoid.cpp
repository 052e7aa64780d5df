// The sigmoid of cpu.h over memory, and what keeps track of a row's elements, for a test that knows the answers.
#include <cstdint>

#include "common/cpu.h"

using namespace zoo;

namespace {

template <class C>
void sigmoid_all(const C* from, C* to, std::int64_t count) {
  cpu::for_each_vector<C, 1>(0, count, [&](std::int64_t j, auto some, int) {
    cpu::store(to + j, cpu::sigmoid(cpu::load(from + j, some)), some);
  });
}

// Ones where the first `count` elements of a vector are, in the order of a row; `lanes` of them.
template <class S>
void exist(int count, S* to) {
  using C = compute_t<S>;
  cpu::store(to, cpu::existing<S>(cpu::broadcast(C(1)), count));
}

// Numbers laid down by `place`, back in the order of a row.
template <class S>
void placed(const compute_t<S>* from, S* to) {
  using C = compute_t<S>;
  C lanes[cpu::Vector<C>::lanes];
  for (int i = 0; i < cpu::Vector<C>::lanes; ++i) lanes[cpu::place<S>(i)] = from[i];
  cpu::store(to, cpu::load(lanes));
}

}  // namespace

extern "C" {
void sigmoid_float(const float* from, float* to, std::int64_t n) { sigmoid_all(from, to, n); }
void sigmoid_double(const double* from, double* to, std::int64_t n) { sigmoid_all(from, to, n); }
void exist_float(int count, float* to) { exist(count, to); }
void exist_double(int count, double* to) { exist(count, to); }
void exist_bf16(int count, bf16* to) { exist(count, to); }
void exist_half(int count, half* to) { exist(count, to); }
void placed_float(const float* from, float* to) { placed(from, to); }
void placed_double(const double* from, double* to) { placed(from, to); }
void placed_bf16(const float* from, bf16* to) { placed(from, to); }
void placed_half(const float* from, half* to) { placed(from, to); }
}
