"""Compositing of convexes in PyTorch: a tile's list at its pixels, front to back; differentiable tile by tile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .projection import with_derivative
from .support import BLOCK_BYTES

_MOST_ALPHA, _LEAST_ALPHA, _LEAST_TRANSMITTANCE = 0.99, 1 / 255, 1e-4
_MOST_EXPONENT = 80.0  # in float32, where exp(88) is the last


class Entries(NamedTuple):
    """L entries of a tile's list; or all convexes, with [I, N] for [L]."""

    means2d: Tensor  # [L, 2]
    limits: Tensor  # [L]
    hull_size: Tensor  # [L]
    lines: Tensor  # [L, M, 3]
    sharpness: Tensor  # [L]
    opacities: Tensor  # [L]
    colors: Tensor  # [L, D]
    absgrad: Tensor  # [L], or [L, 0] where it is not wanted

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        return self[3:]

    def leaves(self) -> Entries:
        """The same with sources that a gradient can be asked for."""
        return Entries(*self[:3], *(t.detach().requires_grad_() for t in self.sources))


class _Shift(torch.autograd.Function):
    """Pixel coordinates [L, P] that give the probe [L] the lengths of their gradients, summed over pixels."""

    @staticmethod
    def forward(probe: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return u.clone(), v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  # once_differentiable hides that arguments have names
    def backward(ctx: Any, grad_u: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None]:
        return grad_u.hypot(grad_v).sum(-1), None, None


def _alphas(entries: Entries, pixels: Tensor) -> Tensor:
    """alpha of each entry at each pixel [P, 2], 0 where it is below 1/255: [L, P]."""
    u, v = (pixels[:, i] - entries.means2d[:, i, None] for i in (0, 1))
    if entries.absgrad.ndim == 1:
        u, v = _Shift.apply(entries.absgrad, u, v)
    a, b, c = entries.lines[..., None].unbind(2)
    s = a * u[:, None] + (b * v[:, None] + c)  # [L, M, P]
    places = torch.arange(s.shape[1], device=s.device)
    s = s.masked_fill((places >= entries.hull_size[:, None])[..., None], -torch.inf)
    with torch.no_grad():
        top = s.amax(1)
        seen = (top <= entries.limits[:, None]) & (top > -torch.inf)
    # Beyond the limit s may overflow, and what is not used must have a finite derivative all the same.
    t = entries.sharpness[:, None] * s.where(seen[:, None], 0).logsumexp(1)
    if t.dtype is not torch.float64:
        t = t.clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    full = entries.opacities[:, None] * (-t).sigmoid()
    alpha = with_derivative(full.detach().clamp(max=_MOST_ALPHA), full)  # straight through the clamp
    return alpha.where(seen & (alpha.detach() >= _LEAST_ALPHA), 0)


def composite(chunks: Sequence[Entries], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colors [P, D] without background, transmittances [P] and last_ids [P] of one tile."""
    count, channels = pixels.shape[0], chunks[0].colors.shape[-1]
    light, color = pixels.new_ones(count), pixels.new_zeros(count, channels)
    stopped = torch.zeros(count, dtype=torch.bool, device=pixels.device)
    last = torch.zeros(count, dtype=torch.int32, device=pixels.device)
    before = 0
    for entries in chunks:
        if before and bool(stopped.all()):
            break
        alpha = _alphas(entries, pixels)
        with torch.no_grad():
            ahead = torch.cat([light[None], 1 - alpha]).cumprod(0)[1:]
            alive = (ahead >= _LEAST_TRANSMITTANCE) & ~stopped
            stopped = ~alive.all(0) | stopped
            contributes = alive & (alpha > 0)
            numbers = torch.arange(before + 1, before + 1 + len(alpha), dtype=torch.int32, device=pixels.device)
            last = torch.cat([last[None], numbers[:, None].where(contributes, 0)]).amax(0)
        alpha = alpha.where(alive, 0)
        through = torch.cat([light[None], 1 - alpha]).cumprod(0)
        color = color + (through[:-1] * alpha).T @ entries.colors
        light = through[-1]
        before += len(alpha)
    return color, light, last


class Tiling:
    """Tiles with a list (at least one tile), their pixels, and tensors of the image as [tiles, pixels, ...]."""

    def __init__(self, isect_offsets: Tensor, found: int, width: int, height: int, tile_size: int, most: int) -> None:
        """For `found` intersections, each taking `most` bytes a pixel."""
        self.images, self.down, self.across = isect_offsets.shape
        self.width, self.height, self.tile_size = width, height, tile_size
        bounds = [*isect_offsets.flatten().tolist(), found]  # host sync: lengths of the lists
        lengths = [after - start for start, after in itertools.pairwise(bounds)]
        # One tile at least, so that results hang on what they are differentiated by.
        self.busy = [tile for tile, length in enumerate(lengths) if length] or [0][: self.images]
        self.device = isect_offsets.device
        longest = max(1, BLOCK_BYTES // (most * tile_size * tile_size))
        self.chunks = [[min(longest, left) for left in range(lengths[t], 0, -longest)] or [0] for t in self.busy]

    def lists(self, convexes: Entries, flatten_ids: Tensor) -> Iterator[list[Entries]]:
        """The chunks of each busy tile; one gather for all, whose derivative is one sum."""
        ids, lengths = flatten_ids.long(), [length for chunks in self.chunks for length in chunks]
        parts = zip(*(t.flatten(0, 1)[ids].split(lengths) for t in convexes), strict=True)
        for chunks in self.chunks:
            yield [Entries(*next(parts)) for _ in chunks]

    def pixels(self, tile: int, dtype: torch.dtype) -> Tensor:
        """Centres [P, 2] of a tile, those beyond the picture too."""
        row, column = divmod(tile % (self.down * self.across), self.across)
        steps = torch.arange(self.tile_size, device=self.device).to(dtype) + 0.5
        v, u = torch.meshgrid(steps + row * self.tile_size, steps + column * self.tile_size, indexing="ij")
        return torch.stack((u, v), -1).reshape(-1, 2)

    def picture(self, parts: list[Tensor], empty: Tensor) -> Tensor:
        """[P, D] of each busy tile as [I, H, W, D]; `empty` [D] in the others."""
        size, channels = self.tile_size, empty.shape[0]
        tiles = empty.expand(self.images * self.down * self.across, size * size, channels)
        if parts:
            tiles = tiles.index_copy(0, torch.tensor(self.busy, device=self.device), torch.stack(parts))
        tiles = tiles.reshape(self.images, self.down, self.across, size, size, channels).transpose(2, 3)
        whole = tiles.reshape(self.images, self.down * size, self.across * size, channels)
        return whole[:, : self.height, : self.width].contiguous()

    def tiles(self, picture: Tensor) -> Tensor:
        """[I, H, W, D] as [tiles, P, D], zeros beyond the picture."""
        size, channels = self.tile_size, picture.shape[-1]
        padding = (0, 0, 0, self.across * size - self.width, 0, self.down * size - self.height)
        whole = F.pad(picture, padding).reshape(self.images, self.down, size, self.across, size, channels)
        return whole.transpose(2, 3).reshape(-1, size * size, channels)
