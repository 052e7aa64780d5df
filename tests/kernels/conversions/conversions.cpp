// The conversions of scalar.h and cpu.h, element by element and vector by vector, for a test that knows the answers.
#include <cstdint>

#include "common/cpu.h"

using namespace zoo;

namespace {

template <class S>
void widen_all(const S* from, float* one_by_one, float* vectors, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) one_by_one[i] = widen(from[i]);
  // Where a vector keeps which element is its own business, so they are stored as floats one by one after a round trip.
  constexpr int lanes = cpu::Vector<float>::lanes;
  cpu::for_each_vector<float, 1>(0, count, [&](std::int64_t j, auto some, int) {
    S values[lanes] = {};
    cpu::store(values, cpu::load(from + j, some));
    for (int i = 0; i < lanes && j + i < count; ++i) vectors[j + i] = widen(values[i]);
  });
}

template <class S>
void narrow_all(const float* from, S* one_by_one, S* vectors, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) one_by_one[i] = narrow(from[i], S{});
  // A vector that holds one value everywhere stores it everywhere, whatever its order.
  constexpr int lanes = cpu::Vector<float>::lanes;
  for (std::int64_t i = 0; i < count; ++i) {
    float copies[lanes];
    for (float& copy : copies) copy = from[i];
    S values[lanes];
    cpu::store(values, cpu::load(copies));
    vectors[i] = values[i % lanes];
  }
}

}  // namespace

extern "C" {
void widen_half(const half* from, float* a, float* b, std::int64_t n) { widen_all(from, a, b, n); }
void widen_bf16(const bf16* from, float* a, float* b, std::int64_t n) { widen_all(from, a, b, n); }
void narrow_half(const float* from, half* a, half* b, std::int64_t n) { narrow_all(from, a, b, n); }
void narrow_bf16(const float* from, bf16* a, bf16* b, std::int64_t n) { narrow_all(from, a, b, n); }
}
