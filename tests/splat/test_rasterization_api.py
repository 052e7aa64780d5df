"""What the rasterizer takes and gives: kinds of inputs, what is found on the way, and what is refused."""

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
    WIDTH,
    Scene,
    closed_forms,
    converted,
    crowd,
    gradients,
    in_torch,
    native,
)
from zoo.errors import KernelError
from zoo.splat import rasterization_convex
from zoo.splat.convex import rendering

SIZE = {"width": WIDTH, "height": HEIGHT}


def _single() -> Scene:
    return converted(crowd(5, cameras=2), torch.float32)


# What is given


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_results_have_the_promised_shapes(dtype: torch.dtype) -> None:
    scene = converted(crowd(5, 4, cameras=3, leading=(2, 1)), dtype)
    picture, alpha, meta = native(**scene, **SIZE, render_mode="RGB+D", absgrad=True, tile_size=8)
    views, rows, columns = (2, 1, 3), math.ceil(HEIGHT / 8), math.ceil(WIDTH / 8)
    assert picture.shape == (*views, HEIGHT, WIDTH, 4)
    assert alpha.shape == (*views, HEIGHT, WIDTH, 1)
    shapes = {
        "means2d": (2,),
        "depths": (),
        "points2d": (4, 2),
        "opacities": (),
        "sigmas": (),
        "vertex_absgrad": (),
        "radii": (2,),
        "hull_size": (),
        "tiles_per_convex": (),
    }
    for name, tail in shapes.items():
        assert meta[name].shape == (*views, 5, *tail), name
        integer = name in ("radii", "hull_size", "tiles_per_convex")
        assert meta[name].dtype is (torch.int32 if integer else dtype), name
    assert meta["isect_offsets"].shape == (*views, rows, columns)
    assert meta["flatten_ids"].shape == (int(meta["tiles_per_convex"].sum()),)
    assert meta["isect_offsets"].dtype is meta["flatten_ids"].dtype is torch.int32
    numbers = {"width": WIDTH, "height": HEIGHT, "tile_size": 8, "n_cameras": 3, "n_batches": 2}
    assert {name: meta[name] for name in numbers} == numbers
    assert set(meta) == set(shapes) | set(numbers) | {"isect_offsets", "flatten_ids"}
    assert "vertex_absgrad" not in native(**scene, **SIZE)[2]
    assert_close(meta["opacities"], scene["opacities"][..., None, :].expand(*views, 5))
    assert picture.dtype is alpha.dtype is dtype


def test_modes_are_channels_of_one_picture() -> None:
    scene = crowd()
    color, alpha, _ = native(**scene, **SIZE)
    depth = native(**scene, **SIZE, render_mode="D")[0]
    expected = native(**scene, **SIZE, render_mode="ED")[0]
    assert depth.shape == expected.shape == (2, HEIGHT, WIDTH, 1)
    assert_close(native(**scene, **SIZE, render_mode="RGB+D")[0], torch.cat([color, depth], -1), rtol=0, atol=0)
    assert_close(native(**scene, **SIZE, render_mode="RGB+ED")[0], torch.cat([color, expected], -1), rtol=0, atol=0)
    seen = alpha > 0
    assert_close(expected[seen], depth[seen] / alpha[seen])
    assert not expected[~seen].any()
    assert (~seen).any()


def test_colors_may_have_any_number_of_channels() -> None:
    scene = crowd(channels=7)
    picture = native(**scene, **SIZE)[0]
    for channel in range(7):
        own = scene | {name: scene[name][..., channel : channel + 1] for name in ("colors", "backgrounds")}
        assert_close(native(**own, **SIZE)[0][..., 0], picture[..., channel], rtol=0, atol=0)


def test_coefficients_beyond_the_degree_do_not_count() -> None:
    scene = crowd(degree=3)
    less = scene | {"colors": scene["colors"][..., :4, :]}
    wanted = gradients(native, less, **SIZE, sh_degree=1)
    found = gradients(native, scene, **SIZE, sh_degree=1)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2]["colors"][..., :4, :], wanted[2]["colors"])
    assert not found[2]["colors"][..., 4:, :].any()


def test_colors_of_harmonics_are_half_more_and_not_negative() -> None:
    scene = crowd(1, cameras=1, degree=0)
    scene["colors"][0, 0] = torch.tensor([-9.0, 0, 1])
    picture, alpha, found = gradients(native, scene, **SIZE, sh_degree=0)
    color = (picture - (1 - alpha) * scene["backgrounds"]) / alpha
    expected = torch.tensor([0, 0.5, 0.5 + 0.28209479177387814], dtype=F64)
    assert_close(color[alpha[..., 0] > 0.3], expected.expand(int((alpha > 0.3).sum()), 3))
    assert found["colors"][0, 0, 0] == 0
    assert found["colors"][0, 0, 1:].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_cast_up(dtype: torch.dtype) -> None:
    scene = _single()
    mixed = scene | {name: scene[name].to(dtype) for name in ("points", "colors", "opacities", "viewmats")}
    exact = converted(mixed, torch.float32)
    leaves = {name: t.clone().requires_grad_(name != "Ks") for name, t in mixed.items()}
    picture, _, _ = native(**leaves, **SIZE)
    assert picture.dtype is torch.float32
    assert torch.equal(picture, native(**exact, **SIZE)[0])
    picture.sum().backward()
    floats = {name: t.clone().requires_grad_(name != "Ks") for name, t in exact.items()}
    native(**floats, **SIZE)[0].sum().backward()
    for name in LEAVES:
        assert leaves[name].grad.dtype is mixed[name].dtype
        assert torch.equal(leaves[name].grad, floats[name].grad.to(mixed[name].dtype)), name


@pytest.mark.parametrize("degree", [None, 1])
def test_inputs_need_not_be_contiguous(degree: int | None) -> None:
    scene = crowd(leading=(2,), degree=degree)
    wanted = gradients(native, scene, **SIZE, sh_degree=degree)
    strided = {name: t.movedim(0, -1).contiguous().movedim(-1, 0) for name, t in scene.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    leaves = {name: t.requires_grad_(name != "Ks") for name, t in strided.items()}
    picture, alpha, _ = native(**leaves, **SIZE, sh_degree=degree)
    g = torch.Generator().manual_seed(5)
    to_picture, to_alpha = (torch.randn(t.shape, generator=g, dtype=F64) for t in (picture, alpha))
    # Gradients that are broadcast, and not contiguous either.
    ((picture * to_picture).movedim(1, 2).sum() + (alpha * to_alpha).sum()).backward()
    assert torch.equal(picture, wanted[0])
    for name in LEAVES:
        assert torch.equal(leaves[name].grad, wanted[2][name]), name


def test_arguments_are_left_as_they_are() -> None:
    scene = crowd(degree=1)
    before = {name: t.clone() for name, t in scene.items()}
    gradients(native, scene, **SIZE, sh_degree=1)
    for name, t in scene.items():
        assert torch.equal(t, before[name])


def test_backends_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def watched(module: Any, name: str) -> Any:
        original = module.convex_raster

        def call(*arguments: Any) -> Any:
            called.append(name)
            return original(*arguments)

        return call

    monkeypatch.setattr(rendering.ops, "convex_raster", watched(rendering.ops, "op"))
    monkeypatch.setattr(rendering.eager, "convex_raster", watched(rendering.eager, "formula"))
    for backend in ("auto", "cpp", "torch"):
        rasterization_convex(**_single(), **SIZE, backend=backend)
    assert called == ["op", "op", "formula"]


def test_auto_without_a_library_is_the_same() -> None:
    scene = crowd()
    with closed_forms():
        found = rasterization_convex(**scene, **SIZE)[0]
    assert_close(found, native(**scene, **SIZE)[0], rtol=0, atol=1e-13)


# What is refused


def _changed(name: str, change: Any) -> dict[str, Any]:
    return {name: change(_single()[name]) if callable(change) else change}


def _cut(t: Tensor) -> Tensor:
    return t[..., :-1]


def _tilted(matrices: Tensor) -> Tensor:
    return matrices * torch.tensor([1.0, 1, 0, 1])  # the third column of R


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "points_2d": (_changed("points", _cut), ValueError, r"points must be \[..., N, K, 3\].*got \(5, 6, 2\)"),
    "two_points": (_changed("points", lambda t: t[:, :2]), ValueError, r"K from 3 to 8 points .*got \(5, 2, 3\)"),
    "nine_points": (_changed("points", lambda t: t.repeat(1, 2, 1)[:, :9]), ValueError, r"from 3 to 8.*\(5, 9, 3\)"),
    "one_convex": (_changed("points", lambda t: t[0]), ValueError, r"points must be .*got \(6, 3\)"),
    "delta": (_changed("delta", _cut), ValueError, r"delta must be \[5\] beside points \[5, 6, 3\].*got \[4\]"),
    "sigma": (_changed("sigma", lambda t: t[:, None]), ValueError, r"sigma must be \[5\].*got \[5, 1\]"),
    "opacities": (_changed("opacities", lambda t: t[:1]), ValueError, r"opacities must be \[5\].*got \[1\]"),
    "one_camera": (
        _changed("viewmats", lambda t: t[0]),
        ValueError,
        r"viewmats must be \[..., C, 4, 4\], got \(4, 4\)",
    ),
    "small_viewmats": (
        _changed("viewmats", lambda t: t[:, :3]),
        ValueError,
        r"viewmats must be \[2, 4, 4\].*\[2, 3, 4\]",
    ),
    "other_cameras": (
        _changed("Ks", lambda t: t[:1]),
        ValueError,
        r"Ks must be \[2, 3, 3\] .*2 cameras, got \[1, 3, 3\]",
    ),
    "colors": (_changed("colors", lambda t: t[:4]), ValueError, r"colors must be \[..., \(C,\) N, D\].*got \[4, 3\]"),
    "flat_colors": (_changed("colors", lambda t: t[:, 0]), ValueError, r"colors must be .*got \[5\]"),
    "no_coefficients": ({"sh_degree": 0}, ValueError, r"N, S, 3\] with an sh_degree.*got \[5, 3\]"),
    "few_coefficients": (
        {"sh_degree": 1, "colors": torch.zeros(5, 3, 3)},
        ValueError,
        r"colors must hold 4 or more coefficients of 3 channels for sh_degree 1, got \[5, 3, 3\]",
    ),
    "coefficients_of_features": (
        {"sh_degree": 0, "colors": torch.zeros(5, 4, 2)},
        ValueError,
        r"1 or more coefficients of 3 channels .*got \[5, 4, 2\]",
    ),
    "high_degree": (
        {"sh_degree": 5, "colors": torch.zeros(5, 36, 3)},
        ValueError,
        r"sh_degree must lie in \[0, 4\], got 5",
    ),
    "backgrounds": (_changed("backgrounds", _cut), ValueError, r"backgrounds must be \[2, 3\], .*got \[2, 2\]"),
    "one_background": (_changed("backgrounds", lambda t: t[0]), ValueError, r"backgrounds must be \[2, 3\].*got \[3\]"),
    "integers": (_changed("points", lambda t: t.int()), TypeError, r"points must be floating point, got torch.int32"),
    "booleans": (
        _changed("opacities", lambda t: t > 0),
        TypeError,
        r"opacities must be floating .*opacities.float\(\)",
    ),
    "mixed": (
        _changed("Ks", lambda t: t.double()),
        TypeError,
        r"Ks is torch.float64 and points torch.float32; give all",
    ),
    "mixed_points": (
        _changed("points", lambda t: t.double()),
        TypeError,
        r"delta is torch.float32 and points torch.flo",
    ),
    "device": (_changed("delta", lambda t: t.to("meta")), ValueError, r"delta is on meta and points on cpu; move all"),
    "intrinsics_grad": (_changed("Ks", lambda t: t.requires_grad_()), ValueError, r"Ks has no gradient; detach it"),
    "width": ({"width": 0}, ValueError, r"width must be a number of pixels from 1 to \d+, got 0"),
    "height": ({"height": 2**24 + 1}, ValueError, r"height must be a number of pixels .*got 16777217"),
    "small_tiles": ({"tile_size": 3}, ValueError, r"tile_size must lie in \[4, 64\] pixels, got 3"),
    "large_tiles": ({"tile_size": 65}, ValueError, r"tile_size must lie in \[4, 64\] pixels, got 65"),
    "near": ({"near_plane": 0.0}, ValueError, r"0 < near_plane < far_plane, got 0.0 and"),
    "far": ({"far_plane": 0.01}, ValueError, r"0 < near_plane < far_plane, got 0.01 and 0.01"),
    "nan_far": ({"far_plane": math.nan}, ValueError, r"near_plane < far_plane, got 0.01 and nan"),
    "clip": ({"radius_clip": -1.0}, ValueError, r"radius_clip must not be negative, got -1.0"),
    "nan_clip": ({"radius_clip": math.nan}, ValueError, r"radius_clip must not be negative, got nan"),
    "focal": (
        {"reference_focal": 0.0},
        ValueError,
        r"reference_focal must be a positive number of pixels or None, got 0",
    ),
    "infinite_focal": ({"reference_focal": math.inf}, ValueError, r"reference_focal must be .*got inf"),
    "render_mode": (
        {"render_mode": "DEPTH"},
        ValueError,
        r"render_mode must be one of RGB, D, ED, RGB\+D, RGB\+ED, got",
    ),
    "near_mode": ({"near_mode": "cut"}, ValueError, r"near_mode must be one of cull, clip, got 'cut'"),
    "antialiased": ({"rasterize_mode": "antialiased"}, NotImplementedError, r"rasterize_mode must be 'classic', got"),
    "backend": ({"backend": "gpu"}, ValueError, r"backend must be one of auto, torch, cpp, cuda, got 'gpu'"),
    "cuda": ({"backend": "cuda"}, KernelError, r"use backend='auto'"),
    "no_focal_length": (_changed("Ks", lambda t: t * 0), ValueError, r"focal lengths fx, fy > 0, got \[\[0.0, 0.0\]"),
    "mirrored": (
        _changed("Ks", lambda t: t * torch.tensor([-1.0, 1, 1])),
        ValueError,
        r"Ks must be finite .*got \[\[-",
    ),
    "nan_intrinsics": (_changed("Ks", lambda t: t.fill_(math.nan)), ValueError, r"Ks must be finite with focal"),
    "singular": (
        _changed("viewmats", _tilted),
        ValueError,
        r"viewmats must be finite with an invertible .*\[0.0, 0.0\]",
    ),
    "width_of_float": ({"width": 32.0}, TypeError, r"width must be an int, got 32.0; round it"),
    "tile_size_of_float": ({"tile_size": 16.0}, TypeError, r"tile_size must be an int, got 16.0; round it"),
    "height_of_bool": ({"height": True}, TypeError, r"height must be an int, got True; round it"),
    "no_colors": (_changed("colors", None), TypeError, r"colors must be a tensor, got NoneType; make one with torch"),
    "nan_viewmats": (_changed("viewmats", lambda t: t.fill_(math.nan)), ValueError, r"give world-to-camera matrices"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_refused_in_a_sentence(case: str) -> None:
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=f"^rasterization_convex: .*{message}") as caught:
        rasterization_convex(**{**_single(), **SIZE, **changes})
    assert "\n" not in str(caught.value)


def test_a_small_world_has_cameras_too() -> None:
    scene = crowd()
    small = {**scene, "viewmats": scene["viewmats"].clone(), "points": scene["points"] * 1e6}
    small["viewmats"][..., :3, :3] *= 1e-6
    assert_close(native(**small, **SIZE)[0], native(**scene, **SIZE)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["points", "delta", "sigma", "opacities", "colors"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_validate_names_the_input_that_is_not_finite(name: str, value: float) -> None:
    scene = _single()
    native(**scene, **SIZE, validate=True)
    scene[name].view(-1)[3] = value
    native(**scene, **SIZE)
    with pytest.raises(ValueError, match=f"^rasterization_convex: {name} is not finite everywhere"):
        native(**scene, **SIZE, validate=True)


def test_backends_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "use_cpu_library", lambda: False)
    with pytest.raises(KernelError, match="backend='cpp' needs the CPU library, but it could not be built"):
        native(**_single(), **SIZE)
    monkeypatch.setenv("ZOO_KERNELS", "off")
    with pytest.raises(KernelError, match="but ZOO_KERNELS=off; use backend='auto'"):
        native(**_single(), **SIZE)
    meta = {name: t.to("meta") for name, t in _single().items()}
    with pytest.raises(KernelError, match="backend='cpp' is for CPU tensors, got meta"):
        native(**meta, **SIZE)


def test_the_formula_takes_what_the_ops_take() -> None:
    scene = _single()
    assert_close(in_torch(**scene, **SIZE)[0], native(**scene, **SIZE)[0], rtol=0, atol=1e-5)
