"""What the rasterizer does with convexes, cameras and pictures at the edge of what makes sense."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
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
    by_closed_forms,
    closed_forms,
    converted,
    crowd,
    gradients,
    in_torch,
    native,
    one_square,
)
from zoo.splat.convex.reference import rasterization_convex_reference

SIZE = {"width": WIDTH, "height": HEIGHT}
DTYPES = pytest.mark.parametrize("dtype", [F64, torch.float32])
RENDERS = pytest.mark.parametrize("render", [native, in_torch], ids=["native", "torch"])


def _assert_finite(found: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    picture, alpha, grads = found
    assert picture.isfinite().all()
    assert ((alpha >= 0) & (alpha <= 1)).all()
    for name, grad in grads.items():
        assert grad.isfinite().all(), name


# What is left out: row 1 of a scene of four, through a camera that is not turned


def _still(seed: int = 5, **changes: Any) -> Scene:
    scene = crowd(4, cameras=1, seed=seed, **changes)
    scene["viewmats"][:] = torch.eye(4)
    return scene


def _set(name: str, value: float) -> Callable[[Scene], dict[str, Any]]:
    def spoil(scene: Scene) -> dict[str, Any]:
        scene[name][1] = value
        return {}

    return spoil


def _set_point(place: tuple[int, int], value: float) -> Callable[[Scene], dict[str, Any]]:
    def spoil(scene: Scene) -> dict[str, Any]:
        scene["points"][1, place[0], place[1]] = value
        return {}

    return spoil


def _overwrite(
    points: Callable[[Tensor], Tensor], near_mode: str = "cull", **options: Any
) -> Callable[[Scene], dict[str, Any]]:
    def spoil(scene: Scene) -> dict[str, Any]:
        scene["points"][1] = points(scene["points"][1])
        return {"near_mode": near_mode, **options}

    return spoil


SPOILED = {
    "nan_point": _set_point((2, 0), math.nan),
    "infinite_point": _set_point((0, 1), math.inf),
    "infinite_depth": _set_point((3, 2), math.inf),
    **{f"nan_{name}": _set(name, math.nan) for name in ("delta", "sigma", "opacities")},
    **{f"infinite_{name}": _set(name, math.inf) for name in ("delta", "sigma", "opacities")},
    "lines_overflow": _set("delta", 3e38),
    "no_opacity": _set("opacities", 0.0),
    "negative_opacity": _set("opacities", -1.0),
    "least_opacity": _set("opacities", 1 / 255),
    "one_point": _overwrite(lambda p: p[:1].expand(6, 3)),
    "two_points": _overwrite(lambda p: p[[0, 1, 0, 1, 1, 0]]),
    "on_a_line": _overwrite(lambda p: torch.stack((torch.arange(6) / 4, torch.zeros(6), torch.full((6,), 3.0)), -1)),
    "edge_on": _overwrite(lambda p: torch.stack((p[:, 2] / 4, p[:, 1], p[:, 2]), -1)),
    "one_point_behind": _overwrite(lambda p: torch.cat([p[:5], p[5:] * torch.tensor([1, 1, -0.3])])),
    "one_point_before_the_plane": _overwrite(lambda p: p, near_plane=2.6),
    "in_the_eye": _overwrite(lambda p: torch.cat([p[:5], torch.zeros(1, 3)])),
    "all_behind": _overwrite(lambda p: -p, "clip"),
    "all_before_the_plane": _overwrite(lambda p: p / 20, "clip", near_plane=0.5),
    "centre_before_the_plane": _overwrite(lambda p: torch.cat([p[:1], p[1:] / p[1:, 2:]]), "clip", near_plane=1.7),
    "far": _overwrite(lambda p: p * 20, "clip", far_plane=20.0),
    "beside": _overwrite(lambda p: p + torch.tensor([100.0, 0, 0]), "clip"),
    "above": _overwrite(lambda p: p - torch.tensor([0, 100.0, 0]), "clip"),
    "overflow": _overwrite(lambda p: p * 5e37, far_plane=math.inf),
}


@RENDERS
@DTYPES
@pytest.mark.parametrize("case", SPOILED)
def test_what_is_left_out_is_as_if_it_were_not_there(case: str, dtype: torch.dtype, render: Render) -> None:
    scene, fine = _still(), _still()
    scene["sigma"] *= 10
    fine["sigma"] *= 10
    options = {"near_plane": 0.1} | SPOILED[case](scene) | SIZE
    if dtype is F64:  # where it takes more to overflow
        scene["delta"][1] *= 1e270 if case == "lines_overflow" else 1
        scene["points"][1] *= 1e270 if case == "overflow" else 1
    kept = [0, 2, 3]
    rest = {name: t[kept] if name in PER_CONVEX else t for name, t in scene.items()}
    scene, rest, fine = (converted(s, dtype) for s in (scene, rest, fine))
    meta = render(**scene, **options)[2]
    assert meta["hull_size"][0, 1] == 0
    assert (meta["hull_size"][0, kept] > 2).all() or case == "one_point_before_the_plane"
    assert render(**fine, **SIZE)[2]["hull_size"][0, 1] > 2
    for name in ("means2d", "depths", "points2d", "radii", "tiles_per_convex"):
        assert not meta[name][0, 1].any()
    found, wanted = gradients(render, scene, **options), gradients(render, rest, **options)
    _assert_finite(found)
    for name in LEAVES:
        assert_within(found[2][name][kept] if name in PER_CONVEX else found[2][name], wanted[2][name], 1e-6, name)
        if name in PER_CONVEX:
            assert not found[2][name][1].any()
    for actual, expected in zip(found[:2], wanted[:2], strict=True):
        assert_within(actual, expected, 1e-6)


@pytest.mark.parametrize("degree", [None, 2])
@pytest.mark.parametrize("render", [native, in_torch, by_closed_forms], ids=["native", "torch", "closed_forms"])
def test_colors_of_what_is_left_out_may_be_nan(render: Render, degree: int | None) -> None:
    scene = _still(degree=degree)
    scene["points"][1] = math.nan
    scene["colors"][1] = math.nan
    rest = {name: t[[0, 2, 3]] if name in PER_CONVEX else t for name, t in scene.items()}
    with closed_forms() if render is by_closed_forms else contextlib.nullcontext():
        wanted = gradients(render, rest, **SIZE, sh_degree=degree)
        found = gradients(render, scene, **SIZE, sh_degree=degree)
    _assert_finite(found)
    assert_within(found[0], wanted[0], 1e-14)
    assert_within(found[2]["viewmats"], wanted[2]["viewmats"], 1e-13)


@RENDERS
def test_convexes_whose_box_is_no_larger_than_the_clip_are_left_out(render: Render) -> None:
    scene = crowd(60, arm=0.1)
    scene["sigma"] *= 5
    radii = render(**scene, **SIZE)[2]["radii"].amax(-1)
    for clip in (1.5, *radii[radii > 0].unique()[:-1].tolist()):
        kept = render(**scene, **SIZE, radius_clip=clip)[2]["hull_size"] > 0
        assert torch.equal(kept, radii > clip)
        assert kept.any()
    assert (radii > 0).sum() > 60


# What is seen all the same


@RENDERS
@pytest.mark.parametrize("extra", ["duplicate", "on_an_edge", "inside"])
def test_points_that_are_no_corners_change_nothing(extra: str, render: Render) -> None:
    square = one_square()
    a, b, c, d = square["points"][0]
    more = {
        "duplicate": [a, d, d, a],
        "on_an_edge": [(a + b) / 2, (a + 3 * c) / 4, (c + d) / 2, (b + d) / 2],  # seen head on: exact
        "inside": [a * 0.75 + d * 0.25, (a + b + c + d) / 4, (b + c) / 2, c * 0.5 + b * 0.5],
    }[extra]
    more = [p if p[2] == 4.0 else p / p[2] * 4.0 for p in more]
    eight = square | {"points": torch.stack([d, *more[:2], a, c, *more[2:], b])[None]}
    wanted, found = (gradients(render, scene, width=16, height=16) for scene in (square, eight))
    assert render(**eight, width=16, height=16)[2]["hull_size"].item() == 4
    for actual, expected in zip(found[:2], wanted[:2], strict=True):
        assert_within(actual, expected, 1e-12)
    corners = found[2]["points"][0, [0, 3, 4, 7]]
    assert_close(corners.sum(0)[:2], found[2]["points"].sum((0, 1))[:2], rtol=0, atol=1e-12)


@RENDERS
@DTYPES
def test_a_sliver_is_kept_and_its_box_is_capped(dtype: torch.dtype, render: Render) -> None:
    thin = 1e-12 if dtype is F64 else 1e-4
    scene = converted(_still(k=3), dtype)
    scene["points"][1] = torch.tensor([[-20.0, 0.05, 3], [20, 0.05 + thin, 3], [0, 0.05 - thin, 3]], dtype=dtype)
    scene["sigma"][1] = 1e-3
    found = gradients(render, scene, **SIZE)
    _assert_finite(found)
    meta = render(**scene, **SIZE)[2]
    assert meta["hull_size"][0, 1] == 3
    assert meta["radii"][0, 1].max() == math.ceil(2 * math.hypot(WIDTH, HEIGHT))
    assert found[2]["opacities"][1] != 0


@RENDERS
@DTYPES
@pytest.mark.parametrize("name", ["delta", "sigma"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30])
def test_scales_have_a_floor(value: float, name: str, dtype: torch.dtype, render: Render) -> None:
    scene = converted(_still(), dtype)
    scene[name][1] = value
    meta = render(**scene, **SIZE)[2]
    assert (meta["hull_size"] > 2).all()
    found = gradients(render, scene, **SIZE)
    _assert_finite(found)
    assert found[2][name][1] == 0
    assert found[2]["opacities"][1] != 0
    exact = gradients(rasterization_convex_reference, converted(scene, F64), **SIZE)
    assert_within(found[0].double(), exact[0], 1e-12 if dtype is F64 else 1e-5)


@RENDERS
@pytest.mark.parametrize("factor", [1e3, 1e8, 1e15, 1e30])
def test_edges_of_any_hardness_are_finite_in_float32(factor: float, render: Render) -> None:
    scene = converted(crowd(20), torch.float32)
    scene["points"] = (scene["points"] * 64).round() / 64
    for name in ("delta", "sigma"):
        hard = scene | {name: scene[name] * factor}
        _assert_finite(gradients(render, hard, **SIZE, render_mode="RGB+ED"))
    both = scene | {"delta": scene["delta"] * factor, "sigma": scene["sigma"] * factor}
    _assert_finite(gradients(render, both, **SIZE, render_mode="RGB+ED"))


@RENDERS
@DTYPES
def test_opacities_just_above_one_in_255(dtype: torch.dtype, render: Render) -> None:
    scene = converted(_still(), dtype)
    scene["opacities"][:] = torch.tensor([1.0 + 2e-6, 1.0 + 1e-3, 1.001, 1.5]) / 255
    for sigma in (1e-6, 0.3, 100.0):
        found = gradients(render, scene | {"sigma": torch.full_like(scene["sigma"], sigma)}, **SIZE)
        _assert_finite(found)
        assert bool(found[1].any()) is (sigma > 0.01)


@DTYPES
@pytest.mark.parametrize("k", [3, 6, 8])
def test_lattices_seen_head_on(k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(k)
    scene = converted(crowd(400, k, cameras=1), dtype)
    scene["viewmats"][:] = torch.eye(4)
    lattice = torch.randint(-3, 4, (400, k, 3), generator=g)
    scene["Ks"][..., :2, :2] = 32 * torch.eye(2)
    # Every number is exact, so that what lies on an edge does: the mean of K points divides by K.
    scene["points"] = (k * lattice * torch.tensor([1, 1, 0]) / 32 + torch.tensor([0, 0, 4.0])).to(dtype)
    scene["delta"] *= 0.05
    for near_mode in ("cull", "clip"):
        found = gradients(native, scene, **SIZE, near_mode=near_mode, near_plane=2.0)
        _assert_finite(found)
        expected = gradients(in_torch, scene, **SIZE, near_mode=near_mode, near_plane=2.0)
        assert_within(found[0], expected[0], 1e-12 if dtype is F64 else 1e-4)


def test_noise_of_every_size_is_finite_in_float32() -> None:
    g = torch.Generator().manual_seed(1)

    def spread(*shape: int, low: float, high: float) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(shape, generator=g))

    n = 3000
    scene = converted(crowd(n, 8), torch.float32)
    sizes = spread(n, 1, 1, low=-30, high=30)
    scene["points"] = torch.randn(n, 8, 3, generator=g) * sizes.where(sizes > 1e-3, 1)
    scene["points"][::3] = scene["points"][::3].sign() * scene["points"][::3].abs().log10().round()
    scene["points"][::2, :, 2] = scene["points"][::2, :, 2].abs()
    scene["delta"], scene["sigma"] = spread(n, low=-30, high=30), spread(n, low=-30, high=30)
    scene["opacities"] = torch.rand(n, generator=g) * torch.tensor([1.0, 0.005]).repeat(n // 2)
    for near_mode in ("cull", "clip"):
        for reference_focal in (None, 1e4):
            options = {**SIZE, "near_mode": near_mode, "reference_focal": reference_focal}
            picture, alpha, grads = gradients(native, scene, **options)
            assert native(**scene, **options)[2]["hull_size"].count_nonzero() > 300
            assert picture.isfinite().all()
            assert ((alpha >= 0) & (alpha <= 1)).all()
            for name, grad in grads.items():  # which may be larger than float32 can say
                assert not grad.isnan().any(), name


# Pictures and cameras


@RENDERS
@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("mode", ["RGB", "ED", "RGB+ED"])
def test_nothing_to_see_is_the_background(mode: str, n: int, render: Render) -> None:
    scene = crowd(n, degree=1 if mode == "RGB+ED" else None)
    scene["points"] = scene["points"] - torch.tensor([0, 0, 50.0])
    options = {**SIZE, "render_mode": mode, "sh_degree": 1 if mode == "RGB+ED" else None}
    leaves = {name: t.requires_grad_(name != "Ks") for name, t in scene.items()}
    picture, alpha, meta = render(**leaves, **options)
    behind = torch.zeros(2, 0) if mode == "ED" else scene["backgrounds"]
    if mode != "RGB":
        behind = torch.cat([behind, torch.zeros(2, 1)], -1)
    assert_close(picture, behind.double()[:, None, None].expand_as(picture), rtol=0, atol=0)
    assert not alpha.any()
    assert meta["flatten_ids"].shape == (0,)
    assert meta["hull_size"].shape == (2, n)
    (picture.sum() + alpha.sum()).backward()
    for name in LEAVES:
        if mode == "ED" and name in ("colors", "backgrounds"):
            continue
        expected = torch.full_like(scene[name], WIDTH * HEIGHT if name == "backgrounds" else 0.0)
        assert_close(scene[name].grad, expected)


@RENDERS
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (1, 40), (16, 16), (64, 3)])
def test_pictures_of_any_size_are_cut_out_of_a_larger_one(size: tuple[int, int], render: Render) -> None:
    scene = crowd(20)
    (width, height), large = size, {"width": 80, "height": 48}
    whole, _, _ = render(**scene, **large)
    picture, alpha, _ = render(**scene, width=width, height=height)
    assert picture.shape == (2, height, width, 3)
    assert alpha.shape == (2, height, width, 1)
    assert_within(picture, whole[:, :height, :width].contiguous(), 1e-13)
    _assert_finite(gradients(render, scene, width=width, height=height))


def test_a_picture_far_from_the_axis_is_the_same() -> None:
    scene = _still(channels=1)
    scene["points"] = (scene["points"] * 64).round() / 64
    picture, _, _ = native(**converted(scene, torch.float32), **SIZE)
    moved = dict(scene)  # all of it 100 to the right, in pixels that are as far
    moved["points"] = scene["points"].clone()
    moved["points"][..., 0] += 4 * scene["points"][..., 2]
    moved["Ks"] = scene["Ks"].clone()
    moved["Ks"][..., 0, 2] -= 4 * scene["Ks"][..., 0, 0]
    far, _, _ = native(**converted(moved, torch.float32), **SIZE)
    assert picture.std() > 0.1
    assert_within(far, picture, 1e-4)


@DTYPES
def test_no_cameras_and_no_scenes(dtype: torch.dtype) -> None:
    scene = converted(crowd(leading=(2,)), dtype)
    for name in ("viewmats", "Ks", "backgrounds"):
        scene[name] = scene[name][:, :0]
    picture, alpha, meta = native(**scene, **SIZE)
    assert picture.shape == (2, 0, HEIGHT, WIDTH, 3)
    assert alpha.shape == (2, 0, HEIGHT, WIDTH, 1)
    assert meta["hull_size"].shape == (2, 0, 12)
    none = {name: t[:0] for name, t in converted(crowd(leading=(2,)), dtype).items()}
    assert native(**none, **SIZE)[0].shape == (0, 2, HEIGHT, WIDTH, 3)
