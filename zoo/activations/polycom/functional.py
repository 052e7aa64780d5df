"""poly_relu, poly_norm, poly_norm_mul and poly_com: checks, layout, and the choice between op and formula.

Why a file of its own: the ops see only contiguous rows; everything a caller may hand over is turned into those here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...kernels.ops import compute_dtype, prefers_formula, prepare
from ...kernels.sources import MOST_POWERS
from .ops import fused_poly_norm, fused_poly_norm_mul, fused_poly_relu
from .reference import (
    Shards,
    horner,
    poly_norm_mul_reference,
    poly_norm_reference,
    poly_relu_reference,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Norm = Literal["rms", "l2"]
Backend = Literal["auto", "eager"]
Rho = Literal["relu", "prelu", "sigmoid", "silu", "norm", "relu_norm"]


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """PolyReLU: sum over p = 1 .. order of weight[order - p] * max(0, x)^p, plus bias.

    Args:
        x: any shape, floating point.
        weight: [order], in descending order of power: weight[0] belongs to x^order.
        bias: [1] the constant term, or None.
        backend: "auto" runs the fused closed form, which keeps only x for the backward; "eager" the plain formula in
            PyTorch, for tracers that want no custom op.

    Returns:
        Tensor shaped and typed like x. float16 and bfloat16 are computed in float32 and rounded once.

    Raises:
        ValueError: if x is not floating point, or weight or bias has another shape.

    Source:
        Zhuo et al., "Polynomial Composition Activations", ICLR 2025, arXiv:2411.03884, eq. 2.

    Example:
        >>> poly_relu(torch.tensor([-2.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 0.0]))  # squared ReLU
        tensor([0., 1., 4.])
    """
    _check_input("poly_relu", x)
    _check_weight("poly_relu", weight, None)
    bias = _check_bias("poly_relu", bias, None)
    if (
        _use_formula("poly_relu", backend, weight) or torch.compiler.is_compiling()
    ):  # inductor fuses what is elementwise
        return poly_relu_reference(x, weight, bias)
    prepare(x)
    if x.is_contiguous():
        return fused_poly_relu(x, weight.contiguous(), bias)
    dense, order = _dense(x, range(x.ndim))
    y = fused_poly_relu(dense, weight.contiguous(), bias)
    return _formatted_like(x, y.permute(_inverse(order)))


def poly_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: Norm = "rms",
    dim: int = -1,
    tokens_per_expert: Tensor | Sequence[int] | None = None,
    process_group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """PolyNorm: sum over p = 1 .. order of weight[order - p] * N(x^p), plus bias; N(u) = u / sqrt(mean(u^2) + eps).

    ``|y| <= sqrt(D) * sum|weight| + |bias|`` for any input, so float16 does not overflow. Rows so large that
    x^(2 order) would leave float32 are rescaled exactly. A NaN makes its whole row NaN; an inf becomes NaN and the
    row's finite elements become bias.

    Args:
        x: [..., D] with D on axis `dim`, D >= 1, floating point.
        weight: [order], in descending order of power, or [num_groups, order] with tokens_per_expert.
        bias: [1] the constant term, [num_groups, 1], or None.
        eps: 1e-6 (the authors' code), added to the mean of the squared power.
        norm: "rms" divides by the root mean square, as the authors trained; "l2" by the Euclidean norm, as they print.
        dim: axis that is normalised.
        tokens_per_expert: [num_groups] how many consecutive rows use each set of coefficients; they sum to the rows.
        process_group: ranks that hold the shards of D; statistics and coefficient gradients are summed over them.
        backend: "auto" runs the fused closed form, which keeps x and order + 1 numbers a row for the backward; "eager"
            the plain formula in PyTorch. torch.compile, torch.export, torch.func and process_group use the formula.

    Returns:
        Tensor shaped, typed and laid out like x. float16 and bfloat16 are computed in float32 and rounded once.

    Raises:
        ValueError: if x is not floating point or has D = 0, or weight, bias, norm or tokens_per_expert do not fit.

    Source:
        Zhuo et al., "Polynomial Composition Activations", ICLR 2025, arXiv:2411.03884, eq. 3. The paper prints the
        Euclidean norm, the code uses the root mean square; we follow the code, and norm="l2" gives the other.

    Example:
        >>> x = torch.tensor([[3.0, -4.0]])
        >>> poly_norm(x, torch.tensor([1.0]), norm="l2")  # order 1: x over its norm
        tensor([[ 0.6000, -0.8000]])
    """
    op = "poly_norm"
    _check_input(op, x)
    _check_rows(op, x, dim, norm)
    weight, bias, grouped = _coefficients(op, x, dim, weight, bias, tokens_per_expert)
    rms = norm == "rms"
    if process_group is not None or _use_formula(op, backend, weight):
        moved, shards = x.movedim(dim, -1), _shards(process_group)
        if grouped:
            weight, bias = _like_rows(weight, moved), None if bias is None else _like_rows(bias, moved)
        return poly_norm_reference(moved, weight, bias, eps=eps, rms=rms, shards=shards).movedim(-1, dim)
    if x.is_contiguous() and dim in (-1, x.ndim - 1):
        return _poly_norm_rows(x.view(-1, x.shape[-1]), weight, bias, eps, rms).view_as(x)
    others = [axis for axis in range(x.ndim) if axis != dim % x.ndim]
    dense, order = _dense(x, others, dim % x.ndim, keep_order=grouped)
    y = _poly_norm_rows(dense.view(-1, dense.shape[-1]), weight, bias, eps, rms)
    return _formatted_like(x, y.view(dense.shape).permute(_inverse(order)))


def poly_norm_mul(
    x: Tensor,
    mul: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: Norm = "rms",
    clamp: float | None = None,
    scores: Tensor | None = None,
    tokens_per_expert: Tensor | Sequence[int] | None = None,
    process_group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """PolyNorm as the gate of a linear unit: poly_norm(x) * mul * scores, in one pass that saves only the arguments.

    Args:
        x: [..., D] the gate, D >= 1, floating point.
        mul: [..., D] what is gated, shaped and typed like x.
        weight: [order], in descending order of power, or [num_groups, order] with tokens_per_expert.
        bias: [1], [num_groups, 1] or None.
        eps: added to the mean of the squared power.
        norm: "rms" or "l2", see :func:`poly_norm`.
        clamp: bound on the magnitudes of x and mul, applied first; None leaves them.
        scores: [...] one factor a row, e.g. a router's, or None.
        tokens_per_expert: see :func:`poly_norm`.
        process_group: see :func:`poly_norm`.
        backend: see :func:`poly_norm`.

    Returns:
        Tensor shaped and typed like x, contiguous.

    Raises:
        ValueError: as :func:`poly_norm`, and if mul or scores do not fit x or clamp is not positive.

    Source:
        Zhuo et al., arXiv:2411.03884, eq. 3, on the gate of a GLU as later models use it.

    Example:
        >>> x, up = torch.tensor([[3.0, -4.0]]), torch.tensor([[10.0, 10.0]])
        >>> poly_norm_mul(x, up, torch.tensor([1.0]), norm="l2", scores=torch.tensor([0.5]))
        tensor([[ 3., -4.]])
    """
    op = "poly_norm_mul"
    _check_input(op, x)
    _check_rows(op, x, -1, norm)
    if mul.shape != x.shape or mul.dtype != x.dtype:
        raise ValueError(
            f"{op}: mul must be shaped and typed like x, {tuple(x.shape)} {x.dtype}, got {tuple(mul.shape)} {mul.dtype}"
        )
    if scores is not None and scores.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: scores must hold one factor a row, shape {tuple(x.shape[:-1])}, got {tuple(scores.shape)}"
        )
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp must be positive or None, got {clamp}")
    weight, bias, grouped = _coefficients(op, x, -1, weight, bias, tokens_per_expert)
    rms = norm == "rms"
    if process_group is not None or _use_formula(op, backend, weight):
        if grouped:
            weight, bias = _like_rows(weight, x), None if bias is None else _like_rows(bias, x)
        shards = _shards(process_group)
        return poly_norm_mul_reference(x, mul, weight, bias, scores, eps=eps, rms=rms, clamp=clamp, shards=shards)
    rows, factors = (-1, x.shape[-1]), None if scores is None else scores.reshape(-1).contiguous()
    gate, up = x.contiguous().view(rows), mul.contiguous().view(rows)
    arguments = (gate, up, weight.contiguous(), bias, factors, eps, rms, clamp)
    if torch.compiler.is_compiling():
        return torch.ops.zoo.poly_norm_mul(*arguments)[0].view(x.shape)
    prepare(x)
    return fused_poly_norm_mul(*arguments).view(x.shape)


def poly_com(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rho: Rho | Callable[[Tensor], Tensor] = "relu",
    kind: Literal[1, 2] = 1,
    slope: Tensor | None = None,
    eps: float = 1e-6,
    norm: Norm = "rms",
    dim: int = -1,
) -> Tensor:
    """Polynomial composition: sum_p weight_p rho(x)^p (kind 1) or sum_p weight_p rho(x^p) (kind 2), plus bias.

    Args:
        x: any shape, floating point.
        weight: [order], in descending order of power.
        bias: [1] the constant term, or None.
        rho: "relu", "prelu", "sigmoid", "silu", "norm" (x over its root mean square, or norm), "relu_norm", or a
            function that keeps the shape; it is given float32 for float16 and bfloat16 inputs.
        kind: 1 applies rho first, then powers; 2 powers first. "relu_norm" rectifies first in both kinds.
        slope: [1] of rho="prelu".
        eps: of "norm" and "relu_norm".
        norm: "rms" or "l2", of "norm" and "relu_norm".
        dim: axis that "norm" and "relu_norm" reduce.

    Returns:
        Tensor shaped and typed like x.

    Raises:
        ValueError: if x, weight, bias, rho, kind, slope, norm or dim do not fit.

    Source:
        Zhuo et al., "Polynomial Composition Activations", ICLR 2025, arXiv:2411.03884, eq. 1. The paper does not print
        the order of ReLU and normalisation in its PolyReLUNorm ablation; we take sum_p a_p N(max(0, x)^p).

    Example:
        >>> poly_com(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.0]), rho="relu", kind=2)  # relu(x^2)
        tensor([1., 4.])
    """
    _check_input("poly_com", x)
    _check_weight("poly_com", weight, None)
    bias = _check_bias("poly_com", bias, None)
    if kind not in (1, 2):
        raise ValueError(f"poly_com: kind must be 1 (rho first) or 2 (powers first), got {kind!r}")
    if rho in ("norm", "relu_norm"):
        _check_rows("poly_com", x, dim, norm)
        x = x.relu() if rho == "relu_norm" else x
        if kind == 2:
            return poly_norm(x, weight, bias, eps=eps, norm=norm, dim=dim)
    elif rho == "relu" and kind == 1:
        return poly_relu(x, weight, bias)
    dtype = compute_dtype(x.dtype)
    function = _normalisation(eps, norm, dim) if rho in ("norm", "relu_norm") else _elementwise(rho, slope)
    t, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if kind == 1:
        return horner(function(t), weight, bias).to(x.dtype)
    y, power = torch.zeros_like(t) if bias is None else bias.expand_as(t), t
    for coefficient in reversed(weight.unbind()):
        y = y + coefficient * function(power)
        power = power * t
    return y.to(x.dtype)


def _normalisation(eps: float, norm: Norm, dim: int) -> Callable[[Tensor], Tensor]:
    return lambda t: poly_norm(t, t.new_ones(1), eps=eps, norm=norm, dim=dim)


def _elementwise(rho: str | Callable[[Tensor], Tensor], slope: Tensor | None) -> Callable[[Tensor], Tensor]:
    if not isinstance(rho, str):
        return rho
    if rho == "prelu":
        if slope is None or slope.numel() != 1:
            raise ValueError(f"poly_com: rho='prelu' needs a slope of one element, got {slope!r}; pass slope=")
        # Not F.prelu: autocast on the CPU would run it in bfloat16.
        return lambda t: torch.where(t > 0, t, slope.to(t.dtype) * t)
    functions = {"relu": torch.relu, "sigmoid": torch.sigmoid, "silu": silu}
    if rho not in functions:
        raise ValueError(
            f"poly_com: rho must be relu, prelu, sigmoid, silu, norm, relu_norm or a function, got {rho!r}"
        )
    return functions[rho]


def _use_formula(op: str, backend: str, weight: Tensor) -> bool:
    return prefers_formula(op, backend, weight.device.type) or weight.shape[-1] > MOST_POWERS


def _poly_norm_rows(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    weight = weight.contiguous()
    if torch.compiler.is_compiling():
        return torch.ops.zoo.poly_norm(x, weight, bias, eps, rms)[0]
    prepare(x)
    return fused_poly_norm(x, weight, bias, eps, rms)


def _shards(process_group: ProcessGroup | None) -> Shards | None:
    if process_group is None:
        return None
    from ...collectives import GroupReduction  # torch.distributed is needed only here

    return GroupReduction(process_group)


def _check_input(op: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point, got {x.dtype}; cast it first")


def _check_rows(op: str, x: Tensor, dim: int, norm: str) -> None:
    if norm not in ("rms", "l2"):
        raise ValueError(f"{op}: norm must be 'rms' or 'l2', got {norm!r}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{op}: dim must be an axis of x, which has {x.ndim}, got {dim}")
    if x.shape[dim] == 0:
        raise ValueError(f"{op}: x must have at least one element along dim {dim}, got shape {tuple(x.shape)}")


def _check_weight(op: str, weight: Tensor, groups: int | None) -> None:
    expected = "(order,)" if groups is None else f"({groups}, order)"
    if (
        weight.ndim != (1 if groups is None else 2)
        or weight.shape[-1] == 0
        or weight.shape[0] != (groups or weight.shape[0])
    ):
        hint = "; pass tokens_per_expert to use one set a group" if groups is None and weight.ndim == 2 else ""
        raise ValueError(f"{op}: weight must have shape {expected} with order >= 1, got {tuple(weight.shape)}{hint}")


def _check_bias(op: str, bias: Tensor | None, groups: int | None) -> Tensor | None:
    """The bias as [1] or [groups, 1]."""
    if bias is None:
        return None
    if bias.numel() != (groups or 1):
        expected = "one element" if groups is None else f"shape ({groups}, 1)"
        raise ValueError(f"{op}: bias must have {expected}, got shape {tuple(bias.shape)}")
    return bias.reshape(1) if groups is None else bias.reshape(groups, 1)


def _coefficients(
    op: str,
    x: Tensor,
    dim: int,
    weight: Tensor,
    bias: Tensor | None,
    tokens_per_expert: Tensor | Sequence[int] | None,
) -> tuple[Tensor, Tensor | None, bool]:
    """Checked weight and bias, one set a row if there are groups, and whether there are."""
    if tokens_per_expert is None:
        _check_weight(op, weight, None)
        return weight, _check_bias(op, bias, None), False
    counts = torch.as_tensor(tokens_per_expert, device=x.device)
    rows = x.numel() // x.shape[dim]
    if counts.ndim != 1 or counts.is_floating_point():
        raise ValueError(
            f"{op}: tokens_per_expert must be a 1-D tensor of integers, got shape {tuple(counts.shape)} {counts.dtype}"
        )
    groups = counts.shape[0]
    _check_weight(op, weight, groups)
    bias = _check_bias(op, bias, groups)
    # A device tensor is not read: that would be a host sync.
    if not isinstance(tokens_per_expert, Tensor) and sum(tokens_per_expert) != rows:
        raise ValueError(f"{op}: tokens_per_expert must sum to the {rows} rows of x, got {sum(tokens_per_expert)}")
    expert = torch.repeat_interleave(torch.arange(groups, device=x.device), counts, output_size=rows)
    dtype = compute_dtype(x.dtype)  # so that the gradients of a group's rows add up in it
    return weight.to(dtype)[expert], None if bias is None else bias.to(dtype)[expert], True


def _like_rows(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _dense(
    x: Tensor, others: Sequence[int], last: int | None = None, *, keep_order: bool = False
) -> tuple[Tensor, list[int]]:
    """x as a contiguous tensor with its axes in memory order, `last` at the end; a copy only where it must be.

    Returns the permuted tensor and the permutation.
    """
    order = list(others) if keep_order else sorted(others, key=lambda axis: -x.stride(axis))
    order += [] if last is None else [last]
    return x.permute(order).contiguous(), order


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _formatted_like(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format an elementwise op would give it."""
    wanted = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == wanted else torch.empty_like(x).copy_(y)
