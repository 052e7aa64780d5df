"""Flat pictures of single shapes, for primitives that live in a plane."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import DataError
from ...splat.cameras import intrinsics
from ..shapes import circle_distance, polygon_distance
from .base import Scene
from .module import SceneModule

PlanarShape = Literal["rectangle", "disc", "gaussian", "anisotropic_gaussian", "triangle", "star"]

_START = 0.5  # starting points lie in [-0.5, 0.5]^2
_STD, _LONG_STD, _SHORT_STD, _TILT = 0.3, 0.4, 0.15, math.pi / 6


def _corners(radii: list[float], start: float) -> list[tuple[float, float]]:
    """Corners at equal angles, from `start` on, at the given distances from the middle."""
    angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_RECTANGLE = [(-0.7, -0.4), (0.7, -0.4), (0.7, 0.4), (-0.7, 0.4)]
_TRIANGLE = _corners([0.75] * 3, -math.pi / 2)  # y points down: the tip is on top
_STAR = _corners([0.8, 0.32] * 5, -math.pi / 2)


def _bell(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-(x.square() + y.square()) / (2 * _STD**2))


def _tilted_bell(x: Tensor, y: Tensor) -> Tensor:
    along, across = x * math.cos(_TILT) + y * math.sin(_TILT), y * math.cos(_TILT) - x * math.sin(_TILT)
    return torch.exp(-(along / _LONG_STD).square() / 2 - (across / _SHORT_STD).square() / 2)


# Brightness in [0, 1] at a place of the square [-1, 1]^2, y down.
_BRIGHTNESS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rectangle": lambda x, y: (polygon_distance(x, y, _RECTANGLE) < 0).to(x),
    "disc": lambda x, y: (circle_distance(x, y, 0.65) < 0).to(x),
    "gaussian": _bell,
    "anisotropic_gaussian": _tilted_bell,
    "triangle": lambda x, y: (polygon_distance(x, y, _TRIANGLE) < 0).to(x),
    "star": lambda x, y: (polygon_distance(x, y, _STAR) < 0).to(x),
}


def planar_picture(shape: PlanarShape, size: int = 64, supersample: int = 8) -> Tensor:
    """White shape on black, each pixel the mean of supersample x supersample points on a regular grid inside it.

    In the square [-1, 1]^2, y down: a rectangle of half sides 0.7 and 0.4, a disc of radius 0.65, a Gaussian of
    deviation 0.3, one of 0.4 along 30 degrees and 0.15 across, a triangle of circumradius 0.75 and a star of radii 0.8
    and 0.32, both with a tip on top.

    Args:
        shape: "rectangle", "disc", "gaussian", "anisotropic_gaussian", "triangle" or "star".
        size: width and height in pixels.
        supersample: points along each side of a pixel.

    Returns:
        [size, size, 3] in [0, 1], float64.

    Raises:
        DataError: if there is no such shape, or `size` or `supersample` is below 1.

    Source:
        The targets of Held et al., "3D Convex Splatting: Radiance Field Rendering with 3D Smooth Convexes", 2025,
        arXiv:2411.14974, figures 2, 6 and 12; their sizes are not printed, ours are above.
    """
    if shape not in _BRIGHTNESS:
        raise DataError(f"planar_picture: shape must be one of {', '.join(get_args(PlanarShape))}, got {shape!r}")
    if size < 1 or supersample < 1:
        raise DataError(f"planar_picture: size and supersample must be at least 1, got {size} and {supersample}")
    place = (torch.arange(size * supersample, dtype=torch.float64) + 0.5) * (2 / (size * supersample)) - 1
    y, x = torch.meshgrid(place, place, indexing="ij")
    brightness = _BRIGHTNESS[shape](x, y).view(size, supersample, size, supersample).mean((1, 3))
    return brightness[..., None].expand(-1, -1, 3).contiguous()


class PlanarPicture(SceneModule):
    """One flat picture of a shape, white on black, to be fitted with primitives in the plane z = 1.

    The camera stands at the origin and looks along z; its focal length is half the picture's width, so that the plane
    z = 1 fills the picture with [-1, 1]^2, x to the right and y down. The one view is training and test view, for what
    is asked is how well the primitives can take the shape. The scene's points lie in the plane and are white: the
    origin if there is one, else random places in [-0.5, 0.5]^2. Its extent is 1.

    Batches are those of :class:`zoo.data.scenes.SceneModule`: dictionaries of image, viewmat, K and index.

    Args:
        shape: "rectangle", "disc", "gaussian", "anisotropic_gaussian", "triangle" or "star", as
            :func:`zoo.data.scenes.planar_picture` draws them.
        size: width and height in pixels.
        supersample: points along each side of a pixel.
        num_points: points to start from.
        steps_per_epoch: training batches an epoch, all of the same view.
        seed: seed of the points.
        num_workers: loader processes.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        shape: PlanarShape = "star",
        size: int = 64,
        supersample: int = 8,
        num_points: int = 1,
        steps_per_epoch: int = 100,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(1, steps_per_epoch, seed, num_workers)
        self._check_at_least(1, size=size, supersample=supersample, num_points=num_points)
        if shape not in _BRIGHTNESS:
            raise DataError(f"PlanarPicture: shape must be one of {', '.join(get_args(PlanarShape))}, got {shape!r}")
        self.shape, self.size, self.supersample, self.num_points = shape, size, supersample, num_points

    def _build(self) -> Scene:
        points = torch.tensor([[0.0, 0.0, 1.0]]).repeat(self.num_points, 1)
        if self.num_points > 1:
            generator = torch.Generator().manual_seed(self.seed)
            points[:, :2] = _START * (2 * torch.rand(self.num_points, 2, generator=generator) - 1)
        return Scene(
            images=planar_picture(self.shape, self.size, self.supersample)[None].float(),
            viewmats=torch.eye(4)[None],
            Ks=intrinsics(self.size / 2, self.size, self.size, dtype=torch.float32)[None],
            points=points,
            colors=torch.ones(self.num_points, 3),
            train=(0,),
            test=(0,),
            names=(self.shape,),
            extent=1.0,
            background=(0.0, 0.0, 0.0),
        )
