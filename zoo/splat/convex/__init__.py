"""3D convex splatting (Held et al. 2025, arXiv:2411.14974)."""

from .geometry import convex_hull_2d, convex_init_from_points, convex_normals
from .model import ConvexModel
from .rendering import rasterization_convex

__all__ = ["ConvexModel", "convex_hull_2d", "convex_init_from_points", "convex_normals", "rasterization_convex"]
