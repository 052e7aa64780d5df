"""The ops of `ops.py` on CUDA tensors: which kernel, how the work is shared out, where the results go.

Why a file of its own: it is the host side of `cuda_kernels/comp_sum/*.cu`, and runs on the emulator as it does on a
GPU. Arguments and results are those of `eager.py`, whose contract it keeps; where a kernel cannot be used, that runs.
It adds one thing: targets are not looked at, and one out of range makes loss, statistics and gradient of its row NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import launch, use_cuda
from ...kernels.launch import DTYPE_CODES, MOST_BLOCKS, Extent, Machine, Signature, aligned, kernel_of
from ...kernels.ops import compute_dtype
from ...kernels.sources import Unit, comp_sum_unit
from . import eager

__all__ = ["comp_sum_backward", "comp_sum_forward"]

_THREADS = 256  # kThreads of comp_sum.cu
_BLOCK_THREADS = 512  # kBlockThreads
_TILE = 32  # kTile
_RESIDENT_THREADS = 2048  # a multiprocessor has at a time
_PACKS = 4  # a thread loads at once, kDeep
_LANES_PACKS = 256  # of a row that lanes of a warp share; beyond, a block has it
_MOST_CLASSES = 2**30  # of which, and of their loads by a block ahead, the count fits 32 bits

_PROBLEM = "S* scores, void* target, C* taus?, C a, C cap, i64 ignore_index, i64 rows, i32 classes"
_FORWARD_LANES = Signature(f"{_PROBLEM}, i32 lanes, C* loss, C* statistics")
_FORWARD_BLOCK = Signature(f"{_PROBLEM}, C* loss, C* statistics")
_FORWARD_PLANES = Signature(f"{_PROBLEM}, i64 inner, i32 groups, C* loss, C* statistics")
_BACKWARD_LANES = Signature(f"C* grad, {_PROBLEM}, C* statistics, i32 lanes, S* dscores")
_BACKWARD_BLOCK = Signature(f"C* grad, {_PROBLEM}, C* statistics, i32 parts, i32 segment, S* dscores")
_BACKWARD_PLANES = Signature(f"C* grad, {_PROBLEM}, C* statistics, i64 inner, i32 groups, S* dscores")


def _unit(input: Tensor) -> Unit | None:
    """None if no kernel can be used here."""
    if input.dtype not in DTYPE_CODES or input.numel() == 0 or input.shape[1] >= _MOST_CLASSES:
        return None
    unit = comp_sum_unit(str(input.dtype).removeprefix("torch."))
    return unit if use_cuda(unit, input.device) else None


def _problem(
    input: Tensor, target: Tensor, taus: Tensor | None, tau: float, cap: float, ignore_index: int
) -> tuple[Any, ...]:
    """What `_PROBLEM` names; 1 - tau in float64, of which float would lose what a tau near 1 has."""
    return (input, target, taus, 1.0 - tau, float(cap), ignore_index, target.numel(), input.shape[1])


def _packs(input: Tensor) -> int:
    """16-byte packs of a row, the last one perhaps incomplete."""
    return -(-input.shape[1] * input.dtype.itemsize // 16)


def _lanes(packs: int) -> int:
    """Threads that share a row: a power of two that gives each the packs it loads at once."""
    return min(32, 1 << (-(-packs // _PACKS) - 1).bit_length())


def _block_threads(packs: int) -> int:
    return min(_BLOCK_THREADS, -(-packs // (_PACKS * 32)) * 32)


def _parts(rows: int, packs: int, threads: int, machine: Machine) -> tuple[int, int]:
    """Into how many parts a row is cut so that few rows fill the machine, and the packs of one."""
    blocks = machine.multiprocessors * max(1, _RESIDENT_THREADS // threads)
    parts = max(1, min(-(-blocks // rows), packs // (_PACKS * threads)))
    segment = -(-packs // parts)
    return -(-packs // segment), segment


def _groups(positions: int, classes: int, machine: Machine) -> int:
    """Warps that share the classes of a position: a power of two; several where few positions have many classes."""
    groups = 1
    while (
        groups * _TILE < _THREADS
        and positions * groups < machine.multiprocessors * _RESIDENT_THREADS
        and classes >= 2 * _PACKS * 2 * groups
    ):
        groups *= 2
    return groups


def _grid(blocks: int) -> Extent:
    if blocks > MOST_BLOCKS:
        raise ValueError(f"comp_sum: expected at most {MOST_BLOCKS} blocks of work, got {blocks}; split the batch")
    return (blocks, 1, 1)


def comp_sum_forward(
    input: Tensor, target: Tensor, taus: Tensor | None, tau: float, cap: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """zoo::comp_sum."""
    unit = _unit(input)
    if unit is None:
        return eager.comp_sum_forward(input, target, taus, tau, cap, ignore_index)
    input, rows, packs = aligned(input), target.numel(), _packs(input)
    loss = torch.empty(target.shape, dtype=compute_dtype(input.dtype), device=input.device)
    results = (loss, loss.new_empty(2, *target.shape))
    problem = _problem(input, target, taus, tau, cap, ignore_index)
    if input.shape[2] > 1:
        groups = _groups(rows, input.shape[1], launch.machine_of(input.device))
        grid = _grid(-(-rows * groups // _THREADS))
        kernel = kernel_of(unit, "comp_sum_fwd_planes", _FORWARD_PLANES)
        kernel(grid, (_THREADS, 1, 1), *problem, input.shape[2], groups, *results)
    elif packs <= _LANES_PACKS:
        lanes = _lanes(packs)
        kernel = kernel_of(unit, "comp_sum_fwd_lanes", _FORWARD_LANES)
        kernel(_grid(-(-rows * lanes // _THREADS)), (_THREADS, 1, 1), *problem, lanes, *results)
    else:
        kernel = kernel_of(unit, "comp_sum_fwd_block", _FORWARD_BLOCK)
        kernel(_grid(rows), (_block_threads(packs), 1, 1), *problem, *results)
    return results


def comp_sum_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    statistics: Tensor,
    taus: Tensor | None,
    tau: float,
    cap: float,
    ignore_index: int,
) -> Tensor:
    """zoo::comp_sum_backward."""
    unit = _unit(input)
    if unit is None:
        return eager.comp_sum_backward(grad, input, target, statistics, taus, tau, cap, ignore_index)
    input, rows, packs = aligned(input), target.numel(), _packs(input)
    result = torch.empty_like(input)
    problem = (grad, *_problem(input, target, taus, tau, cap, ignore_index), statistics)
    if input.shape[2] > 1:
        groups = _groups(rows, input.shape[1], launch.machine_of(input.device))
        grid = _grid(-(-rows * groups // _THREADS))
        kernel = kernel_of(unit, "comp_sum_bwd_planes", _BACKWARD_PLANES)
        kernel(grid, (_THREADS, 1, 1), *problem, input.shape[2], groups, result)
    elif packs <= _LANES_PACKS:
        lanes = _lanes(packs)
        kernel = kernel_of(unit, "comp_sum_bwd_lanes", _BACKWARD_LANES)
        kernel(_grid(-(-rows * lanes // _THREADS)), (_THREADS, 1, 1), *problem, lanes, result)
    else:
        threads = _block_threads(packs)
        parts, segment = _parts(rows, packs, threads, launch.machine_of(input.device))
        kernel = kernel_of(unit, "comp_sum_bwd_block", _BACKWARD_BLOCK)
        kernel(_grid(rows * parts), (threads, 1, 1), *problem, parts, segment, result)
    return result
