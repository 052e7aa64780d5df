"""Scenes to fit a splatting model to: pictures with their cameras, made by formula."""

from .base import Scene, Views
from .module import SceneModule, ViewBatches, ViewLoader
from .planar import PlanarPicture, planar_picture
from .procedural import RADIUS_RANGE, ProceduralScene, boxes, orbit_cameras, random_solids
from .solids import Solid, box, intersect, octahedron, prism, rotation_z, sample_surface, tetrahedron, trace

__all__ = [
    "RADIUS_RANGE",
    "PlanarPicture",
    "ProceduralScene",
    "Scene",
    "SceneModule",
    "Solid",
    "ViewBatches",
    "ViewLoader",
    "Views",
    "box",
    "boxes",
    "intersect",
    "octahedron",
    "orbit_cameras",
    "planar_picture",
    "prism",
    "random_solids",
    "rotation_z",
    "sample_surface",
    "tetrahedron",
    "trace",
]
