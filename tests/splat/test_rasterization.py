"""The rasterizer against the formulas as they are written, and its derivatives against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.splat.scenes import (
    F64,
    HEIGHT,
    LEAVES,
    WIDTH,
    Render,
    Scene,
    assert_within,
    by_closed_forms,
    closed_forms,
    converted,
    crowd,
    gradients,
    in_torch,
    native,
)
from tests.splat.soft_scene import soft_scene
from zoo.splat.convex.reference import rasterization_convex_reference

# What of a scene differs, the options, and the size of tiles: each option is met with others around it.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "triangles": ({"k": 3}, {"render_mode": "RGB+ED", "reference_focal": 20.0}, 16),
    "four_points": ({"k": 4, "degree": 0, "leading": (2,)}, {"render_mode": "RGB+D"}, 32),
    "five_points": ({"k": 5, "degree": 2, "cameras": 3}, {"depth_grad": False}, 8),
    "six_points": ({"k": 6}, {}, 16),
    "seven_points": ({"k": 7, "per_view": True}, {"render_mode": "D"}, 16),
    "eight_points": ({"k": 8, "degree": 4, "cameras": 1}, {"render_mode": "ED"}, 11),
    "without_background": ({"channels": 5, "leading": (2, 1)}, {"backgrounds": None}, 16),
    "one_channel": ({"channels": 1, "cameras": 1}, {"render_mode": "RGB+D", "radius_clip": 9.0}, 64),
    "many_channels": ({"channels": 9, "per_view": True, "leading": (2,)}, {}, 8),
    "tall": ({"size": (23, 41), "degree": 1}, {"depth_grad": False, "render_mode": "RGB+ED"}, 16),
    "clipped_triangles": ({"k": 3, "nearest": 0.3}, {"near_mode": "clip", "near_plane": 0.3}, 16),
    "clipped_four_points": ({"k": 4, "nearest": 0.3, "leading": (2,)}, {"near_mode": "clip", "near_plane": 0.2}, 8),
    "clipped_six_points": (
        {"k": 6, "nearest": 0.3, "degree": 3},
        {"near_mode": "clip", "near_plane": 0.25, "render_mode": "RGB+D", "reference_focal": 60.0},
        16,
    ),
    "clipped_eight_points": (
        {"k": 8, "nearest": 0.2, "per_view": True},
        {"near_mode": "clip", "near_plane": 0.2, "depth_grad": False, "render_mode": "RGB+ED"},
        32,
    ),
    "in_each_others_way": ({"n": 150, "k": 4, "arm": 0.5, "cameras": 1}, {"render_mode": "RGB+D"}, 64),
    "some_culled": ({"nearest": 0.3, "degree": 1}, {"near_plane": 0.4, "far_plane": 1.6}, 16),
}


def _check(case: str, render: Render) -> None:
    changes, options, tile_size = CASES[case]
    scene, options = crowd(seed=len(case), **changes), {"sh_degree": changes.get("degree")} | options
    if "backgrounds" in options:
        del scene["backgrounds"]
    options["width"], options["height"] = changes.get("size", (WIDTH, HEIGHT))
    names = tuple(name for name in LEAVES if name in scene)
    picture, alpha, wanted = gradients(rasterization_convex_reference, scene, names, **options)
    our_picture, our_alpha, found = gradients(render, scene, names, tile_size=tile_size, **options)
    assert our_picture.shape == picture.shape
    assert our_alpha.shape == alpha.shape
    assert (our_picture - picture).abs().max() <= 1e-12
    assert (our_alpha - alpha).abs().max() <= 1e-12
    assert alpha.max() > 0.5
    assert wanted["points"].any()
    for name, grad in wanted.items():
        assert_within(found[name], grad, 1e-10, name)


@pytest.mark.parametrize("case", CASES)
def test_picture_and_gradients_are_those_of_the_formulas(case: str) -> None:
    _check(case, native)


@pytest.mark.parametrize("case", ["triangles", "five_points", "clipped_six_points", "without_background"])
def test_formulas_in_torch_are_the_same(case: str) -> None:
    _check(case, in_torch)


@pytest.mark.parametrize("case", ["four_points", "tall", "clipped_four_points", "some_culled"])
def test_ops_without_a_library_are_the_same(case: str) -> None:
    with closed_forms():
        _check(case, by_closed_forms)


def test_pixels_are_finished_at_different_places_of_a_list() -> None:
    scene = crowd(seed=len("in_each_others_way"), **CASES["in_each_others_way"][0])
    _, alpha, meta = native(**scene, width=WIDTH, height=HEIGHT, tile_size=64)
    assert meta["isect_offsets"].numel() == 1
    assert (meta["hull_size"] > 0).sum() > 128  # as many as are added up at a time, twice
    finished = alpha > 1 - 1e-3  # the next one is too much for some of these, but not for all
    assert 100 < finished.sum() < 0.9 * finished.numel()


def test_what_is_found_on_the_way_is_that_of_the_formulas() -> None:
    changes, options, tile_size = CASES["clipped_six_points"]
    scene, size = crowd(30, **changes), {"width": WIDTH, "height": HEIGHT}
    _, _, wanted = rasterization_convex_reference(**scene, **size, sh_degree=3, **options)
    _, _, found = native(**scene, **size, sh_degree=3, **options, tile_size=tile_size)
    assert (wanted["hull_size"] > 6).any()
    assert (wanted["hull_size"] == 0).any()
    for name in ("hull_size", "radii"):
        assert torch.equal(found[name], wanted[name])
    for name in ("means2d", "depths", "points2d"):
        assert_within(found[name], wanted[name], 1e-13, name)


# Differences


def _mixtures(picture: Tensor, alpha: Tensor) -> Tensor:
    """A few sums over all pixels with different signs: a number a pixel would take as many derivatives."""
    every = torch.cat([picture.flatten(), alpha.flatten()])
    g = torch.Generator().manual_seed(3)
    return torch.randn(3, len(every), generator=g, dtype=F64) @ every


def _gradcheck(scene: Scene, names: tuple[str, ...], **options: Any) -> None:
    def outputs(*values: Tensor) -> Tensor:
        picture, alpha, _ = native(**scene | dict(zip(names, values, strict=True)), width=14, height=12, **options)
        return _mixtures(picture, alpha)

    assert gradcheck(outputs, [scene[name].clone().requires_grad_() for name in names], eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LEAVES)
def test_gradient_of_one_input_is_that_of_differences(name: str) -> None:
    _gradcheck(soft_scene(1, n=3, k=5), (name,))


@pytest.mark.parametrize("render_mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
def test_gradient_of_all_inputs_is_that_of_differences(render_mode: str) -> None:
    names = LEAVES if render_mode.startswith("RGB") else tuple(n for n in LEAVES if n not in ("colors", "backgrounds"))
    _gradcheck(soft_scene(2, n=3, k=4, cameras=2), names, render_mode=render_mode, reference_focal=12.0)


@pytest.mark.parametrize("degree", range(4))
def test_gradient_of_harmonics_is_that_of_differences(degree: int) -> None:
    scene = soft_scene(degree, n=2, k=3, coefficients=(degree + 1) ** 2)
    _gradcheck(scene, ("points", "colors", "viewmats"), sh_degree=degree)


@pytest.mark.parametrize("k", [3, 6, 8])
def test_gradient_through_the_near_plane_is_that_of_differences(k: int) -> None:
    scene = soft_scene(10 + k, n=2, k=k)
    depths = scene["points"][0] @ scene["viewmats"][0, 2, :3] + scene["viewmats"][0, 2, 3]
    first, second = depths.sort().values[:2].tolist()
    near = (first + second) / 2  # cuts off one point, and perhaps some of the other convex
    assert native(**scene, width=14, height=12, near_plane=near)[2]["hull_size"][0, 0] == 0
    assert native(**scene, width=14, height=12, near_plane=near, near_mode="clip")[2]["hull_size"][0, 0] > 2
    _gradcheck(scene, ("points", "delta", "viewmats"), near_mode="clip", near_plane=near)


# Precision


def hard_crowd(n: int = 5000) -> Scene:
    """Convexes of about five pixels with edges a fraction of a pixel wide, in a picture of 256 x 256."""
    scene = crowd(n, cameras=1, size=(256, 256), arm=0.05, seed=1, nearest=2.5)
    scene["delta"] *= 4
    scene["sigma"] *= 0.3
    return converted(converted(scene, torch.float32), F64)  # of numbers that float32 has


def test_float32_is_as_near_to_float64_as_the_design_asks() -> None:
    scene, size = hard_crowd(), {"width": 256, "height": 256}
    picture, _, wanted = gradients(native, scene, **size)
    found_picture, _, found = gradients(native, converted(scene, torch.float32), **size)
    error = (found_picture.double() - picture).abs()
    assert picture.std() > 0.1
    assert error.mean() <= 1e-6, error.mean()
    assert (error.amax(-1) <= 1e-4).double().mean() >= 0.999
    for name in LEAVES:
        relative = (found[name].double() - wanted[name]).norm() / wanted[name].norm()
        print(name, f"{relative.item():.1e}")
        assert relative <= 1e-3, f"{name}: {relative:.1e}"
