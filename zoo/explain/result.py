"""What an explainer returns: maps by layer, in the size of the layer or of the image, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CAMError, UnknownLayer
from .formulas import Normalize, normalised

if TYPE_CHECKING:
    from PIL import Image

Size = Literal["input"] | Sequence[int] | None
Fuse = Literal["mean", "max", "product"] | Callable[[Tensor], Tensor]

_FUSIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda maps: maps.mean(0),
    "max": lambda maps: maps.amax(0),
    "product": lambda maps: maps.prod(0),
}


@dataclass
class CAMResult:
    """Class activation maps of a batch.

    Args:
        maps: by layer, [B, h, w], or [B, T, h, w] for T targets an image; after the relu, not normalised,
            relative to e^log_scale; float32, of a float64 model float64. With `reduce="none"` the parts,
            [B, (T,) k, h, w], without relu.
        logits: what the model says of the images without noise, after output_fn.
        targets: classes, [B] or [B, T]; None for functions.
        scores: what was explained, of the images without noise, [B] or [B, T].
        effective_samples: how many of the noisy copies count, (sum v)^2 / sum v^2, shaped like the scores.
        log_scale: shaped like the scores; maps times its exponential are the literal values.
        n_forwards: images that went through the network for each one explained, rounded up.
        linear_tail: by layer, whether the score was found to be linear behind it.
        valid: [B] or [B, T], False where a map is 0 everywhere.
        fused: [B, (T,) H, W] in [0, 1] where layers were fused.
        input_size: of the images.
        size, normalize: what :meth:`heatmap` does unless told otherwise.
    """

    maps: dict[str, Tensor]
    logits: Any
    targets: Tensor | None
    scores: Tensor
    effective_samples: Tensor
    log_scale: Tensor
    n_forwards: int
    linear_tail: dict[str, bool]
    valid: Tensor
    fused: Tensor | None
    input_size: tuple[int, ...]
    size: Size
    normalize: Normalize

    def heatmap(self, layer: str | None = None, size: Size | Literal["default"] = "default") -> Tensor:
        """[B, H, W] in [0, 1], or [B, T, H, W]: the map of a layer, enlarged bilinearly, then normalised.

        Args:
            layer: which; None for the fused map, or for the only layer.
            size: "input", (H, W), or None for that of the layer; what the call said, if left out.

        Raises:
            UnknownLayer: if the layer was not explained, or several were and none is named.
        """
        if layer is None and self.fused is not None:
            return self.fused if size == "default" else sized(self.fused, size, self.input_size, "max")
        size = self.size if size == "default" else size
        if layer is None and len(self.maps) > 1:
            raise UnknownLayer(
                f"heatmap: several layers were explained, name one of {', '.join(self.maps)}, or fuse them"
            )
        name = next(iter(self.maps)) if layer is None else layer
        if name not in self.maps:
            raise UnknownLayer(f"heatmap: layer {name!r} was not explained; there are {', '.join(self.maps)}")
        return sized(self.maps[name], size, self.input_size, self.normalize)

    def overlay(self, images: Any, layer: str | None = None, **options: Any) -> list[Image.Image]:
        """The maps over the images, as pictures: one an image, in the order of images and then targets.

        Args:
            images: [B, 3, H, W] in [0, 1] or uint8, or a list of pictures.
            layer: as for :meth:`heatmap`.
            options: of :func:`zoo.explain.overlay`.
        """
        from .overlay import overlay

        maps = self.heatmap(layer)
        several = 1 + (self.scores.ndim > 1)
        if maps.ndim != several + len(self.input_size):
            raise CAMError("overlay: these are the parts of a map, with signs; explain without reduce='none'")
        targets = maps.shape[1] if maps.ndim > 1 + len(self.input_size) else 1
        flat = maps.reshape(-1, *maps.shape[-len(self.input_size) :])
        return [overlay(images[i // targets], one, **options) for i, one in enumerate(flat)]

    def save(self, path: str | Path, images: Any = None) -> None:
        """Write everything but pictures to an .npz file, or, to any other suffix, the images with their maps.

        Args:
            path: of the file; folders are made.
            images: as for :meth:`overlay`; needed for a picture.

        Raises:
            ValueError: if a picture is asked for without images.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".npz":
            if images is None:
                raise ValueError(f"save: {path.name} is a picture and needs images=; an .npz file takes the maps alone")
            from .overlay import grid

            layers = [None] if self.fused is not None else list(self.maps)
            rows = [self.overlay(images, layer) for layer in layers]
            grid([picture for row in rows for picture in row], cols=len(rows[0])).save(path)
            return
        import numpy as np

        arrays = {f"map/{name}": t for name, t in self.maps.items()}
        arrays |= {"scores": self.scores, "log_scale": self.log_scale, "effective_samples": self.effective_samples}
        arrays |= {"valid": self.valid}
        if self.targets is not None:
            arrays["targets"] = self.targets
        if self.fused is not None:
            arrays["fused"] = self.fused
        np.savez_compressed(path, **{name: t.detach().cpu().numpy() for name, t in arrays.items()})  # type: ignore[arg-type]


def sized(maps: Tensor, size: Size, input_size: Sequence[int], normalize: Normalize) -> Tensor:
    """Maps [..., h, w] enlarged and then normalised; any number of axes of the input's."""
    axes = len(input_size)
    to = None if size is None else tuple(input_size if isinstance(size, str) else size)
    if to is not None and tuple(maps.shape[-axes:]) != to:
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[axes]
        flat = maps.reshape(1, -1, *maps.shape[-axes:])
        maps = F.interpolate(flat, to, mode=mode, align_corners=False).reshape(*maps.shape[:-axes], *to)
    return normalised(maps, normalize, axes)


def fused(maps: Mapping[str, Tensor], how: Fuse, size: Size, input_size: Sequence[int]) -> Tensor:
    """One map of several layers': each in [0, 1] and of one size, that of the largest for None, combined, in [0, 1]."""
    axes = len(input_size)
    if size is None:
        size = max((tuple(t.shape[-axes:]) for t in maps.values()), key=lambda shape: torch.Size(shape).numel())
    same = torch.stack([sized(t, size, input_size, "max") for t in maps.values()])
    combine = _FUSIONS[how] if isinstance(how, str) else how
    return normalised(combine(same), "max", axes)
