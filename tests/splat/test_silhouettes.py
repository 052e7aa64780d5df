"""Hard convexes against ray-traced solids, and pictures of one scene at several resolutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.splat.scenes import F64, Scene, converted, crowd, native
from tests.splat.soft_scene import random_rotation
from zoo.data.scenes import Solid, box, octahedron, tetrahedron, trace
from zoo.splat.cameras import intrinsics

POSES = 50
SOLIDS: dict[str, Solid] = {
    "cube": box([0.7, 0.7, 0.7], [1.0, 1.0, 1.0]),
    "tetrahedron": tetrahedron(1.1, [1.0, 1.0, 1.0]),
    "octahedron": octahedron(1.1, [1.0, 1.0, 1.0]),
}


def _poses(size: int) -> tuple[Tensor, Tensor]:
    """Cameras [V, 4, 4] around the origin, turned in any way, about 4 away; intrinsics [V, 3, 3]."""
    g = torch.Generator().manual_seed(4)
    viewmats = torch.eye(4, dtype=F64).repeat(POSES, 1, 1)
    viewmats[:, :3, :3] = random_rotation(g, POSES, angle=2.0)
    viewmats[:, :3, 3] = torch.tensor([0.0, 0, 4.0]) + 0.1 * torch.randn(POSES, 3, generator=g, dtype=F64)
    return viewmats, intrinsics(size * 1.1, size, size, dtype=F64).expand(POSES, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", SOLIDS)
def test_hard_convexes_are_solids(name: str, dtype: torch.dtype) -> None:
    solid, size = SOLIDS[name], 256
    viewmats, Ks = _poses(size)
    assert len(solid.vertices) == {"cube": 8, "tetrahedron": 4, "octahedron": 6}[name]
    _, coverage = trace([solid], viewmats, Ks, size, size)
    scene = {
        "points": solid.vertices[None],
        "delta": torch.tensor([50.0], dtype=F64),
        "sigma": torch.tensor([50.0], dtype=F64),
        "opacities": torch.tensor([0.99], dtype=F64),  # 0.495 at the edge
        "colors": torch.ones(1, 1, dtype=F64),
        "viewmats": viewmats,
        "Ks": Ks,
    }
    with torch.no_grad():
        _, alpha, _ = native(**converted(scene, dtype), width=size, height=size)
    found, wanted = alpha[..., 0] > 0.495, coverage > 0.5
    assert (wanted.sum((1, 2)) > 5000).all()
    assert not wanted[:, 0].any()  # all of it is in the picture
    overlap = (found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2))
    assert overlap.min() >= 0.9999, overlap.min()


# Resolution


def _soft_crowd(size: int) -> Scene:
    """400 convexes of the same kind at any resolution."""
    scene = crowd(400, cameras=1, size=(128, 128), arm=0.08, seed=5, nearest=2.5)
    scene["delta"] *= 0.5
    scene["sigma"] *= 0.15
    scene["Ks"][:, :2] *= size / 128
    return converted(scene, torch.float32)


def _psnr(size: int, reference_focal: float | None) -> float:
    def picture(width: int) -> Tensor:
        with torch.no_grad():
            options = {"reference_focal": reference_focal, "width": width, "height": width}
            return native(**_soft_crowd(width), **options)[0].movedim(-1, 1)

    large, small = sorted((size, 128), reverse=True)
    error = F.avg_pool2d(picture(large), large // small) - picture(small)
    return -10 * math.log10(error.square().mean().item())


def test_a_reference_focal_length_makes_pictures_of_any_size_the_same() -> None:
    focal = math.sqrt(1.1 * 1.05) * 128
    with_focal = {size: _psnr(size, focal) for size in (64, 256, 512)}
    published = {size: _psnr(size, None) for size in (64, 256, 512)}
    assert with_focal[256] >= 45
    assert published[256] <= 30
    for size in (64, 512):
        assert with_focal[size] >= published[size] + 15
