"""What the modules share about their coefficients: start values, checks, the maps of later models, the repr."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.ops import compute_dtype

CoeffMap = Literal["sigmoid", "abs"]
Init = float | Sequence[float] | None


def initial_coefficients(op: str, order: int, init: Init) -> list[float]:
    """Start values in descending order of power: 1 / order each (sec. 2), one number for all, or one a power."""
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"{op}: order must be an integer >= 1, got {order!r}; the paper uses 3")
    if init is None:
        return [1 / order] * order
    if isinstance(init, (int, float)):
        return [float(init)] * order
    values = [float(value) for value in init]
    if len(values) != order:
        raise ValueError(
            f"{op}: init must be a number or {order} numbers, one a power from x^{order} down, got {len(values)}"
        )
    return values


def check_norm(op: str, eps: float, norm: str) -> None:
    """Reject what :func:`poly_norm` would reject at the first call, and a negative eps."""
    if norm not in ("rms", "l2"):
        raise ValueError(f"{op}: norm must be 'rms' or 'l2', got {norm!r}")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"{op}: eps must be finite and >= 0, got {eps}; the authors use 1e-6")


def check_backend(op: str, backend: str) -> None:
    """Reject what the functional forms would reject at the first call."""
    if backend not in ("auto", "eager"):
        raise ValueError(f"{op}: backend must be 'auto' or 'eager', got {backend!r}")


def empty_coefficients(
    order: int,
    bias: bool,
    groups: int | None = None,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Uninitialised weight [order] and bias [1], or one row a group."""
    leading = () if groups is None else (groups,)
    weight = nn.Parameter(torch.empty(*leading, order, device=device, dtype=dtype))
    return weight, nn.Parameter(torch.empty(*leading, 1, device=device, dtype=dtype)) if bias else None


@torch.no_grad()
def fill_coefficients(weight: Tensor, bias: Tensor | None, values: Sequence[float]) -> None:
    """Start values into weight, zero into bias; exact in the parameter's dtype and free of data on meta."""
    for k, value in enumerate(values):
        weight[..., k].fill_(value)
    if bias is not None:
        bias.zero_()


def check_coefficient_map(op: str, coeff_map: str | None, bias_clamp: float | None, num_groups: int | None) -> None:
    """Options beyond the paper."""
    if coeff_map not in (None, "sigmoid", "abs"):
        raise ValueError(f"{op}: coeff_map must be None, 'sigmoid' or 'abs', got {coeff_map!r}")
    if bias_clamp is not None and not bias_clamp > 0:
        raise ValueError(f"{op}: bias_clamp must be positive or None, got {bias_clamp}")
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"{op}: num_groups must be >= 1 or None, got {num_groups}")


def check_tokens(op: str, num_groups: int | None, tokens_per_expert: Tensor | Sequence[int] | None) -> None:
    """Groups and their row counts come together."""
    if (num_groups is None) != (tokens_per_expert is None):
        problem = "is needed with num_groups" if num_groups else "needs a module built with num_groups"
        raise ValueError(f"{op}: tokens_per_expert {problem}, got num_groups={num_groups}")


def mapped_coefficients(
    weight: Tensor, bias: Tensor | None, coeff_map: str | None, bias_clamp: float | None, out_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Stored coefficients to used ones, in float32 at least; a few numbers, so plain autograd."""
    if coeff_map is None and bias_clamp is None and out_scale == 1.0:
        return weight, bias
    dtype = compute_dtype(weight.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if coeff_map is not None:
        weight = weight.sigmoid() if coeff_map == "sigmoid" else weight.abs()
    if bias is not None and bias_clamp is not None:
        bias = bias.clamp(-bias_clamp, bias_clamp)
    return weight * out_scale, None if bias is None else bias * out_scale


def describe(order: int, eps: float, norm: str, options: dict[str, tuple[Any, Any]]) -> str:
    """The repr of a normalising module: order, eps, norm, and each option (value, default) that was changed."""
    changed = "".join(f", {name}={value!r}" for name, (value, default) in options.items() if value != default)
    return f"order={order}, eps={eps}, norm={norm!r}{changed}"
