"""B layers whose batch is spread over the ranks of a process group: three numbers a channel travel, never x.

Forward gathers mean, sum of squared deviations and count of every rank, so that batches may differ in size; backward
adds up one number a channel, what enters the batch variance. Gradients of parameters stay those of the local batch, as
with SyncBatchNorm: data parallelism adds them up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...collectives import GroupReduction
from . import eager, ops
from .reference import VARIANTS_B, batch_variance, evonorm_b_reference


def synchronised_evonorm_b(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    variant: str,
    channels_last: bool,
    group: dist.ProcessGroup,
    *,
    by_formula: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, variance [C] of the joined batch, elements a channel of it [1]); arguments as in `eager.py`."""
    if by_formula:
        y = _formula(x, v, weight, bias, eps, variant, channels_last, group)
        with torch.no_grad():
            local, reduction = eager.planes(x, channels_last).to(_compute(x)), GroupReduction(group)
            variance = batch_variance(local, reduction).view(-1)
            count = reduction.total(local.new_full((1,), float(local.shape[0] * local.shape[2])))
        return y, variance, count
    y, batch, count = _Synchronised.apply(x, v, weight, bias, eps, VARIANTS_B.index(variant), channels_last, group)
    return y, batch[1], count


def _compute(x: Tensor) -> torch.dtype:
    return ops.compute_dtype(x.dtype)


def _formula(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    variant: str,
    channels_last: bool,
    group: dist.ProcessGroup,
) -> Tensor:
    y = evonorm_b_reference(
        eager.planes(x, channels_last),
        v,
        weight,
        bias,
        None,
        eps=eps,
        variant=variant,
        replicas=GroupReduction(group),
    )
    return eager.planes(y, channels_last)


def _joined(of_samples: Tensor, length: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [2, C] over all ranks, and how many elements a channel they hold."""
    samples, channels = of_samples.shape[1:]
    count = samples * length
    mean, variance = eager.batch_moments(of_samples) if count else of_samples.new_zeros(2, channels)
    local = torch.cat([mean, variance * count, mean.new_full((1,), float(count))])
    everywhere = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, local, group=group)
    means, deviations, counts = torch.stack(everywhere).split([channels, channels, 1], 1)
    total = counts.sum(0)  # [1]: the host does not read it, and need not wait
    mean = (means * counts).sum(0) / total
    variance = (deviations + counts * (means - mean).square()).sum(0) / total
    return torch.stack([mean, variance]), total


class _Synchronised(torch.autograd.Function):
    """`evonorm_b_forward` and `evonorm_b_backward` of `ops.py` with collectives between the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        variant: int,
        channels_last: bool,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_samples = ops.moments(x, channels_last)
        batch, total = _joined(of_samples, x.shape[1 if channels_last else 2], group)
        left = (batch[1] + eps).sqrt()
        ctx.options, ctx.group = (eps, variant, channels_last), group
        ctx.save_for_backward(x, v, weight, bias, of_samples, batch, total)
        ctx.mark_non_differentiable(batch, total)
        return ops.b_apply(x, v, weight, bias, of_samples, left, eps, variant, channels_last), batch, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v, weight, bias, of_samples, batch, total = ctx.saved_tensors
        eps, variant, channels_last = ctx.options
        grad = grads[0].contiguous()
        if torch.is_grad_enabled():  # somebody wants a second derivative
            return *_differentiable(ctx, grad, x, v, weight, bias), *(None,) * 4
        left = (batch[1] + eps).sqrt()
        sums = ops.b_sums(grad, x, v, weight, of_samples, left, eps, variant, channels_last)
        into_variance = sums[1].sum(0)
        dist.all_reduce(into_variance, group=ctx.group)
        batch_pull = into_variance / (total * left)
        dx = ops.b_input_gradient(grad, x, v, weight, of_samples, batch, sums, batch_pull, eps, variant, channels_last)
        gradients = ops.b_parameter_gradients(sums, weight)
        parameters = (v, weight, bias)
        given = (None if p is None else g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))
        return dx, *given, *(None,) * 4


def _differentiable(
    ctx: Any, grad: Tensor, x: Tensor, v: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """First derivatives through the formula, so that they have derivatives themselves."""
    eps, variant, channels_last = ctx.options

    def source(t: Tensor) -> Tensor:
        return t.view_as(t) if t.requires_grad else t

    x = source(x)
    v, weight, bias = (None if t is None else source(t) for t in (v, weight, bias))
    sources = (x, v, weight, bias)
    y = _formula(x, v, weight, bias, eps, VARIANTS_B[variant], channels_last, ctx.group)
    wanted = [t for t in sources if t is not None and t.requires_grad]
    slots = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple(next(slots) if t is not None and t.requires_grad else None for t in sources)
