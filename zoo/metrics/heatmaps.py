"""Heatmaps as metrics take them: checked, in a dtype to compute in, resized, and their pixels in order of heat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.ops import compute_dtype


def checked_heatmaps(heatmaps: Tensor, of: str, *, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Heatmaps in float32 or float64, 0 where they say nothing, and which of them say something.

    Args:
        heatmaps: [B, H, W].
        of: who asks, for messages.
        positive: refuse negative heat.

    Returns:
        [B, H, W] and [B]: False for maps with NaN or infinity in them and for maps of zeros alone.

    Raises:
        TypeError: if they are no floating-point tensor.
        ValueError: if they are not [B, H, W], or negative where that means nothing.
    """
    if not isinstance(heatmaps, Tensor) or not heatmaps.is_floating_point():
        got = heatmaps.dtype if isinstance(heatmaps, Tensor) else type(heatmaps).__name__
        raise TypeError(f"{of}: heatmaps must be a floating-point tensor, got {got}; convert them with .float()")
    if heatmaps.ndim != 3 or 0 in heatmaps.shape[1:]:
        raise ValueError(
            f"{of}: heatmaps must be [B, H, W], got shape {list(heatmaps.shape)}; flatten or index other axes"
        )
    heat = heatmaps.detach().to(compute_dtype(heatmaps.dtype))
    valid = heat.isfinite().flatten(1).all(1) & (heat != 0).flatten(1).any(1)
    heat = heat.masked_fill(~valid[:, None, None], 0)
    if positive and bool((heat < 0).any()):  # host sync: once a batch
        raise ValueError(
            f"{of}: heat must be at least 0, got {float(heat.min()):.4g}; a share of signed heat has no meaning, take"
            " the positive part first (heatmaps.relu())"
        )
    return heat, valid


def resized(heat: Tensor, size: Sequence[int]) -> Tensor:
    """[B, H, W] of that size, bilinearly."""
    if tuple(heat.shape[1:]) == tuple(size):
        return heat
    return F.interpolate(heat[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def ranks(heat: Tensor) -> Tensor:
    """[B, H, W] place of each pixel from the hottest, 0, on; of equal ones the first in memory comes first."""
    order = heat.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=heat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(heat)


def spread(values: Tensor, valid: Tensor) -> Tensor:
    """Values of the valid images, [B] with NaN for the others."""
    all_values = values.new_full(valid.shape, torch.nan)
    all_values[valid] = values
    return all_values
