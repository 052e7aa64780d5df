"""A part of a layer: some of its feature maps, some of their neurons.

Before the relu the maps of disjoint parts sum to that of the whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import EmptySelection


@dataclass(frozen=True)
class FeatureMaps:
    """Some feature maps of a layer. Exactly one of:

    Args:
        indices: their numbers, or a slice.
        mask: [K] of bool.
        top: the so many that contribute most, by abs(w_k) times the sum of the map's activations; each image and
            target has its own.
    """

    indices: Sequence[int] | slice | None = None
    mask: Tensor | None = None
    top: int | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.indices, self.mask, self.top)) != 1:
            raise ValueError("FeatureMaps: give one of indices, mask and top")
        if self.top is not None and self.top < 1:
            raise EmptySelection(f"FeatureMaps: top must be at least 1, got {self.top}")

    def chosen(self, weights: Tensor, contributions: Tensor) -> Tensor:
        """Numbers of the maps, [B, T, k].

        Args:
            weights: w_k, [B, T, K].
            contributions: abs(w_k) sum A_k, [B, T, K].
        """
        maps = weights.shape[-1]
        if self.top is not None:
            return contributions.topk(min(self.top, maps), -1).indices
        if self.mask is not None:
            if self.mask.shape != (maps,):
                raise EmptySelection(f"FeatureMaps: mask must be [{maps}] for this layer, got {tuple(self.mask.shape)}")
            found = self.mask.nonzero().flatten().tolist()
        elif isinstance(self.indices, slice):
            found = list(range(maps)[self.indices])
        else:
            found = [int(i) for i in self.indices or ()]
        outside = [i for i in found if not -maps <= i < maps]
        if outside:
            raise EmptySelection(f"FeatureMaps: the layer has maps 0 to {maps - 1}, got {outside[0]}")
        if not found:
            raise EmptySelection(f"FeatureMaps: no feature map is left of the layer's {maps}")
        found = sorted({i % maps for i in found})
        return torch.tensor(found, device=weights.device).expand(*weights.shape[:2], -1)


@dataclass(frozen=True)
class Neurons:
    """Some neurons of a layer's maps. Exactly one of:

    Args:
        points: [(row, column), ...].
        box: (top, left, bottom, right), half-open.
        mask: [h, w] of bool, or [K, h, w] with a mask for each feature map; for space "layer" only.
        space: "layer", cells of the layer, or "input", pixels: pixel p of H lies in cell floor(p h / H), and a box
            takes the cells it touches.
    """

    points: Sequence[Sequence[int]] | None = None
    box: Sequence[int] | None = None
    mask: Tensor | None = None
    space: Literal["layer", "input"] = "layer"

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.points, self.box, self.mask)) != 1:
            raise ValueError("Neurons: give one of points, box and mask")
        if self.space not in ("layer", "input"):
            raise ValueError(f"Neurons: space must be 'layer' or 'input', got {self.space!r}")
        if self.mask is not None and self.space == "input":
            raise ValueError("Neurons: a mask is one of the layer's cells; give points or a box in pixels")

    def among(self, maps: int, cells: Sequence[int], size: Sequence[int]) -> Tensor:
        """0/1 mask, [1 or K, ...].

        Args:
            maps: K.
            cells: of a map, (h, w).
            size: of the input.
        """
        if self.mask is not None:
            mask = self.mask.bool()
            if tuple(mask.shape) not in (tuple(cells), (maps, *cells)):
                raise EmptySelection(
                    f"Neurons: mask must be {list(cells)} or {[maps, *cells]} for this layer, got {list(mask.shape)}"
                )
            mask = mask if mask.ndim > len(cells) else mask.unsqueeze(0)
        else:
            mask = torch.zeros(1, *cells, dtype=torch.bool)
            limits = list(cells if self.space == "layer" else size)
            if self.box is not None:
                self._fill(mask[0], limits, cells)
            for point in self.points or ():
                if len(point) != len(cells) or any(not 0 <= p < limit for p, limit in zip(point, limits, strict=True)):
                    raise EmptySelection(f"Neurons: points must lie in {limits} ({self.space}), got {tuple(point)}")
                mask[(0, *(p * cell // limit for p, cell, limit in zip(point, cells, limits, strict=True)))] = True
        if not mask.any():
            raise EmptySelection("Neurons: no neuron is left of the layer")
        return mask

    def _fill(self, mask: Tensor, limits: Sequence[int], cells: Sequence[int]) -> None:
        box = [int(side) for side in self.box or ()]
        axes = len(cells)
        low, high = box[:axes], box[axes:]
        if len(box) != 2 * axes or any(not 0 <= a < b <= limit for a, b, limit in zip(low, high, limits, strict=True)):
            raise EmptySelection(
                f"Neurons: box must be (top, left, bottom, right), half-open, inside {list(limits)} ({self.space}), got"
                f" {tuple(box)}"
            )
        spans = zip(low, high, cells, limits, strict=True)
        mask[tuple(slice(a * cell // limit, (b - 1) * cell // limit + 1) for a, b, cell, limit in spans)] = True


@dataclass(frozen=True)
class Select:
    """What of a layer makes the map.

    Args:
        feature_maps: which, None for all.
        neurons: which, None for all.
        layer: the layer it is about; None for every layer that is explained.
        neuron_weights: "map", w_k sums over the whole map; "selected", over the selected neurons alone, and parts no
            longer add up.
        reduce: "sum" over feature maps, then relu; "none", each w_k A_k by itself, [B, k, h, w], without relu.
    """

    feature_maps: FeatureMaps | None = None
    neurons: Neurons | None = None
    layer: str | None = None
    neuron_weights: Literal["map", "selected"] = "map"
    reduce: Literal["sum", "none"] = "sum"

    def __post_init__(self) -> None:
        if self.neuron_weights not in ("map", "selected"):
            raise ValueError(f"Select: neuron_weights must be 'map' or 'selected', got {self.neuron_weights!r}")
        if self.reduce not in ("sum", "none"):
            raise ValueError(f"Select: reduce must be 'sum' or 'none', got {self.reduce!r}")


def as_select(select: Select | FeatureMaps | Neurons | None) -> Select:
    """A selection, whatever was given of it.

    Raises:
        TypeError: if it is none.
    """
    if select is None:
        return Select()
    if isinstance(select, FeatureMaps):
        return Select(feature_maps=select)
    if isinstance(select, Neurons):
        return Select(neurons=select)
    if isinstance(select, Select):
        return select
    raise TypeError(f"select must be a FeatureMaps, Neurons or Select, got {type(select).__name__}")
