"""Gradients of the oracle against finite differences, and what is left out of picture and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close
from tests.splat.soft_scene import Scene, render, soft_scene

F64 = torch.float64
PER_CONVEX = ("points", "delta", "sigma", "opacities", "colors")
LEAVES = (*PER_CONVEX, "viewmats", "backgrounds")


def _gradcheck(scene: Scene, names: tuple[str, ...], fast: bool, **options: Any) -> None:
    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        picture, alpha, meta = render(scene | dict(zip(names, leaves, strict=True)), 7, 6, **options)
        outputs = picture, alpha, meta["means2d"], meta["depths"], meta["points2d"]
        return outputs if fast else tuple(_mixtures(out) for out in outputs)

    leaves = [scene[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=fast, rtol=1e-4, atol=1e-6)


def _small(seed: int, **options: int) -> Scene:
    """In 7 x 6 pixels, with no alpha below 1/255 in the picture, so that no threshold is crossed."""
    scene = soft_scene(seed, **options)
    scene["Ks"][:, :2] *= 0.5
    scene["sigma"] *= 0.2
    return scene


def _mixtures(out: Tensor) -> Tensor:
    """Three random sums of all elements: each element of an input is checked, at less cost than each output of each."""
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(3, out.numel(), generator=generator, dtype=F64) @ out.flatten()


@pytest.mark.parametrize("name", LEAVES)
def test_gradient_of_one_input(name: str):
    _gradcheck(_small(0, n=2, k=5), (name,), fast=False)


@pytest.mark.parametrize("render_mode", ["RGB", "D", "ED", "RGB+D", "RGB+ED"])
def test_gradient_of_all_inputs(render_mode: str):
    names = LEAVES if "RGB" in render_mode else tuple(n for n in LEAVES if n not in ("colors", "backgrounds"))
    _gradcheck(_small(1, cameras=2), names, fast=True, render_mode=render_mode, reference_focal=10.0)


@pytest.mark.parametrize("degree", range(5))
def test_gradient_of_harmonics(degree: int):
    _gradcheck(_small(2, n=3, coefficients=25), LEAVES, fast=True, sh_degree=degree)


@pytest.mark.parametrize("k", [3, 4, 6, 8])
def test_gradient_through_the_clip(k: int):
    scene = _small(3, k=k)
    scene["viewmats"][:, 2, 3] -= 2.6  # some points come before the plane
    seen = scene["points"] @ scene["viewmats"][0, :3, :3].T + scene["viewmats"][0, :3, 3]
    cut = (seen[..., 2] <= 2.0).any(-1) & (seen[..., 2].mean(-1) > 2.0)
    assert cut.any()
    _gradcheck(scene, LEAVES, fast=True, near_mode="clip", near_plane=2.0)


def _gradients(loss: Callable[[Scene], Tensor], scene: Scene) -> dict[str, Tensor]:
    leaves = {name: scene[name].detach().clone().requires_grad_() for name in LEAVES}
    loss(scene | leaves).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_depth_grad_false_takes_the_depth_as_a_constant():
    scene = soft_scene(4)
    weights = torch.randn(1, 12, 14, 3, dtype=F64)
    depths = (scene["points"].mean(1) @ scene["viewmats"][0, :3, :3].T + scene["viewmats"][0, :3, 3])[:, 2]

    def constant_depth(s: Scene) -> Tensor:
        now = (s["points"].mean(1) @ s["viewmats"][0, :3, :3].T + s["viewmats"][0, :3, 3])[:, 2]
        return (render(s | {p: s[p] * depths / now for p in ("delta", "sigma")})[0] * weights).sum()

    expected = _gradients(constant_depth, scene)
    found = _gradients(lambda s: (render(s, depth_grad=False)[0] * weights).sum(), scene)
    full = _gradients(lambda s: (render(s)[0] * weights).sum(), scene)
    for name in LEAVES:
        assert_close(found[name], expected[name], loose=100)
    assert not torch.allclose(found["points"], full["points"])
    assert_close(found["delta"], full["delta"])


# What is left out.


def _spoil(scene: Scene, case: str) -> dict[str, Any]:
    """Make row 1 of a scene one that is left out; returns the options that it takes."""
    points = scene["points"]
    match case:
        case "nan_point":
            points[1, 2, 0] = math.nan
        case "infinite_point":
            points[1, 0, 1] = math.inf
        case "nan_delta" | "nan_sigma":
            scene[case[4:]][1] = math.nan
        case "infinite_delta":
            scene["delta"][1] = math.inf
        case "nan_opacity" | "infinite_opacity":
            scene["opacities"][1] = math.nan if case == "nan_opacity" else math.inf
        case "no_opacity" | "least_opacity":
            scene["opacities"][1] = 0.0 if case == "no_opacity" else 1 / 255
        case "all_equal":
            points[1] = points[1, 0].clone()
        case "on_a_line":
            points[1] = torch.tensor([0.0, 0, 5]) + torch.arange(6, dtype=F64)[:, None] * torch.tensor([0.25, 0, 0])
            scene["viewmats"][0] = torch.eye(4)  # without rounding
        case "edge_on":
            points[1, :, 0] = points[1, :, 2] * 0.25  # in a plane through the camera
            scene["viewmats"][0] = torch.eye(4)
        case "one_point_behind":
            points[1, 3, 2] = -1.0
            return {"near_mode": "cull"}
        case "all_behind":
            points[1, :, 2] -= 20.0
            return {"near_mode": "clip"}
        case "centre_behind":
            points[1, :, 2] -= 8.0
            points[1, 0, 2] = 1.0
            return {"near_mode": "clip"}
        case "centre_before_the_plane":
            points[1, :, 2], points[1, 0, 2] = 1.0, 4.0
            return {"near_mode": "clip", "near_plane": 2.0}
        case "point_in_the_eye":
            points[1, 0] = 0.0
            scene["viewmats"][0] = torch.eye(4)
            return {"near_mode": "cull"}
        case "far":
            points[1, :, 2] += 100.0
            return {"far_plane": 50.0}
        case "beside_the_picture":
            points[1, :, 0] += 100.0
        case "overflow":
            points[1] *= 1e300
        case "small":  # half a pixel around a pixel's centre
            arms = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
            points[1] = torch.tensor([2.5 / 14, 0.1, 5]) + 0.15 * arms
            scene["viewmats"][0] = torch.eye(4)
            scene["sigma"][1] = 100.0
            assert render(scene, radius_clip=0.5)[2]["radii"][0, 1].tolist() == [1, 1]
            return {"radius_clip": 1.0}
    return {}


LEFT_OUT = [
    *(
        "nan_point",
        "infinite_point",
        "nan_delta",
        "nan_sigma",
        "infinite_delta",
        "nan_opacity",
        "infinite_opacity",
        "no_opacity",
    ),
    *("least_opacity", "all_equal", "on_a_line", "edge_on", "one_point_behind", "all_behind", "centre_behind"),
    *("centre_before_the_plane", "point_in_the_eye", "far", "beside_the_picture", "overflow", "small"),
]


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_changes_nothing(case: str):
    scene = soft_scene(5)
    options = _spoil(scene, case)
    kept = [0, 2, 3]
    rest = {name: t[kept] if name in PER_CONVEX else t for name, t in scene.items()}
    for mode in [options.pop("near_mode")] if "near_mode" in options else ["cull", "clip"]:

        def again(s: Scene, mode: str = mode) -> tuple[Tensor, Tensor, dict[str, Any]]:
            return render(s, near_mode=mode, **options)

        (picture, alpha, meta), expected = again(scene), again(rest)
        assert picture.equal(expected[0])
        assert alpha.equal(expected[1])
        assert meta["hull_size"][0, 1] == 0
        assert (meta["hull_size"][0, kept] > 2).all()
        for name in ("means2d", "depths", "points2d", "radii"):
            assert (meta[name][0, 1] == 0).all()
            assert meta[name][0, kept].equal(expected[2][name][0])
        found, wanted = (_gradients(lambda s: again(s)[0].sum(), given) for given in (scene, rest))
        for name in LEAVES:
            assert_close(found[name][kept] if name in PER_CONVEX else found[name], wanted[name])
        for name in PER_CONVEX:
            assert (found[name][1] == 0).all()


@pytest.mark.parametrize("name", ["delta", "sigma"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_no_scale_is_below_the_floor(name: str, value: float):
    scene = soft_scene(6, n=1)
    scene[name][0] = value
    _, alpha, meta = render(scene)
    size = meta["hull_size"].item()
    if name == "sigma":  # t = 0 everywhere
        assert_close(alpha, (scene["opacities"] / 2).expand_as(alpha), loose=100)
    else:  # phi = log m everywhere
        depth = meta["depths"].item()
        flat = scene["opacities"] / (1 + size ** (depth * scene["sigma"]))
        assert_close(alpha, flat.expand_as(alpha), like=torch.float32)
    assert (_gradients(lambda s: render(s)[0].sum(), scene)[name] == 0).all()


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_seen_is_background(n: int):
    scene = soft_scene(7, n=n)
    scene["opacities"] *= 0
    picture, alpha, meta = render(scene, render_mode="RGB+ED")
    assert picture[..., :3].equal(scene["backgrounds"].expand(1, 12, 14, 3))
    assert (picture[..., 3] == 0).all()
    assert (alpha == 0).all()
    assert meta["hull_size"].shape == (1, n)
    found = _gradients(lambda s: render(s)[0].sum(), scene)
    assert found.keys() == set(LEAVES)
    assert all((found[name] == 0).all() for name in LEAVES[:-1])
    assert (found["backgrounds"] == 12 * 14).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_hard_edges_far_away_stay_finite(dtype: torch.dtype):
    scene = {name: t.to(dtype) for name, t in soft_scene(8).items()}
    scene["delta"] *= 1e6
    scene["sigma"] *= 1e6
    found = _gradients(lambda s: render(s)[0].sum(), scene)
    assert all(g.isfinite().all() for g in found.values())
    picture, _, _ = render(scene)
    assert picture.dtype is dtype
    assert picture.isfinite().all()
