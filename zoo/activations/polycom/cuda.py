"""The ops of `ops.py` on CUDA tensors: which kernel, how many threads and blocks, where the results go.

Why a file of its own: it is the host side of `cuda_kernels/polycom/*.cu`, and runs on the emulator as it does on a GPU.
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
from ...kernels.sources import MOST_POWERS, Unit, poly_norm_unit, poly_relu_unit, row_plan
from . import eager
from .reference import rescale_threshold

_WARP_THREADS = 256  # of a block in which each warp has a row
_FINISH_THREADS = 256
_RESIDENT_THREADS = 1024  # a multiprocessor works on; with 64 registers each that is what fits
_RELU_THREADS = 256

_PROBLEM = (
    "S* x, S* mul?, void* weight, void* bias?, void* scores?, C* stats, i64 rows, i32 width, i32 staged,"
    " i32 weight_dtype, i32 bias_dtype, i32 scores_dtype, i32 weight_per_row, i32 bias_per_row,"
    " C count, C eps, C threshold, C clamp"
)
_FORWARD = Signature(f"{_PROBLEM}, S* out")
_BACKWARD = Signature(f"{_PROBLEM}, S* grad, S* dx, S* dmul?, C* partial?, C* dweight, C* dbias, C* dscores?")
_FINISH = Signature("C* partial, i32 blocks, C* dweight, C* dbias")
_RELU_FORWARD = Signature("S* x, void* weight, void* bias?, i32 weight_dtype, i32 bias_dtype, i64 elements, S* y")
_RELU_BACKWARD = Signature("S* grad, S* x, void* weight, i32 weight_dtype, i64 elements, S* dx, C* partial")


def _unit(x: Tensor, weight: Tensor, gated: bool | None) -> Unit | None:
    """The unit that serves, PolyReLU's for None; None if no kernel can be used here."""
    dtype, order = str(x.dtype).removeprefix("torch."), weight.shape[-1]
    if x.dtype not in DTYPE_CODES or order > MOST_POWERS or weight.dtype not in DTYPE_CODES:
        return None
    unit = poly_relu_unit(dtype, order) if gated is None else poly_norm_unit(dtype, order, gated)
    return unit if use_cuda(unit, x.device) else None


@dataclass(frozen=True)
class _Team:
    """How rows are shared out: the kernel's variant, threads of a block, rows a block has at a time, staged packs."""

    variant: str
    threads: int
    rows_per_block: int
    staged: int = 0
    shared: int = 0


def _team(width: int, itemsize: int, items: int, most_threads: int, tensors: int, machine: Machine) -> _Team:
    """A warp, a block that keeps the row in registers, or one that reads it twice.

    Args:
        width: of a row.
        itemsize: bytes of an element.
        items: elements of a row one thread keeps in registers.
        most_threads: of a block.
        tensors: read twice, which share the staging memory.
        machine: decides how much that is.
    """
    pack = 16 // itemsize
    packs = width // pack if width % pack == 0 else (width + 2 * pack - 2) // pack  # a row may begin inside a pack
    threads = -(-packs // (items // pack))
    if threads <= 32:
        return _Team("warp", _WARP_THREADS, _WARP_THREADS // 32)
    threads = -(-threads // 32) * 32
    if threads <= most_threads:
        return _Team("block", threads, 1)
    staged = min(packs, machine.shared_bytes // (16 * tensors))
    return _Team("loop", most_threads, 1, staged, 16 * tensors * staged)


def _grid(rows: int, team: _Team, machine: Machine | None) -> Extent:
    """One block a row, or a few blocks a multiprocessor that loop over the rows."""
    blocks = -(-rows // team.rows_per_block)
    if machine is not None:
        blocks = min(blocks, machine.multiprocessors * max(1, _RESIDENT_THREADS // team.threads))
    return (min(blocks, MOST_BLOCKS), 1, 1)


def _problem(
    x: Tensor,
    mul: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    stats: Tensor,
    staged: int,
    eps: float,
    rms: bool,
    clamp: float | None,
) -> tuple[Any, ...]:
    """What `_PROBLEM` names."""
    rows, width = x.shape
    code = [0 if t is None else DTYPE_CODES[t.dtype] for t in (weight, bias, scores)]
    per_row = [int(t is not None and t.ndim == 2) for t in (weight, bias)]
    count, threshold = float(width if rms else 1), rescale_threshold(weight.shape[-1])
    numbers = (count, float(eps), threshold, 0.0 if clamp is None else float(clamp))
    return (x, mul, weight, bias, scores, stats, rows, width, staged, *code, *per_row, *numbers)


def _forward(
    unit: Unit,
    x: Tensor,
    mul: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    eps: float,
    rms: bool,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    x, mul = aligned(x), None if mul is None else aligned(mul)
    (rows, width), order = x.shape, weight.shape[-1]
    out = torch.empty_like(x)
    stats = torch.empty(order + 1, rows, dtype=compute_dtype(x.dtype), device=x.device)
    if rows == 0:
        return out, stats
    machine, plan = launch.machine_of(x.device), row_plan(unit.dtype, mul is not None)
    team = _team(width, x.dtype.itemsize, plan.forward_items, plan.forward_threads, 1, machine)
    problem = _problem(x, mul, weight, bias, scores, stats, team.staged, eps, rms, clamp)
    kernel = kernel_of(unit, f"poly_norm_fwd_{team.variant}", _FORWARD)
    kernel(_grid(rows, team, None), (team.threads, 1, 1), *problem, out, shared=team.shared)
    return out, stats


def _backward(
    unit: Unit,
    grad: Tensor,
    x: Tensor,
    mul: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    stats: Tensor,
    eps: float,
    rms: bool,
    clamp: float | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    grad, x, mul = aligned(grad), aligned(x), None if mul is None else aligned(mul)
    (rows, width), order = x.shape, weight.shape[-1]
    dx, dmul = torch.empty_like(x), None if mul is None else torch.empty_like(mul)
    dscores = None if mul is None else stats.new_empty(rows)
    dweight, dbias = stats.new_zeros(weight.shape), stats.new_zeros((*weight.shape[:-1], 1))
    if rows == 0:
        return dx, dmul, dweight, dbias, dscores
    machine, plan = launch.machine_of(x.device), row_plan(unit.dtype, mul is not None)
    tensors = 2 if mul is None else 3
    team = _team(width, x.dtype.itemsize, plan.backward_items, plan.backward_threads, tensors, machine)
    grid = _grid(rows, team, machine)
    # With one set of coefficients a row there is nothing to sum over rows.
    partial = None if weight.ndim == 2 else stats.new_empty(order + 1, grid[0])
    problem = _problem(x, mul, weight, bias, scores, stats, team.staged, eps, rms, clamp)
    kernel = kernel_of(unit, f"poly_norm_bwd_{team.variant}", _BACKWARD)
    results = (dx, dmul, partial, dweight, dbias, dscores)
    kernel(grid, (team.threads, 1, 1), *problem, grad, *results, shared=team.shared)
    if partial is not None:
        finish = kernel_of(unit, "polycom_finish", _FINISH)
        finish((order + 1, 1, 1), (_FINISH_THREADS, 1, 1), partial, grid[0], dweight, dbias)
    return dx, dmul, dweight, dbias, dscores


def poly_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """zoo::poly_norm."""
    unit = _unit(x, weight, False)
    if unit is None:
        return eager.poly_norm_forward(x, weight, bias, eps, rms)
    return _forward(unit, x, None, weight, bias, None, eps, rms, None)


def poly_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """zoo::poly_norm_backward."""
    unit = _unit(x, weight, False)
    if unit is None:
        return eager.poly_norm_backward(grad, x, weight, stats, rms)
    dx, _, dweight, dbias, _ = _backward(unit, grad, x, None, weight, None, None, stats, eps, rms, None)
    return dx, dweight, dbias


def poly_norm_mul_forward(
    x: Tensor,
    mul: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    eps: float,
    rms: bool,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """zoo::poly_norm_mul."""
    unit = _unit(x, weight, True)
    if unit is None:
        return eager.poly_norm_mul_forward(x, mul, weight, bias, scores, eps, rms, clamp)
    return _forward(unit, x, mul, weight, bias, scores, eps, rms, clamp)


def poly_norm_mul_backward(
    grad: Tensor,
    x: Tensor,
    mul: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    stats: Tensor,
    eps: float,
    rms: bool,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """zoo::poly_norm_mul_backward."""
    unit = _unit(x, weight, True)
    if unit is None:
        return eager.poly_norm_mul_backward(grad, x, mul, weight, bias, scores, stats, rms, clamp)
    dx, dmul, dweight, dbias, dscores = _backward(unit, grad, x, mul, weight, bias, scores, stats, eps, rms, clamp)
    assert dmul is not None
    assert dscores is not None
    return dx, dmul, dweight, dbias, dscores


def poly_relu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """zoo::poly_relu."""
    unit = _unit(x, weight, None)
    if unit is None:
        return eager.poly_relu_forward(x, weight, bias)
    x, y = aligned(x), torch.empty_like(x)
    if x.numel():
        codes = (DTYPE_CODES[weight.dtype], 0 if bias is None else DTYPE_CODES[bias.dtype])
        packs = -(-x.numel() * x.dtype.itemsize // 16)
        blocks = min(-(-packs // _RELU_THREADS), MOST_BLOCKS)
        kernel = kernel_of(unit, "poly_relu_fwd", _RELU_FORWARD)
        kernel((blocks, 1, 1), (_RELU_THREADS, 1, 1), x, weight, bias, *codes, x.numel(), y)
    return y


def poly_relu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """zoo::poly_relu_backward."""
    unit = _unit(x, weight, None)
    if unit is None:
        return eager.poly_relu_backward(grad, x, weight)
    grad, x, order = aligned(grad), aligned(x), weight.shape[0]
    dx, dtype = torch.empty_like(x), compute_dtype(x.dtype)
    dweight = torch.zeros(order, dtype=dtype, device=x.device)
    dbias = dweight.new_zeros(1)
    if x.numel():
        machine = launch.machine_of(x.device)
        packs = -(-x.numel() * x.dtype.itemsize // 16)
        blocks = min(-(-packs // _RELU_THREADS), machine.multiprocessors * _RESIDENT_THREADS // _RELU_THREADS)
        partial = dweight.new_empty(order + 1, blocks)
        code = DTYPE_CODES[weight.dtype]
        kernel = kernel_of(unit, "poly_relu_bwd", _RELU_BACKWARD)
        kernel((blocks, 1, 1), (_RELU_THREADS, 1, 1), grad, x, weight, code, x.numel(), dx, partial)
        finish = kernel_of(unit, "polycom_finish", _FINISH)
        finish((order + 1, 1, 1), (_FINISH_THREADS, 1, 1), partial, blocks, dweight, dbias)
    return dx, dweight, dbias
