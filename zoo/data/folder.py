"""Pictures in a folder a class, on disk or inside a tar archive."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import lightning as L
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..settings import cache_folder
from .loader import eval_loader, train_loader
from .sources import Archive, Entry, Folder, find, take_turns

Augment = Literal["none", "flip", "crop", "resized_crop"]

_MEMORY = 2 * 2**30  # bytes of decoded pictures that are held at once: CIFAR-10 takes 0.2 GB, ImageNet 190 GB
_BROKEN_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Pictures(Dataset[tuple[Tensor, int]]):
    """One split of :class:`ImageFolder`.

    What is drawn for a picture is a function of (seed, epoch, index): no loader worker and no resume changes it.

    Args:
        source: where the pictures are.
        entries: which they are.
        targets: int64 [N] their classes.
        held: uint8 [N, 3, size, size] the pictures decoded, or None to decode each when it is asked for.
        size, augment, centre_share, mean, std, seed: as in :class:`ImageFolder`.
    """

    def __init__(
        self,
        source: Folder | Archive,
        entries: Sequence[Entry],
        targets: Tensor,
        held: Tensor | None,
        *,
        size: int,
        augment: Augment,
        centre_share: float,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        self.source, self.entries, self.targets, self.held = source, entries, targets, held
        self.size, self.augment, self.centre_share, self.seed = size, augment, centre_share, seed
        self.mean, self.std = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
        # In shared memory: loader workers that live on see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose what is drawn."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.augment == "resized_crop":
            picture = _resized_crop(self._read(index), self.size, self._uniform(index))
        elif self.held is not None:
            picture = self.held[index]
        else:
            picture = _centre_crop(self._read(index), self.size, self.centre_share)
        if self.augment == "crop":
            picture = _padded_crop(picture, self._uniform(index))
        elif self.augment == "flip":
            picture = picture.flip(-1) if float(self._uniform(index)[0]) < 0.5 else picture
        return (picture.float() / 255 - self.mean) / self.std, int(self.targets[index])

    def decode(self) -> None:
        """Hold the pictures decoded from now on."""
        held = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        for i, content in self.source.read(self.entries):
            held[i] = _centre_crop(self._decoded(i, content), self.size, self.centre_share)
        self.held = held

    def _read(self, index: int) -> Image.Image:
        ((_, content),) = self.source.read([self.entries[index]])
        return self._decoded(index, content)

    def _decoded(self, index: int, content: bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(content)) as image:
                return image.convert("RGB")
        except _BROKEN_PICTURE as error:
            path = self.source.root / self.entries[index].name
            raise DataError(f"cannot decode the picture {path}: {error}; replace or remove it") from error

    def _uniform(self, index: int) -> Tensor:
        """24 numbers in [0, 1)."""
        key = f"{self.seed} {int(self._epoch)} {index}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)
        return torch.rand(24, generator=torch.Generator().manual_seed(seed))


class ImageFolder(L.LightningDataModule):
    """Pictures in a folder a class: `train/<class>/...` and `<val>/<class>/...`, on disk or in a tar archive.

    Pictures that fit (2 GiB decoded, and no "resized_crop") are decoded once, held in memory, and kept in the folder of
    `ZOO_CACHE_DIR` for the next run. Others are decoded one by one when they are needed, for which an archive must not
    be compressed. Nothing is unpacked.

    The pictures of a split take turns by class (the first of each class, the second of each, ...), so that what `limit`
    and the trainer's `limit_val_batches` take, its beginning, is balanced.

    The test split is the validation split, the pictures below `<val>`. With `holdout` they are the test split alone,
    and pictures below `train` validate: the first ones by turns, which then do not train. What is chosen by such a
    validation is not chosen by test pictures.

    A batch is `(pictures, targets)`: float32 [B, 3, size, size], (picture in [0, 1] - mean) / std, and int64 [B], the
    position of the class in `class_names`, which are in alphabetical order.

    Args:
        root: folder or archive (.tar, .tar.gz, .tar.bz2, .tar.xz); a relative name is looked for here, then below the
            folder of `ZOO_DATA`.
        size: height and width in pixels; the shorter side is resized to it and the middle is taken.
        augment: of training pictures. "flip" mirrors half of them. "crop" pads by an eighth of the size, crops at
            random and mirrors half of them, as usual for CIFAR. "resized_crop" takes 8 to 100 % of the area at an
            aspect ratio of 3/4 to 4/3 and mirrors half of them, as usual for ImageNet.
        mean, std: of each channel, to normalise by.
        batch_size: pictures a batch and process.
        val: name of the folder that validates, e.g. `test`; with `holdout` that of the test pictures.
        limit: training pictures, as many of each class to within one; None takes all.
        centre_share: share of the shorter side that the middle has, without augmentation; usually 0.875 for ImageNet.
        seed: seed of the training order and of the augmentation.
        num_workers: loader processes.
        holdout: pictures below `train` that validate instead, as many of each class to within one; `limit` counts those
            that are left.

    Raises:
        DataError: if an argument is out of range, there is no such root, a split or a class is without pictures,
            `holdout` leaves none to train on, the splits differ in their classes, or a picture or an archive cannot be
            read.
    """

    channels = 3

    def __init__(
        self,
        root: str,
        size: int = 32,
        augment: Augment = "none",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        batch_size: int = 128,
        val: str = "val",
        limit: int | None = None,
        centre_share: float = 1.0,
        seed: int = 0,
        num_workers: int = 0,
        holdout: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"size": size, "batch_size": batch_size, "limit": limit}.items():
            if value is not None and value < 1:
                raise DataError(f"ImageFolder: {name} must be at least 1, got {value}")
        if num_workers < 0:
            raise DataError(f"ImageFolder: num_workers must not be negative, got {num_workers}")
        if holdout < 0:
            raise DataError(f"ImageFolder: holdout must not be negative, got {holdout}")
        if augment not in get_args(Augment):
            raise DataError(f"ImageFolder: augment must be one of {', '.join(get_args(Augment))}, got {augment!r}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise DataError(f"ImageFolder: mean and std must be 3 numbers, std positive, got {mean} and {std}")
        if not 0 < centre_share <= 1:
            raise DataError(f"ImageFolder: centre_share must lie in (0, 1], got {centre_share}")
        if val in ("", ".", "..", "train") or "/" in val:
            raise DataError(f"ImageFolder: val must name a folder beside train, got {val!r}")
        self.root = find(root)
        self.size, self.limit, self.centre_share, self.batch_size = size, limit, centre_share, batch_size
        self.augment: Augment = augment
        self.mean, self.std = tuple(mean), tuple(std)
        self.splits = ("train", val)  # the folders
        self._parts = ("train", "held", "val") if holdout else ("train", "val")
        self.seed, self.num_workers, self.holdout = seed, num_workers, holdout
        self._class_names: tuple[str, ...] = ()
        self._sets: dict[str, Pictures] = {}

    def prepare_data(self) -> None:
        """Decode what will be held in memory: on one process, the others then read the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures, and read what is held in memory, once."""
        if self._sets:
            return
        source = Folder(self.root) if self.root.is_dir() else Archive(self.root)
        cache = None if self.augment == "resized_crop" else self._cache_file(source)
        if cache is not None and cache.is_file():
            self._restore(source, cache)
            return
        chosen = self._choose(source)
        for part, entries in chosen.items():
            targets = torch.tensor([self._class_names.index(entry.label) for entry in entries])
            self._sets[part] = self._pictures(part, source, entries, targets, None)
        size = 3 * self.size**2 * sum(map(len, chosen.values()))
        if cache is not None and size <= _MEMORY:
            for pictures in self._sets.values():
                pictures.decode()
            self._keep(cache)
        elif not source.seekable:
            why = "resized_crop needs" if cache is None else f"{size / 2**30:.0f} GiB of pictures need"
            self._sets = {}
            raise DataError(
                f"{why} to read pictures one by one, which the compressed archive {self.root} does not allow;"
                " decompress it to a .tar, or unpack it"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders, in alphabetical order."""
        self.setup()
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.class_names)

    @property
    def train_set(self) -> Pictures:
        """Training pictures."""
        self.setup()
        return self._sets["train"]

    @property
    def val_set(self) -> Pictures:
        """Validation pictures, which are the test pictures too if none are held out."""
        self.setup()
        return self._sets["held" if self.holdout else "val"]

    @property
    def test_set(self) -> Pictures:
        """The pictures below `<val>`."""
        self.setup()
        return self._sets["val"]

    def train_dataloader(self) -> DataLoader:
        return train_loader(
            self, self.train_set, batch_size=self.batch_size, seed=self.seed, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        return eval_loader(self, self.val_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return eval_loader(self, self.test_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def _pictures(
        self, part: str, source: Folder | Archive, entries: Sequence[Entry], targets: Tensor, held: Tensor | None
    ) -> Pictures:
        return Pictures(
            source,
            entries,
            targets,
            held,
            size=self.size,
            augment=self.augment if part == "train" else "none",
            centre_share=self.centre_share,
            mean=self.mean,
            std=self.std,
            seed=self.seed,
        )

    def _choose(self, source: Folder | Archive) -> dict[str, list[Entry]]:
        """The pictures of each part, taking turns by class; sets the class names."""
        found, classes = source.index(self.splits)
        names = {split: sorted(label for of, label in classes if of == split) for split in self.splits}
        for split in self.splits:
            if not names[split]:
                also = "" if split == "train" else ", or val= with another name"
                raise DataError(f"{self.root} has no {split}/<class>/ folder; pass root= with one{also}")
        train, val = (names[split] for split in self.splits)
        if train != val:
            differing = sorted(set(train) ^ set(val))
            raise DataError(
                f"the splits {' and '.join(self.splits)} of {self.root} differ in their classes, by {len(differing)}:"
                f" {', '.join(differing[:5])}; give both the same folders"
            )
        self._class_names = tuple(train)
        turns, test = (take_turns(self.root, split, train, found) for split in self.splits)
        held, rest = turns[: self.holdout], turns[self.holdout :]
        if not rest:
            raise DataError(
                f"ImageFolder: holdout must leave some of the {len(turns)} pictures below train, got {self.holdout}"
            )
        chosen = {"train": rest[: self.limit], "held": held, "val": test}
        return {part: chosen[part] for part in self._parts}

    def _cache_file(self, source: Folder | Archive) -> Path:
        facts = [source.key(self.splits), self.splits, self.size, self.limit, self.centre_share, self.holdout]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return cache_folder() / "pictures" / f"{self.root.name}-{digest}.safetensors"

    def _keep(self, cache: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for part, pictures in self._sets.items():
            assert pictures.held is not None
            tensors |= {f"{part}.pictures": pictures.held, f"{part}.targets": pictures.targets}
        scratch = cache.with_suffix(f".{os.getpid()}")  # another process may be writing the same
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, scratch, {"class_names": json.dumps(self._class_names)})
            os.replace(scratch, cache)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cannot keep the decoded pictures in {cache.parent}: {error}; make room, or set ZOO_CACHE_DIR"
            ) from error

    def _restore(self, source: Folder | Archive, cache: Path) -> None:
        try:
            with safe_open(cache, "pt") as file:
                names = json.loads(file.metadata()["class_names"])
                parts = {
                    part: (file.get_tensor(f"{part}.targets"), file.get_tensor(f"{part}.pictures"))
                    for part in self._parts
                }
        except (SafetensorError, OSError) as error:
            raise DataError(f"cannot read the decoded pictures in {cache}: {error}; delete the file") from error
        self._class_names = tuple(names)
        self._sets = {part: self._pictures(part, source, (), *tensors) for part, tensors in parts.items()}


def _centre_crop(image: Image.Image, size: int, share: float) -> Tensor:
    """The middle square, `share` of the shorter side wide, as uint8 [3, size, size]."""
    width, height = image.size
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return _resized(image, size, (left, top, left + side, top + side))


def _resized_crop(image: Image.Image, size: int, uniform: Tensor) -> Tensor:
    """A random part of random shape, perhaps mirrored; ten tries, then the middle, as torchvision has it."""
    width, height = image.size
    mirrored, x, y, *tries = uniform.tolist()
    for area, aspect in zip(tries[:10], tries[10:20], strict=True):
        area = width * height * (0.08 + 0.92 * area)
        aspect = math.exp((2 * aspect - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    picture = _resized(image, size, (left, top, left + w, top + h))
    return picture.flip(-1) if mirrored < 0.5 else picture


def _padded_crop(picture: Tensor, uniform: Tensor) -> Tensor:
    """Shifted by up to an eighth of the size, black where it was not, and perhaps mirrored."""
    mirrored, x, y, *_ = uniform.tolist()
    size = picture.shape[-1]
    pad = max(1, size // 8)
    left, top = int(x * (2 * pad + 1)), int(y * (2 * pad + 1))
    picture = F.pad(picture, [pad] * 4)[:, top : top + size, left : left + size]
    return picture.flip(-1) if mirrored < 0.5 else picture


def _resized(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Tensor:
    if image.size != (size, size) or box != (0, 0, size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1)
