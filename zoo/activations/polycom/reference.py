"""PolyReLU and PolyNorm as differentiable formulas: any float dtype, any device, any number of derivatives.

The oracle of the closed-form code in `eager.py`, the path of torch.compile, torch.export and functorch (inductor fuses
it), and the graph behind second derivatives. Float64 stays float64, everything narrower is computed in float32 and
rounded once.

Coefficients are in descending order of power, as the authors store them: weight[..., 0] belongs to x^order.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.ops import compute_dtype


class Shards(Protocol):
    """How the ranks that share a row reduce over it; see `zoo/collectives.py`."""

    def maximum(self, local: Tensor) -> Tensor: ...

    def total(self, local: Tensor) -> Tensor: ...

    def replicated(self, parameter: Tensor) -> Tensor: ...


def horner(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sum_p weight_p t^p + bias, without forming powers: a zero coefficient stays zero where a power overflows."""
    first, *rest = weight.unbind(-1)
    y = t * first.unsqueeze(-1)
    for coefficient in rest:
        y = (y + coefficient.unsqueeze(-1)) * t
    return y if bias is None else y + bias


def rescale_threshold(order: int) -> float:
    """Largest |x| of a row that is left unscaled.

    Its power 2 * order is 2^60: the power sums, their inverse cubes in the backward and the products between stay far
    from the ends of float32 (2^128).
    """
    return 2.0 ** (30 / order)


def row_scale(amax: Tensor, order: int) -> Tensor:
    """1 for rows up to the threshold, else the power of two above the row's largest magnitude.

    PolyNorm of x / c with eps / c^2p is PolyNorm of x for any c, so the scale is a constant to every derivative. A row
    with inf or NaN keeps 1: the formula itself then gives the required NaNs.
    """
    largest_exponent = -int(math.log2(torch.finfo(amax.dtype).tiny))  # 1 / scale must not be a denormal
    exponent = torch.frexp(amax).exponent.clamp(max=largest_exponent)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    # frexp leaves the exponent of inf and NaN open.
    return torch.where((amax > rescale_threshold(order)) & amax.isfinite(), scale, 1.0)


def poly_relu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """sum_p weight_p max(0, x)^p + bias, eq. 2."""
    dtype = compute_dtype(x.dtype)
    rectified = x.to(dtype).relu()
    return horner(rectified, weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def poly_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, rms: bool, shards: Shards | None = None
) -> Tensor:
    """sum_p weight_p x^p / sqrt(mean(x^2p) + eps) + bias over the last axis, eq. 3 as the authors' code has it.

    Args:
        x: [..., D].
        weight: [order], or [..., order] with the leading axes of x.
        bias: [1], [..., 1] or None.
        eps: added to the mean (rms) or the sum of the squared power.
        rms: mean over D; False: sum over D.
        shards: set where x holds only this rank's part of D.
    """
    order, dtype = weight.shape[-1], compute_dtype(x.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    t = x.to(dtype)
    amax = t.detach().abs().amax(-1, keepdim=True)
    if shards is not None:
        amax, weight = shards.maximum(amax), shards.replicated(weight)
        bias = None if bias is None else shards.replicated(bias)
    inverse = row_scale(amax, order).reciprocal()
    t = t * inverse
    sums = _power_sums(t, order)
    if shards is not None:
        sums = shards.total(sums)
    # The last entry counts the elements, so that uneven shards agree on D with no further message.
    statistic = sums[..., :-1] / sums[..., -1:] if rms else sums[..., :-1]
    floor = torch.cat([eps * inverse ** (2 * p) for p in range(order, 0, -1)], -1)
    return horner(t, weight * (statistic + floor).rsqrt(), bias).to(x.dtype)


def _power_sums(t: Tensor, order: int) -> Tensor:
    """[..., order + 1]: sum t^2p for p = order .. 1, then the number of elements."""
    square = t.square()
    powers = [square]
    for _ in range(order - 1):
        powers.append(powers[-1] * square)
    sums = [power.sum(-1, keepdim=True) for power in reversed(powers)]
    return torch.cat([*sums, torch.full_like(sums[0], t.shape[-1])], -1)


def _clamped(t: Tensor, bound: float) -> Tensor:
    """t within +-bound, with slope 1 at the bound itself: torch.clamp has 0 there in some versions, 1 in others."""
    return torch.where(t.abs() <= bound, t, t.detach().clamp(-bound, bound))


def poly_norm_mul_reference(
    x: Tensor,
    mul: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    *,
    eps: float,
    rms: bool,
    clamp: float | None,
    shards: Shards | None = None,
) -> Tensor:
    """poly_norm(x) * mul * scores with x and mul first clamped to +-clamp; rounded once, at the end.

    Args:
        x: [..., D].
        mul: [..., D].
        weight: [order] or [..., order].
        bias: [1], [..., 1] or None.
        scores: [...] one factor a row, or None.
        eps: see :func:`poly_norm_reference`.
        rms: see :func:`poly_norm_reference`.
        clamp: bound on |x| and |mul|, or None.
        shards: set where x and mul hold only this rank's part of D.
    """
    dtype = compute_dtype(x.dtype)
    gate, up = x.to(dtype), mul.to(dtype)
    if clamp is not None:
        gate, up = _clamped(gate, clamp), _clamped(up, clamp)
    y = poly_norm_reference(gate, weight, bias, eps=eps, rms=rms, shards=shards) * up
    if scores is not None:
        scores = scores.to(dtype).unsqueeze(-1)
        y = y * (scores if shards is None else shards.replicated(scores))
    return y.to(x.dtype)
