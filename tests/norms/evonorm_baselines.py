"""EvoNorm as the paper's table has it, in torch's own reductions: the oracle. And timm's layers by our names."""

from __future__ import annotations

import torch
from torch import Tensor


def _spread(parameter: Tensor | None, x: Tensor) -> Tensor | float:
    """[C] or [N, C] against [N, C, ...]; None is what changes nothing in a product."""
    if parameter is None:
        return 1.0
    rows = parameter.shape if parameter.ndim == 2 else (1, *parameter.shape)
    return parameter.reshape(*rows, *(1,) * (x.ndim - 2))


def oracle_s(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    linear: bool = False,
) -> Tensor:
    """S0, S1, S2 and what timm's a-layers do without activation."""
    group = x.reshape(x.shape[0], groups, -1)
    statistic = (group**2).mean(-1) if rms else torch.var(group, -1, correction=0)
    deviation = torch.sqrt(statistic + eps).repeat_interleave(x.shape[1] // groups, 1)
    u = x if linear else x * torch.sigmoid(_spread(v, x) * x)
    y = u / _spread(deviation, x) * _spread(weight, x)
    return y if bias is None else y + _spread(bias, x)


def oracle_b(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_var: Tensor | None,
    *,
    eps: float = 1e-5,
    variant: str = "b0",
) -> Tensor:
    """B0, B1, B2."""
    maps = x.unsqueeze(-1) if x.ndim == 2 else x
    space = tuple(range(2, maps.ndim))
    batch = torch.var(maps, (0, *space), correction=0) if running_var is None else running_var
    left = torch.sqrt(_spread(batch, maps) + eps)
    if variant == "b0":
        right = _spread(v, maps) * maps + torch.sqrt(torch.var(maps, space, correction=0, keepdim=True) + eps)
    else:
        root = torch.sqrt((maps**2).mean(space, keepdim=True) + eps)
        right = (maps + 1) * root if variant == "b1" else root - maps
    y = maps / torch.maximum(left.expand_as(right), right) * _spread(weight, maps)
    return (y if bias is None else y + _spread(bias, maps)).reshape(x.shape)
