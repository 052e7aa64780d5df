"""Solids and the tracer: against exact arithmetic, by hand, and in the limit of many rays."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.data.scenes import (
    Solid,
    box,
    boxes,
    octahedron,
    prism,
    random_solids,
    rotation_z,
    sample_surface,
    solids,
    tetrahedron,
    trace,
)
from zoo.splat.cameras import camera_rays, intrinsics, look_at, orbit

RED, GREEN, BLUE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


def _shot(things: list[Solid], eye: tuple[float, float, float], focal: float, size: int, **options: Any) -> Any:
    """Picture [H, W, 3] and coverage [H, W] from `eye` towards the origin."""
    viewmat, K = look_at(torch.tensor(eye).double())[None], intrinsics(focal, size, size)[None]
    picture, coverage = trace(things, viewmat, K, size, size, **options)
    return picture[0], coverage[0]


def _exact(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.tolist()]


def _cross(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def _dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def _triangle_hit(origin: list[Fraction], ray: list[Fraction], corners: list[list[Fraction]]) -> Fraction | None:
    """How far along the ray it meets a triangle, by Cramer's rule and without rounding."""
    a, b, c = corners
    e, f, s = ([x - y for x, y in zip(p, a, strict=True)] for p in (b, c, origin))
    normal = _cross(ray, f)
    if not (det := _dot(e, normal)):
        return None
    across, down = _dot(s, normal) / det, _dot(ray, _cross(s, e)) / det
    distance = _dot(f, _cross(s, e)) / det
    return distance if across >= 0 and down >= 0 and across + down <= 1 and distance > 0 else None


def test_pictures_are_those_of_exact_arithmetic_on_triangles():
    things = random_solids(seed=3, count=5)
    width, height = 13, 10
    viewmat = look_at(torch.tensor([1.9, -1.4, 0.7]).double(), (0.0, 0.1, -0.5))
    K = intrinsics(16.0, width, height, dtype=torch.float64)
    picture, coverage = trace(things, viewmat[None], K[None], width, height)

    triangles = []
    for thing in things:
        for loop, color in zip(thing.faces, thing.colors, strict=True):
            for second, third in pairwise(loop[1:]):
                triangles.append(([_exact(thing.vertices[i]) for i in (loop[0], second, third)], color))
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    origin, rays = camera_rays(torch.stack([x, y], -1).flatten(0, 1).double(), viewmat, K)
    start = _exact(origin)
    for ray, color, share in zip(rays, picture[0].flatten(0, 1), coverage[0].flatten(), strict=True):
        hits = [(_triangle_hit(start, _exact(ray), corners), color) for corners, color in triangles]
        met = [(distance, color) for distance, color in hits if distance is not None]
        nearest = min(met, key=lambda hit: hit[0])[1] if met else torch.ones(3, dtype=torch.float64)
        assert torch.equal(color, nearest)
        assert share == float(bool(met))
    assert 0.2 < coverage.mean() < 0.95  # the scene is in the picture, and so is the background


def test_a_square_seen_head_on_has_the_size_of_its_projection():
    # The front face lies 4 away and is 2 wide: with a focal length of 32 it spans 16 pixels, 8 to 24.
    picture, coverage = _shot([box((1, 1, 1), [RED, GREEN, BLUE])], (0.0, -5.0, 0.0), 32.0, 32)
    expected = torch.zeros(32, 32, dtype=torch.float64)
    expected[8:24, 8:24] = 1
    assert torch.equal(coverage, expected)
    assert torch.equal(picture[16, 16], torch.tensor(GREEN).double())  # its faces along y
    assert torch.equal(picture[7, 16], torch.ones(3).double())


def test_partly_covered_pixels_have_their_share():
    # Shifting the box by 1/32 of its width, half a pixel, leaves half of column 8 and takes half of column 24.
    shifted = box((1, 1, 1), RED).moved((1 / 16, 0, 1 / 32))
    picture, coverage = _shot([shifted], (0.0, -5.0, 0.0), 32.0, 32, supersample=4, background=(0, 0, 0.5))
    expected = torch.zeros(32, 32, dtype=torch.float64)
    expected[8:24, 8:24] = 1
    expected[:, 8] /= 2
    expected[:, 24] = expected[:, 23] / 2
    rows = expected.clone()
    rows[23] = 0.75 * expected[23]  # a quarter pixel upwards
    rows[7] = 0.25 * expected[8]
    assert torch.equal(coverage, rows)
    assert_close(picture, rows[..., None] * torch.tensor(RED) + (1 - rows[..., None]) * torch.tensor([0, 0, 0.5]))


def test_right_is_right_up_is_up_and_near_hides_far():
    right, up = box((0.2, 0.2, 0.2), RED).moved((1, 0, 0)), box((0.2, 0.2, 0.2), GREEN).moved((0, 0, 1))
    picture, _ = _shot([right, up], (0.0, -5.0, 0.0), 32.0, 32)
    reds, greens = ((picture == torch.tensor(color)).all(-1).nonzero().double() for color in (RED, GREEN))
    assert_close(reds.mean(0), torch.tensor([15.5, 15.5 + 32 / 5]).double(), atol=0.5, rtol=0)  # row, column
    assert_close(greens.mean(0), torch.tensor([15.5 - 32 / 5, 15.5]).double(), atol=0.5, rtol=0)

    near, far = box((0.5, 0.1, 0.5), RED).moved((0, -2, 0)), box((0.7, 0.1, 0.5), BLUE).moved((0, 2, 0))
    first, _ = _shot([near, far], (0.0, -5.0, 0.0), 32.0, 32)
    second, _ = _shot([far, near], (0.0, -5.0, 0.0), 32.0, 32)
    assert torch.equal(first, second)
    assert torch.equal(first[16, 16], torch.tensor(RED).double())
    hidden, _ = _shot([far], (0.0, -5.0, 0.0), 32.0, 32)
    assert torch.equal(hidden[16, 16], torch.tensor(BLUE).double())


def test_what_lies_behind_the_camera_is_not_seen():
    _, coverage = _shot([box((1, 1, 1), RED).moved((0, -10, 0))], (0.0, -5.0, 0.0), 32.0, 32)
    assert not coverage.any()
    # A floor that reaches behind the camera: its top, 1 below the eye, ends 8 ahead, so that it fills the rows below
    # 8 + 16 / 8 = 10.
    _, coverage = _shot([box((8, 8, 0.5), RED).moved((0, -5, -1.5))], (0.0, -5.0, 0.0), 16.0, 16)
    assert torch.equal(coverage, (torch.arange(16) >= 10).double()[:, None].expand(16, 16))


def test_a_ray_along_a_face_meets_only_what_it_does_not_pass_by():
    direction = torch.tensor([[0.0, 1.0, 0.0]]).double()
    for height, expected in ((0.5, 4.0), (1.5, math.inf)):
        origin = torch.tensor([0.0, -5.0, height]).double()
        distance, face = solids.intersect(box((1, 1, 1), RED), origin, direction)
        assert distance.item() == expected
        if height == 0.5:
            assert face.item() == 2  # -y


def test_supersampling_is_the_mean_of_a_larger_picture_and_converges():
    viewmats = orbit(2, 3.2, 0.5, dtype=torch.float64)
    Ks = intrinsics(20.0, 16, 12, dtype=torch.float64).repeat(2, 1, 1)
    fine, _ = trace(boxes(), viewmats, Ks * torch.tensor([3, 3, 1])[:, None], 48, 36)
    coarse, _ = trace(boxes(), viewmats, Ks, 16, 12, supersample=3)
    assert_close(coarse, fine.view(2, 12, 3, 16, 3, 3).mean((2, 4)))

    exact, _ = trace(boxes(), viewmats, Ks, 16, 12, supersample=24)
    errors = [(trace(boxes(), viewmats, Ks, 16, 12, supersample=s)[0] - exact).abs().mean() for s in (1, 2, 4, 8)]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(errors))


def test_rays_are_traced_in_any_number_at_a_time(monkeypatch):
    viewmats, Ks = orbit(2, 3.2, 0.5), intrinsics(20.0, 16, 11).repeat(2, 1, 1)
    whole = trace(boxes(), viewmats, Ks, 16, 11, supersample=2)
    monkeypatch.setattr(solids, "_RAYS", 150)
    for part, expected in zip(trace(boxes(), viewmats, Ks, 16, 11, supersample=2), whole, strict=True):
        assert torch.equal(part, expected)


def test_the_tracer_refuses_what_it_cannot_draw():
    viewmats, Ks = look_at(torch.tensor([[3.0, 0, 0], [0.5, 0, 0]])), torch.eye(3).repeat(2, 1, 1)
    with pytest.raises(ValueError, match="camera 1 stands inside solid 0"):
        trace([box((1, 1, 1), RED)], viewmats, Ks, 4, 4)
    with pytest.raises(ValueError, match="supersample must be at least 1, got 0"):
        _shot([], (1.0, 0.0, 0.0), 4.0, 4, supersample=0)
    assert not _shot([], (1.0, 0.0, 0.0), 4.0, 4)[1].any()


# Solids


def test_solids_are_what_they_are_called():
    block = box((1, 2, 3), [RED, GREEN, BLUE]).moved((5, 0, 0))
    assert_close(block.normals @ torch.tensor([1.0, 2, 3]).double(), torch.tensor([-1.0, 1, -2, 2, -3, 3]).double())
    assert_close(block.offsets, torch.tensor([-4.0, 6, 2, 2, 3, 3]).double())
    assert torch.equal(block.colors, torch.tensor([RED, RED, GREEN, GREEN, BLUE, BLUE]).double())

    pyramid = tetrahedron(3, RED)
    assert_close(torch.pdist(pyramid.vertices), torch.full((6,), math.sqrt(24), dtype=torch.float64))
    assert_close(pyramid.normals[0], torch.tensor([0.0, 0, -1]).double())
    assert_close(pyramid.offsets, torch.ones(4).double())

    diamond = octahedron(1, torch.arange(24).view(8, 3) / 24)
    signs = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).double()
    assert_close(diamond.normals, signs / math.sqrt(3))
    assert_close(diamond.colors[1], torch.tensor([3.0, 4, 5]).double() / 24, atol=1e-7, rtol=0)

    column = prism(5, 2, 0.5, RED)
    assert len(column.faces) == 7
    assert_close(column.normals[:2], torch.tensor([[0.0, 0, -1], [0, 0, 1]]).double())
    assert_close(column.offsets[2:], torch.full((5,), 2 * math.cos(math.pi / 5), dtype=torch.float64))


def test_solids_turn_about_the_origin_and_then_move():
    moved = box((1, 1, 1), RED).moved((1, 0, 0)).moved((0, 0, 7), rotation_z(math.pi / 2))
    assert_close(moved.vertices.mean(0), torch.tensor([0.0, 1, 7]).double())
    assert moved.contains(torch.tensor([[0.0, 1.99, 7.9], [0, 2.01, 7], [0, 1, 8.01]])).tolist() == [True, False, False]


def test_dents_and_bent_faces_are_refused():
    block = box((1, 1, 1), RED)
    bent = block.vertices.clone()
    bent[7] *= 0.9
    with pytest.raises(ValueError, match=r"^Solid: faces must be flat and the solid convex, got a corner 0\.\d+ off"):
        Solid(bent, block.faces, block.colors)
    inside = torch.cat([tetrahedron(1, RED).vertices, torch.tensor([[0.0, 0, 2]])])
    with pytest.raises(ValueError, match="list the corners of one plane a face"):
        Solid(inside, ((0, 1, 2), (0, 1, 3), (1, 2, 3), (2, 0, 3)), torch.tensor(RED))
    apex = tetrahedron(1, RED)
    with pytest.raises(ValueError, match="a corner 1.33 off a face"):
        Solid(apex.vertices, ((0, 1, 2, 3), *apex.faces[1:]), torch.tensor(RED))
    with pytest.raises(ValueError, match="sides must be at least 3, got 2"):
        prism(2, 1, 1, RED)


def test_points_lie_on_faces_of_their_colour_that_can_be_seen():
    things = boxes()
    points, colors = sample_surface(things, 3000, torch.Generator().manual_seed(0))
    assert points.shape == colors.shape == (3000, 3)
    beyond = [(points @ thing.normals.mT - thing.offsets) for thing in things]
    assert not any(bool((b < -1e-9).all(1).any()) for b in beyond)  # none is inside
    on = torch.stack([(b.amax(1).abs() < 1e-9) for b in beyond], 1)
    owner, face = on.int().argmax(1), torch.stack([b.argmax(1) for b in beyond], 1)
    assert bool(on.any(1).all())
    face = face.gather(1, owner[:, None])[:, 0]
    assert_close(colors, torch.stack([thing.colors for thing in things])[owner, face])
    counts = torch.bincount(owner * 6 + face, minlength=18).view(3, 6)
    assert not counts[:, 4].any()  # bottoms
    # Each of the 15 faces is as likely, but for what lies inside another solid: box A stands in the slab.
    counts = counts[:, [0, 1, 2, 3, 5]].double()
    assert counts.min() > 3000 / 15 * 0.75
    assert counts.max() < 3000 / 15 * 1.25


def test_points_fill_their_face_evenly():
    points, _ = sample_surface([box((1, 2, 0.5), RED)], 20_000, torch.Generator().manual_seed(0))
    top = points[points[:, 2] == 0.5][:, :2] / torch.tensor([1, 2])
    share = torch.histogramdd(top, bins=[4, 4], range=[-1.0, 1, -1, 1]).hist / len(top)
    assert_close(share, torch.full((4, 4), 1 / 16).double(), atol=0.01, rtol=0)
