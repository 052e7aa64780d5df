"""Hulls against exact arithmetic, neighbours against all pairs, normals and start shapes against their definitions."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close
from zoo.splat.convex.geometry import convex_hull_2d, convex_init_from_points, convex_normals
from zoo.splat.convex.reference import hull

F64 = torch.float64
Point = tuple[int, int]  # all sets have whole coordinates, so that Python's integers are exact


def _turn(a: Point, b: Point, q: Point) -> int:
    return (b[0] - a[0]) * (q[1] - a[1]) - (b[1] - a[1]) * (q[0] - a[0])


def _holds(corners: tuple[Point, ...], q: Point) -> bool:
    """Whether a segment or a triangle holds q, its boundary included."""
    if len(corners) == 2 or _turn(*corners) == 0:
        ends = min(corners), max(corners)
        return _turn(*ends, q) == 0 and all(
            min(ends[0][i], ends[1][i]) <= q[i] <= max(ends[0][i], ends[1][i]) for i in (0, 1)
        )
    a, b, c = corners
    turns = [_turn(a, b, q), _turn(b, c, q), _turn(c, a, q)]
    return min(turns) >= 0 or max(turns) <= 0


def _exact_corners(points: set[Point]) -> set[Point]:
    """By Caratheodory: a point is a corner unless two or three of the others hold it."""
    return {
        p
        for p in points
        if not any(_holds(others, p) for m in (2, 3) for others in combinations(sorted(points - {p}), m))
    }


def _check_hull(points: Tensor, index: Tensor, size: int) -> None:
    exact = [(int(u), int(v)) for u, v in points.tolist()]
    corners = _exact_corners(set(exact))
    assert index[size:].tolist() == [-1] * (len(points) - size)
    if len(corners) < 3:
        assert size < 3
        return
    found = [exact[k] for k in index[:size].tolist()]
    assert size == len(corners)
    assert set(found) == corners
    assert found[0] == min(exact)
    for a, b in zip(found, found[1:] + found[:1], strict=True):
        assert all(_turn(a, b, q) >= 0 for q in exact)


@pytest.mark.parametrize("k", range(3, 9))
@pytest.mark.parametrize("side", [3, 7, None], ids=["lattice_3", "lattice_7", "generic"])
def test_hull_is_exact(k: int, side: int | None):
    generator = torch.Generator().manual_seed(10 * k + (side or 0))
    if side is None:
        sets = (2**40 * torch.randn(200, k, 2, generator=generator, dtype=F64)).round()
    else:
        sets = torch.randint(0, side, (300, k, 2), generator=generator).to(F64) - side // 2
    index, size = convex_hull_2d(sets)
    assert index.dtype == size.dtype == torch.long
    for points, corners, m in zip(sets, index, size.tolist(), strict=True):
        _check_hull(points, corners, m)


def test_hull_is_the_one_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    for k in (3, 6, 8, 20):
        for sets in (torch.randint(0, 4, (50, k, 2), generator=generator).double(), torch.randn(50, k, 2).double()):
            index, size = convex_hull_2d(sets)
            expected = [hull(points) for points in sets]
            assert [i[:m].tolist() for i, m in zip(index, size.tolist(), strict=True)] == expected


def test_hull_of_fewer_than_three_corners():
    on_a_line = torch.tensor([[0.0, 0], [1, 1], [3, 3], [2, 2]])
    in_one_place = torch.ones(4, 2)
    _, size = convex_hull_2d(torch.stack([on_a_line, in_one_place]))
    assert (size < 3).all()
    assert (convex_hull_2d(torch.zeros(5, 1, 2))[1] < 3).all()
    assert (convex_hull_2d(torch.eye(2))[1] < 3).all()


def test_nan_in_one_set_leaves_the_others_alone():
    sets = torch.randn(5, 6, 2)
    index, size = convex_hull_2d(sets)
    sets[2, 3] = math.nan
    spoilt, spoilt_size = convex_hull_2d(sets)
    keep = torch.tensor([0, 1, 3, 4])
    assert spoilt[keep].equal(index[keep])
    assert spoilt_size[keep].equal(size[keep])


def test_hull_keeps_leading_axes_and_takes_any_float():
    sets = torch.randint(0, 7, (2, 3, 6, 2)).float()
    index, size = convex_hull_2d(sets)
    assert index.shape == (2, 3, 6)
    assert size.shape == (2, 3)
    flat, flat_size = convex_hull_2d(sets.reshape(6, 6, 2).half())
    assert flat.equal(index.reshape(6, 6))
    assert flat_size.equal(size.reshape(6))
    empty, none = convex_hull_2d(torch.zeros(0, 6, 2))
    assert empty.shape == (0, 6)
    assert none.shape == (0,)


def test_hull_refuses_what_is_no_set_of_points():
    with pytest.raises(TypeError, match="floating point"):
        convex_hull_2d(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[\.\.\., K, 2\]"):
        convex_hull_2d(torch.zeros(4, 3))


def test_normals_of_flat_convexes():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2, 40, 3, 3, generator=generator, dtype=F64)
    campos = torch.randn(2, 3, generator=generator, dtype=F64)
    normals = convex_normals(points, campos)
    expected = torch.linalg.cross(points[..., 1, :] - points[..., 0, :], points[..., 2, :] - points[..., 0, :])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    to_camera = campos[:, None] - points.mean(-2)
    expected = torch.where((expected * to_camera).sum(-1, keepdim=True) < 0, -expected, expected)
    assert_close(normals, expected, like=F64, loose=1e3)


def test_normals_can_be_learned_and_nan_stays_where_it_is():
    points = torch.randn(3, 6, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    points = (points * torch.tensor([1.0, 0.6, 0.2], dtype=F64)).requires_grad_()
    campos = torch.tensor([0.3, 1.0, 5.0], dtype=F64)
    assert torch.autograd.gradcheck(lambda p: convex_normals(p, campos), points)
    spoilt = points.detach().clone()
    spoilt[1, 2, 0] = math.nan
    spoilt.requires_grad_()
    normals = convex_normals(spoilt, campos)
    assert normals[1].equal(torch.zeros(3, dtype=F64))
    normals.sum().backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    with pytest.raises(ValueError, match="campos"):
        convex_normals(points, campos[:2])


def _mean_square(xyz: Tensor) -> Tensor:
    squares = (xyz[:, None] - xyz).square().sum(-1).fill_diagonal_(math.inf)
    nearest = squares.sort(-1).values[:, : min(3, len(xyz) - 1)]
    return nearest.mean(-1).clamp(min=1e-7)


def _clouds() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(n: int) -> Tensor:
        return torch.randn(n, 3, generator=generator, dtype=F64)

    few = {f"{n}_points": normal(n) for n in (2, 3, 4, 5, 24, 25, 49)}
    return few | {
        "even": torch.rand(1500, 3, generator=generator, dtype=F64),
        "flat": normal(700) * torch.tensor([1.0, 2.0, 0.0], dtype=F64),
        "clustered": torch.cat([normal(500) * 1e-3, normal(500) * 10 + 50, (2 * normal(300)).exp()]),
        "with_repeats": torch.randint(0, 6, (900, 3), generator=generator).to(F64),
        "in_one_place": torch.ones(200, 3, dtype=F64),
    }


@pytest.mark.parametrize("cloud", _clouds())
def test_radius_is_that_of_all_pairs(cloud: str):
    xyz = _clouds()[cloud]
    _, radius = convex_init_from_points(xyz)
    assert_close(radius, _mean_square(xyz).sqrt())
    _, single = convex_init_from_points(xyz.float())
    assert_close(single, _mean_square(xyz.float().double()).sqrt(), like=torch.float32)


def test_radius_in_a_large_cloud():
    xyz = torch.randn(30_000, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
    _, radius = convex_init_from_points(xyz)
    some = torch.arange(0, len(xyz), 601)
    squares = (xyz[some, None] - xyz).square().sum(-1)
    assert_close(radius[some], squares.sort(-1).values[:, 1:4].mean(-1).sqrt())


def test_no_point_and_one_point():
    points, radius = convex_init_from_points(torch.zeros(0, 3))
    assert points.shape == (0, 6, 3)
    assert radius.shape == (0,)
    _, radius = convex_init_from_points(torch.zeros(1, 3, dtype=F64))
    assert_close(radius, torch.tensor([1e-7], dtype=F64).sqrt())


@pytest.mark.parametrize("k", range(3, 9))
def test_points_lie_on_a_fibonacci_sphere(k: int):
    xyz = torch.randn(10, 3, dtype=F64, generator=torch.Generator().manual_seed(5))
    points, radius = convex_init_from_points(xyz, k, size=1.5, random_orientation=False)
    for n in range(10):
        for i in range(k):
            z = 1 - 2 * i / (k - 1)
            angle = math.pi * (3 - 5**0.5) * i
            rho = math.sqrt(max(0.0, 1 - z * z))
            unit = torch.tensor([rho * math.cos(angle), rho * math.sin(angle), z], dtype=F64)
            assert_close(points[n, i], xyz[n] + 1.5 * radius[n] * unit, loose=10)


def test_random_orientation_is_a_rotation_and_seeded():
    xyz = torch.randn(2000, 3, dtype=F64, generator=torch.Generator().manual_seed(6))

    def arms(**kwargs: bool | int) -> Tensor:
        points, radius = convex_init_from_points(xyz, generator=torch.Generator().manual_seed(7), **kwargs)
        return (points - xyz[:, None]) / radius[:, None, None]

    upright, turned = arms(k=6, random_orientation=False), arms(k=6, random_orientation=True)
    assert turned.equal(arms(k=6, random_orientation=True))
    assert_close(turned @ turned.mT, upright @ upright.mT, loose=100)
    assert_close(torch.linalg.det(turned[:, :3]), torch.linalg.det(upright[:, :3]), loose=100)
    assert turned.mean(0).abs().max() < 0.1  # every direction as often as its opposite
    assert_close(turned[..., 2].square().mean(0), upright.square().sum(-1)[0] / 3, like=torch.bfloat16, loose=20)


def test_only_triangles_are_turned_by_default():
    xyz = torch.randn(5, 3)
    for k, is_turned in ((3, True), (4, False), (6, False)):
        points, radius = convex_init_from_points(xyz, k)
        arms = (points - xyz[:, None]) / radius[:, None, None]
        assert (arms.var(0).sum() > 0.1) == is_turned


@pytest.mark.parametrize(
    ("xyz", "arguments", "error", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.long), {}, TypeError, "floating point"),
        (torch.zeros(4, 2), {}, ValueError, r"\[N, 3\]"),
        (torch.full((4, 3), math.nan), {}, ValueError, "finite"),
        (torch.zeros(4, 3), {"k": 2}, ValueError, "k must be"),
        (torch.zeros(4, 3), {"k": 9}, ValueError, "k must be"),
        (torch.zeros(4, 3), {"size": 0.0}, ValueError, "size"),
    ],
)
def test_start_refuses(xyz: Tensor, arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        convex_init_from_points(xyz, **arguments)
