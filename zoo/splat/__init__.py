"""Splatting: primitives that are projected, sorted by depth and composited, with gradients to all they are made of."""

from .convex import (
    ConvexModel,
    convex_hull_2d,
    convex_init_from_points,
    convex_normals,
    rasterization_convex,
)
from .sh import spherical_harmonics

__all__ = [
    "ConvexModel",
    "convex_hull_2d",
    "convex_init_from_points",
    "convex_normals",
    "rasterization_convex",
    "spherical_harmonics",
]
