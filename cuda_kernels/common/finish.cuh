// The second half of a sum over blocks: one block a quantity adds up what the blocks of the first kernel left.
#pragma once

#include "common/rows.cuh"

namespace zoo {

constexpr int kFinishThreads = 256;

// totals[k] = sum_b partial[k, b], k = blockIdx.x, always in the same order.
template <class C>
__device__ __forceinline__ C finish(const C* partial, int blocks) {
  using Buffers = SumBuffers<C, 1>;
  ZOO_SHARED(Buffers, buffers, 1);
  Block<C, 1> team(buffers[0]);
  C sum[1] = {};
  const C* mine = partial + static_cast<int64>(blockIdx.x) * blocks;
  for (int b = threadIdx.x; b < blocks; b += kFinishThreads) sum[0] += mine[b];
  team.sum(sum);
  return sum[0];
}

}  // namespace zoo
