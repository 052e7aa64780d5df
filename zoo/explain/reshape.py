"""Maps out of layers that return tokens, or channels last: [B, K, h, w] from whatever layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from .errors import NotSpatial, ReshapeNeeded

Reshape = Callable[[Tensor], Tensor]

_MOST_PREFIXES = 8  # class, distillation and register tokens before the patches


class TokenReshape:
    """[B, prefix + h w, K] tokens to [B, K, h, w].

    Args:
        grid: (h, w).
        prefix: tokens before those of the patches (class, distillation, registers).
    """

    def __init__(self, grid: Sequence[int], prefix: int = 0) -> None:
        self.grid, self.prefix = (int(grid[0]), int(grid[1])), prefix

    def __call__(self, t: Tensor) -> Tensor:
        return t[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)

    def __repr__(self) -> str:
        return f"TokenReshape(grid={self.grid}, prefix={self.prefix})"


class NHWCReshape:
    """[B, h, w, K] to [B, K, h, w]."""

    def __call__(self, t: Tensor) -> Tensor:
        return t.movedim(-1, 1)

    def __repr__(self) -> str:
        return "NHWCReshape()"


def _as_it_is(t: Tensor) -> Tensor:
    return t


def resolve_reshape(
    reshape: Literal["auto"] | Reshape, name: str, output: Tensor, model: nn.Module, size: Sequence[int]
) -> Reshape:
    """How the output of a layer becomes maps.

    Args:
        reshape: "auto", or what the user gave.
        name: of the layer, for messages.
        output: what the layer returned.
        model: the whole model, asked for its number of prefix tokens and its layout.
        size: of the input without batch and channels.

    Raises:
        NotSpatial: if there is no map in it.
        ReshapeNeeded: if the layout cannot be told.
    """
    found = _guessed(name, output, model, size) if reshape == "auto" else reshape
    maps = found(output)
    if maps.ndim < 3 or all(side < 2 for side in maps.shape[2:]):
        raise NotSpatial(
            f"layer {name!r} returns {tuple(output.shape)}, which holds no map of at least two cells; name a layer"
            " before the pooling"
        )
    return found


def _guessed(name: str, output: Tensor, model: nn.Module, size: Sequence[int]) -> Reshape:
    if output.ndim < 3:
        raise NotSpatial(
            f"layer {name!r} returns {tuple(output.shape)}, without a map; name a layer before pooling and flattening"
        )
    if len(size) != 2:
        if output.ndim == len(size) + 2:
            return _as_it_is
    elif output.ndim == 4:
        if _alike(output.shape[1:3], size) and (not _alike(output.shape[2:], size) or _channels_last(model)):
            return NHWCReshape()
        return _as_it_is
    elif output.ndim == 3:
        grid = _grid(output.shape[1], model, size)
        if grid is not None:
            return grid
    raise ReshapeNeeded(
        f"layer {name!r} returns {tuple(output.shape)}, in which the map cannot be told; give"
        " reshape=TokenReshape(grid=(h, w), prefix=...) or another function to [B, K, h, w]"
    )


def _alike(map: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a map has the proportions of the input, to a cell."""
    return abs(map[0] * size[1] - map[1] * size[0]) < max(size) and map[0] <= size[0] and map[1] <= size[1]


def _channels_last(model: nn.Module) -> bool:
    return str(getattr(model, "output_fmt", "")).upper().endswith("NHWC")  # timm


def _grid(tokens: int, model: nn.Module, size: Sequence[int]) -> TokenReshape | None:
    """The grid of the proportions of the input, behind as few tokens as possible."""
    known = getattr(model, "num_prefix_tokens", None)  # timm; a layer may come before them
    prefixes = [known, 0] if isinstance(known, int) else range(_MOST_PREFIXES + 1)
    for exact in (True, False):
        for prefix in prefixes:
            patches = tokens - prefix
            height = round(math.sqrt(patches * size[0] / size[1])) if patches > 0 else 0
            if not height or patches % height:
                continue
            grid = (height, patches // height)
            if grid[0] * size[1] == grid[1] * size[0] or (not exact and _alike(grid, size)):
                return TokenReshape(grid, prefix)
    return None
