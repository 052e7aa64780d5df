"""What is explained: a score of each image, out of whatever the model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .errors import NonFinite, TargetCount, TargetNotScalar, TargetOutOfRange

TargetFunction = Callable[[Any], Tensor]
Targets: TypeAlias = "int | Sequence[int] | Tensor | TopK | TargetFunction | Sequence[TargetFunction] | None"


@dataclass(frozen=True)
class TopK:
    """The k best classes of each image, by its own scores without noise."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"TopK: k must be at least 1, got {self.k}")


@dataclass(frozen=True, eq=False)
class SegmentationTarget:
    """The sum of a class's scores over a mask, for outputs [B, C, h, w].

    Args:
        category: the class.
        mask: [h, w], weights of the pixels; None for all of them.
    """

    category: int
    mask: Tensor | None = None

    def __call__(self, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim < 3:
            raise TargetNotScalar("SegmentationTarget: the model must return scores [B, C, h, w]; see output_fn")
        _check_class(self.category, output.shape[1], "SegmentationTarget")
        scores = output[:, self.category]
        if self.mask is None:
            return scores.flatten(1).sum(1)
        if self.mask.shape != scores.shape[1:]:
            raise TargetNotScalar(
                f"SegmentationTarget: the model's map is {list(scores.shape[1:])}, the mask {list(self.mask.shape)};"
                " give one of the map's size"
            )
        return (scores * self.mask.to(scores)).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class DetectionTarget:
    """The score of the detection that matches a box best: 0 where none does.

    For models that return, as torchvision's do, a list of {"boxes", "labels", "scores"}, one an image.

    Args:
        label: class of the detection.
        box: (x0, y0, x1, y1).
        iou: least intersection over union with the box.
    """

    label: int
    box: Sequence[float]
    iou: float = 0.5

    def __call__(self, output: Sequence[Mapping[str, Tensor]]) -> Tensor:
        try:
            return torch.stack([self._score(one) for one in output])
        except (TypeError, KeyError, IndexError):
            raise TargetNotScalar(
                'DetectionTarget: the model must return a list of {"boxes", "labels", "scores"}, one an image; see'
                " output_fn"
            ) from None

    def _score(self, found: Mapping[str, Tensor]) -> Tensor:
        boxes, scores = found["boxes"].detach(), found["scores"]
        box = torch.as_tensor(self.box, dtype=boxes.dtype, device=boxes.device)
        low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
        both = (high - low).clamp(min=0).prod(1)
        either = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - both
        fitting = (found["labels"] == self.label) & (both >= self.iou * either)
        if not bool(fitting.any()):
            return scores.sum() * 0
        return scores[torch.where(fitting, both / either, -1).argmax()]


@dataclass(frozen=True)
class ContrastTarget:
    """S_c - gamma times the mean of other classes' scores: what speaks for c and not for them.

    Args:
        category: c.
        others: the other classes.
        gamma: weight of their mean.
    """

    category: int
    others: Sequence[int]
    gamma: float = 1.0

    def __call__(self, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise TargetNotScalar("ContrastTarget: the model must return scores [B, C]; see output_fn")
        if not self.others:
            raise TargetCount("ContrastTarget: others must name at least one class")
        for category in (self.category, *self.others):
            _check_class(category, output.shape[1], "ContrastTarget")
        return output[:, self.category] - self.gamma * output[:, list(self.others)].mean(1)


class Scorer:
    """The scores that are explained, row by row of a pass, for targets of whatever kind.

    Classes that hang on the model's answer are those of the images without noise, and fixed once known.

    Args:
        targets: as the explainers take them.
        images: how many there are.
    """

    def __init__(self, targets: Targets, images: int) -> None:
        self.images = images
        self.functions: list[TargetFunction] | None = None
        self.k = 1
        self.several = False
        self._classes: list[Tensor | None] = [None] * images
        if targets is None:
            return
        if isinstance(targets, TopK):
            self.k, self.several = targets.k, True
        elif callable(targets):
            self.functions = [targets]
        elif isinstance(targets, Sequence) and targets and all(map(callable, targets)):
            if len(targets) != images:
                raise TargetCount(f"targets: {len(targets)} functions for {images} images; give one an image")
            self.functions = list(targets)  # type: ignore[arg-type]
        else:
            self._of_classes(targets)

    def _of_classes(self, targets: Any) -> None:
        classes = targets if isinstance(targets, Tensor) else torch.as_tensor(targets)
        if classes.is_floating_point() or classes.is_complex() or classes.dtype is torch.bool:
            raise TargetNotScalar(f"targets: classes must be integers, got {classes.dtype}")
        if classes.ndim == 0:
            classes = classes.expand(self.images)
        if classes.ndim > 2 or len(classes) != self.images or classes.numel() == 0:
            raise TargetCount(
                f"targets: {self.images} images take one class, [{self.images}] or [{self.images}, T] classes, got"
                f" shape {list(classes.shape)}"
            )
        self.several = classes.ndim == 2
        self._classes = list(classes.detach().cpu().reshape(self.images, -1).long())
        self.k = self._classes[0].numel()  # type: ignore[union-attr]

    @property
    def classes(self) -> Tensor | None:
        """[B] or, for several a image, [B, T]; None for functions."""
        if self.functions is not None:
            return None
        found = torch.stack([c for c in self._classes if c is not None])
        return found if self.several else found.squeeze(1)

    @property
    def distinct(self) -> list[int]:
        """Images that together have every target, once it is known."""
        if self.functions is not None:
            return list(range(len(self.functions)))
        seen: dict[tuple[int, ...], int] = {}
        for image, classes in enumerate(self._classes):
            seen.setdefault(tuple(classes.tolist()) if classes is not None else (), image)
        return list(seen.values())

    @property
    def of_first(self) -> Targets:
        """The target of the first image."""
        if self.functions is not None:
            return self.functions[0]
        return self._classes[0].unsqueeze(0) if self._classes[0] is not None else None

    def __call__(self, output: Any, image_of: Sequence[int], clean: Sequence[bool]) -> Tensor:
        """Scores of a pass, [rows, T], with their graph.

        Args:
            output: the model's, after output_fn.
            image_of: number of each row's image.
            clean: which rows are without noise.
        """
        if self.functions is not None:
            scores = self._of_functions(output, image_of)
        else:
            scores = self._of_rows(output, image_of, clean)
        finite = scores.detach().isfinite().all(1)
        if not bool(finite.all()):
            row = int(finite.logical_not().nonzero()[0])
            raise NonFinite(
                f"the score of image {image_of[row]} is {scores[row].detach().tolist()}: the model returns NaN or"
                " infinity, and nothing can be explained"
            )
        return scores

    def _of_rows(self, output: Any, image_of: Sequence[int], clean: Sequence[bool]) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(image_of):
            got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise TargetNotScalar(
                f"a class as target needs scores [{len(image_of)}, C], got {got}; give output_fn=, or a function as"
                " target (SegmentationTarget, DetectionTarget)"
            )
        for row, image in enumerate(image_of):
            if self._classes[image] is None and clean[row]:
                _check_k(self.k, output.shape[1])
                self._classes[image] = output[row].detach().topk(self.k).indices.cpu()
        classes = torch.stack([self._classes[image] for image in image_of])  # type: ignore[arg-type]
        low, high = int(classes.min()), int(classes.max())
        _check_class(high if low >= 0 else low, output.shape[1], "targets")
        return output.gather(1, classes.to(output.device))

    def _of_functions(self, output: Any, image_of: Sequence[int]) -> Tensor:
        functions = self.functions or []
        if len(functions) == 1:
            return _one_each(functions[0](output), len(image_of)).unsqueeze(1)
        rows = [_one_each(functions[i](_part(output, row)), 1) for row, i in enumerate(image_of)]
        return torch.stack(rows)


def default_output(output: Any) -> Any:
    """The scores in what models return: a tensor, `.logits`, a mapping's "logits" or "out", a tuple's first."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if key in output:
                return output[key]
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple) and output else output


def _part(output: Any, row: int) -> Any:
    if isinstance(output, (Tensor, list)):
        return output[row : row + 1]
    if isinstance(output, Mapping):
        return {key: _part(value, row) for key, value in output.items()}
    if isinstance(output, tuple):
        return tuple(_part(value, row) for value in output)
    raise TargetNotScalar(
        f"one function an image needs an output that divides into rows, got {type(output).__name__}; give output_fn="
    )


def _one_each(scores: Any, rows: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (rows,):
        got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise TargetNotScalar(
            f"the target function must return one number a row, [{rows}], got {got}; a pass holds noisy copies of the"
            " images as further rows"
        )
    return scores


def _check_k(k: int, classes: int) -> None:
    if k > classes:
        raise TargetOutOfRange(f"TopK: the model has {classes} classes, {k} were asked for")


def _check_class(category: int, classes: int, of: str) -> None:
    if not 0 <= category < classes:
        raise TargetOutOfRange(f"{of}: the model has classes 0 to {classes - 1}, got {category}")
