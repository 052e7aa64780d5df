"""Sums over the ranks of a process group, with derivatives of any order.

A sum over ranks and the copy of one value to all ranks are adjoint to each other, so each is the other's backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """Sum over the ranks; every rank then holds the same value, which counts once."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Replicate.apply(grads[0], ctx.group), None


class _Replicate(torch.autograd.Function):
    """One value, the same on all ranks, used by each of them for its own share; their gradients add up."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0], ctx.group), None


class GroupReduction:
    """Reductions over the ranks of one process group.

    Args:
        group: the ranks, each of which holds a share of what is reduced.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def maximum(self, local: Tensor) -> Tensor:
        """Largest value over the ranks, a constant to autograd."""
        largest = local.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest

    def total(self, local: Tensor) -> Tensor:
        """Sum over the ranks, for use by every rank on its own share."""
        return self.replicated(_Sum.apply(local, self.group))

    def replicated(self, parameter: Tensor) -> Tensor:
        """The same value, whose gradient is summed over the ranks."""
        return _Replicate.apply(parameter, self.group)
