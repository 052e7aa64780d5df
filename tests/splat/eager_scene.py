"""Random scenes for the ops of the convex rasterizer, and the ops one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.splat.convex import eager, reference

F64 = torch.float64
WIDTH, HEIGHT = 22, 17
NEAR = 0.05


class Scene(NamedTuple):
    """B scenes seen by C cameras each; sigmas and opacities one a view, as the ops take them."""

    points: Tensor  # [B, N, K, 3]
    delta: Tensor  # [B, N]
    sigmas: Tensor  # [I, N]
    opacities: Tensor  # [I, N]
    viewmats: Tensor  # [I, 4, 4]
    Ks: Tensor  # [I, 3, 3]
    colors: Tensor  # [I, N, 3]
    backgrounds: Tensor  # [I, 3]

    def leaves(self) -> Scene:
        copies = [t.clone().requires_grad_() for t in self]
        return Scene(*copies)._replace(Ks=self.Ks)

    def to(self, dtype: torch.dtype) -> Scene:
        return Scene(*(t.to(dtype) for t in self))


class Projected(NamedTuple):
    means2d: Tensor
    depths: Tensor
    points2d: Tensor
    lines: Tensor
    sharpness: Tensor
    limits: Tensor
    hull_size: Tensor
    boxes: Tensor
    radii: Tensor


def _uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, dtype=F64)


def random_scene(
    n: int = 8,
    k: int = 6,
    scenes: int = 1,
    cameras: int = 1,
    *,
    distance: float = 4.0,
    size: float = 0.45,
    opacity: tuple[float, float] = (0.2, 0.95),
) -> Scene:
    """Convexes around the origin, cameras around them; `distance` 1 has the near plane cut many of them."""
    images = scenes * cameras
    points = 0.7 * torch.randn(scenes, n, 1, 3, dtype=F64) + size * torch.randn(scenes, n, k, 3, dtype=F64)
    viewmats = torch.eye(4, dtype=F64).repeat(images, 1, 1)
    angles = 0.4 * torch.arange(images) - 0.3
    viewmats[:, 0, 0] = viewmats[:, 2, 2] = angles.cos().to(F64)
    viewmats[:, 0, 2], viewmats[:, 2, 0] = angles.sin().to(F64), -angles.sin().to(F64)
    viewmats[:, 2, 3] = distance
    Ks = torch.tensor([[20.0, 0, 11.5], [0, 21, 8], [0, 0, 1]], dtype=F64).repeat(images, 1, 1)
    shared = (_uniform(0.05, 0.5, scenes, n), _uniform(0.05, 0.8, scenes, n), _uniform(*opacity, scenes, n))
    delta, sigmas, opacities = shared
    of_views = (t.repeat_interleave(cameras, 0) for t in (sigmas, opacities))
    return Scene(points, delta, *of_views, viewmats, Ks, _uniform(0, 1, images, n, 3), _uniform(0, 1, images, 3))


def project(scene: Scene, *, clip: bool = False, reference_focal: float = 0.0, depth_grad: bool = True) -> Projected:
    options = (WIDTH, HEIGHT, NEAR, 1e10, 0.0, reference_focal, clip, depth_grad)
    return Projected(*eager.convex_project(*scene[:3], scene.opacities.detach(), *scene[4:6], *options))


def intersections(seen: Projected, tile_size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    footprint = [t.detach() for t in (seen.means2d, seen.depths, seen.lines, seen.limits)]
    return eager.convex_isect(*footprint, seen.hull_size, seen.boxes, WIDTH, HEIGHT, tile_size)


def raster_arguments(
    scene: Scene, seen: Projected, backgrounds: Tensor | None, absgrad: Tensor | None = None, tile_size: int = 8
) -> tuple[Tensor | None, ...]:
    _, offsets, ids = intersections(seen, tile_size)
    tensors = (seen.means2d, seen.lines, seen.sharpness, scene.opacities, scene.colors, backgrounds, absgrad)
    return (*tensors, seen.limits, seen.hull_size, seen.boxes, offsets, ids)


def render(scene: Scene, tile_size: int = 8, *, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    arguments = raster_arguments(scene, project(scene, clip=clip), scene.backgrounds, None, tile_size)
    return eager.convex_raster(*arguments, WIDTH, HEIGHT, tile_size, True)


def expected_by_formulas(
    scene: Scene, *, clip: bool = False, reference_focal: float = 0.0
) -> tuple[Tensor, Tensor, dict]:
    """Colors [I, H, W, 3], alphas [I, H, W] and what else the formulas find, [I, N, ...]."""
    b, images = len(scene.points), len(scene.viewmats)
    c = images // b
    # The formulas take one sigma and opacity a scene.
    options = {"near_plane": NEAR, "near_mode": "clip" if clip else "cull", "reference_focal": reference_focal or None}
    picture, alpha, meta = reference.rasterization_convex_reference(
        scene.points,
        scene.delta,
        scene.sigmas[::c],
        scene.opacities[::c],
        *(t.unflatten(0, (b, c)) for t in (scene.colors, scene.viewmats, scene.Ks)),
        WIDTH,
        HEIGHT,
        backgrounds=scene.backgrounds.unflatten(0, (b, c)),
        **options,
    )
    meta = {name: t.flatten(0, 1) for name, t in meta.items() if isinstance(t, Tensor)}
    return picture.flatten(0, 1), alpha.flatten(0, 1)[..., 0], meta


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry."""
    assert actual.shape == expected.shape
    assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))
