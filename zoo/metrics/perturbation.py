"""An image and its heatmap made ready for a model: what all metrics that change images have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .heatmaps import checked_heatmaps, resized, spread


@dataclass(frozen=True)
class Explained:
    """Images with their heatmaps and targets, those without a usable map left out.

    Args:
        x: [V, C, H, W].
        heat: [V, H, W], float32 or float64.
        targets: [V].
        valid: [B] which of all images these are.
    """

    x: Tensor
    heat: Tensor
    targets: Tensor
    valid: Tensor

    @classmethod
    def of(cls, name: str, x: Tensor, heatmaps: Tensor, targets: Tensor) -> Explained:
        """Checked, on the device of x.

        Args:
            name: who asks, for messages.
            x: [B, C, H, W].
            heatmaps: [B, h, w]; enlarged bilinearly.
            targets: [B] classes.

        Raises:
            TypeError: if x or the heatmaps are not floating point, or the targets no integers.
            ValueError: if shapes do not fit.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: x must be a floating-point tensor, got {got}; normalise it as the model wants it")
        if x.ndim != 4:
            raise ValueError(f"{name}: x must be images [B, C, H, W], got shape {list(x.shape)}")
        heat, valid = checked_heatmaps(heatmaps, name)
        if len(heat) != len(x):
            raise ValueError(f"{name}: heatmaps must be one an image, [{len(x)}, H, W], got {list(heatmaps.shape)}")
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype is torch.bool:
            got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"{name}: targets must be a tensor of integers, one class an image, got {got}")
        if targets.shape != x.shape[:1]:
            raise ValueError(
                f"{name}: targets must be one class an image, [{len(x)}], got shape {list(targets.shape)}; for several"
                " call it once for each"
            )
        heat, valid, targets = (t.to(x.device) for t in (heat, valid, targets))
        heat = resized(heat, x.shape[2:])
        valid = valid & (heat != 0).flatten(1).any(1)  # a map that was made smaller may have lost all it had
        return cls(x.detach()[valid], heat[valid], targets[valid].long(), valid)

    def spread(self, values: Tensor) -> Tensor:
        """[V] values of the valid images as [B] of all, NaN for the others."""
        return spread(values, self.valid)
