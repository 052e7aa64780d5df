"""The ops of `ops.py` on CUDA tensors: which kernel, how the work is shared out, where the results go.

Why a file of its own: it is the host side of `cuda_kernels/evonorm/*.cu`, and runs on the emulator as it does on a GPU.
Arguments and results are those of `eager.py`, whose contract it keeps; where a kernel cannot be used, that runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import launch, use_cuda
from ...kernels.launch import DTYPE_CODES, MOST_BLOCKS, Extent, Machine, Signature, aligned, kernel_of
from ...kernels.ops import compute_dtype
from ...kernels.sources import Unit, evonorm_b_unit, evonorm_moments_unit, evonorm_s_unit
from . import eager

_THREADS = 256  # kThreads of spread.cuh
_SLAB_THREADS = 512  # kSlabThreads of evonorm_s.cu
_RESIDENT_THREADS = 2048  # a multiprocessor has at a time
_COLUMNS = 32  # threads of a block side by side along the channels: 512 neighbouring bytes
_MOMENTS, _DEVIATION, _ROOT_MEAN_SQUARE = 0, 1, 2  # enum Mode of spread.cuh

_SHAPE = "i64 samples, i32 channels, i32 length, i32 parts, i32 segment, i32 lanes"
_PARAMETERS = "void* v?, void* weight?, void* bias?, i32 v_dtype, i32 weight_dtype, i32 bias_dtype, i32 per_sample"
_S = f"{_SHAPE}, {_PARAMETERS}, C* stats, i32 group_channels, i32 linear"
_B = f"{_SHAPE}, {_PARAMETERS}, C* moments, C* left, C eps"
_S_SLAB_FORWARD = Signature(f"S* x, {_S}, C eps, i32 mode, S* y")
_S_SLAB_BACKWARD = Signature(f"S* grad, S* x, {_S}, C* partial, S* dx")
_S_APPLY = Signature(f"S* x, {_S}, S* y")
_S_SUMS = Signature(f"S* grad, S* x, {_S}, C* partial")
_S_GRAD = Signature(f"S* grad, S* x, {_S}, C* pull, S* dx")
_B_APPLY = Signature(f"S* x, {_B}, S* y")
_B_SUMS = Signature(f"S* grad, S* x, {_B}, C* partial")
_B_GRAD = Signature(f"S* grad, S* x, {_B}, C* centre, C* pull, C* batch_pull, S* dx")
_PLANE_MOMENTS = Signature(f"S* x, {_SHAPE}, C* out")
_MERGE = Signature("C* from, i64 sets, i32 members, i32 length, i32 parts, i32 segment, C eps, i32 mode, C* out")


@dataclass(frozen=True)
class _Layout:
    """How the passes over a tensor are shared out (struct Shape of spread.cuh), and the grid that does it."""

    name: str
    shape: tuple[int, int, int, int, int, int]
    grid: Extent
    block: Extent

    @property
    def parts(self) -> int:
        return self.shape[3]

    @property
    def planes(self) -> int:
        return self.shape[0] * self.shape[1]


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _serves(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether kernels can take a call: its dtypes, and something to do in each dimension."""
    dtypes = (x.dtype, *(p.dtype for p in parameters if p is not None))
    return x.numel() > 0 and x.shape[1] * x.shape[2] < 2**31 and all(d in DTYPE_CODES for d in dtypes)


def _layout(x: Tensor, channels_last: bool, machine: Machine) -> _Layout:
    pack, want = 16 // x.dtype.itemsize, machine.multiprocessors * _RESIDENT_THREADS
    return _pixels(x, pack, want) if channels_last else _planes(x, pack, want)


def _lanes(length: int, pack: int) -> int:
    """Threads that share a plane: a power of two that gives each about two packs."""
    packs = -(-length // pack) + (length % pack != 0)
    return min(32, 1 << max(0, (packs // 2 - 1).bit_length()))


def _planes(x: Tensor, pack: int, want: int) -> _Layout:
    """Large planes are cut where there are too few of them to fill the machine."""
    samples, channels, length = x.shape
    lanes = _lanes(length, pack)
    threads = samples * channels * lanes
    parts = max(1, min(-(-want // threads), length // (4 * lanes * pack)))
    parts, segment = _cut(length, parts, pack)
    blocks = -(-samples * channels * parts * lanes // _THREADS)
    return _Layout("planes", (samples, channels, length, parts, segment, lanes), _grid(blocks), (_THREADS, 1, 1))


def _pixels(x: Tensor, pack: int, want: int) -> _Layout:
    """A block has up to 32 packs of channels side by side and a part of the positions below each other."""
    samples, length, channels = x.shape
    packs = -(-channels // pack)
    lanes = min(packs, _COLUMNS)
    columns, rows = -(-packs // lanes), _THREADS // lanes
    blocks = samples * columns
    parts = max(1, min(-(-want // (blocks * _THREADS)), length // (4 * rows)))
    parts, segment = _cut(length, parts, 1)
    return _Layout(
        "pixels",
        (samples, channels, length, parts, segment, lanes),
        _grid(blocks * parts),
        (lanes * rows, 1, 1),
    )


def _cut(length: int, parts: int, unit: int) -> tuple[int, int]:
    """Equal segments, a multiple of `unit` long so that they stay aligned, and how many there are."""
    segment = -(-length // (parts * unit)) * unit
    return -(-length // segment), segment


def _grid(blocks: int) -> Extent:
    if blocks > MOST_BLOCKS:
        raise ValueError(f"EvoNorm: expected at most {MOST_BLOCKS} blocks of work, got {blocks}; split the batch")
    return (blocks, 1, 1)


def _parameters(v: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """What `_PARAMETERS` names."""
    codes = [0 if t is None else DTYPE_CODES[t.dtype] for t in (v, weight, bias)]
    per_sample = any(t is not None and t.ndim == 2 for t in (weight, bias))
    return v, weight, bias, *codes, int(per_sample)


# S layers


@dataclass(frozen=True)
class _Slabs:
    """One block a group of a sample, which it keeps in shared memory."""

    shape: tuple[int, int, int, int, int, int]
    grid: Extent
    block: Extent
    shared: int


def _slabs(x: Tensor, groups: int, tensors: int, machine: Machine) -> _Slabs | None:
    """None if a group does not fit.

    Args:
        x: [N, C, L].
        groups: of a sample.
        tensors: of the size of x that wait in shared memory.
        machine: decides how much that is.
    """
    (samples, channels, length), pack = x.shape, 16 // x.dtype.itemsize
    members, lanes = channels // groups, _lanes(length, pack)
    packs = members * -(-length // pack)
    threads = min(_SLAB_THREADS, max(32, -(-packs // (4 * 32)) * 32))
    # Every team of lanes should have something to do, and two packs a lane.
    parts = max(1, min(threads // lanes // members, length // (2 * lanes * pack)))
    parts, segment = _cut(length, parts, pack)
    slots = members * parts * ((segment + 2 * pack - 2) // pack)
    shared = 16 * slots * tensors
    if shared > machine.shared_bytes or samples * groups > MOST_BLOCKS:
        return None
    shape = (samples, channels, length, parts, segment, lanes)
    return _Slabs(shape, (samples * groups, 1, 1), (threads, 1, 1), shared)


def _s_unit(x: Tensor, *parameters: Tensor | None) -> Unit | None:
    if not _serves(x, *parameters):
        return None
    unit = evonorm_s_unit(_dtype_name(x))
    return unit if use_cuda(unit, x.device) else None


def evonorm_s_forward(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    rms: bool,
    linear: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """zoo::evonorm_s."""
    unit = _s_unit(x, v, weight, bias)
    if unit is None:
        return eager.evonorm_s_forward(x, v, weight, bias, groups, eps, rms, linear, channels_last)
    x, y, machine = aligned(x), torch.empty_like(x), launch.machine_of(x.device)
    members = x.shape[2 if channels_last else 1] // groups
    mode = _ROOT_MEAN_SQUARE if rms else _DEVIATION
    slabs = None if channels_last else _slabs(x, groups, 1, machine)
    if slabs is not None:
        stats = torch.empty(2, x.shape[0], groups, dtype=compute_dtype(x.dtype), device=x.device)
        layer = (*_parameters(v, weight, bias), stats, members, int(linear))
        kernel = kernel_of(unit, "evonorm_s_fwd_slab", _S_SLAB_FORWARD)
        kernel(slabs.grid, slabs.block, x, *slabs.shape, *layer, float(eps), mode, y, shared=slabs.shared)
        return y, stats
    layout = _layout(x, channels_last, machine)
    stats = _merged(x, _part_moments(x, layout), layout, members, float(eps), mode).view(2, x.shape[0], groups)
    layer = (*_parameters(v, weight, bias), stats, members, int(linear))
    kernel_of(unit, f"evonorm_s_apply_{layout.name}", _S_APPLY)(layout.grid, layout.block, x, *layout.shape, *layer, y)
    return y, stats


def evonorm_s_backward(
    grad: Tensor,
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    eps: float,
    rms: bool,
    linear: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """zoo::evonorm_s_backward."""
    unit = _s_unit(x, v, weight)
    if unit is None:
        return eager.evonorm_s_backward(grad, x, v, weight, stats, eps, rms, linear, channels_last)
    grad, x, dx, machine = aligned(grad), aligned(x), torch.empty_like(x), launch.machine_of(x.device)
    channels, groups = x.shape[2 if channels_last else 1], stats.shape[2]
    members = channels // groups
    layer = (*_parameters(v, weight, None), stats, members, int(linear))
    slabs = None if channels_last else _slabs(x, groups, 2, machine)
    if slabs is not None:
        partial = stats.new_empty(3, x.shape[0], channels, slabs.shape[3])
        kernel = kernel_of(unit, "evonorm_s_bwd_slab", _S_SLAB_BACKWARD)
        kernel(slabs.grid, slabs.block, grad, x, *slabs.shape, *layer, partial, dx, shared=slabs.shared)
        return dx, *eager.s_parameter_gradients(partial.sum(-1), weight, stats)
    layout = _layout(x, channels_last, machine)
    partial = stats.new_empty(3, x.shape[0], channels, layout.parts)
    kernel_of(unit, f"evonorm_s_sums_{layout.name}", _S_SUMS)(
        layout.grid, layout.block, grad, x, *layout.shape, *layer, partial
    )
    sums = partial.sum(-1)
    pull = eager.s_pull(sums[0], weight, stats, members * (x.numel() // (x.shape[0] * channels)))
    kernel_of(unit, f"evonorm_s_grad_{layout.name}", _S_GRAD)(
        layout.grid, layout.block, grad, x, *layout.shape, *layer, pull, dx
    )
    return dx, *eager.s_parameter_gradients(sums, weight, stats)


def _part_moments(x: Tensor, layout: _Layout) -> Tensor:
    """Mean and variance of every part of every plane, [2, planes, parts]."""
    partial = torch.empty(2, layout.planes, layout.parts, dtype=compute_dtype(x.dtype), device=x.device)
    kernel = kernel_of(evonorm_moments_unit(_dtype_name(x)), f"evonorm_moments_{layout.name}", _PLANE_MOMENTS)
    kernel(layout.grid, layout.block, x, *layout.shape, partial)
    return partial


def _merged(x: Tensor, partial: Tensor, layout: _Layout, members: int, eps: float, mode: int) -> Tensor:
    """Those of sets of `members` planes, [2, planes / members]."""
    sets, (_, _, length, parts, segment, _) = layout.planes // members, layout.shape
    out = partial.new_empty(2, sets)
    kernel = kernel_of(evonorm_moments_unit(_dtype_name(x)), "evonorm_merge", _MERGE)
    grid = _grid(-(-sets // (_THREADS // 32)))
    kernel(grid, (_THREADS, 1, 1), partial, sets, members, length, parts, segment, eps, mode, out)
    return out


# B layers


def evonorm_moments(x: Tensor, channels_last: bool) -> Tensor:
    """zoo::evonorm_moments."""
    if not _serves(x) or not use_cuda(evonorm_moments_unit(_dtype_name(x)), x.device):
        return eager.evonorm_moments(x, channels_last)
    x = aligned(x)
    layout = _layout(x, channels_last, launch.machine_of(x.device))
    moments = _part_moments(x, layout)
    if layout.parts > 1:
        moments = _merged(x, moments, layout, 1, 0.0, _MOMENTS)
    return moments.view(2, *layout.shape[:2])


def _b_unit(x: Tensor, variant: int, *parameters: Tensor | None) -> Unit | None:
    if not _serves(x, *parameters):
        return None
    unit = evonorm_b_unit(_dtype_name(x), variant)
    return unit if use_cuda(unit, x.device) else None


def evonorm_b_apply(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    left: Tensor,
    eps: float,
    variant: int,
    channels_last: bool,
) -> Tensor:
    """zoo::evonorm_b_apply."""
    unit = _b_unit(x, variant, v, weight, bias)
    if unit is None:
        return eager.evonorm_b_apply(x, v, weight, bias, moments, left, eps, variant, channels_last)
    x, y = aligned(x), torch.empty_like(x)
    layout = _layout(x, channels_last, launch.machine_of(x.device))
    layer = (*_parameters(v, weight, bias), moments, left, float(eps))
    kernel_of(unit, f"evonorm_b_apply_{layout.name}", _B_APPLY)(layout.grid, layout.block, x, *layout.shape, *layer, y)
    return y


def evonorm_b_sums(
    grad: Tensor,
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    moments: Tensor,
    left: Tensor,
    eps: float,
    variant: int,
    channels_last: bool,
) -> Tensor:
    """zoo::evonorm_b_sums."""
    unit = _b_unit(x, variant, v, weight)
    if unit is None:
        return eager.evonorm_b_sums(grad, x, v, weight, moments, left, eps, variant, channels_last)
    grad, x = aligned(grad), aligned(x)
    layout = _layout(x, channels_last, launch.machine_of(x.device))
    layer = (*_parameters(v, weight, None), moments, left, float(eps))
    partial = moments.new_empty(5, *layout.shape[:2], layout.parts)
    kernel_of(unit, f"evonorm_b_sums_{layout.name}", _B_SUMS)(
        layout.grid, layout.block, grad, x, *layout.shape, *layer, partial
    )
    return partial.squeeze(-1) if layout.parts == 1 else partial.sum(-1)


def evonorm_b_grad(
    grad: Tensor,
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    moments: Tensor,
    left: Tensor,
    centre: Tensor,
    pull: Tensor,
    batch_pull: Tensor,
    eps: float,
    variant: int,
    channels_last: bool,
) -> Tensor:
    """zoo::evonorm_b_grad."""
    unit = _b_unit(x, variant, v, weight)
    if unit is None:
        arguments = (grad, x, v, weight, moments, left, centre, pull, batch_pull, eps, variant, channels_last)
        return eager.evonorm_b_grad(*arguments)
    grad, x, dx = aligned(grad), aligned(x), torch.empty_like(x)
    layout = _layout(x, channels_last, launch.machine_of(x.device))
    layer = (*_parameters(v, weight, None), moments, left, float(eps))
    kernel_of(unit, f"evonorm_b_grad_{layout.name}", _B_GRAD)(
        layout.grid, layout.block, grad, x, *layout.shape, *layer, centre, pull, batch_pull, dx
    )
    return dx
