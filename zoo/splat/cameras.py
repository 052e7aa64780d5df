"""Pinhole cameras: world to camera matrices with OpenCV axes (x right, y down, z forward) and intrinsics in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Scene extent over the largest distance of a camera from the mean camera, as 3D Gaussian splatting has it.
_EXTENT = 1.1

Vector = Tensor | Sequence[float]


def look_at(eye: Vector, target: Vector = (0.0, 0.0, 0.0), up: Vector = (0.0, 0.0, 1.0)) -> Tensor:
    """World to camera matrix of a camera at `eye` that sees `target` in the middle of its picture.

    Args:
        eye: [..., 3] position of the camera, world coordinates.
        target: [..., 3] what it looks at, broadcast against `eye`.
        up: [..., 3] world direction that points upwards in the picture; it need not be perpendicular or of unit length.

    Returns:
        [..., 4, 4] world to camera, OpenCV axes, on the device of the tensors among the arguments and in their type;
        float32 when there is none.

    Raises:
        ValueError: if a vector has no last axis of 3, `target` is `eye`, or `up` points along the view.
    """
    given = [value for value in (eye, target, up) if isinstance(value, Tensor)]
    dtype = torch.float32
    if given:
        dtype = given[0].dtype
        for value in given[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
    device = given[0].device if given else None
    vectors = []
    for name, value in {"eye": eye, "target": target, "up": up}.items():
        vector = torch.as_tensor(value, dtype=dtype, device=device)
        if vector.ndim < 1 or vector.shape[-1] != 3:
            raise ValueError(f"look_at: {name} must be [..., 3], got {list(vector.shape)}; pass x, y and z")
        vectors.append(vector)
    eye, target, up = torch.broadcast_tensors(*vectors)
    forward = target - eye
    distance = forward.norm(dim=-1, keepdim=True)
    if not bool((distance > 0).all()):
        raise ValueError("look_at: target must differ from eye, got the same point; move one of them")
    forward = forward / distance
    right = torch.linalg.cross(forward, up / up.norm(dim=-1, keepdim=True))
    sine = right.norm(dim=-1, keepdim=True)
    if not bool((sine > 8 * torch.finfo(dtype).eps).all()):  # up = 0 divides to nan and fails here, too
        raise ValueError("look_at: up must not be zero or point along the view, but it does; pass another up")
    right = right / sine
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], -2)
    return _rigid(rotation, -(rotation @ eye[..., None])[..., 0])


def orbit(
    n: int,
    radius: float | Tensor,
    elevation: float | Tensor,
    target: Vector = (0.0, 0.0, 0.0),
    *,
    azimuth: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cameras on a sphere around a point that look at its centre; world z is up.

    Camera i stands at target + radius (cos e cos a, cos e sin a, sin e), e its elevation and a its azimuth.

    Args:
        n: number of cameras V.
        radius: distance from `target`, one for all or [V].
        elevation: angle above the horizontal plane in radians, inside (-pi/2, pi/2), one for all or [V].
        target: [3] what they look at.
        azimuth: [V] angles from world x towards world y in radians; None takes 2 pi i / n.
        device, dtype: of the result; dtype None is the one of `azimuth`, or else torch's default.

    Returns:
        [V, 4, 4] world to camera, OpenCV axes.

    Raises:
        ValueError: if `n` is below 1, `azimuth` does not hold n angles, a radius is not positive, or a camera stands
            above or below the target.
    """
    if n < 1:
        raise ValueError(f"orbit: n must be at least 1, got {n}; ask for a camera or more")
    if azimuth is None:
        dtype = dtype or torch.get_default_dtype()
        azimuth = torch.arange(n, device=device, dtype=dtype) * (2 * math.pi / n)
    if tuple(azimuth.shape) != (n,):
        raise ValueError(
            f"orbit: azimuth must hold one angle a camera, [{n}], got {list(azimuth.shape)}; pass n angles"
        )
    azimuth = azimuth.to(device=device, dtype=dtype)
    radius = torch.as_tensor(radius, dtype=azimuth.dtype, device=azimuth.device).expand(n)
    elevation = torch.as_tensor(elevation, dtype=azimuth.dtype, device=azimuth.device).expand(n)
    if not bool((radius > 0).all()):
        raise ValueError(f"orbit: radius must be positive, got {float(radius.min())}; move the cameras off the target")
    if not bool((elevation.abs() < math.pi / 2).all()):
        raise ValueError(
            f"orbit: elevation must lie inside (-pi/2, pi/2) radians, got {float(elevation.abs().max())}; use look_at"
            " with an up of its own to look straight down"
        )
    flat = elevation.cos()
    direction = torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], -1)
    centre = torch.as_tensor(target, dtype=azimuth.dtype, device=azimuth.device)
    return look_at(centre + radius[:, None] * direction, centre)


def intrinsics(
    focal: float | Tensor,
    width: int,
    height: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Intrinsics of a camera with square pixels that looks through the middle of its picture.

    Args:
        focal: focal length in pixels, one or [...] for a batch.
        width, height: size of the picture in pixels.
        device, dtype: of the result; None takes those of a tensor `focal`, or else torch's defaults.

    Returns:
        [..., 3, 3] pixels: fx = fy = focal, cx = width / 2, cy = height / 2. The centre of the pixel in row i and
        column j is (j + 0.5, i + 0.5).

    Raises:
        ValueError: if a focal length or a side is not positive.
    """
    if width < 1 or height < 1:
        raise ValueError(f"intrinsics: width and height must be at least 1, got {width} and {height}; pass pixels")
    if not isinstance(focal, Tensor):
        dtype = dtype or torch.get_default_dtype()
    focal = torch.as_tensor(focal, dtype=dtype, device=device)
    if not bool((focal > 0).all()):
        raise ValueError(f"intrinsics: focal must be positive, got {float(focal.min())}; pass it in pixels")
    K = focal.new_zeros(*focal.shape, 3, 3)
    K[..., 0, 0] = K[..., 1, 1] = focal
    K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = width / 2, height / 2, 1
    return K


def resize_intrinsics(Ks: Tensor, width: int, height: int, new_width: int, new_height: int) -> Tensor:
    """Intrinsics of the same cameras after their pictures were resized.

    The two axes are scaled on their own, because sides are rounded to whole pixels; with pixel centres at halves there
    is no shift.

    Args:
        Ks: [..., 3, 3] intrinsics of pictures of width x height pixels.
        width, height: size they belong to.
        new_width, new_height: size after resizing.

    Returns:
        [..., 3, 3] intrinsics of pictures of new_width x new_height pixels.

    Raises:
        ValueError: if a side is below 1.
    """
    if min(width, height, new_width, new_height) < 1:
        sizes = f"{width} x {height} and {new_width} x {new_height}"
        raise ValueError(f"resize_intrinsics: sides must be at least 1, got {sizes}; pass pixels")
    return Ks * Ks.new_tensor([new_width / width, new_height / height, 1])[:, None]


def camera_positions(viewmats: Tensor) -> Tensor:
    """Where cameras stand, -R^T t.

    Args:
        viewmats: [..., 4, 4] world to camera.

    Returns:
        [..., 3] world coordinates.
    """
    return -(viewmats[..., :3, 3:].mT @ viewmats[..., :3, :3])[..., 0, :]


def scene_extent(viewmats: Tensor) -> Tensor:
    """Size of a scene as its cameras tell it: 1.1 x the largest distance of one from their mean position.

    Args:
        viewmats: [..., V, 4, 4] world to camera, of the training views.

    Returns:
        [...] world units; 0 for a single camera.

    Raises:
        ValueError: if there is no camera.

    Source:
        Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023, arXiv:2308.04079, as in the
        authors' code; Held et al., "3D Convex Splatting", 2025, arXiv:2411.14974, keeps it.
    """
    if viewmats.ndim < 3 or not viewmats.shape[-3]:
        raise ValueError(
            f"scene_extent: viewmats must be [..., V, 4, 4] with V >= 1, got {list(viewmats.shape)}; add one"
        )
    positions = camera_positions(viewmats)
    return _EXTENT * (positions - positions.mean(-2, keepdim=True)).norm(dim=-1).amax(-1)


def project_points(points: Tensor, viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
    """Where points appear: (fx x / z + cx, fy y / z + cy), x, y and z in camera coordinates.

    Args:
        points: [..., N, 3] world coordinates.
        viewmats: [..., 4, 4] world to camera, OpenCV axes; batch axes broadcast against those of `points`.
        Ks: [..., 3, 3] pixels; without skew.

    Returns:
        Places [..., N, 2] in pixels, across and down, and depths z [..., N]; a place means nothing where z <= 0.
    """
    camera = points @ viewmats[..., :3, :3].mT + viewmats[..., None, :3, 3]
    depth = camera[..., 2]
    focal, centre = torch.diagonal(Ks, dim1=-2, dim2=-1)[..., None, :2], Ks[..., None, :2, 2]
    return camera[..., :2] / depth[..., None] * focal + centre, depth


def camera_rays(pixels: Tensor, viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
    """Rays through places of a picture, in world coordinates; the inverse of :func:`project_points`.

    Args:
        pixels: [..., N, 2] places in pixels, across and down; pixel centres lie at halves.
        viewmats: [..., 4, 4] world to camera, OpenCV axes; batch axes broadcast against those of `pixels`.
        Ks: [..., 3, 3] pixels; without skew.

    Returns:
        Origins [..., 3] and directions [..., N, 3], scaled so that origin + z direction has the depth z.
    """
    focal, centre = torch.diagonal(Ks, dim1=-2, dim2=-1)[..., None, :2], Ks[..., None, :2, 2]
    flat = (pixels - centre) / focal
    directions = torch.cat([flat, torch.ones_like(flat[..., :1])], -1) @ viewmats[..., :3, :3]
    return camera_positions(viewmats), directions


def _rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """[..., 4, 4] from [..., 3, 3] and [..., 3]."""
    top = torch.cat([rotation, translation[..., None]], -1)
    bottom = top.new_tensor([0, 0, 0, 1]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], -2)
