"""evonorm_s and evonorm_b: checks, layout, and the choice between op and formula.

Why a file of its own: the ops see only [N, C, L] and [N, L, C]; everything a caller may hand over is turned into those
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...kernels.ops import compute_dtype, prefers_formula, prepare
from ...warn import warn_once
from .ops import fused_evonorm_b, fused_evonorm_s
from .reference import VARIANTS_B, batch_variance, evonorm_b_reference, evonorm_s_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Moment = Literal["var", "rms"]
Act = Literal["swish_v", "silu", "none"]
VariantB = Literal["b0", "b1", "b2"]
Backend = Literal["auto", "eager"]


def evonorm_s(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    moment: Moment = "var",
    act: Act = "swish_v",
    backend: Backend = "auto",
) -> Tensor:
    """EvoNorm-S: x sigmoid(v x) / sqrt(s^2 + eps) * weight + bias, s^2 a statistic of each sample's group of channels.

    Args:
        x: [N, C, ...], floating point.
        v: [C] slope of the gate, of act="swish_v"; None with the others.
        weight: [C], or [N, C] for one set a sample, or None for 1.
        bias: [C], or [N, C], or None for 0.
        groups: how many equal runs of channels share a statistic; divides C.
        eps: added to s^2, inside the root.
        moment: "var", the biased variance (S0, S1), or "rms", the mean square (S2).
        act: "swish_v" is x sigmoid(v x) (S0), "silu" x sigmoid(x) (S1, S2), "none" x alone: what timm's S0a, S1a and
            S2a do when they apply no activation.
        backend: "auto" runs the fused closed form, which keeps x and two numbers a group for the backward; "eager" the
            plain formula in PyTorch. torch.export and torch.func use the formula.

    Returns:
        Tensor shaped, typed and laid out like x. float16 and bfloat16 are computed in float32 and rounded once.

    Raises:
        ValueError: if x is not floating point, groups do not divide C, or v, weight, bias, moment or act do not fit.

    Source:
        Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv:2004.02967, table of layers; the
        variance is biased and eps inside the root, as in the authors' code.

    Example:
        >>> evonorm_s(torch.tensor([[[3.0, -3.0]]]), None, None, None, 1, eps=0.0, act="none")  # over the deviation
        tensor([[[ 1., -1.]]])
    """
    op = "evonorm_s"
    _check(op, x, v, weight, bias)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: groups must divide the {x.shape[1]} channels of x, got {groups}")
    if moment not in ("var", "rms"):
        raise ValueError(f"{op}: moment must be 'var' or 'rms', got {moment!r}")
    if act not in ("swish_v", "silu", "none"):
        raise ValueError(f"{op}: act must be 'swish_v', 'silu' or 'none', got {act!r}")
    if (act == "swish_v") != (v is not None):
        need = "needs v, the slope of its gate" if v is None else "has no v"
        raise ValueError(f"{op}: act={act!r} {need}; v belongs to 'swish_v' alone")
    rms, linear = moment == "rms", act == "none"
    _warn_of_single_elements(x, groups, rms, eps)
    weight, bias = _alike(weight, bias)
    if prefers_formula(op, backend, x.device.type):
        y = evonorm_s_reference(_flat(x), v, weight, bias, groups, eps=eps, rms=rms, linear=linear)
        return _from_formula(x, y)
    rows, channels_last = _rows(x)
    arguments = (rows, *_contiguous(v, weight, bias), groups, float(eps), rms, linear, channels_last)
    if torch.compiler.is_compiling():
        y = torch.ops.zoo.evonorm_s(*arguments)[0]
    else:
        prepare(x)
        y = fused_evonorm_s(*arguments)
    return _shaped_like(x, y, channels_last)


def evonorm_b(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    variant: VariantB = "b0",
    unbiased_running_var: bool = False,
    process_group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """EvoNorm-B: x / max(sqrt(batch variance + eps), R) * weight + bias.

    R is v x + sqrt(s^2 + eps) for B0, (x + 1) sqrt(q^2 + eps) for B1, sqrt(q^2 + eps) - x for B2; s^2 and q^2 are the
    variance and the mean square of each channel of each sample, in training and evaluation alike.

    Args:
        x: [N, C, ...], floating point.
        v: [C], of B0; None with the others.
        weight: [C], or [N, C] for one set a sample, or None for 1.
        bias: [C], or [N, C], or None for 0.
        running_var: [C] in float32 or float64; what takes the place of the batch variance when not training, and is
            updated in place when training. None: the batch variance, always.
        training: use the variance of the batch, and move `running_var` towards it unless the batch is empty.
        momentum: running_var becomes (1 - momentum) running_var + momentum variance; 0.1 (a decay of 0.9 in the
            authors' code).
        eps: added to every variance and mean square, inside the root.
        variant: "b0", "b1" or "b2".
        unbiased_running_var: move running_var towards the unbiased variance, as timm and BatchNorm do; the authors'
            code takes the biased one.
        process_group: ranks over which the batch variance is taken in training; their batches may differ in size.
        backend: "auto" runs the fused closed form, which keeps x and a few numbers a channel for the backward; "eager"
            the plain formula in PyTorch. torch.export and torch.func use the formula.

    Returns:
        Tensor shaped, typed and laid out like x. float16 and bfloat16 are computed in float32 and rounded once.

    Raises:
        ValueError: if x is not floating point, or v, weight, bias, running_var or variant do not fit.

    Source:
        Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv:2004.02967, table of layers.

    Example:
        >>> x = torch.tensor([[[1.0, -1.0]], [[3.0, -3.0]]])  # batch variance 5, instance variances 1 and 9
        >>> evonorm_b(x, torch.zeros(1), None, None, None, True, eps=0.0)  # v = 0: over the larger deviation
        tensor([[[ 0.4472, -0.4472]],
        <BLANKLINE>
                [[ 1.0000, -1.0000]]])
    """
    op = "evonorm_b"
    _check(op, x, v, weight, bias)
    if variant not in VARIANTS_B:
        raise ValueError(f"{op}: variant must be one of {', '.join(VARIANTS_B)}, got {variant!r}")
    if variant != "b0" and v is not None:
        raise ValueError(f"{op}: v belongs to variant 'b0' alone, got one with {variant!r}")
    if running_var is not None:
        _check_running_var(op, running_var, x.shape[1])
    frozen = None if training else running_var
    weight, bias = _alike(weight, bias)
    by_formula = prefers_formula(op, backend, x.device.type)
    if process_group is not None and frozen is None:
        from .synchronised import synchronised_evonorm_b  # torch.distributed is needed only here

        rows, channels_last = _rows(x)
        prepare(x)
        v, weight, bias = _contiguous(v, weight, bias)
        y, variance, count = synchronised_evonorm_b(
            rows, v, weight, bias, float(eps), variant, channels_last, process_group, by_formula=by_formula
        )
        y = _shaped_like(x, y, channels_last)
    elif by_formula:
        y = _from_formula(x, evonorm_b_reference(_flat(x), v, weight, bias, frozen, eps=eps, variant=variant))
        with torch.no_grad():
            variance = batch_variance(_flat(x).to(compute_dtype(x.dtype)), None).view(-1) if training else None
        count = x.numel() // x.shape[1]
    else:
        rows, channels_last = _rows(x)
        arguments = (rows, *_contiguous(v, weight, bias, frozen), float(eps), VARIANTS_B.index(variant), channels_last)
        if torch.compiler.is_compiling():
            y, _, batch = torch.ops.zoo.evonorm_b(*arguments)
        else:
            prepare(x)
            y, _, batch = fused_evonorm_b(*arguments)
        y, variance, count = _shaped_like(x, y, channels_last), batch[1], x.numel() // x.shape[1]
    if training and running_var is not None and variance is not None:
        _move(running_var, variance, momentum, count, unbiased_running_var)
    return y


def _move(running_var: Tensor, variance: Tensor, momentum: float, count: int | Tensor, unbiased: bool) -> None:
    """The buffer on its way to the variance of `count` elements a channel, outside every graph; of none it stays."""
    with torch.no_grad():
        target = variance.detach().to(running_var.dtype)
        if isinstance(count, int):
            if count == 0:
                return
            factor: float | Tensor = count / max(1, count - 1)
        else:  # on the device, of several ranks
            factor = count / (count - 1).clamp_min(1)
            target = torch.where(count > 0, target, running_var)
        target = target * factor if unbiased else target
        running_var.copy_(running_var + momentum * (target - running_var))


def _check(op: str, x: Tensor, v: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point, got {x.dtype}; cast it first")
    if x.ndim < 2:
        raise ValueError(f"{op}: x must have at least 2 dimensions, [N, C, ...], got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"{op}: x must have at least one channel, got shape {tuple(x.shape)}")
    if v is not None and v.shape != (channels,):
        raise ValueError(f"{op}: v must have shape ({channels},), one for each channel of x, got {tuple(v.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape not in ((channels,), (x.shape[0], channels)):
            raise ValueError(
                f"{op}: {name} must have shape ({channels},) or, one set a sample, {(x.shape[0], channels)}, got "
                f"{tuple(parameter.shape)}"
            )


def _check_running_var(op: str, running_var: Tensor, channels: int) -> None:
    if running_var.shape != (channels,):
        raise ValueError(
            f"{op}: running_var must have shape ({channels},), one for each channel of x, got "
            f"{tuple(running_var.shape)}"
        )
    if running_var.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: running_var must be float32 or float64, got {running_var.dtype}: in 16 bits it stops moving; "
            "keep it with running_var.float()"
        )


def _alike(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both [C] or both [N, C], as the ops want them."""
    ranks = {t.ndim for t in (weight, bias) if t is not None}
    if 2 not in ranks:
        return weight, bias
    rows = next(t.shape[0] for t in (weight, bias) if t is not None and t.ndim == 2)
    if weight is None:
        assert bias is not None
        weight = bias.new_ones(bias.shape)
    elif weight.ndim == 1:
        weight = weight.expand(rows, -1)
    if bias is not None and bias.ndim == 1:
        bias = bias.expand(rows, -1)
    return weight, bias


def _contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in parameters]


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """x as contiguous [N, C, L], or as [N, L, C] with True if it lies that way; a copy only where it must be."""
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return x.movedim(1, -1).flatten(1, -2), True
    return _flat(x.contiguous()), False


def _flat(x: Tensor) -> Tensor:
    """[N, C, L]."""
    return x.unsqueeze(2) if x.ndim == 2 else x.flatten(2)


def _shaped_like(x: Tensor, y: Tensor, channels_last: bool) -> Tensor:
    if channels_last:
        return y.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return y.view(x.shape)


def _from_formula(x: Tensor, y: Tensor) -> Tensor:
    """[N, C, L] in the shape of x, and channels last where x is."""
    y = y.reshape(x.shape)
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y


def _warn_of_single_elements(x: Tensor, groups: int, rms: bool, eps: float) -> None:
    if 0 < x.numel() == x.shape[0] * groups and not rms and eps < 1e-3 and not torch.compiler.is_compiling():
        warn_once(
            f"EvoNorm-S divides by the deviation of groups of one element ({groups} groups of {x.shape[1]} channels on "
            f"maps of one pixel), which is 0, so that outputs grow by 1 / sqrt(eps); use fewer groups or eps=1e-3",
            UserWarning,
        )
