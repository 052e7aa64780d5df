"""ROAD: what the confidence loses with the least, and with the most relevant pixels imputed from their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .average import ImageAverage
from .confidence import Confidence, Scores
from .heatmaps import ranks
from .imputation import linear_imputation
from .perturbation import Explained


def road(
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    percentiles: Sequence[float] = (20, 40, 60, 80),
    noise: float = 0.01,
    seed: int = 0,
    scores: Scores = "softmax",
    output_fn: Callable[[Any], Tensor] | None = None,
    chunk_size: int = 32,
) -> Tensor:
    """Confidence without the least relevant pixels minus that without the most relevant ones; higher is better.

    Averaged over the percentages of pixels removed. A removed pixel becomes the weighted mean of its eight neighbours,
    removed ones among them, plus a little noise: the shape of what is missing tells the model nothing. Confidence is
    the softmax of the model's scores. Of pixels equally hot, the first in memory counts as hotter.

    Args:
        model: [B, C, H, W] -> scores before the softmax, [B, classes]; in evaluation meanwhile, two images for each
            percentage.
        x: [B, C, H, W] images as the model takes them.
        heatmaps: [B, h, w], of any scale and sign: only the order counts; enlarged bilinearly.
        targets: [B] the classes that were explained.
        percentiles: percent of the pixels that are removed, between 0 and 100.
        noise: standard deviation, in units of x.
        seed: of the noise, one field for all images and percentages, so that a value does not hang on the batch.
        scores, output_fn, chunk_size: see :func:`zoo.metrics.average_drop`.

    Returns:
        [B] differences in [-1, 1], NaN for a map with NaN in it or of zeros alone.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the model returns no such scores.

    Source:
        Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", 2022, arXiv:2202.00449;
        the difference of both orders in one figure is pytorch-grad-cam's, which halves it and takes scores.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> road(model, torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4), torch.tensor([0, 2])).shape
        torch.Size([2])
    """
    shares = _checked(percentiles, noise)
    return _road("road", model, x, heatmaps, targets, shares, noise, seed, Confidence(scores, output_fn, chunk_size))


def _checked(percentiles: Sequence[float], noise: float) -> tuple[float, ...]:
    if not percentiles or not all(0 < p < 100 for p in percentiles):
        raise ValueError(f"percentiles must be one or more numbers between 0 and 100, got {percentiles!r}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be at least 0, got {noise}")
    return tuple(percentiles)


def _road(
    of: str,
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    percentiles: tuple[float, ...],
    noise: float,
    seed: int,
    confidence: Confidence,
) -> Tensor:
    given = Explained.of(of, x, heatmaps, targets)
    places = ranks(given.heat)
    pixels = x.shape[2] * x.shape[3]
    # the last pixel stays: there would be nothing to impute from
    count = torch.tensor([min(round(p / 100 * pixels), pixels - 1) for p in percentiles], device=x.device)
    field = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed)).to(x) * noise

    def made(images: Tensor, which: Tensor) -> Tensor:
        place, k = places[images], count[which % len(count), None, None]
        removed = torch.where((which < len(count))[:, None, None], place >= pixels - k, place < k)
        imputed = linear_imputation(given.x[images], removed)
        return torch.where(removed[:, None], imputed + field, imputed)

    least, most = confidence(model, given.targets, 2 * len(count), made).exp().chunk(2, dim=1)
    return given.spread((least - most).mean(1))


class Road(ImageAverage):
    """Remove and debias: :func:`road`, averaged over images; higher is better.

    Args:
        percentiles: percent of the pixels that are removed, between 0 and 100.
        noise: standard deviation of what is added to imputed pixels, in units of x.
        seed: of the noise.
        scores: "softmax", or "sigmoid" for multi-label models.
        output_fn: finds the scores in what the model returns; None as in :func:`zoo.metrics.average_drop`.
        chunk_size: images a forward pass.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: their maps have NaN in them or nothing but zeros.

    Shape:
        x [B, C, H, W], heatmaps [B, h, w] and targets [B] -> scalar in [-1, 1].

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.
        TypeError: if output_fn cannot be called.

    Source:
        Rong, Leemann, Borisov, Kasneci, Kasneci, "A Consistent and Efficient Evaluation Strategy for Attribution
        Methods", ICML 2022, arXiv:2202.00449.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # a channel is a class
        >>> x = torch.zeros(1, 2, 4, 4)
        >>> x[0, 0, :2, :2] = 9
        >>> gap = Road()
        >>> gap.update(model, x, x[:, 0], torch.tensor([0]))  # a map that shows all of class 0
        >>> bool(gap.compute() > 0)
        True
    """

    higher_is_better = True

    def __init__(
        self,
        *,
        percentiles: Sequence[float] = (20, 40, 60, 80),
        noise: float = 0.01,
        seed: int = 0,
        scores: Scores = "softmax",
        output_fn: Callable[[Any], Tensor] | None = None,
        chunk_size: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.percentiles, self.noise, self.seed = _checked(percentiles, noise), noise, seed
        self.confidence = Confidence(scores, output_fn, chunk_size)

    def update(self, model: nn.Module, x: Tensor, heatmaps: Tensor, targets: Tensor) -> None:
        """Add a batch; see :func:`road`."""
        args = (self.percentiles, self.noise, self.seed, self.confidence)
        self._add(_road("Road", model, x, heatmaps, targets, *args))
