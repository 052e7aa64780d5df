"""The rasterizer among the rest of PyTorch: op checks, compilation, autocast, transforms, gradients of a part."""

from __future__ import annotations

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
    assert_within,
    converted,
    crowd,
    gradients,
    in_torch,
    native,
    one_square,
)
from zoo.errors import KernelError
from zoo.splat import rasterization_convex
from zoo.splat.convex import ops, rendering
from zoo.splat.convex.reference import rasterization_convex_reference
from zoo.splat.sh import _backward as sh_eval_bwd
from zoo.splat.sh import sh_eval

SIZE = {"width": WIDTH, "height": HEIGHT}


# opcheck looks at .grad itself
LOOKS_AT_GRADIENTS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


# Registrations


class Calls:
    """Arguments that the rasterizer calls its ops with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scene: Scene, **options: Any) -> None:
        self.arguments: dict[str, tuple[Any, ...]] = {}
        for name in ("convex_project", "convex_isect", "convex_raster"):
            monkeypatch.setattr(ops, name, self._kept(name, getattr(ops, name)))
        for name in ("_project_backward", "_raster_backward"):
            monkeypatch.setattr(ops, name, self._kept(name, getattr(ops, name)))
        picture, alpha, _ = native(**scene, **SIZE, **options)
        if picture.requires_grad:
            (picture.sum() + alpha.square().sum()).backward()

    def _kept(self, name: str, op: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.arguments[name] = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
            return op(*arguments)

        return call


def _leaves(scene: Scene, names: tuple[str, ...] = LEAVES) -> Scene:
    return {name: t.detach().clone().requires_grad_(name in names) for name, t in scene.items()}


@LOOKS_AT_GRADIENTS
@pytest.mark.parametrize("near_mode", ["cull", "clip"])
def test_ops_are_registered_as_pytorch_wants(near_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = _leaves(crowd(4, cameras=2, nearest=0.5))
    options = {"near_mode": near_mode, "near_plane": 0.3, "absgrad": near_mode == "clip"}
    with monkeypatch.context() as patch:
        found = Calls(patch, scene, **options).arguments
    for name in ("convex_project", "convex_raster"):
        moving = [
            a.clone().requires_grad_(i != 5) if isinstance(a, Tensor) and a.is_floating_point() else a
            for i, a in enumerate(found[name])
        ]
        if name == "convex_project":
            moving[3].requires_grad_(False)  # opacities decide what is seen, and no more
        else:
            moving[0].requires_grad_(False)  # the reference point of lines, and their limits
            moving[7].requires_grad_(False)
            moving[5].requires_grad_(True)
        torch.library.opcheck(getattr(ops, name), tuple(moving))
        torch.library.opcheck(getattr(ops, name), found[name])
    torch.library.opcheck(ops.convex_isect, found["convex_isect"])
    torch.library.opcheck(ops.convex_project_bwd, found["_project_backward"])
    torch.library.opcheck(ops.convex_raster_bwd, found["_raster_backward"])


@LOOKS_AT_GRADIENTS
def test_harmonics_are_registered_as_pytorch_wants() -> None:
    dirs, coeffs = torch.randn(4, 5, 3, dtype=F64), torch.randn(2, 5, 9, 3, dtype=F64)
    visible = torch.rand(4, 5) > 0.3
    torch.library.opcheck(sh_eval, (dirs.clone().requires_grad_(), coeffs.clone().requires_grad_(), visible, 2))
    torch.library.opcheck(sh_eval, (dirs, coeffs, visible, 1))
    torch.library.opcheck(sh_eval_bwd, (torch.randn(4, 5, 3, dtype=F64), dirs, coeffs, visible, 2))


@pytest.mark.parametrize(("degree", "mode"), [(1, "RGB+ED"), (None, "RGB")], ids=["harmonics", "colors"])
def test_compiled_code_gives_the_same(degree: int | None, mode: str) -> None:
    scene = converted(crowd(degree=degree), torch.float32)

    def render(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        picture, alpha, meta = rasterization_convex(**arguments)
        return picture, alpha, meta["radii"]

    options = {**SIZE, "sh_degree": degree, "render_mode": mode}
    torch.compiler.reset()
    compiled = torch.compile(render, fullgraph=True, backend="aot_eager")
    wanted = gradients(render, scene, **options)
    found = gradients(compiled, scene, **options)
    for actual, expected in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(actual, expected)
    for name in LEAVES:
        assert_within(found[2][name], wanted[2][name], 1e-6, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    scene = converted(crowd(degree=2), torch.float32)

    def in_autocast(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        with torch.autocast("cpu", dtype=dtype):
            return rasterization_convex(**arguments, backend=backend)

    def plain(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return rasterization_convex(**arguments, backend=backend)

    wanted = gradients(plain, scene, **SIZE, sh_degree=2, render_mode="RGB+ED")
    found = gradients(in_autocast, scene, **SIZE, sh_degree=2, render_mode="RGB+ED")
    for actual, expected in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(actual, expected)
    for name in LEAVES:
        assert torch.equal(found[2][name], wanted[2][name]), name


# Derivatives of other kinds


def test_a_second_derivative_is_refused() -> None:
    scene = _leaves(crowd(3))
    picture, _, _ = native(**scene, **SIZE)
    for name in ("points", "colors", "opacities"):
        (grad,) = torch.autograd.grad(picture.square().sum(), scene[name], create_graph=True)
        with pytest.raises(KernelError, match=r"rasterization_convex has no double backward.*use backend='torch'"):
            torch.autograd.grad(grad.sum(), scene["points"])


def test_the_formula_has_a_second_derivative() -> None:
    scene = _leaves(crowd(2, cameras=1), ("opacities", "colors"))
    picture, _, _ = in_torch(**scene, **SIZE)
    (grad,) = torch.autograd.grad(picture.square().sum(), scene["colors"], create_graph=True)
    (mixed,) = torch.autograd.grad(grad[0, 0], scene["opacities"])
    h = 1e-6

    def first(shift: float) -> Tensor:
        moved = _leaves(scene, ("colors",))
        moved["opacities"][1] += shift
        value = native(**moved, **SIZE)[0].square().sum()
        return torch.autograd.grad(value, moved["colors"])[0][0, 0]

    assert_close(mixed[1], (first(h) - first(-h)) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch 2.14's own use of it
def test_function_transforms_take_the_formula() -> None:
    scene = crowd(4)
    _, _, wanted = gradients(native, scene, ("points", "opacities"), **SIZE)
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(2, HEIGHT, WIDTH, d, generator=g, dtype=F64) for d in (3, 1)]

    def loss(points: Tensor, opacities: Tensor) -> Tensor:
        moved = scene | {"points": points, "opacities": opacities}
        picture, alpha, _ = rasterization_convex(**moved, **SIZE)
        return (picture * weights[0]).sum() + (alpha * weights[1]).sum()

    inputs = scene["points"], scene["opacities"]
    found = torch.func.grad(loss, argnums=(0, 1))(*inputs)
    assert_within(found[0], wanted["points"], 1e-10)
    assert_within(found[1], wanted["opacities"], 1e-10)
    tangents = torch.randn_like(inputs[0]), torch.randn_like(inputs[1])
    _, along = torch.func.jvp(loss, inputs, tangents)
    assert_close(along, (wanted["points"] * tangents[0]).sum() + (wanted["opacities"] * tangents[1]).sum())


# What is asked for, and no more


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("degree", [None, 1])
def test_gradients_of_one_input_are_those_of_all(degree: int | None, name: str) -> None:
    scene = crowd(6, degree=degree)
    wanted = gradients(native, scene, **SIZE, sh_degree=degree)[2][name]
    found = gradients(native, scene, (name,), **SIZE, sh_degree=degree)[2][name]
    assert torch.equal(found, wanted)


def test_cameras_that_are_given_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, asked in ((LEAVES, True), (("points",), False)):
        with monkeypatch.context() as patch:
            calls = Calls(patch, _leaves(crowd(3), names))
        assert calls.arguments["_project_backward"][-1] is asked
    with monkeypatch.context() as patch:  # of colors alone the projection has no part
        calls = Calls(patch, _leaves(crowd(3), ("colors",)))
    assert set(calls.arguments) == {"convex_project", "convex_isect", "convex_raster", "_raster_backward"}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_nothing_is_kept(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    original = rendering.ops.convex_raster

    def call(*arguments: Any) -> Any:
        found = original(*arguments)
        kept.append(found[2])
        return found

    monkeypatch.setattr(rendering.ops, "convex_raster", call)
    scene = crowd(degree=1)
    with context():
        picture, alpha, _ = native(**_leaves(scene), **SIZE, sh_degree=1)
    native(**scene, **SIZE, sh_degree=1)
    with_gradient = native(**_leaves(scene), **SIZE, sh_degree=1)
    assert [t.shape for t in kept] == [(0,), (0,), (2, HEIGHT, WIDTH)]
    assert not picture.requires_grad
    assert torch.equal(picture, with_gradient[0])
    assert torch.equal(alpha, with_gradient[1])


def test_the_op_without_what_it_should_have_kept_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        arguments = Calls(patch, crowd(3)).arguments["convex_raster"]
    moving = [*arguments[:-1], False]
    moving[1] = moving[1].clone().requires_grad_()
    picture, _, _ = ops.convex_raster(*moving)
    with pytest.raises(KernelError, match="keep=False, so that it has no gradient; pass keep=True"):
        picture.sum().backward()


# What a strategy of densification reads


def test_gradients_of_views_can_be_retained() -> None:
    scene = _leaves(crowd(leading=(2,), cameras=3))
    picture, _, meta = native(**scene, **SIZE)
    meta["sigmas"].retain_grad()
    meta["opacities"].retain_grad()
    meta["means2d"].retain_grad()
    (picture.square().sum() + 0.5 * meta["means2d"].sum()).backward()
    assert meta["sigmas"].grad.shape == (2, 3, 12)
    assert_close(meta["sigmas"].grad.sum(1), scene["sigma"].grad)
    assert_close(meta["opacities"].grad.sum(1), scene["opacities"].grad)
    assert not torch.allclose(meta["sigmas"].grad[:, 0], meta["sigmas"].grad[:, 1])
    assert_close(meta["means2d"].grad, torch.full_like(meta["means2d"], 0.5))


@pytest.mark.parametrize("name", ["means2d", "depths", "points2d"])
def test_what_is_found_on_the_way_can_be_differentiated(name: str) -> None:
    scene = crowd(nearest=0.4)
    options = {**SIZE, "near_mode": "clip", "near_plane": 0.6}
    both = []
    for render in (native, rasterization_convex_reference):
        leaves = _leaves(scene, ("points", "viewmats"))
        value = render(**leaves, **options)[2][name]
        weights = torch.linspace(0.1, 2.0, value.numel(), dtype=F64).reshape(value.shape)
        both.append(torch.autograd.grad((value * weights).sum(), [leaves["points"], leaves["viewmats"]]))
    for found, wanted in zip(*both, strict=True):
        assert wanted.any()
        assert_within(found, wanted, 1e-11, name)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_absgrad_is_the_sum_of_lengths_of_the_gradient_of_a_shift(backend: str) -> None:
    width, height = 9, 7
    scene = crowd(4, cameras=1, size=(width, height))
    scene["viewmats"][:] = torch.eye(4)
    g = torch.Generator().manual_seed(1)
    to_picture, to_alpha = (torch.randn(1, height, width, d, generator=g, dtype=F64) for d in (3, 1))
    picture, alpha, meta = rasterization_convex(
        **_leaves(scene), width=width, height=height, absgrad=True, backend=backend
    )
    ((picture * to_picture).sum() + (alpha * to_alpha).sum()).backward()
    # A convex is shifted by du on the screen when each of its points moves by z du / fx; depths stay as they are.
    leaves = _leaves(scene, ("points",))
    values = rasterization_convex_reference(**leaves, width=width, height=height)
    by_pixel = ((values[0] * to_picture).sum(-1) + (values[1] * to_alpha).sum(-1)).flatten()
    expected = torch.zeros(1, 4, dtype=F64)
    for value in by_pixel:
        (grad,) = torch.autograd.grad(value, leaves["points"], retain_graph=True)
        by_shift = (grad[..., :2] * scene["points"][..., 2:]).sum(1) / scene["Ks"][0, (0, 1), (0, 1)]
        expected += by_shift.norm(dim=-1)
    assert expected.min() > 1e-3
    assert_within(meta["vertex_absgrad"].grad, expected, 1e-10)


def test_absgrad_changes_nothing_else() -> None:
    def with_absgrad(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return native(**arguments, absgrad=True)

    wanted, found = gradients(native, crowd(), **SIZE), gradients(with_absgrad, crowd(), **SIZE)
    assert torch.equal(found[0], wanted[0])
    for name in LEAVES:
        assert torch.equal(found[2][name], wanted[2][name])
    scene = one_square()  # nothing else that is learned
    picture, _, meta = native(**scene, width=16, height=16, absgrad=True)
    picture.sum().backward()
    assert meta["vertex_absgrad"].grad.shape == (1, 1)
