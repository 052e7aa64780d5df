"""The native side: kernel sources of `cuda_kernels/`, compiled when first needed, cached, loaded and launched.

| module | what |
| --- | --- |
| `sources` | the sources, what a compiled file depends on, which variants there are |
| `store` | where compiled files lie: ahead of time, in the package, in the cache |
| `nvrtc` | CUDA C++ to a cubin, without a GPU or a CUDA toolkit |
| `cpu` | the CPU library: built by the C++ compiler, loaded into torch |
| `launch` | kernels on torch's current stream, arguments checked |
| `emulate` | the same kernels on the host, for tests |
| `commands` | `zoo kernels build`, `status`, `clear` |

A component asks two questions: :func:`use_cpu_library` before an op on CPU tensors, :func:`use_cuda` before one on
CUDA tensors. Both answer True, or say once why not and how to mend it and answer False; with `ZOO_KERNELS=require` they
raise instead, with `ZOO_KERNELS=off` they are False and silent.
"""

from .cpu import use_cpu_library
from .launch import use_cuda

__all__ = ["use_cpu_library", "use_cuda"]
