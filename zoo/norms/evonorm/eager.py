"""The closed forms of the EvoNorm layers in plain PyTorch, without a graph: what the ops of `ops.py` run.

Why a file of its own: it is the third implementation beside `reference.py` (differentiable) and the native kernels, and
the one every device has. Samples are taken in blocks that stay in cache. Nothing here writes to an argument, and all
sums run in a fixed order, so two calls give the same bits.

Contract of the ops, which native kernels keep too:
    x, grad and the outputs shaped like them are contiguous [N, C, L], or [N, L, C] with channels_last;
    v is [C] or None for 1; weight and bias are [C] or both [N, C], None for 1 and 0, of any float dtype;
    statistics and the gradients of parameters come in the compute dtype: float64 for float64, else float32;
    S layers: stats is [2, N, G], the mean of each group (0 with rms) and 1 / sqrt(s^2 + eps);
    B layers: moments is [2, N, C], mean and biased variance of each sample's channel; `left` is [C], the square root of
    the batch or running variance plus eps; `variant` is 0, 1, 2 for B0, B1, B2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.ops import compute_dtype
from .reference import affine, per_channel

CPU_BLOCK_BYTES = 1024 * 1024
DEVICE_BLOCK_BYTES = 64 * 1024 * 1024


def planes(t: Tensor, channels_last: bool) -> Tensor:
    """The tensor as [N, C, L], whichever way it lies in memory."""
    return t.transpose(1, 2) if channels_last else t


def _blocks(x: Tensor) -> Iterator[slice]:
    budget = CPU_BLOCK_BYTES if x.device.type == "cpu" else DEVICE_BLOCK_BYTES
    of_one = x.shape[1] * x.shape[2] * compute_dtype(x.dtype).itemsize
    step = max(1, budget // max(1, of_one))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def _of(parameter: Tensor | None, block: slice) -> Tensor | None:
    """A block's share of a parameter."""
    return parameter[block] if parameter is not None and parameter.ndim == 2 else parameter


def _moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the last axis of [N, C, L], each [N, C].

    The corrected two-pass algorithm: centred first, and then on what rounding left of the mean, so that a mean of 1e4
    deviations costs no digits of the variance.
    """
    mean = t.mean(-1, keepdim=True)
    centred = t - mean
    rest = centred.mean(-1)
    return mean.squeeze(-1) + rest, (centred.square_().mean(-1) - rest.square()).clamp_min_(0)


def _total(sums: Tensor, like: Tensor | None) -> Tensor:
    """[N, C] as the gradient of a parameter: itself where there is one set a sample, else summed over samples."""
    return sums if like is not None and like.ndim == 2 else sums.sum(0)


def _swish(t: Tensor, v: Tensor | None, linear: bool) -> Tensor:
    """t sigmoid(v t), or t itself."""
    if linear:
        return t
    slope = per_channel(v, t.dtype)
    return torch.sigmoid(t if slope is None else slope * t).mul_(t)


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
    """(y, stats), see the contract above."""
    y, dtype = torch.empty_like(x), compute_dtype(x.dtype)
    stats = torch.zeros(2, x.shape[0], groups, dtype=dtype, device=x.device)
    if x.numel() == 0:  # there may be samples without positions: their statistics are not NaN but nothing
        return y, stats
    source, result = planes(x, channels_last), planes(y, channels_last)
    for block in _blocks(x):
        t = source[block].to(dtype)
        mean, square = _group_moments(t, groups, rms)
        stats[0, block], stats[1, block] = mean, (square + eps).rsqrt_()
        scale = _of_channels(stats[1, block], t.shape[1])
        result[block] = affine(_swish(t, v, linear) * scale, _of(weight, block), _of(bias, block))
    return y, stats


def _group_moments(t: Tensor, groups: int, rms: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance, or 0 and mean square, of each group [N, G]; from those of its channels, of equal size."""
    if rms:
        square = t.square().mean(-1).unflatten(1, (groups, -1)).mean(-1)
        return torch.zeros_like(square), square
    means, variances = (part.unflatten(1, (groups, -1)) for part in _moments(t))
    mean, between = _moments(means)
    return mean, variances.mean(-1) + between


def _of_channels(of_groups: Tensor, channels: int) -> Tensor:
    """[N, G] as something that multiplies [N, C, L]."""
    return of_groups.repeat_interleave(channels // of_groups.shape[1], 1, output_size=channels).unsqueeze(-1)


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
    """(dx, dv, dweight, dbias). eps and rms are in stats; the second derivative needs them."""
    dx, dtype = torch.empty_like(x), stats.dtype
    source, cotangent, result = (planes(t, channels_last) for t in (x, grad, dx))
    (samples, channels, length), groups = source.shape, stats.shape[2]
    sums = torch.zeros(3, samples, channels, dtype=dtype, device=x.device)  # g u, g, g du/dv
    if x.numel() == 0:
        return dx, *s_parameter_gradients(sums, weight, stats)
    for block in _blocks(x):
        t, g = source[block].to(dtype), cotangent[block].to(dtype)
        mean, scale = (_of_channels(part, channels) for part in stats[:, block])
        gamma = per_channel(_of(weight, block), dtype)
        if linear:
            u, slope = t, torch.ones_like(t)
            sums[2, block] = 0
        else:
            factor = per_channel(v, dtype)
            s = torch.sigmoid(t if factor is None else factor * t)
            u, rest = s * t, s * (1 - s)
            slope = s + (t * rest if factor is None else factor * t * rest)  # s (1 + v t (1 - s))
            sums[2, block] = (g * t * t * rest).sum(-1)
        sums[0, block], sums[1, block] = (g * u).sum(-1), g.sum(-1)
        pull = s_pull(sums[0, block], _of(weight, block), stats[:, block], channels // groups * length)
        h = g if gamma is None else g * gamma
        result[block] = h * slope * scale - (t - mean) * _of_channels(pull, channels)
    return dx, *s_parameter_gradients(sums, weight, stats)


def s_pull(sums: Tensor, weight: Tensor | None, stats: Tensor, elements: int) -> Tensor:
    """What multiplies the distance from the mean in dx, [N, G], from [N, C]: the sums of g u; `elements` of a group."""
    weighted = sums if weight is None else sums * weight.to(sums.dtype)
    return weighted.unflatten(1, (stats.shape[2], -1)).sum(-1) * stats[1] ** 3 / elements


def s_parameter_gradients(sums: Tensor, weight: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dv, dweight and dbias from [3, N, C]: the sums of g u, g and g du/dv over each sample's channel."""
    scale = _of_channels(stats[1], sums.shape[2]).squeeze(-1)
    dv = sums[2] * scale if weight is None else sums[2] * scale * weight.to(sums.dtype)
    return dv.sum(0), _total(sums[0] * scale, weight), _total(sums[1], weight)


def evonorm_moments(x: Tensor, channels_last: bool) -> Tensor:
    """Mean and biased variance of each sample's channel, [2, N, C]."""
    source, dtype = planes(x, channels_last), compute_dtype(x.dtype)
    moments = torch.zeros(2, *source.shape[:2], dtype=dtype, device=x.device)
    if x.numel() == 0:
        return moments
    for block in _blocks(x):
        moments[0, block], moments[1, block] = _moments(source[block].to(dtype))
    return moments


def right_root(moments: Tensor, eps: float, variant: int) -> Tensor:
    """sqrt(variance + eps) for B0, sqrt(mean square + eps) for the others, [N, C]."""
    square = moments[1] if variant == 0 else torch.addcmul(moments[1], moments[0], moments[0])
    return (square + eps).sqrt()


def _right(t: Tensor, v: Tensor | None, root: Tensor, variant: int) -> tuple[Tensor, Tensor | float]:
    """The right side of the maximum, and its slope in t where the statistics are held."""
    if variant == 0:
        slope = per_channel(v, t.dtype)
        return (t + root, 1.0) if slope is None else (slope * t + root, slope)
    if variant == 1:
        return (t + 1) * root, root
    return root - t, -1.0


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
    """x / max(left, right) * weight + bias."""
    y, dtype = torch.empty_like(x), moments.dtype
    source, result = planes(x, channels_last), planes(y, channels_last)
    for block in _blocks(x):
        t = source[block].to(dtype)
        root = right_root(moments[:, block], eps, variant).unsqueeze(-1)
        right, _ = _right(t, v, root, variant)
        denominator = torch.maximum(right, left.view(1, -1, 1))
        result[block] = affine(t / denominator, _of(weight, block), _of(bias, block))
    return y


def _b_terms(
    t: Tensor, g: Tensor, v: Tensor | None, weight: Tensor | None, root: Tensor, left: Tensor, variant: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """1 / D, the gradients that enter the right and the left side of the maximum, and the slope of the right one."""
    right, slope = _right(t, v, root, variant)
    bound = left.view(1, -1, 1)
    inverse = torch.maximum(right, bound).reciprocal_()
    gamma = per_channel(weight, t.dtype)
    e = -(g if gamma is None else g * gamma) * t * inverse * inverse
    share = (bound > right).to(t.dtype).add_((bound == right).to(t.dtype), alpha=0.5)
    to_left = share * e
    return inverse, e - to_left, to_left, slope


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
    """Sums over each sample's channel, [5, N, C]: eR (B1: eR (x + 1)), eL, eR x, g x / D, g."""
    source, cotangent = planes(x, channels_last), planes(grad, channels_last)
    sums = torch.empty(5, *source.shape[:2], dtype=moments.dtype, device=x.device)
    for block in _blocks(x):
        t, g = source[block].to(sums.dtype), cotangent[block].to(sums.dtype)
        root = right_root(moments[:, block], eps, variant).unsqueeze(-1)
        inverse, to_right, to_left, _ = _b_terms(t, g, v, _of(weight, block), root, left, variant)
        with_x = to_right * t
        sums[0, block] = (with_x + to_right if variant == 1 else to_right).sum(-1)
        sums[1, block], sums[2, block] = to_left.sum(-1), with_x.sum(-1)
        sums[3, block], sums[4, block] = (g * t * inverse).sum(-1), g.sum(-1)
    return sums


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
    """dx = h / D + eR dR/dx + (x - m) pull + (x - centre) batch_pull; m the sample's mean for B0, else 0.

    `pull` is [N, C], through the statistics of the sample; `centre` and `batch_pull` are [C], through the batch's.
    """
    dx, dtype = torch.empty_like(x), moments.dtype
    source, cotangent, result = (planes(t, channels_last) for t in (x, grad, dx))
    for block in _blocks(x):
        t, g = source[block].to(dtype), cotangent[block].to(dtype)
        of_block = _of(weight, block)
        root = right_root(moments[:, block], eps, variant).unsqueeze(-1)
        inverse, to_right, _, slope = _b_terms(t, g, v, of_block, root, left, variant)
        gamma = per_channel(of_block, dtype)
        h = g if gamma is None else g * gamma
        centred = t - moments[0, block].unsqueeze(-1) if variant == 0 else t
        total = h * inverse + to_right * slope + centred * pull[block].unsqueeze(-1)
        result[block] = total + (t - centre.view(1, -1, 1)) * batch_pull.view(1, -1, 1)
    return dx


def batch_moments(moments: Tensor) -> Tensor:
    """Mean and biased variance of each channel over the batch, [2, C], from those of its samples, of equal size."""
    mean = moments[0].mean(0)
    return torch.stack([mean, moments[1].mean(0) + (moments[0] - mean).square().mean(0)])
