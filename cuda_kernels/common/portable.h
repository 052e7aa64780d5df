// One source for three compilers: NVRTC or nvcc for a GPU, g++ for the emulator (emu.h).
//
// What a kernel may use beyond C++17: threadIdx, blockIdx, blockDim, gridDim, the __sync, __shfl and vote functions with
// full masks, atomics, and the macros below. No standard header: NVRTC has none.
#pragma once

#ifdef __CUDACC__

#define ZOO_HD __host__ __device__ __forceinline__
// Shared memory of one block: a fixed array, and the one array whose size the launch decides.
#define ZOO_SHARED(type, name, count) __shared__ type name[count]
#define ZOO_DYNAMIC_SHARED(type, name) \
  extern __shared__ __align__(16) unsigned char zoo_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(zoo_dynamic_shared)
// After each kernel: its entry for the emulator. A GPU needs none.
#define ZOO_EXPORT(kernel)

#else

#include "emu.h"
#define ZOO_HD inline __attribute__((always_inline))

#endif
