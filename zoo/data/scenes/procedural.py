"""Scenes of plain solids, traced ray by ray: no files, and a ground truth that owes nothing to any renderer."""

from __future__ import annotations

import hashlib
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import DataError
from ...splat.cameras import intrinsics, orbit
from .base import Scene
from .module import SceneModule
from .solids import Solid, box, octahedron, prism, rotation_z, sample_surface, tetrahedron, trace

SceneName = Literal["boxes", "solids"]
Background = Literal["white", "black"]

BACKGROUNDS: dict[str, tuple[float, float, float]] = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}

# What the neighbour distance r of a starting point is clamped to, before the factor of the primitive (1.2 for
# convexes, 0.6 for Gaussians): two points may fall close together, and a lonely one may be far from all others.
RADIUS_RANGE = (0.08, 0.5)

_DISTANCE = 3.2  # of the cameras from the origin
_FOCAL = 1.3  # over the width of the picture
_ELEVATION = (0.25, 0.95)  # radians
_SLAB_TOP = -0.69  # both scenes stand on the same slab, 2.2 wide
_REACH = 0.95  # how far from the axis a random solid may reach
_TRIES = 2000  # places tried for one random solid


def boxes() -> list[Solid]:
    """Two turned boxes above a slab, coloured by axis: the scene of the small recipe, always the same."""
    red_green_blue = [[0.9, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.3, 0.9]]
    yellow_cyan_violet = [[0.95, 0.85, 0.2], [0.2, 0.8, 0.85], [0.8, 0.3, 0.8]]
    return [
        box((0.45, 0.35, 0.5), red_green_blue).moved((-0.5, -0.3, -0.2), rotation_z(0.4)),
        box((0.3, 0.4, 0.3), yellow_cyan_violet).moved((0.5, 0.4, 0.1), rotation_z(-0.7)),
        _slab(),
    ]


def random_solids(seed: int = 0, count: int = 9) -> list[Solid]:
    """Tetrahedra, prisms, boxes and octahedra in turn, of random sizes, directions and colours, beside each other
    on a slab.

    Args:
        seed: seed of the scene.
        count: solids on the slab.

    Returns:
        The solids, then the slab.

    Raises:
        DataError: if `count` is below 1.
    """
    if count < 1:
        raise DataError(f"random_solids: count must be at least 1, got {count}")
    generator = _generator(seed, "solids")
    solids, places = [], torch.empty(0, 3, dtype=torch.float64)  # x, y and radius
    for kind in range(count):
        u = torch.rand(4, generator=generator, dtype=torch.float64)
        # The more solids, the smaller, so that they cover about the same part of the slab.
        radius = float(0.6 + 0.5 * u[0]) / math.sqrt(count + 2)
        while (place := _free_place(places, radius, generator)) is None:
            radius *= 0.9
        places = torch.cat([places, torch.tensor([[*place, radius]], dtype=torch.float64)])
        solid = _random_solid(kind % 4, radius, u[1:], generator)
        lift = _SLAB_TOP - float(solid.vertices[:, 2].min())
        angle = 2 * math.pi * float(u[3])
        solids.append(solid.moved((0, 0, lift)).moved((*place, 0), rotation_z(angle)))
    return [*solids, _slab()]


def orbit_cameras(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cameras around the origin at random heights, one in each n-th of the circle.

    Args:
        n: number of cameras V.
        size: width and height of their pictures in pixels.
        generator: source of the random numbers.

    Returns:
        [V, 4, 4] world to camera, and [V, 3, 3] intrinsics, both float64. Distance 3.2; azimuth 2 pi (i + U) / n and
        elevation 0.25 + 0.7 U with uniform U of their own; focal length 1.3 x width.
    """
    u = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    azimuth = 2 * math.pi * (torch.arange(n) + u[:, 0]) / n
    low, high = _ELEVATION
    viewmats = orbit(n, _DISTANCE, low + (high - low) * u[:, 1], azimuth=azimuth)
    K = intrinsics(_FOCAL * size, size, size, dtype=torch.float64)
    return viewmats, K.repeat(n, 1, 1)


class ProceduralScene(SceneModule):
    """Ray-traced pictures of plain solids from a ring of cameras, to fit and to judge a splatting model by.

    "boxes" holds two turned boxes above a slab and is the same for every seed; "solids" holds nine tetrahedra, prisms,
    boxes and octahedra on a slab, which the seed chooses. World z is up. Training and test cameras, points and solids
    draw from random streams of their own: changing the number of one changes none of the others.

    The points of the scene lie on random faces, with their colours; bottoms and places inside another solid are left
    out. A model that starts from them should clamp the distances between neighbours to `RADIUS_RANGE`.

    Batches are those of :class:`zoo.data.scenes.SceneModule`: dictionaries of image, viewmat, K and index.

    Args:
        scene: "boxes" or "solids".
        size: width and height in pixels.
        views: training views.
        test_views: views to validate and test on, from a ring of their own.
        supersample: rays along each side of a pixel.
        num_points: points of the surface.
        background: "white" or "black".
        batch_size: training views a batch and process.
        steps_per_epoch: training batches an epoch; it does not end with the views, see the base class.
        seed: seed of cameras, points and solids, and of the training order.
        num_workers: loader processes.

    Raises:
        DataError: if an argument is out of range.

    Example:
        >>> from zoo.data import ProceduralScene
        >>> data = ProceduralScene(size=16, views=4, test_views=2)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["viewmat"].shape, batch["K"].shape
        (torch.Size([1, 16, 16, 3]), torch.Size([1, 4, 4]), torch.Size([1, 3, 3]))
    """

    def __init__(
        self,
        scene: SceneName = "boxes",
        size: int = 64,
        views: int = 20,
        test_views: int = 8,
        supersample: int = 4,
        num_points: int = 24,
        background: Background = "white",
        batch_size: int = 1,
        steps_per_epoch: int = 100,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, steps_per_epoch, seed, num_workers)
        self._check_at_least(1, size=size, views=views, test_views=test_views)
        self._check_at_least(1, supersample=supersample, num_points=num_points)
        if scene not in get_args(SceneName):
            raise DataError(f"ProceduralScene: scene must be one of {', '.join(get_args(SceneName))}, got {scene!r}")
        if background not in BACKGROUNDS:
            raise DataError(f"ProceduralScene: background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
        self.scene_name, self.size, self.views, self.test_views = scene, size, views, test_views
        self.supersample, self.num_points, self.background = supersample, num_points, background

    def _build(self) -> Scene:
        solids = boxes() if self.scene_name == "boxes" else random_solids(self.seed)
        rings = {"train": self.views, "test": self.test_views}
        cameras = [orbit_cameras(n, self.size, _generator(self.seed, name)) for name, n in rings.items()]
        viewmats, Ks = (torch.cat(parts) for parts in zip(*cameras, strict=True))
        color = BACKGROUNDS[self.background]
        images, _ = trace(solids, viewmats, Ks, self.size, self.size, background=color, supersample=self.supersample)
        points, colors = sample_surface(solids, self.num_points, _generator(self.seed, "points"))
        return Scene(
            images=images.float(),
            viewmats=viewmats.float(),
            Ks=Ks.float(),
            points=points.float(),
            colors=colors.float(),
            train=tuple(range(self.views)),
            test=tuple(range(self.views, self.views + self.test_views)),
            names=tuple(f"{name}_{i:03d}" for name, n in rings.items() for i in range(n)),
            background=color,
        )


def _slab() -> Solid:
    return box((1.1, 1.1, 0.06), [[0.55, 0.5, 0.45], [0.5, 0.5, 0.5], [0.75, 0.75, 0.7]]).moved((0, 0, -0.75))


def _generator(seed: int, part: str) -> torch.Generator:
    """Random stream of one part of a scene."""
    digest = hashlib.blake2b(f"{seed} {part}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _free_place(places: Tensor, radius: float, generator: torch.Generator) -> tuple[float, float] | None:
    """Middle of a disc that meets none of the discs [N, 3] and keeps to the slab; the first that fits."""
    reach = _REACH - radius
    tried = (2 * torch.rand(_TRIES, 2, generator=generator, dtype=torch.float64) - 1) * reach
    gap = torch.cdist(tried, places[:, :2]) - places[:, 2] - radius
    free = ((gap > 0).all(1)).nonzero()
    if not len(free):
        return None
    x, y = tried[free[0, 0]].tolist()
    return x, y


def _random_solid(kind: int, radius: float, u: Tensor, generator: torch.Generator) -> Solid:
    """Tetrahedron, prism, box or octahedron about the origin, within `radius` of the z axis."""
    first, second = float(u[0]), float(u[1])
    sides = 3 + int(3 * first)  # of a prism: 3 to 5
    num_colors = (4, 2 + sides, 3, 8)[kind]
    colors = 0.15 + 0.8 * torch.rand(num_colors, 3, generator=generator, dtype=torch.float64)
    if kind == 0:
        return tetrahedron(radius, colors)
    if kind == 1:
        return prism(sides, radius, radius * (0.5 + second), colors)
    if kind == 2:
        angle = math.pi / 4 * (0.7 + 0.6 * first)
        return box((radius * math.cos(angle), radius * math.sin(angle), radius * (0.4 + 0.9 * second)), colors)
    return octahedron(radius, colors)
