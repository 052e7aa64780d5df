"""What every kind of scene is turned into: pictures with their cameras, and points to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import DataError
from ...splat.cameras import scene_extent

_ORTHONORMAL = 1e-3  # how far the rotation of a camera may be off one: files carry few digits
_LISTED = 5  # indexes that a message names at most


@dataclass(frozen=True, eq=False)
class Scene:
    """Pictures of one place, the cameras that took them, and points of its surface.

    Read a picture by :meth:`image` or :meth:`view` and its size by :meth:`size`: whether the pictures are held or lie
    on disk is the scene's affair, and a loader of files may let their sizes differ.

    Attributes:
        images: [V, H, W, 3] pictures, uint8, or floating point in [0, 1].
        viewmats: [V, 4, 4] world to camera, OpenCV axes.
        Ks: [V, 3, 3] pixels.
        points: [P, 3] places on surfaces, world coordinates; P is at least 1.
        colors: [P, 3] their colours in [0, 1].
        train: the views to train on.
        test: the views to judge by; they may be training views, where a picture is all there is to fit.
        names: one a view, for files and logs; "view_000" and so on if empty.
        extent: size of the scene in world units; 0 takes :func:`zoo.splat.cameras.scene_extent` of the training views,
            which is 0 for a single one.
        background: colour behind everything, if it is known; None for photographs.

    Raises:
        DataError: if shapes or types are others, numbers are not finite or out of range, a view's matrix is no rigid
            motion, a focal length is not positive, or `train` or `test` names views that are not there.
    """

    images: Tensor
    viewmats: Tensor
    Ks: Tensor
    points: Tensor
    colors: Tensor
    train: tuple[int, ...]
    test: tuple[int, ...]
    names: tuple[str, ...] = ()
    extent: float = 0.0
    background: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        _check_images(self.images)
        views = len(self.images)
        object.__setattr__(self, "train", tuple(self.train))
        object.__setattr__(self, "test", tuple(self.test))
        object.__setattr__(self, "names", tuple(self.names) or tuple(f"view_{i:03d}" for i in range(views)))
        _check_cameras(self.viewmats, self.Ks, views)
        _check_points(self.points, self.colors)
        _check_views("train", self.train, views)
        _check_views("test", self.test, views)
        if not self.train:
            raise DataError("Scene: train must name a view or more, got none; pass indexes of views")
        if len(self.names) != views:
            raise DataError(f"Scene: names must hold one a view, {views}, got {len(self.names)}; or pass none")
        if self.background is not None and not _are_colors(self.background):
            raise DataError(f"Scene: background must be 3 numbers in [0, 1] or None, got {self.background}; pass RGB")
        if not 0 <= self.extent < float("inf"):
            raise DataError(f"Scene: extent must be finite and not negative, got {self.extent}; 0 measures the cameras")
        if not self.extent:
            object.__setattr__(self, "extent", float(scene_extent(self.viewmats[list(self.train)])))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        height, width = self.images.shape[1:3]
        return (
            f"Scene(views={len(self)}, train={len(self.train)}, test={len(self.test)}, width={width}, height={height},"
            f" points={len(self.points)}, extent={self.extent:.4g})"
        )

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a view's picture in pixels."""
        return int(self.images[index].shape[0]), int(self.images[index].shape[1])

    def image(self, index: int) -> Tensor:
        """Picture of a view, float32 [H, W, 3] in [0, 1]."""
        image = self.images[index]
        return image.float() / 255 if image.dtype == torch.uint8 else image.float()

    def view(self, index: int) -> dict[str, Tensor]:
        """What a batch holds of a view: image [H, W, 3], viewmat [4, 4], K [3, 3], all float32, and index, int64 []."""
        return {
            "image": self.image(index),
            "viewmat": self.viewmats[index].float(),
            "K": self.Ks[index].float(),
            "index": torch.tensor(index),
        }


class Views(Dataset[dict[str, Tensor]]):
    """Some views of a scene, as :meth:`Scene.view` gives them.

    Args:
        scene: where they are from.
        indexes: which views, in order.
    """

    def __init__(self, scene: Scene, indexes: Sequence[int]) -> None:
        self.scene, self.indexes = scene, tuple(indexes)

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.scene.view(self.indexes[index])


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _are_colors(values: Tensor | Sequence[float]) -> bool:
    values = torch.as_tensor(values)
    return values.shape[-1:] == (3,) and bool(((values >= 0) & (values <= 1)).all())  # false for nan, too


def _check_images(images: Tensor) -> None:
    kind = isinstance(images, Tensor) and (images.is_floating_point() or images.dtype == torch.uint8)
    if not kind or images.ndim != 4 or images.shape[-1] != 3 or not images.numel():
        raise DataError(
            f"Scene: images must be [V, H, W, 3], uint8 or floating point, got {_described(images)}; put colours last"
        )
    if images.is_floating_point() and not _are_colors(images):
        low, high = (float(value) for value in images.aminmax())
        raise DataError(f"Scene: images must lie in [0, 1], got {low:.4g} to {high:.4g}; scale or clip them")


def _check_cameras(viewmats: Tensor, Ks: Tensor, views: int) -> None:
    for name, value, side in (("viewmats", viewmats, 4), ("Ks", Ks, 3)):
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape == (views, side, side)
        if not fits:
            wanted = f"floating point [{views}, {side}, {side}]"
            raise DataError(f"Scene: {name} must be {wanted}, got {_described(value)}; pass a matrix a view")
    rotation = viewmats[:, :3, :3].double()
    off = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64, device=rotation.device)).abs().amax((1, 2))
    last = viewmats[:, 3] == viewmats.new_tensor([0, 0, 0, 1])
    good = (off < _ORTHONORMAL) & (torch.linalg.det(rotation) > 0) & last.all(1) & viewmats.isfinite().all((1, 2))
    if not bool(good.all()):
        raise DataError(
            f"Scene: viewmats must be rigid motions, world to camera, but that of view {int(good.int().argmin())} is"
            " not; pass rotations without scale or mirroring over a last row of 0, 0, 0, 1"
        )
    focal = torch.diagonal(Ks, dim1=1, dim2=2)[:, :2]
    good = (focal > 0).all(1) & Ks.isfinite().all((1, 2))
    if not bool(good.all()):
        bad = int(good.int().argmin())
        raise DataError(
            f"Scene: Ks must have positive focal lengths, got {focal[bad].tolist()} for view {bad}; pass pixels"
        )


def _check_points(points: Tensor, colors: Tensor) -> None:
    for name, value in (("points", points), ("colors", colors)):
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 2 and value.shape[1] == 3
        if not fits or not len(value):
            raise DataError(
                f"Scene: {name} must be floating point [P, 3] with P >= 1, got {_described(value)}; draw random"
                " points if there are none"
            )
    if len(points) != len(colors):
        raise DataError(f"Scene: colors must be one a point, {len(points)}, got {len(colors)}; pass as many of both")
    if not bool(points.isfinite().all()):
        raise DataError("Scene: points must be finite, but some are not; leave those out")
    if not _are_colors(colors):
        raise DataError("Scene: colors must lie in [0, 1], but some do not; divide bytes by 255")


def _check_views(name: str, indexes: tuple[int, ...], views: int) -> None:
    bad = [index for index in indexes if not 0 <= index < views]
    if bad:
        raise DataError(f"Scene: {name} must name views 0 to {views - 1}, got {bad[:_LISTED]}; leave those out")
    if len(set(indexes)) < len(indexes):
        raise DataError(f"Scene: {name} must name each view once, got {len(indexes) - len(set(indexes))} twice or more")
