"""Pictures of plain shapes, made by formula: nothing to download, and boxes that are known exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .loader import eval_loader, train_loader

SPLITS = ("train", "val", "test")
_SMALLEST_CELL = 12  # pixels; with fewer a ring closes and a star is a blob
_CHUNK = 256  # pictures drawn at once: bounds the memory, and fits a cache


def circle_distance(x: Tensor, y: Tensor, radius: float = 1.0, centre: float = 0.0) -> Tensor:
    """Signed distance to a circle around (centre, 0), negative inside."""
    return torch.hypot(x - centre, y) - radius


def polygon_distance(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance to a closed polygon, negative inside by the even-odd rule."""
    nearest = torch.full_like(x, math.inf)  # squared
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp_(0, 1)
        nearest = torch.minimum(nearest, (px - along * ex).square_() + (py - along * ey).square_())
        if ey:  # a ray along x meets no edge that is parallel to it
            inside ^= ((y < ay) != (y < by)) & (px < py * (ex / ey))
    return torch.where(inside, -1.0, 1.0) * nearest.sqrt_()


def _spokes(radii: list[float], start: float) -> list[tuple[float, float]]:
    """Corners at equal angles with the given distances from the centre."""
    angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_SQUARE = _spokes([1.0] * 4, math.pi / 4)
_TRIANGLE = _spokes([1.0] * 3, -math.pi / 2)
_STAR = _spokes([1.0, 0.42] * 5, -math.pi / 2)
_CROSS = [
    (0.3, 0.3), (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3),
    (-0.3, -0.3), (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3),
]  # fmt: skip
_ARROW = [(1.0, 0.0), (0.15, 0.8), (0.15, 0.28), (-0.95, 0.28), (-0.95, -0.28), (0.15, -0.28), (0.15, -0.8)]
_HOURGLASS = [(-0.62, -0.78), (0.62, -0.78), (-0.62, 0.78), (0.62, 0.78)]  # crosses itself at the waist


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(circle_distance(x, y), -circle_distance(x, y, 0.55))


def _frame(x: Tensor, y: Tensor) -> Tensor:
    hole = [(0.55 * a, 0.55 * b) for a, b in _SQUARE]
    return torch.maximum(polygon_distance(x, y, _SQUARE), -polygon_distance(x, y, hole))


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(circle_distance(x, y), -circle_distance(x, y, 0.8, 0.5))


# Class name to signed distance; every shape fits the unit circle. The order is part of the data: append only.
_DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle_distance,
    "square": lambda x, y: polygon_distance(x, y, _SQUARE),
    "triangle": lambda x, y: polygon_distance(x, y, _TRIANGLE),
    "cross": lambda x, y: polygon_distance(x, y, _CROSS),
    "ring": _ring,
    "star": lambda x, y: polygon_distance(x, y, _STAR),
    "frame": _frame,
    "crescent": _crescent,
    "arrow": lambda x, y: polygon_distance(x, y, _ARROW),
    "hourglass": lambda x, y: polygon_distance(x, y, _HOURGLASS),
}
CLASS_NAMES = tuple(_DISTANCE)


class Scene(NamedTuple):
    """What to draw in N pictures of up to M shapes; lengths in pixels, colours in [0, 1]."""

    classes: Tensor  # int64 [N, M], -1 where there is no shape
    centre: Tensor  # [N, M, 2], x and y
    radius: Tensor  # [N, M], of the circle around the shape
    angle: Tensor  # [N, M]
    colour: Tensor  # [N, M, 3]
    background: Tensor  # [N, 3]
    grating: Tensor  # [N, 6], direction, cycles a picture, phase, and an amplitude for each of red, green, blue
    stroke: Tensor  # [N, K, 5], start x and y, direction, length and half width of K lines under the shapes
    stroke_colour: Tensor  # [N, K, 3]


class ShapePictures(Dataset[tuple]):
    """One split of :class:`Shapes`, drawn when it is created and kept at 3 size^2 bytes a picture.

    Args:
        split: "train", "val" or "test".
        length: number of pictures.
        size, num_classes, multi_label, max_objects, rotate, clutter, noise, return_boxes, seed: as in
            :class:`Shapes`.

    Returns:
        Per index, picture and target, and the boxes if asked for, as :class:`Shapes` describes them.
    """

    def __init__(
        self,
        split: str,
        length: int,
        *,
        size: int,
        num_classes: int,
        multi_label: bool,
        max_objects: int,
        rotate: bool,
        clutter: int,
        noise: float,
        return_boxes: bool,
        seed: int,
    ) -> None:
        self.num_classes, self.multi_label, self.return_boxes = num_classes, multi_label, return_boxes
        max_objects = max_objects if multi_label else 1
        self.pictures = torch.empty(length, 3, size, size, dtype=torch.uint8)
        self.classes = torch.empty(length, max_objects, dtype=torch.int64)
        self.boxes = torch.empty(length, max_objects, 4, dtype=torch.int64)
        for start in range(0, length, _CHUNK):
            index = torch.arange(start, min(start + _CHUNK, length))
            sizes = _sizes(max_objects, clutter)
            uniform, normal = _random(split, index, seed, sum(sizes), size if noise else 0)
            scene = _scene(index, uniform.split(sizes, dim=1), size, num_classes, multi_label, rotate)
            picture, self.boxes[index] = draw(scene, size)
            self.pictures[index] = _exposed(picture, noise, normal)
            self.classes[index] = scene.classes

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple:
        picture = self.pictures[index].float() / 255
        classes = self.classes[index]
        if self.multi_label:
            target = torch.zeros(self.num_classes)
            target[classes[classes >= 0]] = 1
        else:
            target = classes[0]
        if self.return_boxes:
            return picture, target, {"boxes": self.boxes[index], "labels": classes}
        return picture, target


class Shapes(L.LightningDataModule):
    """Pictures of plain shapes to classify, and to point at.

    A shape has a random place, size, rotation and colour on a striped background with noise over all; the colours have
    the same distribution in every class, so that only the outline tells it. Shapes of one picture never overlap. A
    picture is a function of (seed, split, index): no number of workers, processes or pictures changes it, and the
    training, validation and test splits share none.

    A batch is `(pictures, targets)`. Pictures are float32 [B, 3, size, size] in [0, 1], not normalised, so that an
    attack can clip them and a heat map be laid over them. Targets are class indices, int64 [B]; with `multi_label` a
    0/1 vector over the classes, float32 [B, num_classes].

    With `return_boxes` a third item holds the M = `max_objects` (1 without `multi_label`) objects a picture:
    `{"boxes": int64 [B, M, 4], "labels": int64 [B, M]}`. A box is (x0, y0, x1, y1) in pixels, half open, tight around
    the pixels that the shape covers by half or more: `picture[:, y0:y1, x0:x1]` is the object. An absent object has the
    label -1 and the empty box (0, 0, 0, 0). There is a box an object and not a class, because a class may appear twice
    in a picture, and a localisation metric has to know whether both were found.

    Args:
        size: height and width in pixels.
        num_classes: the first so many of `CLASS_NAMES`, 2 to 10.
        length: training pictures. Without `multi_label` every split has as many of each class, to within one.
        val_length: validation pictures, and test pictures.
        batch_size: pictures a batch and process.
        multi_label: draw 1 to `max_objects` shapes a picture, each of any class, instead of one.
        max_objects: most shapes in a `multi_label` picture, 1 to 9.
        clutter: thin lines drawn under the shapes to distract, a picture.
        noise: standard deviation of the noise, in units of the full range.
        return_boxes: add boxes and labels of the objects to every batch.
        seed: seed of the pictures and of the training order.
        num_workers: loader processes.
        rotate: turn each shape by any angle, instead of none.

    Raises:
        DataError: if an argument is out of range, or the pictures are too small for so many objects.
    """

    def __init__(
        self,
        size: int = 32,
        num_classes: int = 6,
        length: int = 2000,
        val_length: int = 500,
        batch_size: int = 32,
        multi_label: bool = False,
        max_objects: int = 3,
        clutter: int = 0,
        noise: float = 0.05,
        return_boxes: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rotate: bool = True,
    ) -> None:
        super().__init__()
        at_least_one = {"length": length, "val_length": val_length, "batch_size": batch_size}
        for name, value in at_least_one.items():
            if value < 1:
                raise DataError(f"Shapes: {name} must be at least 1, got {value}")
        for name, value in {"clutter": clutter, "num_workers": num_workers}.items():
            if value < 0:
                raise DataError(f"Shapes: {name} must not be negative, got {value}")
        if not 2 <= num_classes <= len(CLASS_NAMES):
            raise DataError(f"Shapes: num_classes must be 2 to {len(CLASS_NAMES)}, got {num_classes}")
        if not 1 <= max_objects <= 9:
            raise DataError(f"Shapes: max_objects must be 1 to 9, got {max_objects}")
        if not 0 <= noise < math.inf:
            raise DataError(f"Shapes: noise must be finite and not negative, got {noise}")
        _check_room(size, max_objects if multi_label else 1)
        self.class_names = CLASS_NAMES[:num_classes]
        self.size, self.num_classes, self.clutter, self.noise = size, num_classes, clutter, noise
        self.multi_label, self.max_objects, self.return_boxes = multi_label, max_objects, return_boxes
        self.rotate = rotate
        self.lengths = dict(zip(SPLITS, (length, val_length, val_length), strict=True))
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._drawn: dict[str, ShapePictures] = {}

    def setup(self, stage: str | None = None) -> None:
        """Draw the splits that a stage needs, once."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
        for split in SPLITS if stage is None else needed[stage]:
            self.pictures(split)

    def pictures(self, split: str) -> ShapePictures:
        """The pictures of "train", "val" or "test"."""
        if split not in self._drawn:
            self._drawn[split] = ShapePictures(
                split,
                self.lengths[split],
                size=self.size,
                num_classes=self.num_classes,
                multi_label=self.multi_label,
                max_objects=self.max_objects,
                rotate=self.rotate,
                clutter=self.clutter,
                noise=self.noise,
                return_boxes=self.return_boxes,
                seed=self.seed,
            )
        return self._drawn[split]

    def train_dataloader(self) -> DataLoader:
        return train_loader(
            self, self.pictures("train"), batch_size=self.batch_size, seed=self.seed, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        return eval_loader(self, self.pictures("val"), batch_size=self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return eval_loader(self, self.pictures("test"), batch_size=self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def repeated(self, length: int, same: int = 2, others: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of several objects of one class, beside some of other classes: does a heat map find each of them?

        Args:
            length: number of pictures; drawn at once, from random numbers of the test split.
            same: objects of one class, a picture.
            others: objects of any other class.

        Returns:
            Pictures float32 [N, 3, size, size] in [0, 1]; classes int64 [N, M] of the M = same + others objects, those
            that are alike first; their boxes, int64 [N, M, 4].

        Raises:
            DataError: if `same` is below 1 or `others` below 0, or the pictures are too small for so many objects.
        """
        if same < 1 or others < 0:
            raise DataError(f"Shapes: same must be at least 1 and others 0, got {same} and {others}")
        objects = same + others
        _check_room(self.size, objects)
        index, sizes = torch.arange(length), _sizes(objects, self.clutter)
        uniform, normal = _random("test", index, self.seed, sum(sizes), self.size if self.noise else 0)
        parts = uniform.split(sizes, dim=1)
        kind = parts[2]
        asked = (kind[:, :1] * self.num_classes).long()
        other = (asked + 1 + (kind[:, same:] * (self.num_classes - 1)).long()) % self.num_classes
        classes = torch.cat([asked.expand(-1, same), other], 1)
        scene = _scene(index, parts, self.size, self.num_classes, True, self.rotate)._replace(classes=classes)
        picture, boxes = draw(scene, self.size)
        return _exposed(picture, self.noise, normal).float() / 255, classes, boxes


def draw(scene: Scene, size: int) -> tuple[Tensor, Tensor]:
    """Paint scenes.

    Args:
        scene: N pictures of up to M objects.
        size: height and width in pixels.

    Returns:
        Pictures [N, 3, size, size], before clipping to [0, 1], and boxes int64 [N, M, 4]; see :class:`Shapes`.
    """
    pixel = torch.arange(size) + 0.5  # centres
    x, y = pixel, pixel[:, None]
    direction, cycles, phase, amplitude = (part[..., None, None] for part in scene.grating.split([1, 1, 1, 3], dim=1))
    stripes = torch.sin((x * direction.cos() + y * direction.sin()) * cycles * (2 * math.pi / size) + phase)
    picture = scene.background[..., None, None] + amplitude * stripes  # [N, 3, H, W]
    for k in range(scene.stroke.shape[1]):
        start_x, start_y, direction, length, half_width = scene.stroke[:, k, :, None, None].unbind(1)
        cos, sin = direction.cos(), direction.sin()
        along = ((x - start_x) * cos + (y - start_y) * sin).clamp_(torch.zeros_like(length), length)
        distance = torch.hypot(x - start_x - along * cos, y - start_y - along * sin) - half_width
        picture = picture.lerp(scene.stroke_colour[:, k, :, None, None], _share(distance)[:, None])

    cover = torch.zeros(*scene.classes.shape, size, size)  # [N, M, H, W], share of each pixel
    for number, outline in enumerate(_DISTANCE.values()):
        chosen = scene.classes == number
        radius = scene.radius[chosen][:, None, None]
        cos, sin = scene.angle[chosen].cos()[:, None, None], scene.angle[chosen].sin()[:, None, None]
        cx, cy = scene.centre[chosen][..., None, None].unbind(1)
        u = ((x - cx) * cos + (y - cy) * sin) / radius
        v = ((y - cy) * cos - (x - cx) * sin) / radius
        cover[chosen] = _share(outline(u, v) * radius)
    for m in range(cover.shape[1]):
        picture = picture.lerp(scene.colour[:, m, :, None, None], cover[:, m, None])
    return picture, _boxes(cover >= 0.5)


def _exposed(picture: Tensor, noise: float, normal: Tensor) -> Tensor:
    """The picture as it is kept: with noise, clipped, in 256 levels."""
    if noise:
        picture = picture + noise * normal
    return (picture.clamp(0, 1) * 255).round().byte()


def _share(distance: Tensor) -> Tensor:
    """Share of a pixel that an edge at this signed distance, in pixels, leaves inside: linear while it crosses."""
    return (0.5 - distance).clamp_(0, 1)


def _boxes(mask: Tensor) -> Tensor:
    """Half-open (x0, y0, x1, y1) around the pixels of masks [..., H, W]; zeros around none."""
    sides = []
    for line in (mask.any(-2), mask.any(-1)):  # by column, by row
        size = line.shape[-1]
        first, last = line.byte().argmax(-1), size - line.flip(-1).byte().argmax(-1)
        sides.append(torch.stack([first, last], -1) * line.any(-1, keepdim=True))
    return torch.stack(sides, -1).flatten(-2)


def _check_room(size: int, objects: int) -> None:
    if size < (smallest := _cells(objects) * _SMALLEST_CELL):
        raise DataError(f"Shapes: size must be at least {smallest} pixels for {objects} object(s), got {size}")


def _cells(objects: int) -> int:
    """Side of the grid that gives each object a cell of its own."""
    return math.isqrt(objects - 1) + 1


def _sizes(max_objects: int, clutter: int) -> list[int]:
    """How many random numbers each part of a scene takes, in the order in which `_scene` reads them."""
    objects = [1, _cells(max_objects) ** 2, max_objects, 2 * max_objects, max_objects, max_objects, 3 * max_objects]
    return [*objects, 3, 6, 5 * clutter, 3 * clutter]


def _random(split: str, index: Tensor, seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Uniform numbers [N, count] for the scenes of these pictures, and normal ones [N, 3, size, size] for the noise."""
    generator = torch.Generator()
    uniform, normal = torch.empty(len(index), count), torch.empty(len(index), 3, size, size)
    # A generator keeps 32 bits of its seed. Two of them name the split, so that splits can never share a picture; over
    # the others an odd factor spreads the pictures one to one, from a start that depends on the seed.
    high = SPLITS.index(split) << 30
    start = int.from_bytes(hashlib.md5(str(seed).encode(), usedforsecurity=False).digest()[:4], "big")
    for row, i in enumerate(index.tolist()):
        generator.manual_seed(high | (start + i * 0x278DDE6D) % 2**30)
        torch.rand(count, generator=generator, out=uniform[row])
        if size:
            torch.randn(normal.shape[1:], generator=generator, out=normal[row])
    return uniform, normal


def _scene(
    index: Tensor, uniform: tuple[Tensor, ...], size: int, num_classes: int, multi_label: bool, rotate: bool
) -> Scene:
    """Turn uniform numbers, parted by `_sizes`, into scenes."""
    count, order, kind, place, radius, angle, colour, background, grating, stroke, stroke_colour = uniform
    m, side = kind.shape[1], math.isqrt(order.shape[1])
    if multi_label:
        absent = torch.arange(m) > (count * m).long()
        classes = (kind * num_classes).long().masked_fill(absent, -1)
    else:
        # Each run of num_classes pictures has every class once; the shift keeps every n-th picture balanced, too.
        classes = ((index + index // num_classes) % num_classes)[:, None]
    cell = size / side
    radius = cell * (0.28 + 0.16 * radius)
    corner = order.argsort(dim=1)[:, :m]
    corner = torch.stack([corner % side, corner // side], -1) * cell
    centre = corner + radius[..., None] + place.unflatten(1, (m, 2)) * (cell - 2 * radius[..., None])

    def contrasting(u: Tensor) -> Tensor:
        # Going round the range of a channel by 0.3 to 0.7 keeps it uniform and 0.3 or more away from the background.
        return (background[:, None] + 0.3 + 0.4 * u.unflatten(1, (-1, 3))) % 1

    turn = 2 * math.pi
    low, high = torch.tensor([[0, 1, 0, -0.15, -0.15, -0.15], [turn, 4, turn, 0.15, 0.15, 0.15]])
    grating = low + (high - low) * grating
    low, high = torch.tensor([[0, 0, 0, 0.15 * size, 0.4], [size, size, turn, 0.5 * size, 0.4 + 0.02 * size]])
    stroke = low + (high - low) * stroke.unflatten(1, (-1, 5))
    return Scene(
        classes=classes,
        centre=centre,
        radius=radius,
        angle=turn * angle * rotate,
        colour=contrasting(colour),
        background=background,
        grating=grating,
        stroke=stroke,
        stroke_colour=contrasting(stroke_colour),
    )
