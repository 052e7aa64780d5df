// Runs the source of a CUDA kernel on the host: here CUDA's names get their meaning, emu/ does the work.
//
// Blocks run one after the other, each CUDA thread is a fiber, and a thread runs until it waits at a
// collective or ends. What a kernel gets wrong with barriers, masks and shared memory comes back as a report;
// a race shows as results that differ between schedules. Not seen: races inside of what a thread does between
// two collectives, the memory model, the accuracy of fast mathematics, and a loop that waits for another
// thread without a collective, which never ends.
#pragma once

#include <math.h>  // fminf and its kin in the global namespace, as in CUDA

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emu/launch.h"

// ---- qualifiers ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

// ---- vector types, aligned as CUDA aligns them ----

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(zoo::emu::Index3 index) : x(index.x), y(index.y), z(index.z) {}
};
using uint3 = zoo::emu::Index3;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

#define threadIdx (::zoo::emu::Block::thread().index)
#define blockIdx (::zoo::emu::grid.block_index)
#define blockDim (::dim3(::zoo::emu::grid.block_shape))
#define gridDim (::dim3(::zoo::emu::grid.shape))

// ---- shared memory ----

namespace zoo::emu {

template <class Array>
Array& shared_array(const void* key, const char* name) {
  static_assert(alignof(Array) <= 64, "shared memory is aligned to 64 bytes");
  return *reinterpret_cast<Array*>(Block::current().memory().fixed(key, name, sizeof(Array)));
}

}  // namespace zoo::emu

#define ZOO_SHARED(type, name, count)    \
  static char zoo_emu_key_of_##name = 0; \
  type(&name)[count] = ::zoo::emu::shared_array<type[count]>(&zoo_emu_key_of_##name, #name)
#define ZOO_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::zoo::emu::Block::current().memory().dynamic())

// ---- collectives ----

// Last parameters that nobody passes: as defaults these built-ins give the line of the call, which the
// reports name.
#define ZOO_EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace zoo::emu {

inline Block::Votes barrier(Collective what, int predicate, Site site) {
  return Block::current().wait_for_block(what, predicate != 0, site);
}
// The lanes of the mask that vote yes.
inline unsigned vote(Collective what, unsigned mask, int predicate, Site site) {
  return static_cast<unsigned>(Block::current().wait_for_warp(what, mask, predicate != 0, 0, site));
}

}  // namespace zoo::emu

inline void __syncthreads(ZOO_EMU_CALLER) {
  zoo::emu::barrier(zoo::emu::Collective::sync_threads, 0, {file, line});
}
inline int __syncthreads_count(int predicate, ZOO_EMU_CALLER) {
  const auto votes = zoo::emu::barrier(zoo::emu::Collective::sync_threads_count, predicate, {file, line});
  return static_cast<int>(votes.yes);
}
inline int __syncthreads_and(int predicate, ZOO_EMU_CALLER) {
  const auto votes = zoo::emu::barrier(zoo::emu::Collective::sync_threads_and, predicate, {file, line});
  return votes.yes == votes.all;
}
inline int __syncthreads_or(int predicate, ZOO_EMU_CALLER) {
  return zoo::emu::barrier(zoo::emu::Collective::sync_threads_or, predicate, {file, line}).yes != 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, ZOO_EMU_CALLER) {
  zoo::emu::Block::current().wait_for_warp(zoo::emu::Collective::sync_warp, mask, 0, 0, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, ZOO_EMU_CALLER) {
  return zoo::emu::vote(zoo::emu::Collective::ballot, mask, predicate, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, ZOO_EMU_CALLER) {
  return zoo::emu::vote(zoo::emu::Collective::any, mask, predicate, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ZOO_EMU_CALLER) {
  return zoo::emu::vote(zoo::emu::Collective::all, mask, predicate, {file, line}) == mask;
}

namespace zoo::emu {

// The same bytes as another type; of the longer one, the first bytes.
template <class To, class From>
To bits_as(const From& from) {
  static_assert(std::is_trivially_copyable_v<From> && std::is_trivially_copyable_v<To>);
  To to{};
  std::memcpy(&to, &from, std::min(sizeof(To), sizeof(From)));
  return to;
}

// The lane whose value the caller gets, as the PTX manual defines it for shfl.sync: five bits of the operand
// count, and the caller's own value stands in for a lane outside of its segment of `width` lanes. Only xor
// may reach back before it.
inline unsigned source_lane(Collective what, unsigned lane, unsigned operand, unsigned width) {
  const unsigned first = lane & ~(width - 1), last = first + width - 1;
  operand %= warp_size;
  switch (what) {
    case Collective::shuffle: return first + operand % width;
    case Collective::shuffle_up: return lane >= first + operand ? lane - operand : lane;
    case Collective::shuffle_down: return lane + operand <= last ? lane + operand : lane;
    default: return (lane ^ operand) <= last ? lane ^ operand : lane;
  }
}

template <class T, class Operand>
T shuffle(Collective what, unsigned mask, const T& value, Operand operand, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move values of 4 or 8 bytes");
  Block& block = Block::current();
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    block.fail(name_of(what) + " (" + where(site) + "): the width " + std::to_string(width) +
               " is not a power of two up to 32");
  const unsigned source = source_lane(what, Block::thread().lane(), static_cast<unsigned>(operand), width);
  return bits_as<T>(block.wait_for_warp(what, mask, bits_as<std::uint64_t>(value), source, site));
}

}  // namespace zoo::emu

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, ZOO_EMU_CALLER) {
  return zoo::emu::shuffle(zoo::emu::Collective::shuffle, mask, value, lane, width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, ZOO_EMU_CALLER) {
  return zoo::emu::shuffle(zoo::emu::Collective::shuffle_up, mask, value, delta, width, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, ZOO_EMU_CALLER) {
  return zoo::emu::shuffle(zoo::emu::Collective::shuffle_down, mask, value, delta, width, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, ZOO_EMU_CALLER) {
  return zoo::emu::shuffle(zoo::emu::Collective::shuffle_xor, mask, value, flip, width, {file, line});
}

// ---- atomics: plain operations, since no other thread runs in between ----

namespace zoo::emu {

template <class T>
constexpr bool atomic_integer =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <class T>
using Identity = std::common_type_t<T>;  // no deduction from the operand: it converts, as in CUDA

template <class T>
T exchange(T* address, T value) {
  const T before = *address;
  *address = value;
  return before;
}

// Integers wrap around on a GPU.
template <class T>
T wrapping_sum(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
  else
    return a + b;
}

}  // namespace zoo::emu

template <class T>
T atomicAdd(T* address, zoo::emu::Identity<T> value) {
  static_assert(zoo::emu::atomic_integer<T> || std::is_floating_point_v<T>, "no atomicAdd for this type");
  return zoo::emu::exchange(address, zoo::emu::wrapping_sum(*address, value));
}
template <class T>
T atomicMax(T* address, zoo::emu::Identity<T> value) {
  static_assert(zoo::emu::atomic_integer<T>, "no atomicMax for this type");
  return zoo::emu::exchange(address, *address < value ? value : *address);
}
template <class T>
T atomicMin(T* address, zoo::emu::Identity<T> value) {
  static_assert(zoo::emu::atomic_integer<T>, "no atomicMin for this type");
  return zoo::emu::exchange(address, value < *address ? value : *address);
}
template <class T>
T atomicExch(T* address, zoo::emu::Identity<T> value) {
  static_assert(zoo::emu::atomic_integer<T> || std::is_same_v<T, float>, "no atomicExch for this type");
  return zoo::emu::exchange(address, value);
}
template <class T>
T atomicCAS(T* address, zoo::emu::Identity<T> expected, zoo::emu::Identity<T> value) {
  static_assert(zoo::emu::atomic_integer<T>, "no atomicCAS for this type");
  return zoo::emu::exchange(address, *address == expected ? value : *address);
}
template <class T>
T atomicOr(T* address, zoo::emu::Identity<T> value) {
  static_assert(zoo::emu::atomic_integer<T>, "no atomicOr for this type");
  return zoo::emu::exchange(address, *address | value);
}
template <class T>
T atomicAnd(T* address, zoo::emu::Identity<T> value) {
  static_assert(zoo::emu::atomic_integer<T>, "no atomicAnd for this type");
  return zoo::emu::exchange(address, *address & value);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- loads, bits, mathematics ----

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

inline unsigned __float_as_uint(float value) { return zoo::emu::bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return zoo::emu::bits_as<float>(value); }
inline int __float_as_int(float value) { return zoo::emu::bits_as<int>(value); }
inline float __int_as_float(int value) { return zoo::emu::bits_as<float>(value); }

namespace zoo::emu {

inline float reciprocal_root(float value) { return 1.0f / std::sqrt(value); }
inline double reciprocal_root_double(double value) { return 1.0 / std::sqrt(value); }

}  // namespace zoo::emu

inline float __fdividef(float a, float b) { return a / b; }

// C libraries declare some of these names themselves, so they cannot be functions here.
#define rsqrtf(value) ::zoo::emu::reciprocal_root(value)
#define rsqrt(value) ::zoo::emu::reciprocal_root_double(value)
#define __expf(value) ::expf(value)
#define __logf(value) ::logf(value)
