"""Loaders whose order depends on (seed, epoch) alone, which shard themselves and resume inside an epoch.

Starting one never draws from the global random stream: a resumed run sees the numbers the uninterrupted one saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset

from ..errors import DataError

if TYPE_CHECKING:
    import lightning as L


class SeededBatches(BatchSampler):
    """Full batches of a permutation that is a function of (seed, epoch).

    Args:
        length: number of examples.
        batch_size: examples a batch and process.
        seed: seed of the order.
        rank, world: this process and the number of processes; each takes every world-th example.

    Raises:
        DataError: if `batch_size` is below 1, or a process does not get one whole batch.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        if length // world < batch_size:
            raise DataError(
                f"the training split holds {length} examples, fewer than one batch of {batch_size} for each of {world}"
                " process(es); lower batch_size or add data"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = 0
        self.done: dict[int, int] = {}  # by epoch: batches trained on before, to be skipped without loading them
        self.sampler: Any = self  # Lightning calls `set_epoch` on a loader's `batch_sampler.sampler`

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    @property
    def start(self) -> int:
        """The first batch of this epoch that was not trained on before."""
        return self.done.get(self.epoch, 0)

    def __len__(self) -> int:
        return self.length // self.world // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)[self.rank :: self.world]
        start, self.done = self.start, {}
        for i in range(start, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size].tolist()


class ResumableLoader(DataLoader):
    """Training loader; Lightning stores its position in every checkpoint through `state_dict`.

    A dataset must not draw random numbers in loader workers: their seeds depend on how often a loader was started. One
    with a `set_epoch` is told the epoch before its first picture is asked for, and may draw as a function of that.

    Args:
        dataset: map-style dataset.
        batch_size: examples a batch and process.
        seed: seed of the order.
        rank, world: this process and the number of processes.
        kwargs: further arguments of `DataLoader`, e.g. num_workers.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, rank: int = 0, world: int = 1, **kwargs: Any
    ) -> None:
        self._batches = SeededBatches(len(dataset), batch_size, seed, rank, world)  # type: ignore[arg-type]
        self._handed_out = 0
        super().__init__(dataset, batch_sampler=self._batches, generator=torch.Generator().manual_seed(seed), **kwargs)

    def __iter__(self) -> Iterator[Any]:  # pyrefly: ignore[bad-override]  # the wrapped iterator, counted
        self._handed_out = self._batches.start
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self._batches.epoch)
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch
        self._handed_out = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches of it already handed out (a finished epoch counts as none), and what they were cut from."""
        return {"epoch": self._batches.epoch, "done": self._handed_out % len(self), **self._shape()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that `state` says were handed out.

        Raises:
            DataError: inside an epoch, if the batches are cut differently now.
        """
        now = self._shape()
        if state["done"] and any(state[key] != now[key] for key in now):
            before = {key: state[key] for key in now}
            raise DataError(
                f"the checkpoint lies inside an epoch of {before}, the data is now {now}; resume with the same values,"
                " or from a checkpoint at the end of an epoch"
            )
        self._batches.done = {state["epoch"]: state["done"]}

    def _shape(self) -> dict[str, int]:
        batches = self._batches
        return {"examples": batches.length, "batch_size": batches.batch_size, "processes": batches.world}


def train_loader(
    module: L.LightningDataModule, dataset: Dataset, *, batch_size: int, seed: int, num_workers: int
) -> ResumableLoader:
    """Shuffled, sharded, resumable loader for a data module's training split."""
    rank, world = _place(module)
    return ResumableLoader(
        dataset,
        batch_size,
        seed,
        rank,
        world,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def eval_loader(module: L.LightningDataModule, dataset: Dataset, *, batch_size: int, num_workers: int) -> DataLoader:
    """Ordered, sharded loader for validation, test and prediction; every example is seen exactly once."""
    rank, world = _place(module)
    length = len(dataset)  # type: ignore[arg-type]
    if length < world:
        raise DataError(f"a split of {length} example(s) cannot be shared by {world} processes; add data or use fewer")
    if world > 1:
        dataset = Subset(dataset, range(rank, length, world))
    return DataLoader(
        dataset,
        batch_size=batch_size,  # by keyword: Lightning rebuilds the loader for predict
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )


def _place(module: L.LightningDataModule) -> tuple[int, int]:
    trainer = module.trainer
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
