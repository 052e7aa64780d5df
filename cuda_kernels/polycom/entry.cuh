// What the entry points of this family share: the types and the order they are compiled for (ZOO_SCALAR: float, double,
// zoo::half, zoo::bf16; ZOO_ORDER), and the kernel that ends every sum over blocks.
#pragma once

#include "common/finish.cuh"
#include "polycom/math.h"

using S = ZOO_SCALAR;
using C = zoo::compute_t<S>;
using zoo::int64;

namespace {

using namespace zoo;
using namespace zoo::polycom;

constexpr int kOrder = ZOO_ORDER;

}  // namespace

// dweight and dbias from the summands of the blocks; grid order + 1.
extern "C" __global__ void __launch_bounds__(kFinishThreads)
    polycom_finish(const C* partial, int blocks, C* dweight, C* dbias) {
  const C total = finish(partial, blocks);
  if (threadIdx.x == 0) (blockIdx.x < kOrder ? dweight[blockIdx.x] : *dbias) = total;
}
ZOO_EXPORT(polycom_finish)
