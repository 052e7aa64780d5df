"""A few soft convexes before a camera, for tests in which every pixel counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.splat.convex.reference import rasterization_convex_reference

F64 = torch.float64
Scene = dict[str, Tensor]


def soft_scene(seed: int = 0, n: int = 4, k: int = 6, cameras: int = 1, coefficients: int = 0) -> Scene:
    """Soft convexes about 5 in front of cameras that look along z, a little apart and turned."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=g, dtype=F64)

    centres = uniform(n, 1, 3, low=-0.8, high=0.8) + torch.tensor([0.0, 0.0, 5.0], dtype=F64)
    viewmats = torch.eye(4, dtype=F64).repeat(cameras, 1, 1)
    viewmats[:, :3, :3] = random_rotation(g, cameras, angle=0.1)
    viewmats[:, :3, 3] = uniform(cameras, 3, low=-0.2, high=0.2)
    return {
        "points": centres + 0.6 * torch.randn(n, k, 3, generator=g, dtype=F64),
        "delta": uniform(n, low=0.05, high=0.3),
        "sigma": uniform(n, low=0.02, high=0.1),
        "opacities": uniform(n, low=0.3, high=0.9),
        "colors": uniform(n, coefficients, 3, low=-0.4) if coefficients else uniform(n, 3),
        "viewmats": viewmats,
        "Ks": torch.tensor([[14.0, 0, 7], [0, 15, 6.2], [0, 0, 1]], dtype=F64).repeat(cameras, 1, 1),
        "backgrounds": uniform(cameras, 3),
    }


def random_rotation(g: torch.Generator, n: int, angle: float) -> Tensor:
    skew = angle * torch.randn(n, 3, 3, generator=g, dtype=F64)
    return torch.linalg.matrix_exp(skew - skew.mT)


def render(scene: Scene, width: int = 14, height: int = 12, **options: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return rasterization_convex_reference(**scene, width=width, height=height, **options)
