"""Cameras: which way the axes point, where points land, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.splat.cameras import (
    camera_positions,
    camera_rays,
    intrinsics,
    look_at,
    orbit,
    project_points,
    resize_intrinsics,
    scene_extent,
)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_from_the_south_east_is_right_and_up_is_up():
    viewmat = look_at((0.0, -5.0, 0.0))
    K = intrinsics(100.0, 64, 48)
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [-1, -3, -1]])
    places, depths = project_points(points, viewmat, K)
    assert_close(places, torch.tensor([[32.0, 24], [52, 24], [32, 4], [32, 24], [-18, 74]]))
    assert_close(depths, torch.tensor([5.0, 5, 5, 6, 2]))


def test_looking_along_z_with_y_down_is_the_identity():
    assert torch.equal(look_at((0.0, 0.0, 0.0), (0.0, 0.0, 2.0), (0.0, -3.0, 0.0)), torch.eye(4))


def test_views_are_rigid_and_centred_on_their_target():
    eye, target, up = _random(3, 5, 3), _random(5, 3), _random(3)
    viewmats = look_at(eye, target, up)
    assert viewmats.shape == (3, 5, 4, 4)
    assert viewmats.dtype == torch.float64
    rotation = viewmats[..., :3, :3]
    assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(3, 5, 3, 3))
    assert_close(torch.linalg.det(rotation), torch.ones(3, 5, dtype=torch.float64))
    assert torch.equal(viewmats[..., 3, :], torch.tensor([0.0, 0, 0, 1], dtype=torch.float64).expand(3, 5, 4))

    seen = (rotation @ target[..., None] + viewmats[..., :3, 3:])[..., 0]
    distance = (target - eye).norm(dim=-1)
    assert_close(seen, torch.stack([0 * distance, 0 * distance, distance], -1), atol=1e-12, rtol=0)
    tilted = rotation @ up
    assert_close(tilted[..., 0], 0 * distance, atol=1e-12, rtol=0)
    assert bool((tilted[..., 1] < 0).all())  # y is down
    assert_close(camera_positions(viewmats), eye)
    assert_close(look_at(eye[1, 2], target[2], up), viewmats[1, 2])


def test_positions_are_those_of_the_inverse_matrix():
    viewmats = look_at(_random(4, 3), _random(4, 3), _random(4, 3))
    assert_close(camera_positions(viewmats), torch.linalg.inv(viewmats)[:, :3, 3])


def test_views_differentiate():
    eye, target = _random(2, 3).requires_grad_(), _random(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda e, t: look_at(e, t, (0.0, 1.0, 2.0)), (eye, target))


def test_an_orbit_goes_round_its_target_from_x_to_y():
    target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    viewmats = orbit(4, 2.0, math.pi / 6, target, dtype=torch.float64)
    flat, high = 2 * math.cos(math.pi / 6), 1.0
    expected = torch.tensor([[flat, 0, high], [0, flat, high], [-flat, 0, high], [0, -flat, high]]).double()
    assert_close(camera_positions(viewmats) - target, expected)
    centre, depth = project_points(target[None], viewmats, intrinsics(10.0, 8, 6, dtype=torch.float64))
    assert_close(centre[:, 0], torch.tensor([4.0, 3.0], dtype=torch.float64).expand(4, 2))
    assert_close(depth[:, 0], torch.full((4,), 2.0, dtype=torch.float64))
    assert orbit(3, 1.0, 0.0).dtype == torch.float32


def test_an_orbit_takes_a_radius_height_and_azimuth_for_each_camera():
    azimuth, elevation, radius = torch.tensor([[0.1, 2.0, 4.0], [-0.3, 0.5, 1.0], [1.0, 2.0, 3.0]]).double()
    x, y, z = camera_positions(orbit(3, radius, elevation, azimuth=azimuth)).unbind(-1)
    assert_close(torch.atan2(y, x) % (2 * math.pi), azimuth)
    assert_close(torch.asin(z / radius), elevation)
    assert_close(torch.sqrt(x**2 + y**2 + z**2), radius)


def test_intrinsics_look_through_the_middle():
    expected = torch.tensor([[50.0, 0, 32], [0, 50, 24.5], [0, 0, 1]])
    assert torch.equal(intrinsics(50, 64, 49), expected)
    focal = torch.tensor([[50.0, 3.0]], dtype=torch.float64)
    batch = intrinsics(focal, 64, 49)
    assert batch.shape == (1, 2, 3, 3)
    assert torch.equal(batch[0, 0], expected.double())
    assert batch[0, 1, 1, 1] == 3


def test_a_resized_picture_shows_points_at_the_same_share():
    points = _random(7, 3) * 0.3
    viewmats, Ks = orbit(2, 3.0, 0.4, dtype=torch.float64), intrinsics(torch.tensor([60.0, 70]).double(), 64, 50)
    Ks[:, 0, 2] += 5
    before, _ = project_points(points, viewmats, Ks)
    after, _ = project_points(points, viewmats, resize_intrinsics(Ks, 64, 50, 16, 13))
    assert_close(after / torch.tensor([16.0, 13]), before / torch.tensor([64.0, 50]))


def test_rays_are_the_inverse_of_projection():
    viewmats = look_at(_random(2, 1, 3), _random(2, 1, 3) + 5)
    Ks = intrinsics(torch.tensor([30.0, 40.0, 50.0]).double(), 20, 16)
    Ks[..., 1, 1] *= 1.25
    pixels = torch.rand(6, 2, dtype=torch.float64) * 20
    origins, directions = camera_rays(pixels, viewmats, Ks)
    assert directions.shape == (2, 3, 6, 3)
    places, depths = project_points(origins[..., None, :] + 2.5 * directions, viewmats, Ks)
    assert_close(places, pixels.expand(2, 3, 6, 2))
    assert_close(depths, torch.full((2, 3, 6), 2.5, dtype=torch.float64))


def test_extent_is_the_farthest_camera_from_their_mean():
    eyes = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 0, 0], [1, 0, 0]])  # mean (1, 0, 0)
    viewmats = look_at(eyes, (0.5, 7.0, 0.0))
    assert_close(scene_extent(viewmats), torch.tensor(2.2))
    assert_close(scene_extent(torch.stack([viewmats, viewmats[:1].expand(4, 4, 4)])), torch.tensor([2.2, 0.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: look_at((0.0, 1.0)), r"eye must be \[\.\.\., 3\], got \[2\]"),
        (lambda: look_at((1.0, 2, 3), (1.0, 2, 3)), "target must differ from eye"),
        (lambda: look_at((0.0, 0, 5)), "up must not be zero or point along the view"),
        (lambda: look_at((5.0, 0, 0), up=(0.0, 0, 0)), "up must not be zero"),
        (lambda: look_at((1e3, 1.0, 0), up=(1e3, 1.0, 0)), "point along the view"),
        (lambda: orbit(0, 1.0, 0.0), "n must be at least 1, got 0"),
        (lambda: orbit(2, 0.0, 0.0), "radius must be positive, got 0.0"),
        (lambda: orbit(2, 1.0, 2.0), r"elevation must lie inside \(-pi/2, pi/2\) radians, got 2.0"),
        (lambda: orbit(2, 1.0, 0.0, azimuth=torch.zeros(3)), r"one angle a camera, \[2\], got \[3\]"),
        (lambda: intrinsics(0.0, 4, 4), "focal must be positive, got 0.0"),
        (lambda: intrinsics(1.0, 4, 0), "width and height must be at least 1, got 4 and 0"),
        (lambda: resize_intrinsics(torch.eye(3), 4, 4, 0, 4), "sides must be at least 1, got 4 x 4 and 0 x 4"),
        (lambda: scene_extent(torch.eye(4)), r"viewmats must be \[\.\.\., V, 4, 4\] with V >= 1, got \[4, 4\]"),
        (lambda: scene_extent(torch.empty(0, 4, 4)), r"got \[0, 4, 4\]"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
