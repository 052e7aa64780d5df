"""Deletion and insertion: how the confidence goes as the hottest pixels leave an image, or come back into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .average import ImageAverage
from .baseline import Baseline, Space
from .confidence import Confidence, Scores
from .heatmaps import ranks
from .perturbation import Explained


def deletion_auc(
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    steps: int = 56,
    baseline: Literal["zero", "blur"] = "zero",
    kernel: int = 11,
    blur_sigma: float = 5.0,
    scores: Scores = "softmax",
    output_fn: Callable[[Any], Tensor] | None = None,
    chunk_size: int = 32,
    space: Space = "input",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Tensor:
    """Area under the confidence in the target as pixels are taken away, the hottest first; lower is better.

    The curve goes over the share of pixels taken away, in `steps` equal parts, by the trapezoid rule. Confidence is the
    softmax of the model's scores. Of pixels equally hot, the first in memory goes first.

    Args:
        model: [B, C, H, W] -> scores before the softmax, [B, classes]; in evaluation meanwhile, steps + 1 images for
            each.
        x: [B, C, H, W] images as the model takes them.
        heatmaps: [B, h, w], of any scale and sign: only the order counts; enlarged bilinearly.
        targets: [B] the classes that were explained.
        steps: parts of the curve; as many as there are pixels at most.
        baseline: what takes the place of pixels, "zero" or the image under a Gaussian "blur".
        kernel, blur_sigma: width and standard deviation of the blur, pixels; beyond its border an image goes on as at
            it.
        scores, output_fn, chunk_size: see :func:`zoo.metrics.average_drop`.
        space, mean, std: what "zero" is, see :func:`zoo.metrics.average_drop`.

    Returns:
        [B] areas in [0, 1], NaN for a map with NaN in it or of zeros alone.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the model returns no such scores.

    Source:
        Petsiuk et al., "RISE", 2018, arXiv:1806.07421, section 4.1; blur at the border differs from the authors' code,
        which lets it fade to 0.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
        >>> x, heatmaps = torch.randn(1, 3, 4, 4), torch.rand(1, 4, 4)
        >>> one, other = (deletion_auc(model, x, heatmaps, torch.tensor([c])) for c in (0, 1))
        >>> (one + other).round(decimals=3)  # two classes share the confidence
        tensor([1.])
    """
    base = Baseline(baseline, kernel, blur_sigma, space, mean, std)
    confidence = Confidence(scores, output_fn, chunk_size)
    return _area("deletion_auc", model, x, heatmaps, targets, _checked(steps), confidence, base, insert=False)


def insertion_auc(
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    steps: int = 56,
    baseline: Literal["zero", "blur"] = "blur",
    kernel: int = 11,
    blur_sigma: float = 5.0,
    scores: Scores = "softmax",
    output_fn: Callable[[Any], Tensor] | None = None,
    chunk_size: int = 32,
    space: Space = "input",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Tensor:
    """Area under the confidence in the target as pixels come back into a blurred image, the hottest first.

    Higher is better. Pixels come in the order in which :func:`deletion_auc` takes them away.

    Args:
        model, x, heatmaps, targets, steps, kernel, blur_sigma: see :func:`deletion_auc`.
        baseline: what the curve starts from, the image under a Gaussian "blur", or "zero".
        scores, output_fn, chunk_size, space, mean, std: see :func:`zoo.metrics.average_drop`.

    Returns:
        [B] areas in [0, 1], NaN for a map with NaN in it or of zeros alone.

    Raises:
        TypeError, ValueError: if an argument is not as described, or the model returns no such scores.

    Source:
        Petsiuk et al., "RISE", 2018, arXiv:1806.07421, section 4.1.
    """
    base = Baseline(baseline, kernel, blur_sigma, space, mean, std)
    confidence = Confidence(scores, output_fn, chunk_size)
    return _area("insertion_auc", model, x, heatmaps, targets, _checked(steps), confidence, base, insert=True)


def _checked(steps: int) -> int:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    return steps


def _area(
    of: str,
    model: nn.Module,
    x: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    steps: int,
    confidence: Confidence,
    baseline: Baseline,
    *,
    insert: bool,
) -> Tensor:
    given = Explained.of(of, x, heatmaps, targets)
    places, base = ranks(given.heat), baseline(given.x).expand_as(given.x)
    first, last = (base, given.x) if insert else (given.x, base)
    pixels = places[0].numel() if len(places) else 1
    steps = min(steps, pixels)
    changed = torch.arange(steps + 1, device=x.device) * pixels // steps

    def made(images: Tensor, which: Tensor) -> Tensor:
        done = places[images] < changed[which, None, None]
        return torch.where(done[:, None], last[images], first[images])

    curve = confidence(model, given.targets, steps + 1, made).exp()
    # where pixels do not divide by steps, parts of the curve are not quite equal
    return given.spread(torch.trapezoid(curve, changed.to(curve) / pixels, dim=1))


class _Area(ImageAverage):
    """Average over images of what :func:`_area` tells."""

    insert: bool

    def __init__(
        self,
        *,
        baseline: Literal["zero", "blur"],
        steps: int = 56,
        kernel: int = 11,
        blur_sigma: float = 5.0,
        scores: Scores = "softmax",
        output_fn: Callable[[Any], Tensor] | None = None,
        chunk_size: int = 32,
        space: Space = "input",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.steps = _checked(steps)
        self.confidence = Confidence(scores, output_fn, chunk_size)
        self.baseline = Baseline(baseline, kernel, blur_sigma, space, mean, std)

    def update(self, model: nn.Module, x: Tensor, heatmaps: Tensor, targets: Tensor) -> None:
        """Add a batch; see :func:`deletion_auc`."""
        of = type(self).__name__
        args = (self.steps, self.confidence, self.baseline)
        self._add(_area(of, model, x, heatmaps, targets, *args, insert=self.insert))


class DeletionAUC(_Area):
    """:func:`deletion_auc`, averaged over images; lower is better.

    Args:
        baseline: what takes the place of pixels, "zero" or the image under a Gaussian "blur".
        steps: parts of the curve; as many as there are pixels at most.
        kernel: width of the blur, pixels, odd.
        blur_sigma: its standard deviation, pixels.
        scores: "softmax", or "sigmoid" for multi-label models.
        output_fn: finds the scores in what the model returns; None as in :func:`zoo.metrics.average_drop`.
        chunk_size: images a forward pass.
        space: what "zero" is: "input", 0 as the model takes it; "pixels", black.
        mean: of the normalisation, one number or one a channel; for "pixels" alone.
        std: of the normalisation, likewise.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: their maps have NaN in them or nothing but zeros.

    Shape:
        x [B, C, H, W], heatmaps [B, h, w] and targets [B] -> scalar in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.
        TypeError: if output_fn cannot be called.

    Source:
        Petsiuk, Das, Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018,
        arXiv:1806.07421, section 4.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # a channel is a class
        >>> x = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # a pixel of each
        >>> area = DeletionAUC()
        >>> area.update(model, x, torch.tensor([[[1.0, 0.5]]]), torch.tensor([0]))  # 0.5, 0.38, 0.5
        >>> area.compute()
        tensor(0.4388)
    """

    higher_is_better = False
    insert = False

    def __init__(self, *, baseline: Literal["zero", "blur"] = "zero", **options: Any) -> None:
        super().__init__(baseline=baseline, **options)


class InsertionAUC(_Area):
    """:func:`insertion_auc`, averaged over images; higher is better.

    Args:
        baseline: what the curve starts from, the image under a Gaussian "blur", or "zero".
        steps: parts of the curve; as many as there are pixels at most.
        kernel: width of the blur, pixels, odd.
        blur_sigma: its standard deviation, pixels.
        scores: "softmax", or "sigmoid" for multi-label models.
        output_fn: finds the scores in what the model returns; None as in :func:`zoo.metrics.average_drop`.
        chunk_size: images a forward pass.
        space: what "zero" is: "input", 0 as the model takes it; "pixels", black.
        mean: of the normalisation, one number or one a channel; for "pixels" alone.
        std: of the normalisation, likewise.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: their maps have NaN in them or nothing but zeros.

    Shape:
        x [B, C, H, W], heatmaps [B, h, w] and targets [B] -> scalar in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.
        TypeError: if output_fn cannot be called.

    Source:
        Petsiuk, Das, Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018,
        arXiv:1806.07421, section 4.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # a channel is a class
        >>> x = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # a pixel of each
        >>> area = InsertionAUC(baseline="zero")
        >>> area.update(model, x, torch.tensor([[[1.0, 0.5]]]), torch.tensor([0]))  # 0.5, 0.62, 0.5
        >>> area.compute()
        tensor(0.5612)
    """

    higher_is_better = True
    insert = True

    def __init__(self, *, baseline: Literal["zero", "blur"] = "blur", **options: Any) -> None:
        super().__init__(baseline=baseline, **options)
