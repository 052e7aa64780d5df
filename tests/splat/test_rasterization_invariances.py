"""What must not change a picture of convexes, and pictures that are known without rendering them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.splat.scenes import (
    F64,
    HEIGHT,
    LEAVES,
    PER_CONVEX,
    WIDTH,
    Render,
    Scene,
    assert_within,
    converted,
    crowd,
    gradients,
    in_torch,
    native,
    one_square,
)
from tests.splat.soft_scene import random_rotation

SIZE = {"width": WIDTH, "height": HEIGHT}
CLIPPED = {"near_mode": "clip", "near_plane": 0.3}


def _depth_and_color(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return native(**arguments, render_mode="RGB+ED")


def _assert_same(
    found: tuple[Tensor, Tensor, dict[str, Tensor]], wanted: tuple[Tensor, Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    for actual, expected in zip(found[:2], wanted[:2], strict=True):
        assert_within(actual, expected, tolerance)
    for name, grad in wanted[2].items():
        assert_within(found[2][name], grad, 100 * tolerance, name)


# Invariances


@pytest.mark.parametrize("options", [{}, CLIPPED], ids=["culled", "clipped"])
def test_the_order_of_points_does_not_matter(options: dict[str, Any]) -> None:
    scene = crowd(nearest=0.4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    wanted = gradients(_depth_and_color, scene, **SIZE, **options)
    wanted[2]["points"] = wanted[2]["points"][:, order]
    found = gradients(_depth_and_color, scene | {"points": scene["points"][:, order]}, **SIZE, **options)
    _assert_same(found, wanted, 1e-12)


def test_the_order_of_convexes_does_not_matter() -> None:
    scene = crowd(30)
    order = torch.randperm(30)
    wanted = gradients(_depth_and_color, scene, **SIZE)
    shuffled = {name: t[order] if name in PER_CONVEX else t for name, t in scene.items()}
    found = gradients(_depth_and_color, shuffled, **SIZE)
    for name in PER_CONVEX:
        wanted[2][name] = wanted[2][name][order]
    _assert_same(found, wanted, 1e-13)
    assert torch.equal(found[0], wanted[0])


def test_moving_world_and_cameras_together_changes_nothing() -> None:
    scene = crowd()
    g = torch.Generator().manual_seed(2)
    motion = torch.eye(4, dtype=F64)
    motion[:3, :3] = random_rotation(g, 1, angle=1.0)[0]
    motion[:3, 3] = torch.tensor([3.0, -2.0, 5.0])
    moved = dict(scene)
    moved["points"] = scene["points"] @ motion[:3, :3].mT + motion[:3, 3]
    moved["viewmats"] = scene["viewmats"] @ torch.linalg.inv(motion)
    names = ("points", "delta", "sigma", "opacities", "colors")
    wanted = gradients(_depth_and_color, scene, names, **SIZE)
    wanted[2]["points"] = wanted[2]["points"] @ motion[:3, :3].mT
    _assert_same(gradients(_depth_and_color, moved, names, **SIZE), wanted, 1e-11)


@pytest.mark.parametrize("render", [native, in_torch], ids=["native", "torch"])
def test_the_picture_moves_with_the_principal_point(render: Render) -> None:
    scene = crowd()
    whole, alpha, _ = render(**scene, **SIZE)
    moved = dict(scene)
    moved["Ks"] = scene["Ks"].clone()
    moved["Ks"][..., 0, 2] -= 11
    moved["Ks"][..., 1, 2] -= 5
    part, part_alpha, _ = render(**moved, width=WIDTH - 11, height=HEIGHT - 5)
    assert_within(part, whole[:, 5:, 11:], 1e-12)
    assert_within(part_alpha, alpha[:, 5:, 11:], 1e-12)


@pytest.mark.parametrize("degree", [None, 2])
def test_cameras_and_scenes_of_a_batch_are_single_pictures(degree: int | None) -> None:
    scene = crowd(leading=(2,), cameras=3, degree=degree)
    options = {**SIZE, "sh_degree": degree}
    leaves = {name: t.clone().requires_grad_(name != "Ks") for name, t in scene.items()}
    picture, alpha, meta = native(**leaves, **options)
    weights = torch.rand_like(picture)
    (picture * weights).sum().backward()
    grads = {name: torch.zeros_like(t) for name, t in scene.items()}
    for b in range(2):
        for c in range(3):
            own = {name: t[b].clone() for name, t in scene.items()}
            for name in ("viewmats", "Ks", "backgrounds"):
                own[name] = own[name][c : c + 1]
            own = {name: t.requires_grad_(name != "Ks") for name, t in own.items()}
            single, single_alpha, single_meta = native(**own, **options)
            assert torch.equal(single[0], picture[b, c])
            assert torch.equal(single_alpha[0], alpha[b, c])
            for name in ("means2d", "depths", "points2d", "radii", "hull_size", "tiles_per_convex"):
                assert torch.equal(single_meta[name][0], meta[name][b, c])
            (single[0] * weights[b, c]).sum().backward()
            for name in LEAVES:
                grads[name][b] += 0 if name in ("viewmats", "backgrounds") else own[name].grad
            grads["viewmats"][b, c], grads["backgrounds"][b, c] = own["viewmats"].grad[0], own["backgrounds"].grad[0]
    for name in LEAVES:
        assert_within(leaves[name].grad, grads[name], 1e-12, name)


def test_colors_of_views_are_colors() -> None:
    shared = crowd()
    own = shared | {"colors": shared["colors"].expand(2, -1, -1)}
    wanted = gradients(native, shared, **SIZE)
    found = gradients(native, own, **SIZE)
    found[2]["colors"] = found[2]["colors"].sum(0)
    _assert_same(found, wanted, 1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("options", [{}, CLIPPED], ids=["culled", "clipped"])
def test_convexes_that_are_left_out_change_nothing(dtype: torch.dtype, options: dict[str, Any]) -> None:
    scene = converted(crowd(10, nearest=0.5), dtype)
    behind = converted(crowd(5, seed=1), dtype)
    behind["points"][..., 2] -= 9.0
    both = {name: torch.cat([behind[name], t]) if name in PER_CONVEX else t for name, t in scene.items()}
    wanted = gradients(native, scene, **SIZE, **options)
    found = gradients(native, both, **SIZE, **options)
    for name in PER_CONVEX:
        assert not found[2][name][:5].any()
        assert torch.equal(found[2][name][5:], wanted[2][name])
    for actual, expected in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(actual, expected)


def test_tiles_of_any_size_give_the_same() -> None:
    scene = crowd(200, arm=0.1)
    wanted = gradients(native, scene, **SIZE, tile_size=64)
    for tile_size in (4, 7, 8, 16, 32):
        _assert_same(gradients(native, scene, **SIZE, tile_size=tile_size), wanted, 1e-14)
    single = converted(scene, torch.float32)
    wanted = gradients(native, single, **SIZE, tile_size=64)
    for tile_size in (4, 16):
        _assert_same(gradients(native, single, **SIZE, tile_size=tile_size), wanted, 2e-6)


def test_depths_that_are_equal_keep_the_order_of_the_list() -> None:
    near = one_square(0.6)
    two = {name: torch.cat([t, t]) if name in PER_CONVEX else t for name, t in near.items()}
    two["colors"] = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=F64)
    for last in (1e-12, 0.0, -1e-12):  # which float32 does not tell apart
        two["points"][1, :, 2] = 4.0 + last
        picture, _, _ = native(**two, width=16, height=16)
        assert_close(picture[0, 8, 8], torch.tensor([0.6, 0.24, 0.16], dtype=F64))
    two["points"][1, :, 2] = 3.99
    picture, _, _ = native(**two, width=16, height=16)
    assert_close(picture[0, 8, 8], torch.tensor([0.24, 0.6, 0.16], dtype=F64))


# Known pictures: a square of 4 x 4 pixels in the middle of 16 x 16


def _square(inside: list[float], outside: list[float]) -> Tensor:
    picture = torch.tensor(outside, dtype=F64).repeat(1, 16, 16, 1)
    picture[:, 6:10, 6:10] = torch.tensor(inside, dtype=F64)
    return picture


@pytest.mark.parametrize("render", [native, in_torch], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_one_opaque_convex_leaves_a_hundredth(render: Render, dtype: torch.dtype) -> None:
    picture, alpha, meta = render(**converted(one_square(), dtype), width=16, height=16)
    assert_close(alpha, _square([0.99], [0]).to(dtype))
    assert_close(picture, _square([0.99, 0, 0.01], [0, 0, 1]).to(dtype))
    assert meta["hull_size"].tolist() == [[4]]
    assert meta["depths"].tolist() == [[4.0]]
    assert meta["means2d"].tolist() == [[[8.0, 8.0]]]
    assert meta["radii"].tolist() == [[[3, 3]]]  # two pixels, and what the limit adds
    assert meta["tiles_per_convex"].tolist() == [[1]]


def test_of_two_half_transparent_convexes_the_nearer_counts_twice() -> None:
    scene = one_square(0.5)
    far = scene["points"] * 2  # twice as far and as large: the same square
    both = {name: torch.cat([t, t]) if name in PER_CONVEX else t for name, t in scene.items()}
    both["points"] = torch.cat([far, scene["points"]])
    both["colors"] = torch.tensor([[0.0, 1, 0], [1, 0, 0]], dtype=F64)
    picture, alpha, _ = native(**both, width=16, height=16, render_mode="RGB+D")
    assert_close(picture, _square([0.5, 0.25, 0.25, 4.0], [0, 0, 1, 0]))
    assert_close(alpha, _square([0.75], [0]))
    expected_depth, _, _ = native(**both, width=16, height=16, render_mode="ED")
    assert_close(expected_depth, _square([4 / 0.75], [0]))


def test_a_pixel_stops_before_it_is_too_dark() -> None:
    scene = one_square(0.98)
    layers = {name: torch.cat([t] * 4) if name in PER_CONVEX else t for name, t in scene.items()}
    layers["points"] = torch.cat([scene["points"] * s for s in (1, 2, 3, 4)])
    layers["opacities"][3] = 0.5  # the light would bear this one, but the pixel is finished
    _, alpha, found = gradients(native, layers, width=16, height=16)
    assert_close(1 - alpha[0, 8, 8], torch.tensor([0.02**2], dtype=F64))
    for name in PER_CONVEX:
        assert not found[name][2:].any()
    assert found["opacities"][:2].all()


@pytest.mark.parametrize("render", [native, in_torch], ids=["native", "torch"])
def test_alpha_below_one_in_255_is_skipped(render: Render) -> None:
    for over, seen in ((1 - 1e-3, False), (1.0, False), (1 + 1e-3, True)):
        _, alpha, meta = render(**one_square(over / 255), width=16, height=16)
        assert meta["hull_size"].item() == (4 if seen else 0)
        assert_close(alpha, _square([over / 255 if seen else 0], [0]), rtol=1e-12, atol=0)
    # So soft that it reaches one in 255 nowhere: 1000 over 1e-3 is the odds it needs, and its middle has fewer.
    soft = one_square((1 + 1e-3) / 255, sigma=torch.tensor([1e-4], dtype=F64))
    _, alpha, meta = render(**soft, width=16, height=16)
    assert not alpha.any()
    assert meta["hull_size"].item() == 0
    assert meta["radii"].tolist() == [[[0, 0]]]
    assert not meta["tiles_per_convex"].any()


def test_alpha_is_the_formula_along_a_row() -> None:
    d, delta, sigma, opacity = 4.0, 0.05, 0.2, 0.8
    scene = one_square(
        opacity, delta=torch.tensor([delta], dtype=F64), sigma=torch.tensor([sigma], dtype=F64), backgrounds=None
    )
    _, alpha, _ = native(**scene, width=16, height=16)
    for column in range(16):
        q = column + 0.5 - 8.0, 0.5  # relative to the middle, in row 8
        lines = [4 * (side * x - 2) for x in q for side in (-1, 1)]  # edge length times distance
        phi = math.log(sum(math.exp(d * delta * line) for line in lines))
        expected = opacity / (1 + math.exp(d * sigma * phi))
        assert alpha[0, 8, column, 0].item() == pytest.approx(expected if expected >= 1 / 255 else 0.0, rel=1e-12)


# Known gradients


def test_the_background_has_the_light_that_is_left() -> None:
    scene: Scene = crowd(cameras=2)
    scene = {name: t.requires_grad_(name == "backgrounds") for name, t in scene.items()}
    picture, alpha, _ = native(**scene, **SIZE)
    weights = torch.rand_like(picture)
    (picture * weights).sum().backward()
    assert_close(scene["backgrounds"].grad, ((1 - alpha.detach()) * weights).sum((1, 2)))


def test_the_clamp_lets_the_gradient_through() -> None:
    for opacity in (1.0, 0.5):
        _, alpha, _ = native(**one_square(opacity), width=16, height=16)
        assert alpha.max() <= 0.99
        scene = one_square(opacity)
        scene["opacities"].requires_grad_()
        native(**scene, width=16, height=16)[1].sum().backward()
        assert_close(scene["opacities"].grad, torch.tensor([16.0], dtype=F64))


def test_without_depth_grad_the_depth_is_a_constant() -> None:
    scene = one_square(
        0.8, delta=torch.tensor([0.05], dtype=F64), sigma=torch.tensor([0.2], dtype=F64), backgrounds=None
    )
    scene["points"].requires_grad_()
    grads = {}
    for depth_grad in (True, False):
        _, alpha, _ = native(**scene, width=16, height=16, depth_grad=depth_grad)
        (grads[depth_grad],) = torch.autograd.grad(alpha.sum(), scene["points"])
    # The difference is that of d at fixed lines: d/dd of o sigmoid(-d sigma log sum exp(d delta L)), a quarter a point.
    v, u = torch.meshgrid(torch.arange(16, dtype=F64) - 7.5, torch.arange(16, dtype=F64) - 7.5, indexing="ij")
    lines = torch.stack([4 * (side * x - 2) for x in (u, v) for side in (-1, 1)], -1)
    d = torch.tensor(4.0, dtype=F64, requires_grad=True)
    alpha = 0.8 * torch.sigmoid(-d * 0.2 * (d * 0.05 * lines).logsumexp(-1))
    (by_depth,) = torch.autograd.grad((alpha * (alpha >= 1 / 255)).sum(), d)
    difference = grads[True] - grads[False]
    assert_close(difference[0, :, 2], (by_depth / 4).expand(4))
    assert_close(difference[..., :2], torch.zeros(1, 4, 2, dtype=F64), atol=1e-12, rtol=0)
