"""Projection of convexes in PyTorch: camera points, near plane, hull, lines; differentiable row by row.

Arithmetic is written out in the order of the native kernels: which points make the hull must not depend on who asks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import convex_hull_2d
from .support import BLOCK_BYTES, boxes_of, doubled_area, limits_of

_LEAST_SCALE = 1e-12  # of A and B, which others are divided by


def most_lines(k: int, clip: bool) -> int:
    """Corners that K points can have after the near plane has cut them: each pair across it may make one."""
    return max([k, *(front * (1 + k - front) for front in range(1, k))]) if clip else k


class Seen(NamedTuple):
    """L convexes, each as one camera sees it; the first five are differentiable."""

    means2d: Tensor  # [L, 2]
    depths: Tensor  # [L]
    points2d: Tensor  # [L, K, 2]
    lines: Tensor  # [L, M, 3]
    sharpness: Tensor  # [L]
    hull_size: Tensor  # int64 [L]
    well: Tensor  # bool [L] between near and far, finite, with an area


class Options(NamedTuple):
    """What all convexes have in common."""

    near: float
    far: float
    reference_focal: float  # 0 for none
    clip: bool
    depth_grad: bool


class Given(NamedTuple):
    """L convexes and the cameras that see them."""

    points: Tensor  # [L, K, 3]
    delta: Tensor  # [L]
    sigmas: Tensor  # [L]
    viewmats: Tensor  # [L, 4, 4]
    Ks: Tensor  # [L, 3, 3]


class Rows(NamedTuple):
    """L pairs of an image and a convex, int64 [L] each."""

    of_views: Tensor  # in tensors [I N, ...]
    of_scenes: Tensor  # in tensors [B N, ...]
    images: Tensor

    def take(self, points: Tensor, delta: Tensor, sigmas: Tensor, viewmats: Tensor, Ks: Tensor) -> Given:
        """From points [B, N, K, 3], delta [B, N], sigmas [I, N], viewmats [I, 4, 4] and Ks [I, 3, 3]."""
        own = (points.flatten(0, 1)[self.of_scenes], delta.flatten()[self.of_scenes], sigmas.flatten()[self.of_views])
        return Given(*own, viewmats[self.images], Ks[self.images])


def rows_of(flat: Tensor, images: int, scenes: int, count: int) -> Rows:
    """Rows of places in [I N], image i showing scene i // (I / B)."""
    image = flat // count
    return Rows(flat, image // (images // max(scenes, 1)) * count + flat % count, image)


def rows_in_block(k: int, clip: bool, itemsize: int) -> int:
    """How many rows to project at a time: what grows fastest is pairs of lines, or segments across the plane."""
    lines = most_lines(k, clip)
    numbers = max(lines * (lines - 1) // 2, 3 * k * (k + 1) if clip else 3 * k, 16)
    return max(1, BLOCK_BYTES // (numbers * itemsize))


def _turned(viewmats: Tensor, p: Tensor) -> Tensor:
    """R p in a fixed order of sums, [L, 4, 4] and [L, ..., 3]: forward and backward must find the same hulls."""
    x, y, z = p.unbind(-1)
    r = viewmats[:, :3, :3].reshape(-1, *(1,) * (p.ndim - 2), 3, 3)
    return torch.stack([r[..., i, 0] * x + r[..., i, 1] * y + r[..., i, 2] * z for i in range(3)], -1)


def _cut(arms: Tensor, depths: Tensor, near: float) -> Tensor:
    """Points before the near plane and where segments from them to the others meet it: [L, K, 3] -> [L, M, 3].

    The first point before it fills the places that are left over: a point twice makes no other hull.
    """
    k = arms.shape[1]
    front = depths[:, None] + arms[..., 2] > near  # [L, K]
    across = front[:, :, None] & ~front[:, None, :]
    a, b = arms[:, :, None], arms[:, None, :]
    gap = (b[..., 2] - a[..., 2]).where(across, 1)
    share = (near - depths[:, None, None] - a[..., 2]).where(across, 0) / gap
    x, y = (a[..., i] + share * (b[..., i] - a[..., i]) for i in (0, 1))
    z = (near - depths)[:, None, None].expand_as(x)
    every = torch.cat([arms, torch.stack((x, y, z), -1).flatten(1, 2)], 1)
    there = torch.cat([front, across.flatten(1)], 1)
    order = (~there).to(torch.uint8).argsort(dim=-1, stable=True)[:, : most_lines(k, True)]
    places = torch.arange(order.shape[1], device=order.device)
    order = order.where(places < there.sum(-1, keepdim=True), order[:, :1])
    return every.gather(1, order[..., None].expand(-1, -1, 3))


def _on_screen(arms: Tensor, centre: Tensor, focal: Tensor) -> Tensor:
    """Pixels from the projected centre: differences, which float32 keeps, with the derivative of the absolute place.

    Args:
        arms: [L, P, 3] camera space, from the centre.
        centre: [L, 3].
        focal: [L, 2].
    """
    centre, focal = centre[:, None], focal[:, None]
    z = centre[..., 2:] + arms[..., 2:]
    with torch.no_grad():
        relative = focal * (arms[..., :2] - centre[..., :2] / centre[..., 2:] * arms[..., 2:]) / z
    absolute = focal * (centre[..., :2] + arms[..., :2]) / z
    return with_derivative(relative, absolute)


def with_derivative(value: Tensor, of: Tensor) -> Tensor:
    """The value, differentiated as if it were `of`."""
    return value.detach() + (of - of.detach())


def see(given: Given, options: Options) -> Seen:
    """Project. Rows that are not `well` may hold anything, and have derivatives that are not finite."""
    points, delta, sigmas, viewmats, Ks = given
    near, far, reference_focal, clip, depth_grad = options
    k = points.shape[1]
    mean = points[:, 0]
    for i in range(1, k):
        mean = mean + points[:, i]
    mean = mean / k
    centre = _turned(viewmats, mean) + viewmats[:, :3, 3]
    arms = _turned(viewmats, points - mean[:, None])
    depths = centre[:, 2]
    focal, middle = Ks[:, (0, 1), (0, 1)], Ks[:, :2, 2]
    means2d = focal * centre[:, :2] / centre[:, 2:] + middle

    front = depths[:, None] + arms[..., 2] > near
    shown = arms.where(front[..., None], 0)  # a point on the plane z = 0 has no place, and no derivative
    points2d = (means2d.detach()[:, None] + _on_screen(shown, centre, focal)).where(front[..., None], 0)

    corners = _on_screen(_cut(arms, depths, near) if clip else arms, centre, focal)
    index, size = convex_hull_2d(corners)
    places = torch.arange(index.shape[1], device=index.device)
    following = index.roll(-1, 1).where(places + 1 < size[:, None], index[:, :1])
    a, b = (corners.gather(1, i.clamp(min=0)[..., None].expand(-1, -1, 2)) for i in (index, following))
    (au, av), (bu, bv) = a.unbind(-1), b.unbind(-1)
    known = depths if depth_grad else depths.detach()
    kappa = reference_focal * reference_focal / (focal[:, 0] * focal[:, 1]) if reference_focal > 0 else 1
    scale = _at_least(known * delta * kappa)
    edges = torch.stack((bv - av, au - bu, bu * av - au * bv), -1)
    lines = (scale[:, None, None] * edges).where((places < size[:, None])[..., None], 0)

    area = doubled_area(a.detach(), size)
    well = (front.any(-1) if clip else front.all(-1)) & (depths > near) & (depths < far)
    # Rounding could find a point of a sliver in both chains of its hull.
    well &= (
        (size >= 3)
        & (size <= index.shape[1])
        & (area > 0)
        & area.isfinite()
        & points2d.detach().isfinite().flatten(1).all(-1)
    )
    well &= centre.detach().isfinite().all(-1) & arms.detach().isfinite().flatten(1).all(-1)
    return Seen(means2d, depths, points2d, lines, _at_least(known * sigmas), size, well)


def _at_least(scale: Tensor) -> Tensor:
    """Clamped, without a gradient where it is."""
    return scale.where(scale > _LEAST_SCALE, _LEAST_SCALE)


def kept(
    seen: Seen, given: Given, opacities: Tensor, places: Tensor, width: int, height: int, radius_clip: float
) -> tuple[Tensor, ...]:
    """Places [L] of the rows that are visible, and the nine outputs of those; without a gradient."""
    limits = limits_of(opacities, seen.sharpness)
    boxes = boxes_of(seen.lines, limits, seen.means2d, width, height, radius_clip)
    visible = seen.well & boxes.there & (255 * opacities > 1)
    for t in (given.delta, given.sigmas, opacities, seen.sharpness, limits):
        visible &= t.isfinite()
    visible &= seen.lines.isfinite().flatten(1).all(-1) & seen.means2d.isfinite().all(-1)
    outputs = (*seen[:5], limits, seen.hull_size.to(torch.int32), boxes.ranges, boxes.radii)
    return (places[visible], *(t[visible] for t in outputs))
