"""Where a convex can be seen: the polygon of its lines moved outwards, its box in pixels, the tiles it meets.

alpha >= 1/255 means B phi <= ln(255 o - 1), and phi >= max_j s_j, so that what can be seen of a convex lies in the
polygon {q: s_j(q) <= limit for every j} with limit = ln(255 o - 1) / B. L convexes, M lines [a, b, c] each, of which
the first `size` count and the rest are zeros; coordinates are relative to the projected centre.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 64 * 1024 * 1024  # of one intermediate result
_MARGIN = 1 / 64  # pixels, for the rounding of coordinates


def last_place(dtype: torch.dtype) -> float:
    """Relative size of the last digit, a little more."""
    return 2.3e-16 if dtype is torch.float64 else 1.2e-7


def limits_of(opacities: Tensor, sharpness: Tensor) -> Tensor:
    """max_j s_j above which alpha < 1/255 for certain: ln(255 o - 1) / B with a few last places more, [L]."""
    exponent = (255 * opacities - 1).log()
    return (exponent + 8 * last_place(exponent.dtype) * (1 + exponent.abs())) / sharpness


def reaches(lines: Tensor, limits: Tensor) -> Tensor:
    """How far the polygon reaches to the left, right, up and down of the projected centre.

    In direction e that is the least a (limit - c_i) + b (limit - c_j) over pairs of lines with e = a n_i + b n_j and
    a, b >= 0: the dual of a linear program in two variables. Pairs that are nearly parallel are left out and rounding
    is added, so that the result stays a bound.

    Args:
        lines: [L, M, 3], zeros where there is none.
        limits: [L].

    Returns:
        [L, 4], negative where the polygon lies on the other side.
    """
    place = last_place(lines.dtype)
    first, second = torch.triu_indices(lines.shape[1], lines.shape[1], 1, device=lines.device)
    (pa, pb, pc), (qa, qb, qc) = lines[:, first].unbind(-1), lines[:, second].unbind(-1)
    det = pa * qb - pb * qa
    size = ((pa * pa + pb * pb) * (qa * qa + qb * qb)).sqrt()
    sound = det.abs() > 64 * place * size  # padding is not: 0 > 0
    det = det.where(sound, 1)
    room_p, room_q = limits[:, None] - pc, limits[:, None] - qc
    unbounded = 1e300 if lines.dtype is torch.float64 else 1e38
    found = []
    for eu, ev in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        a, b = (eu * qb - ev * qa) / det, (ev * pa - eu * pb) / det
        by_p, by_q = a * room_p, b * room_q
        bound = by_p + by_q + 8 * place * (by_p.abs() + by_q.abs()) * (size / det.abs())
        found.append(bound.where(sound & (a >= 0) & (b >= 0), unbounded).amin(-1).clamp(max=unbounded))
    return torch.stack(found, -1)


class Boxes(NamedTuple):
    """Half-open ranges of pixels (x0, x1, y0, y1), int32 [L, 4]; half extents int32 [L, 2]; whether there is any."""

    ranges: Tensor
    radii: Tensor
    there: Tensor


def boxes_of(lines: Tensor, limits: Tensor, means2d: Tensor, width: int, height: int, radius_clip: float) -> Boxes:
    """Pixels whose centres may lie in the polygon: lines [L, M, 3], limits [L], means2d [L, 2]."""
    left, right, up, down = reaches(lines, limits).unbind(-1)
    u, v = means2d.unbind(-1)
    ranges = torch.stack((*_between(u - left, u + right, width), *_between(v - up, v + down, height)), -1)
    extents = torch.stack(((right + left) / 2, (down + up) / 2), -1)
    radii = extents.clamp(max=2 * math.hypot(width, height)).ceil()
    there = (extents >= 0).all(-1) & (radii > radius_clip).any(-1)
    there &= (ranges[:, 0] < ranges[:, 1]) & (ranges[:, 2] < ranges[:, 3])
    return Boxes(_integers(ranges), _integers(radii), there)


def _between(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixels [first, last) with centres from low to high, within [0, size)."""
    first, last = (low - _MARGIN - 0.5).ceil(), (high + _MARGIN - 0.5).floor() + 1
    return first.clamp(0, size), last.clamp(0, size)


def _integers(t: Tensor) -> Tensor:
    return t.nan_to_num(0, 0, 0).to(torch.int32)


def meet(
    lines: Tensor, size: Tensor, limits: Tensor, low_u: Tensor, high_u: Tensor, low_v: Tensor, high_v: Tensor
) -> Tensor:
    """Whether a rectangle of pixel centres may meet the polygon: not if all of it is beyond one of the lines.

    Sums are formed in the order in which the pixels' are: rounding is monotone, so that no pixel which passes is in a
    rectangle that does not.

    Args:
        lines: [L, M, 3].
        size: [L] how many lines count.
        limits: [L].
        low_u, high_u, low_v, high_v: [L] relative to the projected centre.

    Returns:
        bool [L].
    """
    result = torch.ones_like(size, dtype=torch.bool)
    for j in range(lines.shape[1]):
        a, b, c = lines[:, j].unbind(-1)
        least = a * low_u.where(a > 0, high_u) + (b * low_v.where(b > 0, high_v) + c)
        result &= (least <= limits) | (j >= size)
    return result


def _cross(a: Tensor, b: Tensor, q: Tensor) -> Tensor:
    return (b[:, 0] - a[:, 0]) * (q[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (q[:, 0] - a[:, 0])


def doubled_area(corners: Tensor, size: Tensor) -> Tensor:
    """Twice the area of polygons: corners [L, M, 2] of which `size` [L] count."""
    area = corners.new_zeros(corners.shape[0])
    for j in range(2, corners.shape[1]):
        area = area + _cross(corners[:, 0], corners[:, j - 1], corners[:, j]).where(j < size, 0)
    return area
