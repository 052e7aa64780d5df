"""Stability: how much two maps of the same image differ that should not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .average import ImageAverage
from .heatmaps import checked_heatmaps


def stability(heatmaps: Tensor, others: Tensor) -> Tensor:
    """1 - the correlation of two maps of an image, made with two seeds, say; lower is better.

    0 for maps alike but for scale and offset, 1 for unrelated, 2 for opposite ones.

    Args:
        heatmaps, others: [B, H, W] of any scale.

    Returns:
        [B] in [0, 2]; NaN where one of the two has NaN in it or the same heat everywhere.

    Raises:
        TypeError, ValueError: if one is no such map, or their shapes differ.

    Example:
        >>> heatmap = torch.rand(1, 4, 4)
        >>> stability(heatmap, 2 * heatmap + 1).abs() < 1e-6
        tensor([True])
    """
    (a, valid), (b, other_valid) = (checked_heatmaps(t, "stability") for t in (heatmaps, others))
    if a.shape != b.shape:
        raise ValueError(f"stability: both maps must be of one shape, got {list(a.shape)} and {list(b.shape)}")
    a, b = a.flatten(1), b.flatten(1).to(a.device)
    flat = (a.amin(1) == a.amax(1)) | (b.amin(1) == b.amax(1))
    # Half the squared distance of unit vectors: exact where the correlation is near 1, unlike 1 - r.
    far = (_unit(a) - _unit(b)).square().sum(1) / 2
    return far.masked_fill(flat | ~valid | ~other_valid.to(a.device), torch.nan)


def _unit(t: Tensor) -> Tensor:
    t = t / t.abs().amax(1, keepdim=True)  # squares of raw maps may be beyond the dtype
    t = t - t.mean(1, keepdim=True)
    return t / torch.linalg.vector_norm(t, dim=1, keepdim=True)


class Stability(ImageAverage):
    """1 - the correlation of maps of two seeds: :func:`stability`, averaged over images; lower is better.

    Args:
        seeds: two different ones, given to a function that makes maps.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: a map has NaN in it or the same heat everywhere.

    Shape:
        heatmaps [B, H, W] and others [B, H, W], or a function seed -> [B, H, W] -> scalar in [0, 2].

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.

    Example:
        >>> def noisy(seed):
        ...     return torch.eye(4) + 0.1 * torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed))
        >>> unstable = Stability()
        >>> unstable.update(noisy)
        >>> bool(unstable.compute() < 0.1)
        True
    """

    higher_is_better = False

    def __init__(self, seeds: tuple[int, int] = (0, 1), **options: Any) -> None:
        super().__init__(**options)
        if len(seeds) != 2 or seeds[0] == seeds[1]:
            raise ValueError(f"Stability: seeds must be two different ones, got {seeds!r}")
        self.seeds = tuple(seeds)

    def update(self, heatmaps: Tensor | Callable[[int], Tensor], others: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            heatmaps: [B, H, W], or a function seed -> [B, H, W].
            others: [B, H, W] of the other seed; None with a function.

        Raises:
            TypeError: if the other maps are missing, or come with a function.
        """
        if callable(heatmaps) and others is None:
            self._add(stability(*(heatmaps(seed) for seed in self.seeds)))
        elif isinstance(heatmaps, Tensor) and others is not None:
            self._add(stability(heatmaps, others))
        else:
            raise TypeError("Stability: give maps of two seeds, or a function of the seed alone")
