"""Average drop and increase in confidence: what a model says of an image of which only the heated part is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .average import ImageAverage
from .baseline import Baseline, Space
from .confidence import Confidence, Scores
from .perturbation import Explained


def average_drop(
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    scores: Scores = "softmax",
    output_fn: Callable[[Any], Tensor] | None = None,
    chunk_size: int = 32,
    space: Space = "input",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Tensor:
    """100 max(0, Y - O) / Y: percent of the confidence Y that are lost with what the heatmap hides; lower is better.

    Y is the probability of the target, the softmax of the model's scores, on the image, O that on image times heatmap.
    Computed from logarithms, so that it holds for any Y. (pytorch-grad-cam's figure of that name is a difference of
    scores.)

    Args:
        model: [B, C, H, W] -> scores before the softmax, [B, classes]; in evaluation meanwhile.
        x: [B, C, H, W] images as the model takes them.
        heatmaps: [B, h, w] in [0, 1], 0 is hidden; enlarged bilinearly.
        targets: [B] the classes that were explained.
        scores: "softmax", or "sigmoid" for multi-label models.
        output_fn: finds the scores in what the model returns; None takes a tensor as it is, else `["logits"]`,
            `["out"]`, `.logits` or the first of a tuple.
        chunk_size: images a forward pass.
        space: what hidden pixels are: "input", 0 as the model takes it, with normalised images the mean of the dataset;
            "pixels", black.
        mean, std: of the normalisation, one number or one a channel; for "pixels" alone.

    Returns:
        [B] percent, NaN for a map with NaN in it or of zeros alone.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the model returns no such scores.

    Source:
        Chattopadhay et al., "Grad-CAM++", 2018, arXiv:1710.11063, section 4.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> x, heatmaps = torch.randn(2, 3, 4, 4), torch.ones(2, 4, 4)
        >>> average_drop(model, x, heatmaps, torch.tensor([0, 2])).round(decimals=2)  # nothing is hidden
        tensor([0., 0.])
    """
    hidden = Baseline(space=space, mean=mean, std=std)
    change = _change("average_drop", model, x, heatmaps, targets, Confidence(scores, output_fn, chunk_size), hidden)
    return _drop(change)


def increase_in_confidence(
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    scores: Scores = "softmax",
    output_fn: Callable[[Any], Tensor] | None = None,
    chunk_size: int = 32,
    space: Space = "input",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Tensor:
    """100 where the model is surer of the image times its heatmap than of the image, else 0; higher is better.

    Args:
        model, x, heatmaps, targets, scores, output_fn, chunk_size, space, mean, std: see :func:`average_drop`.

    Returns:
        [B] of 100 and 0, NaN for a map with NaN in it or of zeros alone.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the model returns no such scores.

    Source:
        Chattopadhay et al., "Grad-CAM++", 2018, arXiv:1710.11063, section 4.1.
    """
    hidden = Baseline(space=space, mean=mean, std=std)
    confidence = Confidence(scores, output_fn, chunk_size)
    return _increase(_change("increase_in_confidence", model, x, heatmaps, targets, confidence, hidden))


def _drop(change: Tensor) -> Tensor:
    return 100 * change.clamp(max=0).expm1().abs()  # NaN stays NaN


def _increase(change: Tensor) -> Tensor:
    return torch.where(change.isnan(), change, 100.0 * (change > 0))


def _change(
    of: str,
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    confidence: Confidence,
    hidden: Baseline,
) -> Tensor:
    """[B] log O - log Y."""
    given = Explained.of(of, x, heatmaps, targets)
    low, high = (float(t) for t in given.heat.aminmax()) if len(given.heat) else (0.0, 1.0)  # host sync: once a batch
    if low < 0 or high > 1 + 2 * torch.finfo(heatmaps.dtype).eps:
        raise ValueError(
            f"{of}: heatmaps must lie in [0, 1], got {low:.4g} to {high:.4g}; divide each by its maximum first"
        )
    under = hidden(given.x).to(given.heat.dtype)

    def made(images: Tensor, which: Tensor) -> Tensor:
        masked = under + given.heat[images, None] * (given.x[images] - under)
        return torch.where((which == 0)[:, None, None, None], given.x[images], masked.to(x.dtype))

    log_y, log_o = confidence(model, given.targets, 2, made).unbind(1)
    return given.spread(log_o - log_y)


class _Change(ImageAverage):
    """Average over images of what :func:`_change` tells."""

    def __init__(
        self,
        *,
        scores: Scores = "softmax",
        output_fn: Callable[[Any], Tensor] | None = None,
        chunk_size: int = 32,
        space: Space = "input",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.confidence = Confidence(scores, output_fn, chunk_size)
        self.hidden = Baseline(space=space, mean=mean, std=std)

    def _changes(self, model: nn.Module, x: Tensor, heatmaps: Tensor, targets: Tensor) -> Tensor:
        return _change(type(self).__name__, model, x, heatmaps, targets, self.confidence, self.hidden)


class AverageDrop(_Change):
    """Average drop, percent: :func:`average_drop`, averaged over images; lower is better.

    Args:
        scores: "softmax", or "sigmoid" for multi-label models.
        output_fn: finds the scores in what the model returns; None as in :func:`average_drop`.
        chunk_size: images a forward pass.
        space: what a hidden pixel is: "input", 0 as the model takes it; "pixels", black.
        mean: of the normalisation, one number or one a channel; for "pixels" alone.
        std: of the normalisation, likewise.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: their maps have NaN in them or nothing but zeros.

    Shape:
        x [B, C, H, W], heatmaps [B, h, w] and targets [B] -> scalar, percent.

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.
        TypeError: if output_fn cannot be called.

    Source:
        Chattopadhay, Sarkar, Howlader, Balasubramanian, "Grad-CAM++: Generalized Gradient-based Visual Explanations for
        Deep Convolutional Networks", WACV 2018, arXiv:1710.11063, section 4.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # a channel is a class
        >>> x = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # a pixel of each
        >>> drop = AverageDrop()
        >>> drop.update(model, x, torch.tensor([[[0.0, 1.0]]]), torch.tensor([0]))  # hides the pixel of class 0
        >>> drop.compute().round(decimals=1)
        tensor(24.5000)
    """

    higher_is_better = False

    def update(self, model: nn.Module, x: Tensor, heatmaps: Tensor, targets: Tensor) -> None:
        """Add a batch; see :func:`average_drop`."""
        self._add(_drop(self._changes(model, x, heatmaps, targets)))


class IncreaseInConfidence(_Change):
    """Percent of images the model is surer of with their heatmap over them; higher is better.

    :func:`increase_in_confidence`, averaged.

    Args:
        scores: "softmax", or "sigmoid" for multi-label models.
        output_fn: finds the scores in what the model returns; None as in :func:`average_drop`.
        chunk_size: images a forward pass.
        space: what a hidden pixel is: "input", 0 as the model takes it; "pixels", black.
        mean: of the normalisation, one number or one a channel; for "pixels" alone.
        std: of the normalisation, likewise.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: their maps have NaN in them or nothing but zeros.

    Shape:
        x [B, C, H, W], heatmaps [B, h, w] and targets [B] -> scalar, percent.

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.
        TypeError: if output_fn cannot be called.

    Source:
        Chattopadhay, Sarkar, Howlader, Balasubramanian, "Grad-CAM++: Generalized Gradient-based Visual Explanations for
        Deep Convolutional Networks", WACV 2018, arXiv:1710.11063, section 4.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # a channel is a class
        >>> x = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # a pixel of each
        >>> surer = IncreaseInConfidence()
        >>> surer.update(model, x, torch.tensor([[[1.0, 0.0]]]), torch.tensor([0]))  # hides the pixel of class 1
        >>> surer.compute()
        tensor(100.)
    """

    higher_is_better = True

    def update(self, model: nn.Module, x: Tensor, heatmaps: Tensor, targets: Tensor) -> None:
        """Add a batch; see :func:`average_drop`."""
        self._add(_increase(self._changes(model, x, heatmaps, targets)))
