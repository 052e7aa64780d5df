"""What PolyCom is measured against: the authors' formula in the input's dtype, and a float64 oracle for any order.

Written from eq. 2 and 3 and the facts of the released code: descending coefficients, eps added to the mean of the
squared power, no upcast, native autograd. The benchmark imports its baselines from here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _rms_normalised(u: Tensor, eps: float) -> Tensor:
    return u / torch.sqrt((u * u).mean(-1, keepdim=True) + eps)


def official_poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Order 3; weight[0] belongs to the cube."""
    return (
        weight[0] * _rms_normalised(x**3, eps)
        + weight[1] * _rms_normalised(x**2, eps)
        + weight[2] * _rms_normalised(x, eps)
        + bias
    )


def official_poly_norm_checkpointed(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The same, recomputed in the backward as the authors do to save memory."""
    return checkpoint(official_poly_norm, x, weight, bias, eps, use_reentrant=False)


def official_poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Order 3; weight[0] belongs to the cube."""
    rectified = torch.relu(x)
    return weight[0] * rectified**3 + weight[1] * rectified**2 + weight[2] * rectified + bias


def oracle_poly_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-6, norm: str = "rms", dim: int = -1
) -> Tensor:
    """sum_p a_p x^p / |x^p| term by term, in the dtype it is given: feed it float64."""
    order = weight.shape[0]
    y = torch.zeros_like(x)
    for k in range(order):
        power = x ** (order - k)
        squares = power**2
        statistic = squares.mean(dim, keepdim=True) if norm == "rms" else squares.sum(dim, keepdim=True)
        y = y + weight[k] * power / (statistic + eps) ** 0.5
    return y if bias is None else y + bias


def oracle_poly_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sum_p a_p max(0, x)^p term by term."""
    order = weight.shape[0]
    y = sum((weight[k] * x.clamp(min=0) ** (order - k) for k in range(order)), torch.zeros_like(x))
    return y if bias is None else y + bias
