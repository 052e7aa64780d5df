"""Convex solids with a colour a face, and pictures of them traced ray by ray: ground truth without a renderer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ...splat.cameras import camera_positions, camera_rays, project_points

_RAYS = 2**15  # traced at once: what is held of them fits a cache
_MARGIN = 1e-3  # pixels around the rectangle in which a solid is looked for: far above rounding
_FLAT = 1e-9  # how far a vertex may lie off its face, over the size of the solid
_BOTTOM = -0.9  # a face whose normal has a smaller z is a bottom: cameras above the horizon do not see it

Values = Tensor | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Solid:
    """A convex polytope, by its faces and as the intersection of half spaces n . x <= d. All float64.

    Attributes:
        vertices: [M, 3] corners, world coordinates.
        faces: corners of every face, as indexes into `vertices`, in order around it (either way).
        colors: [F, 3] in [0, 1], one a face; [3] gives all faces the same.
        normals: [F, 3] unit vectors that point outwards; found from the corners.
        offsets: [F] the d above.

    Raises:
        ValueError: if a face is not flat, or the solid is not convex.
    """

    vertices: Tensor
    faces: tuple[tuple[int, ...], ...]
    colors: Tensor
    normals: Tensor = field(init=False)
    offsets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        vertices = torch.as_tensor(self.vertices, dtype=torch.float64)
        colors = torch.as_tensor(self.colors, dtype=torch.float64).expand(len(self.faces), 3)
        a, b, c = (vertices[[face[i] for face in self.faces]] for i in range(3))
        normals = torch.linalg.cross(b - a, c - a)
        normals = normals / normals.norm(dim=-1, keepdim=True)
        outwards = torch.where(((a - vertices.mean(0)) * normals).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        normals = normals * outwards
        offsets = (normals * a).sum(-1)
        for name, value in {"vertices": vertices, "colors": colors, "normals": normals, "offsets": offsets}.items():
            object.__setattr__(self, name, value)
        beyond = vertices @ normals.mT - offsets  # [M, F]
        allowed = _FLAT * float((vertices - vertices.mean(0)).norm(dim=-1).max())
        off = max(float(beyond[list(face), f].abs().max()) for f, face in enumerate(self.faces))
        if not (off <= allowed and bool((beyond <= allowed).all())):
            raise ValueError(
                f"Solid: faces must be flat and the solid convex, got a corner {max(off, float(beyond.max())):.3g} off"
                " a face; list the corners of one plane a face"
            )

    def moved(self, offset: Values = (0.0, 0.0, 0.0), rotation: Tensor | None = None) -> Solid:
        """The solid turned about the origin, then shifted.

        Args:
            offset: [3] shift.
            rotation: [3, 3] rotation matrix, or None for none.

        Returns:
            A new solid with the same colours.
        """
        vertices = self.vertices if rotation is None else self.vertices @ rotation.to(self.vertices).mT
        return Solid(vertices + torch.as_tensor(offset, dtype=torch.float64), self.faces, self.colors)

    def contains(self, points: Tensor) -> Tensor:
        """Which of the points [..., 3] lie strictly inside, bool [...]."""
        return (points.to(self.normals) @ self.normals.mT < self.offsets).all(-1)


def rotation_z(angle: float) -> Tensor:
    """Rotation matrix [3, 3], float64, by an angle in radians about z: x towards y."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)


def box(half_sizes: Sequence[float], colors: Values) -> Solid:
    """Box around the origin.

    Args:
        half_sizes: half the edge along x, y and z.
        colors: [3, 3] one for both faces of each axis x, y, z; or [3] for all.

    Returns:
        Solid whose faces are -x, +x, -y, +y, -z, +z.
    """
    corners = [[sx * half_sizes[0], sy * half_sizes[1], sz * half_sizes[2]]
               for sx in (-1, 1) for sy in (-1, 1) for sz in (-1, 1)]  # fmt: skip
    faces = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))
    by_axis = torch.as_tensor(colors, dtype=torch.float64).expand(3, 3).repeat_interleave(2, 0)
    return Solid(torch.tensor(corners, dtype=torch.float64), faces, by_axis)


def tetrahedron(radius: float, colors: Values) -> Solid:
    """Regular tetrahedron that stands on a face, its corners at `radius` from the origin.

    Args:
        radius: distance of the corners from the origin.
        colors: [4, 3] bottom, then the sides; or [3] for all.
    """
    low, wide = -1 / 3, math.sqrt(8) / 3
    corners = [[wide * math.cos(a), wide * math.sin(a), low] for a in (2 * math.pi * i / 3 for i in range(3))]
    vertices = radius * torch.tensor([*corners, [0, 0, 1]], dtype=torch.float64)
    return Solid(vertices, ((0, 1, 2), (0, 1, 3), (1, 2, 3), (2, 0, 3)), torch.as_tensor(colors, dtype=torch.float64))


def octahedron(radius: float, colors: Values) -> Solid:
    """Regular octahedron with its corners on the axes.

    Args:
        radius: distance of the corners from the origin.
        colors: [8, 3] by the signs of the normal (x, y, z), z changing fastest and - before +; or [3] for all.
    """
    vertices = radius * torch.cat([-torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)])
    faces = tuple((3 * x, 3 * y + 1, 3 * z + 2) for x in (0, 1) for y in (0, 1) for z in (0, 1))
    return Solid(vertices, faces, torch.as_tensor(colors, dtype=torch.float64))


def prism(sides: int, radius: float, half_height: float, colors: Values) -> Solid:
    """Upright prism over a regular polygon.

    Args:
        sides: corners of the polygon, 3 or more.
        radius: their distance from the axis.
        half_height: half the height.
        colors: [2 + sides, 3] bottom, top, then the sides; or [3] for all.

    Raises:
        ValueError: if there are fewer than 3 sides.
    """
    if sides < 3:
        raise ValueError(f"prism: sides must be at least 3, got {sides}; a triangle has the fewest")
    ring = [[radius * math.cos(a), radius * math.sin(a)] for a in (2 * math.pi * i / sides for i in range(sides))]
    corners = [[x, y, z] for z in (-half_height, half_height) for x, y in ring]
    caps = (tuple(range(sides)), tuple(range(sides, 2 * sides)))
    walls = tuple((i, (i + 1) % sides, sides + (i + 1) % sides, sides + i) for i in range(sides))
    vertices = torch.tensor(corners, dtype=torch.float64)
    return Solid(vertices, (*caps, *walls), torch.as_tensor(colors, dtype=torch.float64))


def intersect(solid: Solid, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter a solid: the last half space they enter, if they have left none by then.

    Args:
        solid: convex solid; the origin must lie outside.
        origin: [3] float64, of all rays.
        directions: [R, 3] float64, of any length.

    Returns:
        Distances in units of the direction [R], infinite where a ray misses or the solid lies behind; the faces int64
        [R] that were hit, meaningless on a miss.
    """
    slope = solid.normals @ directions.mT  # [F, R]
    gap = (solid.offsets - solid.normals @ origin)[:, None]
    crossing = gap / slope
    near, face = torch.where(slope < 0, crossing, -math.inf).max(0)
    far = torch.where(slope > 0, crossing, math.inf).amin(0)
    outside = ((slope == 0) & (gap < 0)).any(0)  # parallel to a face, and in front of it
    hit = (near < far) & (near > 0) & ~outside
    return torch.where(hit, near, math.inf), face


def trace(
    solids: Sequence[Solid],
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    background: Sequence[float] = (1.0, 1.0, 1.0),
    supersample: int = 1,
) -> tuple[Tensor, Tensor]:
    """Pictures of opaque solids, each pixel the mean of supersample x supersample rays on a regular grid inside it.

    A ray has the colour of the face that it meets first; there is no light. Rays and hits are float64.

    Args:
        solids: what is there.
        viewmats: [V, 4, 4] world to camera, OpenCV axes.
        Ks: [V, 3, 3] pixels.
        width, height: size in pixels.
        background: colour of a ray that meets nothing, in [0, 1].
        supersample: rays along each side of a pixel; with 1 they pass through the pixel centres.

    Returns:
        Pictures [V, H, W, 3] in [0, 1] and the share of each pixel's rays that met something [V, H, W], both float64.

    Raises:
        ValueError: if `supersample` is below 1, or a camera stands inside a solid.
    """
    if supersample < 1:
        raise ValueError(f"trace: supersample must be at least 1, got {supersample}; 1 means one ray a pixel")
    viewmats, Ks = viewmats.double(), Ks.double()
    for i, solid in enumerate(solids):
        if bool((inside := solid.contains(camera_positions(viewmats))).any()):
            raise ValueError(f"trace: camera {int(inside.int().argmax())} stands inside solid {i}; move it out")
    pictures = viewmats.new_empty(len(viewmats), height, width, 3)
    coverage = viewmats.new_empty(len(viewmats), height, width)
    rows = max(1, _RAYS // (width * supersample**2))
    for first in range(0, height, rows):
        count = min(rows, height - first)
        y = first + (torch.arange(count * supersample, dtype=torch.float64) + 0.5) / supersample
        x = (torch.arange(width * supersample, dtype=torch.float64) + 0.5) / supersample
        pixels = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
        for view in range(len(viewmats)):
            color, hit = _colors(solids, pixels.flatten(0, 1), viewmats[view], Ks[view], background)
            blocks = (count, supersample, width, supersample)
            pictures[view, first : first + count] = color.view(*blocks, 3).mean((1, 3))
            coverage[view, first : first + count] = hit.double().view(*blocks).mean((1, 3))
    return pictures, coverage


def _colors(
    solids: Sequence[Solid], pixels: Tensor, viewmat: Tensor, K: Tensor, background: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Colour [R, 3] that rays through pixels [R, 2] see, and whether they meet a solid, [R]."""
    origin, directions = camera_rays(pixels, viewmat, K)
    nearest = directions.new_full(directions.shape[:1], math.inf)
    color = torch.tensor(list(background), dtype=directions.dtype).repeat(len(directions), 1)
    for solid in solids:
        rays = _rays_near(solid, pixels, viewmat, K)
        distance, face = intersect(solid, origin, directions[rays])
        closer = distance < nearest[rays]
        rays, face = rays[closer], face[closer]
        nearest[rays] = distance[closer]
        color[rays] = solid.colors[face]
    return color, nearest < math.inf


def _rays_near(solid: Solid, pixels: Tensor, viewmat: Tensor, K: Tensor) -> Tensor:
    """Indexes of the pixels [R, 2] within the rectangle that a solid's corners span in the picture."""
    corners, depth = project_points(solid.vertices, viewmat, K)
    if bool((depth <= 0).any()):  # no rectangle holds what reaches behind the camera
        return torch.arange(len(pixels))
    low, high = corners.aminmax(dim=0)
    x, y = pixels.unbind(-1)
    low_x, low_y = (low - _MARGIN).tolist()
    high_x, high_y = (high + _MARGIN).tolist()
    return ((x >= low_x) & (x <= high_x) & (y >= low_y) & (y <= high_y)).nonzero()[:, 0]


def sample_surface(solids: Sequence[Solid], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on what cameras above the horizon may see of solids, with the colour of their face.

    Every face that is not a bottom is as likely as any other, however small, and within a face every place. A point
    inside another solid is drawn again.

    Args:
        solids: what is there.
        count: number of points P.
        generator: source of the random numbers.

    Returns:
        Points [P, 3], world coordinates, and colours [P, 3] in [0, 1], both float64.
    """
    corners, weights, owners = [], [], []
    for index, solid in enumerate(solids):
        for face, loop in enumerate(solid.faces):
            if solid.normals[face, 2] < _BOTTOM:
                continue
            a, *ring = solid.vertices[list(loop)]
            fan = torch.stack([torch.stack([a, b, c]) for b, c in pairwise(ring)])  # [T, 3, 3]
            area = torch.linalg.cross(fan[:, 1] - fan[:, 0], fan[:, 2] - fan[:, 0]).norm(dim=-1)
            corners.append(fan)
            weights.append(area / area.sum())
            owners += [(index, face)] * len(fan)
    triangles, weight, owner = torch.cat(corners), torch.cat(weights), torch.tensor(owners)
    points, chosen, found = [], [], 0
    while found < count:
        drawn = torch.multinomial(weight, count, replacement=True, generator=generator)
        u = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        u = torch.where(u.sum(-1, keepdim=True) > 1, 1 - u, u)  # folds the square onto the triangle
        a, b, c = triangles[drawn].unbind(1)
        place = a + u[:, :1] * (b - a) + u[:, 1:] * (c - a)
        buried = torch.zeros(count, dtype=torch.bool)
        for index, solid in enumerate(solids):
            buried |= solid.contains(place) & (owner[drawn, 0] != index)
        points.append(place[~buried])
        chosen.append(drawn[~buried])
        found += len(points[-1])
    color = torch.stack([solids[index].colors[face] for index, face in owners])
    return torch.cat(points)[:count], color[torch.cat(chosen)[:count]]
