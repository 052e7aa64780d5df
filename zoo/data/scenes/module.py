"""The data module that every kind of scene shares, and the order in which it draws views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import DataError
from ..loader import ResumableLoader, SeededBatches, _place, eval_loader
from .base import Scene, Views


class ViewBatches(SeededBatches):
    """Batches of views drawn without replacement, from permutations that follow each other without regard to epochs.

    An epoch is as long as it is asked to be. Draw number g of a run is a function of (seed, g): entry g % V of
    permutation g // V.

    Args:
        views: number of training views V.
        steps: batches an epoch.
        batch_size: views a batch and process.
        seed: seed of the order.
        rank, world: this process and the number of processes; each takes every world-th draw.

    Raises:
        DataError: if `batch_size` is below 1.
    """

    def __init__(self, views: int, steps: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(steps * batch_size * world, batch_size, seed, rank, world)
        self.views = views
        self._turn, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.done = self.start, {}
        first = self.epoch * self.length + self.rank
        for batch in range(start, len(self)):
            places = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [self._view(first + place * self.world) for place in places]

    def _view(self, draw: int) -> int:
        turn, place = divmod(draw, self.views)
        if turn != self._turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            self._turn, self._order = turn, torch.randperm(self.views, generator=generator)
        return int(self._order[place])


class ViewLoader(ResumableLoader):
    """Training loader over views; it resumes inside an epoch as :class:`zoo.data.loader.ResumableLoader` does.

    Args:
        views: the training views.
        batches: the order in which they are drawn.
        kwargs: further arguments of `DataLoader`, e.g. num_workers.
    """

    def __init__(self, views: Views, batches: ViewBatches, **kwargs: Any) -> None:
        self._batches: SeededBatches = batches
        self._num_views = batches.views
        self._handed_out = 0
        generator = torch.Generator().manual_seed(batches.seed)  # else starting one draws from the global stream
        DataLoader.__init__(self, views, batch_sampler=batches, generator=generator, **kwargs)

    def _shape(self) -> dict[str, int]:
        return {"views": self._num_views, **super()._shape()}


class SceneModule(L.LightningDataModule):
    """Loaders over the views of a scene; a subclass says in `_build` what the scene is.

    A batch is a dictionary: image float32 [B, H, W, 3] in [0, 1], viewmat [B, 4, 4], K [B, 3, 3], index int64 [B], B
    views of the same size. Training draws views without replacement, permutation after permutation, and an epoch is
    `steps_per_epoch` batches of them, so that what Lightning does once an epoch need not happen every few views. The
    test views come one by one and in order, and validate, too.

    Args:
        batch_size: training views a batch and process.
        steps_per_epoch: training batches an epoch.
        seed: seed of the training order.
        num_workers: loader processes.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(self, batch_size: int, steps_per_epoch: int, seed: int, num_workers: int) -> None:
        super().__init__()
        self._check_at_least(1, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        self._check_at_least(0, num_workers=num_workers)
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.seed, self.num_workers = seed, num_workers
        self._scene: Scene | None = None

    def _check_at_least(self, least: int, **values: int) -> None:
        for name, value in values.items():
            if value < least:
                raise DataError(f"{type(self).__name__}: {name} must be at least {least}, got {value}")

    def _build(self) -> Scene:
        """The scene."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Make the scene, once; every stage needs the same."""
        if self._scene is None:
            self._scene = self._build()

    @property
    def scene(self) -> Scene:
        """The scene: its cameras and points, from which a model starts."""
        self.setup()
        assert self._scene is not None
        return self._scene

    def train_dataloader(self) -> ViewLoader:
        views = Views(self.scene, self.scene.train)
        rank, world = _place(self)
        return ViewLoader(
            views,
            ViewBatches(len(views), self.steps_per_epoch, self.batch_size, self.seed, rank, world),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        views = Views(self.scene, self.scene.test)
        return eval_loader(self, views, batch_size=1, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()
