"""The EvoNorm layers as differentiable formulas: any float dtype, any device, any number of derivatives.

The oracle of the closed-form code in `eager.py`, the path of torch.export and functorch, and the graph behind second
derivatives. Float64 stays float64, everything narrower is computed in float32 and rounded once.

x is [N, C, L] here, L the product of the axes behind the channels. Variances are biased, eps lies inside the root, and
nothing is ever subtracted from the numerator.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...kernels.ops import compute_dtype

VARIANTS_B = ("b0", "b1", "b2")
VARIANTS_S = ("s0", "s1", "s2")


class Replicas(Protocol):
    """How the ranks that share a batch add up; see `synchronised.py`."""

    def total(self, local: Tensor) -> Tensor: ...


def per_channel(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[C] or, one set a sample, [N, C] as something that multiplies [N, C, L]."""
    return None if parameter is None else parameter.to(dtype).unsqueeze(-1)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight * y + bias in the dtype of y, either of them optional."""
    scale, shift = per_channel(weight, y.dtype), per_channel(bias, y.dtype)
    y = y if scale is None else scale * y
    return y if shift is None else y + shift


def evonorm_s_reference(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    *,
    eps: float,
    rms: bool,
    linear: bool = False,
) -> Tensor:
    """x sigmoid(v x) / sqrt(s^2 + eps) * weight + bias; s^2 the variance, or the mean square, of a sample's group.

    Args:
        x: [N, C, L].
        v: [C], or None for 1 (S1, S2).
        weight: [C] or [N, C] or None for 1.
        bias: [C] or [N, C] or None for 0.
        groups: how many equal runs of channels share a statistic.
        eps: added to s^2.
        rms: the mean square instead of the variance (S2).
        linear: without the factor sigmoid(v x): what timm's S0a, S1a and S2a do when they apply no activation.
    """
    t = x.to(compute_dtype(x.dtype))
    size = x.shape[1] // groups * x.shape[2]
    grouped = t.reshape(x.shape[0], groups, 1, size)
    square = grouped.square().mean(-1, keepdim=True) if rms else _variance(grouped)
    scale = (square + eps).rsqrt().expand(-1, -1, x.shape[1] // groups, -1).reshape(*x.shape[:2], 1)
    if not linear:
        slope = per_channel(v, t.dtype)
        t = t * torch.sigmoid(t if slope is None else slope * t)
    return affine(t * scale, weight, bias).to(x.dtype)


def _variance(t: Tensor) -> Tensor:
    """Biased variance over the last axis, which stays; nan, without a warning, where it is empty."""
    return (t - t.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)


def evonorm_b_reference(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_var: Tensor | None,
    *,
    eps: float,
    variant: str,
    replicas: Replicas | None = None,
) -> Tensor:
    """x / max(sqrt(batch variance + eps), R) * weight + bias.

    R is v x + sqrt(s^2 + eps) with the variance s^2 of the sample's channel (B0), (x + 1) sqrt(q^2 + eps) with its mean
    square (B1), sqrt(q^2 + eps) - x (B2). Where both sides of the maximum are equal each gets half of the gradient.

    Args:
        x: [N, C, L].
        v: [C], or None for 1; of B0 alone.
        weight: [C] or [N, C] or None for 1.
        bias: [C] or [N, C] or None for 0.
        running_var: [C] in place of the batch variance, or None.
        eps: added to every variance and mean square.
        variant: "b0", "b1" or "b2".
        replicas: the ranks over which the batch variance is taken; None for this one alone.
    """
    t = x.to(compute_dtype(x.dtype))
    if running_var is None:
        left = (batch_variance(t, replicas) + eps).sqrt()
    else:
        left = (running_var.to(t.dtype) + eps).sqrt().view(1, -1, 1)
    if variant == "b0":
        slope = per_channel(v, t.dtype)
        right = (t if slope is None else slope * t) + (_variance(t) + eps).sqrt()
    else:
        root = (t.square().mean(-1, keepdim=True) + eps).sqrt()
        right = (t + 1) * root if variant == "b1" else root - t
    return affine(t / torch.maximum(left, right), weight, bias).to(x.dtype)


def batch_variance(t: Tensor, replicas: Replicas | None) -> Tensor:
    """Biased variance of each channel over samples and positions, [1, C, 1]."""
    if replicas is None:
        mean = t.mean((0, 2), keepdim=True)
        return (t - mean).square().mean((0, 2), keepdim=True)
    count = replicas.total(t.new_full((1,), float(t.shape[0] * t.shape[2])))
    mean = replicas.total(t.sum((0, 2), keepdim=True)) / count
    return replicas.total((t - mean).square().sum((0, 2), keepdim=True)) / count
