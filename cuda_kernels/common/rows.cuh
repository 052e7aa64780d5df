// What row kernels share: who works on a row, how a row lies in 16-byte packs, sums over a row.
//
// Rows of a contiguous [rows, width] tensor start where they start: when width is no multiple of a pack, a row begins and
// ends inside packs it shares with its neighbours. Loads and stores go pack by pack, and element by element only in
// those two. The first element of the tensor is 16-byte aligned; the host sees to that.
#pragma once

#include "common/portable.h"
#include "common/scalar.h"

namespace zoo {

typedef long long int64;

template <class S>
constexpr int pack_size = 16 / sizeof(S);

template <class S>
union Pack {
  uint4 raw;
  S values[pack_size<S>];
  ZOO_HD Pack() : raw{} {}
};

// As one instruction: left to the compiler, the store of a union inside a loop becomes four.
ZOO_HD void store_16_bytes(void* to, uint4 value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = value;
#endif
}

template <class S>
struct Row {
  S* packs;   // 16-byte aligned, at most pack_size - 1 elements before the row
  int phase;  // elements of the first pack that belong to the row before
  int width;
  int count;  // packs

  ZOO_HD Row(S* tensor, int64 row, int width) : Row(width, tensor, row * width) {}
  // `width` elements from any place of a tensor.
  ZOO_HD Row(int width, S* tensor, int64 first) : width(width) {
    phase = static_cast<int>(first % pack_size<S>);
    packs = tensor + (first - phase);
    count = (phase + width + pack_size<S> - 1) / pack_size<S>;
  }
  // Elements [low, high) of pack j are ours.
  ZOO_HD int low(int j) const { return j == 0 ? phase : 0; }
  ZOO_HD int high(int j) const {
    const int end = phase + width - j * pack_size<S>;
    return end < pack_size<S> ? end : pack_size<S>;
  }
};

template <class S>
ZOO_HD Pack<S> load_pack(const Row<const S>& row, int j) {
  Pack<S> pack;
  const int low = row.low(j), high = row.high(j);
  const S* from = row.packs + static_cast<int64>(j) * pack_size<S>;
  if (low == 0 && high == pack_size<S>) {
    pack.raw = *reinterpret_cast<const uint4*>(from);
  } else {
    for (int i = 0; i < pack_size<S>; ++i)
      if (i >= low && i < high) pack.values[i] = from[i];
  }
  return pack;
}

template <class S>
ZOO_HD void store_pack(const Row<S>& row, int j, const Pack<S>& pack) {
  const int low = row.low(j), high = row.high(j);
  S* to = row.packs + static_cast<int64>(j) * pack_size<S>;
  if (low == 0 && high == pack_size<S>) {
    store_16_bytes(to, pack.raw);
  } else {
    for (int i = 0; i < pack_size<S>; ++i)
      if (i >= low && i < high) to[i] = pack.values[i];
  }
}

constexpr unsigned kFullWarp = 0xffffffffu;

// The same bits in every lane: each step adds the same two numbers on both sides.
template <class C>
__device__ __forceinline__ C warp_sum(C value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}
template <class C>
__device__ __forceinline__ C warp_max(C value) {
  for (int step = 16; step > 0; step /= 2) {
    const C other = __shfl_xor_sync(kFullWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Who shares a row: the 32 threads of a warp, or a block. `Most` is the largest number of sums taken at once.
//
// Sums of a block meet in shared memory, in two buffers that take turns: no thread can be more than one sum ahead of
// another, so one barrier a sum is enough.
template <class C, int Most>
using SumBuffers = C[2][32][Most];

template <class C, int Most>
struct Warp {
  static constexpr int size = 32;
  int rank;  // of this thread among those that share a row
  int64 first_row, row_step;
  SumBuffers<C, Most>& buffers;

  __device__ explicit Warp(SumBuffers<C, Most>& buffers)
      : rank(threadIdx.x % 32),
        first_row(static_cast<int64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32),
        row_step(static_cast<int64>(gridDim.x) * (blockDim.x / 32)),
        buffers(buffers) {}

  template <int Count>
  __device__ void sum(C (&values)[Count]) {
    for (int k = 0; k < Count; ++k) values[k] = warp_sum(values[k]);
  }
  __device__ C max(C value) { return warp_max(value); }

  // Adds up what the warps of the block hold, in the order of the warps; the result is in thread 0.
  template <int Count>
  __device__ void sum_of_block(C (&values)[Count]) {
    if (rank == 0)
      for (int k = 0; k < Count; ++k) buffers[0][threadIdx.x / 32][k] = values[k];
    __syncthreads();
    for (int k = 0; k < Count; ++k) {
      values[k] = 0;
      for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) values[k] += buffers[0][warp][k];
    }
  }
};

template <class C, int Most>
struct Block {
  int rank, size;
  int64 first_row, row_step;
  SumBuffers<C, Most>& buffers;
  int turn = 0;

  __device__ explicit Block(SumBuffers<C, Most>& buffers)
      : rank(threadIdx.x), size(blockDim.x), first_row(blockIdx.x), row_step(gridDim.x), buffers(buffers) {}

  template <int Count>
  __device__ void sum(C (&values)[Count]) {
    auto& parts = buffers[turn];
    turn ^= 1;
    for (int k = 0; k < Count; ++k) {
      const C part = warp_sum(values[k]);
      if (rank % 32 == 0) parts[rank / 32][k] = part;
    }
    __syncthreads();
    for (int k = 0; k < Count; ++k) {
      values[k] = 0;
      for (int warp = 0; warp < size / 32; ++warp) values[k] += parts[warp][k];
    }
  }
  __device__ C max(C value) {
    auto& parts = buffers[turn];
    turn ^= 1;
    value = warp_max(value);
    if (rank % 32 == 0) parts[rank / 32][0] = value;
    __syncthreads();
    for (int warp = 0; warp < size / 32; ++warp) value = parts[warp][0] > value ? parts[warp][0] : value;
    return value;
  }
  // The block is one team: it holds its sums already.
  template <int Count>
  __device__ void sum_of_block(C (&)[Count]) {}
};

// The packs of a row that one thread works on, read twice. Packs > 0: that many at most, kept in registers. Packs = 0:
// any number; the first `staged` of the row wait in shared memory, the others are read again, from L2 as a rule.
template <class S, int Packs>
struct Held {
  Pack<S> packs[Packs];

  template <class Team>
  __device__ Held(const Team& team, const Row<const S>& row, uint4*, int) {
#pragma unroll
    for (int k = 0; k < Packs; ++k) {
      const int j = k * team.size + team.rank;
      if (j < row.count) packs[k] = load_pack<S>(row, j);
    }
  }
  __device__ Pack<S> first(int k, int) const { return packs[k]; }
  __device__ Pack<S> again(int k, int) const { return packs[k]; }
};

template <class S>
struct Held<S, 0> {
  const Row<const S>& row;
  uint4* shared;
  int staged;

  template <class Team>
  __device__ Held(const Team&, const Row<const S>& row, uint4* shared, int staged)
      : row(row), shared(shared), staged(staged) {}
  __device__ Pack<S> first(int, int j) const {
    const Pack<S> pack = load_pack<S>(row, j);
    if (j < staged) shared[j] = pack.raw;
    return pack;
  }
  __device__ Pack<S> again(int, int j) const {
    if (j >= staged) return load_pack<S>(row, j);
    Pack<S> pack;
    pack.raw = shared[j];
    return pack;
  }
};

// Calls body(k, j) for every pack j of a row that is this thread's, its k-th.
template <int Packs, class Team, class Body>
__device__ __forceinline__ void each_pack(const Team& team, int count, Body&& body) {
  if constexpr (Packs > 0) {
#pragma unroll
    for (int k = 0; k < Packs; ++k) {
      const int j = k * team.size + team.rank;
      if (j < count) body(k, j);
    }
  } else {
    for (int k = 0, j = team.rank; j < count; ++k, j += team.size) body(k, j);
  }
}

}  // namespace zoo
