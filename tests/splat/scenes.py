"""Random scenes for the rasterizer of convexes, and what is compared of two ways to render them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.implementations import registered
from tests.splat.soft_scene import random_rotation
from zoo.splat import rasterization_convex, sh
from zoo.splat.convex import eager

F64 = torch.float64
Scene = dict[str, Tensor]
Render = Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]
WIDTH, HEIGHT = 37, 29
LEAVES = ("points", "delta", "sigma", "opacities", "colors", "viewmats", "backgrounds")
PER_CONVEX = ("points", "delta", "sigma", "opacities", "colors")


def crowd(
    n: int = 12,
    k: int = 6,
    cameras: int = 2,
    leading: tuple[int, ...] = (),
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    degree: int | None = None,
    per_view: bool = False,
    channels: int = 3,
    nearest: float = 2.0,
    arm: float = 0.35,
    seed: int = 0,
) -> Scene:
    """Convexes from `nearest` to 2 behind it, in front of cameras that look along z, a little turned; all float64."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*leading, *shape, generator=g, dtype=F64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*leading, *shape, generator=g, dtype=F64)

    width, height = size
    viewmats = torch.eye(4, dtype=F64).repeat(*leading, cameras, 1, 1)
    views = viewmats[..., 0, 0].numel()
    viewmats[..., :3, :3] = random_rotation(g, views, angle=0.05).reshape(*leading, cameras, 3, 3)
    viewmats[..., :3, 3] = 0.1 * normal(cameras, 3)
    K = torch.tensor([[1.1 * width, 0, width / 2 + 0.3], [0, 1.05 * width, height / 2 - 0.2], [0, 0, 1]], dtype=F64)
    centres = torch.stack((*uniform(2, n, low=-1.0).unbind(-2), uniform(n, low=nearest, high=nearest + 2)), -1)
    views_of_colors = (cameras,) if per_view else ()
    colors = uniform(*views_of_colors, n, channels) if degree is None else 0.5 * normal(n, (degree + 1) ** 2 + 1, 3)
    return {
        "points": centres[..., None, :] + arm * normal(n, k, 3),
        "delta": 0.8 * (0.5 * normal(n)).exp(),
        "sigma": 0.3 * (0.5 * normal(n)).exp(),
        "opacities": uniform(n, low=0.2, high=0.9),
        "colors": colors,
        "viewmats": viewmats,
        "Ks": K.repeat(*leading, cameras, 1, 1),
        "backgrounds": uniform(cameras, channels if degree is None else 3),
    }


def one_square(opacity: float = 1.0, half: float = 1.0, depth: float = 4.0, **changes: Tensor) -> Scene:
    """A hard square seen head on in the middle of a picture of 16 x 16, 2 x 8 half / depth pixels wide; red on blue."""
    corners = [[x, y, depth] for x in (-half, half) for y in (-half, half)]
    return {
        "points": torch.tensor([corners], dtype=F64),
        "delta": torch.tensor([10.0], dtype=F64),
        "sigma": torch.tensor([10.0], dtype=F64),
        "opacities": torch.tensor([opacity], dtype=F64),
        "colors": torch.tensor([[1.0, 0, 0]], dtype=F64),
        "viewmats": torch.eye(4, dtype=F64)[None],
        "Ks": torch.tensor([[[8.0, 0, 8], [0, 8, 8], [0, 0, 1]]], dtype=F64),
        "backgrounds": torch.tensor([[0.0, 0, 1]], dtype=F64),
        **changes,
    }


def converted(scene: Scene, dtype: torch.dtype) -> Scene:
    return {name: t.to(dtype) for name, t in scene.items()}


def gradients(
    render: Render, scene: Scene, names: tuple[str, ...] = LEAVES, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Picture, alphas, and the gradients of a sum that weighs every number of both differently."""
    leaves = {name: t.detach().clone().requires_grad_(name in names) for name, t in scene.items()}
    picture, alpha, _ = render(**leaves, **options)
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=g, dtype=F64).to(t.dtype) for t in (picture, alpha)]
    loss = (picture * weights[0]).sum() + (alpha * weights[1]).sum()
    found = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True, materialize_grads=True)
    return picture.detach(), alpha.detach(), dict(zip(names, found, strict=True))


def native(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return rasterization_convex(**arguments, backend="cpp")


def in_torch(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return rasterization_convex(**arguments, backend="torch")


def by_closed_forms(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return rasterization_convex(**arguments)


@contextlib.contextmanager
def closed_forms() -> Iterator[None]:
    """Within the block the ops are what they are where there is no library: PyTorch, called by the dispatcher."""
    names = ("convex_project", "convex_project_bwd", "convex_isect", "convex_raster", "convex_raster_bwd")
    ops = {name: getattr(eager, name) for name in names}
    with registered(ops | {"sh_eval": sh.sh_formula, "sh_eval_bwd": sh._formula_gradients}):
        yield


def assert_within(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the largest entry of what is expected."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    largest = expected.abs().max().item() if expected.numel() else 0.0
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * largest, f"{what}: {error:.2e} of {largest:.2e}"  # NaN is not
