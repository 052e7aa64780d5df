// Small kernels that test the emulator itself. The first half is right and must compute what its comment says
// under every schedule; the second half is wrong on purpose, each kernel in one way.
#include "common/portable.h"

namespace {

constexpr unsigned full = 0xffffffffu;

template <class T>
ZOO_HD T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(full, value, offset);
  return value;
}

ZOO_HD unsigned global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

}  // namespace

// ---- right ----

// out += sum of x [n]: shuffles within warps, shared memory between them, one atomic a block.
extern "C" __global__ void block_sum(const double* __restrict__ x, double* __restrict__ out, int n) {
  ZOO_SHARED(double, parts, 32);
  const int i = static_cast<int>(global_thread()), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const double part = warp_sum(i < n ? x[i] : 0.0);
  if (lane == 0) parts[warp] = part;
  __syncthreads();
  if (warp == 0) {
    const double total = warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? parts[lane] : 0.0);
    if (lane == 0) atomicAdd(out, total);
  }
}
ZOO_EXPORT(block_sum)

// y = inclusive scan of x, both [blockDim.x]: two barriers a round.
extern "C" __global__ void block_scan(const int* __restrict__ x, int* __restrict__ y) {
  ZOO_SHARED(int, sums, 1024);
  const unsigned i = threadIdx.x;
  sums[i] = x[i];
  __syncthreads();
  for (unsigned step = 1; step < blockDim.x; step *= 2) {
    const int left = i >= step ? sums[i - step] : 0;
    __syncthreads();
    sums[i] += left;
    __syncthreads();
  }
  y[i] = sums[i];
}
ZOO_EXPORT(block_scan)

// out [warps, 3] = ballot, any, all of x over each warp, with a shuffle between the votes; y = x of the lane
// to the right.
extern "C" __global__ void warp_votes(const int* __restrict__ x, unsigned* __restrict__ out, int* __restrict__ y) {
  const unsigned i = global_thread(), warp = i / 32;
  const unsigned ballot = __ballot_sync(full, x[i] != 0);
  const int right = __shfl_down_sync(full, x[i], 1);
  const int any = __any_sync(full, x[i]);
  const int back = __shfl_up_sync(full, right, 1);
  const int all = __all_sync(full, x[i]);
  y[i] = right + (i % 32 != 0 && back != x[i] ? 1000 : 0);
  if (i % 32 == 0) {
    out[3 * warp] = ballot;
    out[3 * warp + 1] = any;
    out[3 * warp + 2] = all;
  }
}
ZOO_EXPORT(warp_votes)

// out [blockDim.x, rounds, 3] = how many threads vote yes, whether all, whether any. Thread i votes in round
// r iff i < r, and threads from `leave` on end before they vote.
extern "C" __global__ void block_votes(int* __restrict__ out, int rounds, unsigned leave) {
  const unsigned i = threadIdx.x;
  if (i >= leave) return;
  for (int r = 0; r < rounds; ++r) {
    const int yes = static_cast<int>(i) < r;
    int* const row = out + 3 * (i * rounds + r);
    row[0] = __syncthreads_count(2 * yes);
    row[1] = __syncthreads_and(yes);
    row[2] = __syncthreads_or(yes);
  }
}
ZOO_EXPORT(block_votes)

// counts [bins] += histogram of x [n]: atomics in shared and in global memory.
extern "C" __global__ void histogram(const int* __restrict__ x, unsigned* __restrict__ counts, int n, int bins) {
  ZOO_DYNAMIC_SHARED(unsigned, local);
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) local[bin] = 0;
  __syncthreads();
  for (int i = global_thread(); i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1u);
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) atomicAdd(&counts[bin], local[bin]);
}
ZOO_EXPORT(histogram)

// state [8] of x: least, largest, sum, or, and, sum of all that [6] held before, last, largest by compare and
// swap. wide [3]: count << 32, largest and least 1 << x; single [1]: count.
extern "C" __global__ void atomics(const int* __restrict__ x, int* __restrict__ state,
                                   unsigned long long* __restrict__ wide, float* __restrict__ single) {
  const int value = x[global_thread()];
  atomicMin(&state[0], value);
  atomicMax(&state[1], value);
  atomicAdd(&state[2], value);
  atomicOr(&state[3], value);
  atomicAnd(&state[4], value);
  atomicAdd(&state[5], atomicExch(&state[6], value));
  for (int seen = state[7]; seen < value;) {
    const int before = atomicCAS(&state[7], seen, value);
    seen = before == seen ? value : before;
  }
  atomicAdd(wide, 1ull << 32);
  atomicMax(wide + 1, 1ull << (value & 63));
  atomicMin(wide + 2, 1ull << (value & 63));
  atomicAdd(single, 1);
}
ZOO_EXPORT(atomics)

// y = x reversed within each block.
extern "C" __global__ void reverse(const float* __restrict__ x, float* __restrict__ y) {
  ZOO_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = x[global_thread()];
  __syncthreads();
  y[global_thread()] = tile[blockDim.x - 1 - threadIdx.x];
}
ZOO_EXPORT(reverse)

// out [warps] = sum of x over the lanes that the warp has; the last warp may be partial.
extern "C" __global__ void partial_warp_sum(const int* __restrict__ x, int* __restrict__ out) {
  const unsigned i = threadIdx.x, lanes = blockDim.x - i / 32 * 32;
  const unsigned mask = lanes >= 32 ? full : (1u << lanes) - 1;
  int total = 0;
  for (unsigned lane = 0; lane < 32 && lane < lanes; ++lane)
    total += __shfl_sync(mask, x[i], static_cast<int>(lane));
  if (i % 32 == 0) out[i / 32] = total;
}
ZOO_EXPORT(partial_warp_sum)

// Halves of a warp in different collectives at the same time: y = sum of x over the even, or largest of the
// odd lanes.
extern "C" __global__ void split_warp(const int* __restrict__ x, int* __restrict__ y) {
  const unsigned lane = threadIdx.x;
  int value = x[lane];
  if (lane % 2 == 0) {
    for (int offset = 2; offset < 32; offset *= 2) value += __shfl_xor_sync(0x55555555u, value, offset);
  } else {
    for (int offset = 2; offset < 32; offset *= 2) {
      const int other = __shfl_xor_sync(0xaaaaaaaau, value, offset);
      value = other > value ? other : value;
      __syncwarp(0xaaaaaaaau);
    }
  }
  y[lane] = value;
}
ZOO_EXPORT(split_warp)

// out [blocks * threads, 12] = the coordinates as each thread sees them, rows in the order of CUDA's
// numbering.
extern "C" __global__ void coordinates(unsigned* __restrict__ out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned values[12] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                               blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
  unsigned* const row = out + 12ull * (block * (blockDim.x * blockDim.y * blockDim.z) + thread);
  for (int i = 0; i < 12; ++i) row[i] = values[i];
}
ZOO_EXPORT(coordinates)

// out [32, 4]: what each lane gets from the four shuffles of x, with segments of `width` lanes.
extern "C" __global__ void shuffle_widths(const double* __restrict__ x, double* __restrict__ out, int operand,
                                          int width) {
  const unsigned lane = threadIdx.x;
  out[4 * lane] = __shfl_sync(full, x[lane], operand, width);
  out[4 * lane + 1] = __shfl_up_sync(full, x[lane], static_cast<unsigned>(operand), width);
  out[4 * lane + 2] = __shfl_down_sync(full, x[lane], static_cast<unsigned>(operand), width);
  out[4 * lane + 3] = __shfl_xor_sync(full, x[lane], operand, width);
}
ZOO_EXPORT(shuffle_widths)

// out [16] from u: bits and small functions.
extern "C" __global__ void intrinsics(unsigned u, float f, float* __restrict__ out) {
  out[0] = static_cast<float>(__popc(u));
  out[1] = static_cast<float>(__popcll(static_cast<unsigned long long>(u) << 32 | 1));
  out[2] = static_cast<float>(__ffs(static_cast<int>(u)));
  out[3] = static_cast<float>(__clz(static_cast<int>(u)));
  out[4] = static_cast<float>(__ffs(0) + __clz(0));
  out[5] = __uint_as_float(__float_as_uint(f));
  out[6] = __int_as_float(__float_as_int(f) ^ static_cast<int>(0x80000000u));
  out[7] = rsqrtf(f);
  out[8] = __fdividef(f, 3.0f);
  out[9] = __expf(f);
  out[10] = __logf(f);
  out[11] = exp2f(f);
  out[12] = fminf(f, 1.0f) + fmaxf(f, 2.0f);
  out[13] = static_cast<float>(rsqrt(static_cast<double>(f)));
  const float floats = make_float4(1, 2, 3, 4).w + make_float2(1, 2).y + make_float3(1, 2, 3).z;
  const int ints = make_int2(1, 2).y + make_int4(1, 2, 3, 4).w;
  const unsigned unsigneds = make_uint2(1, 2).y + make_uint3(1, 2, 3).z + make_uint4(1, 2, 3, 4).w;
  out[14] = floats + static_cast<float>(make_double2(1, 2).y) + static_cast<float>(ints + unsigneds);
  out[15] = static_cast<float>(alignof(float2) + alignof(float3) + alignof(float4) + alignof(double2) + alignof(int2) +
                               alignof(int4) + alignof(uint2) + alignof(uint3) + alignof(uint4));
  __threadfence();
  __threadfence_block();
}
ZOO_EXPORT(intrinsics)

struct Affine {
  double slope;
  float offset;
};

// y [n] = slope x + offset, unless y is null: a struct by value and 64-bit sizes as arguments.
extern "C" __global__ void affine(const float* __restrict__ x, double* __restrict__ y, Affine map, long long n) {
  const long long i = global_thread();
  if (y != nullptr && i < n) y[i] = map.slope * __ldg(&x[i]) + map.offset;
}
ZOO_EXPORT(affine)

// out [blocks, 2] = whether the block finds its shared memory, fixed and dynamic, as NaN, after which it
// writes there.
extern "C" __global__ void finds_poison(int* __restrict__ out) {
  ZOO_SHARED(float, fixed, 8);
  ZOO_DYNAMIC_SHARED(double, dynamic);
  if (threadIdx.x == 0) {
    out[2 * blockIdx.x] = fixed[5] != fixed[5];
    out[2 * blockIdx.x + 1] = dynamic[1] != dynamic[1];
    fixed[5] = 0;
    dynamic[1] = 0;
  }
}
ZOO_EXPORT(finds_poison)

// order [rounds, blocks * threads] = the threads in the order in which they come by, a barrier a round;
// counter starts at 0.
extern "C" __global__ void turns(int* __restrict__ order, int* __restrict__ counter, int rounds) {
  for (int r = 0; r < rounds; ++r) {
    order[atomicAdd(&counter[r], 1) + r * gridDim.x * blockDim.x] = static_cast<int>(global_thread());
    __syncthreads();
  }
}
ZOO_EXPORT(turns)

// ---- wrong ----

// y[i] = x[i - 1], but the barrier between writing and reading is missing.
extern "C" __global__ void missing_barrier(const float* __restrict__ x, float* __restrict__ y) {
  ZOO_SHARED(float, tile, 1024);
  const unsigned i = threadIdx.x;
  tile[i] = x[i];
  y[i] = i > 0 ? tile[i - 1] : 0.0f;
}
ZOO_EXPORT(missing_barrier)

// out [warps, rounds] = sums over the block of i + r, but a fast warp overwrites the parts of round r while a
// slow one still adds them up: the barrier at the end of the round is missing.
extern "C" __global__ void reused_too_early(int* __restrict__ out, int rounds) {
  ZOO_SHARED(int, parts, 32);
  const int i = threadIdx.x, warps = blockDim.x / 32;
  for (int r = 0; r < rounds; ++r) {
    const int part = warp_sum(i + r);
    if (i % 32 == 0) parts[i / 32] = part;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < warps; ++w) total += parts[w];
    if (i % 32 == 0) out[i / 32 * rounds + r] = total;
  }
}
ZOO_EXPORT(reused_too_early)

// out [blocks] = 0, 1, 2 ...: each block counts on the one before it.
extern "C" __global__ void counts_on_block_order(int* __restrict__ out) {
  const unsigned block = blockIdx.x;
  if (threadIdx.x == 0) out[block] = block > 0 ? out[block - 1] + 1 : 0;
}
ZOO_EXPORT(counts_on_block_order)

// The first 16 threads at the barrier, the next 16 at a warp collective that needs the first.
extern "C" __global__ void deadlock(int* __restrict__ out) {
  if (threadIdx.x < 16) {
    __syncthreads();  // line of the block
  } else if (threadIdx.x < 32) {
    __syncwarp();  // line of the warp
  }
  out[threadIdx.x] = 1;
}
ZOO_EXPORT(deadlock)

extern "C" __global__ void divergent_barrier(int* __restrict__ out) {
  if (threadIdx.x < 32) {
    __syncthreads();  // one site
  } else {
    __syncthreads();  // another site
  }
  out[threadIdx.x] = 1;
}
ZOO_EXPORT(divergent_barrier)

extern "C" __global__ void exited_lanes(int* __restrict__ out) {
  const int lane = threadIdx.x;
  if (lane == 3 || lane >= 30) return;
  out[lane] = __shfl_sync(full, lane, 0);
}
ZOO_EXPORT(exited_lanes)

extern "C" __global__ void mixed_collectives(int* __restrict__ out) {
  const int lane = threadIdx.x;
  if (lane < 8)
    out[lane] = __shfl_sync(full, lane, 0);
  else
    out[lane] = __any_sync(full, lane);
}
ZOO_EXPORT(mixed_collectives)

// A collective of all lanes with `mask`; the mask may name lanes that do not exist or leave out the caller.
extern "C" __global__ void given_mask(int* __restrict__ out, unsigned mask) {
  out[threadIdx.x] = __any_sync(mask, 1);
}
ZOO_EXPORT(given_mask)

extern "C" __global__ void different_masks(int* __restrict__ out) {
  const unsigned lane = threadIdx.x;
  out[lane] = __any_sync(lane == 0 ? 3u : full, 1);
}
ZOO_EXPORT(different_masks)

// One thread writes one element of a fixed array of 7 and one of the dynamic shared memory.
extern "C" __global__ void shared_write(int fixed_index, int dynamic_index, int value) {
  ZOO_SHARED(int, fixed, 7);
  ZOO_DYNAMIC_SHARED(int, dynamic);
  int* const start = &fixed[0];
  if (threadIdx.x == 1) {
    start[fixed_index] = value;
    dynamic[dynamic_index] = value;
  }
}
ZOO_EXPORT(shared_write)

// y [threads] = what the neighbour never wrote.
extern "C" __global__ void uninitialised(float* __restrict__ y) {
  ZOO_SHARED(float, tile, 64);
  if (threadIdx.x % 2 == 0) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}
ZOO_EXPORT(uninitialised)

// A local array larger than any stack of the emulator.
extern "C" __global__ void deep_stack(int* __restrict__ out, int n) {
  volatile int local[40000];
  for (int i = n - 1; i >= 0; --i) local[i] = i;
  out[threadIdx.x] = local[n / 2];
}
ZOO_EXPORT(deep_stack)

#ifndef __CUDACC__
extern "C" __global__ void throws() { throw std::runtime_error("from the kernel"); }
ZOO_EXPORT(throws)
#endif

// Writes x[index]: past the end of the caller's memory, which only the address sanitizer sees.
extern "C" __global__ void global_write(int* __restrict__ x, int index) { x[index] = 1; }
ZOO_EXPORT(global_write)
