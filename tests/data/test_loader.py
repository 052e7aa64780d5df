"""The loaders: order, shards, resuming, and the random streams they leave alone."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.loader import ResumableLoader, SeededBatches, eval_loader, train_loader
from zoo.errors import DataError

LENGTH, BATCH = 46, 6  # 7 full batches, 4 examples left over


class Numbers(Dataset):
    """Example i is the number i; remembers, in its own process, which were asked for."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length, self.asked = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index


def _module(rank: int = 0, world: int = 1) -> Any:
    return SimpleNamespace(trainer=SimpleNamespace(global_rank=rank, world_size=world))


def _train(num_workers: int = 0, seed: int = 0, rank: int = 0, world: int = 1) -> ResumableLoader:
    return train_loader(_module(rank, world), Numbers(), batch_size=BATCH, seed=seed, num_workers=num_workers)


def _lists(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def _flat(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch]


def _epoch(loader: ResumableLoader, epoch: int) -> list[list[int]]:
    loader.batch_sampler.set_epoch(epoch)
    return _lists(loader)


def test_an_epoch_is_full_batches_of_a_permutation():
    batches = _lists(_train())
    assert len(batches) == len(_train()) == LENGTH // BATCH
    assert all(len(batch) == BATCH for batch in batches)
    seen = _flat(batches)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(LENGTH))
    assert seen != sorted(seen)


def test_order_is_a_function_of_seed_and_epoch():
    loader = _train()
    first, second = _epoch(loader, 0), _epoch(loader, 1)
    assert first != second
    assert _epoch(_train(), 1) == second  # a loader that never ran epoch 0
    assert _epoch(loader, 0) == first  # and one that already ran epoch 1
    assert _epoch(_train(seed=1), 0) not in (first, second)


def _state(*, done: int, epoch: int = 0) -> dict[str, int]:
    return {"epoch": epoch, "done": done, "examples": LENGTH, "batch_size": BATCH, "processes": 1}


def test_workers_do_not_change_the_order():
    assert _lists(_train(num_workers=2)) == _lists(_train())


@pytest.mark.parametrize("world", [2, 3])
def test_training_shards_are_disjoint_equally_long_and_cover_the_epoch(world):
    shards = [_flat(_lists(_train(rank=rank, world=world))) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    seen = _flat(shards)
    assert len(set(seen)) == len(seen)
    assert LENGTH - len(seen) < world * BATCH  # less than one more batch for everyone is left out


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_shards_are_disjoint_and_complete(world):
    shards = []
    for rank in range(world):
        loader = eval_loader(_module(rank, world), Numbers(), batch_size=BATCH, num_workers=0)
        shards.append(_flat(_lists(loader)))
        assert shards[-1] == sorted(shards[-1])
    assert sorted(_flat(shards)) == list(range(LENGTH))


def test_without_a_trainer_there_is_one_process():
    module = L.LightningDataModule()
    assert _lists(train_loader(module, Numbers(), batch_size=BATCH, seed=0, num_workers=0)) == _lists(_train())
    assert _flat(_lists(eval_loader(module, Numbers(), batch_size=BATCH, num_workers=0))) == list(range(LENGTH))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_resumed_loader_yields_exactly_the_batches_that_were_left(num_workers, done):
    whole = _train(num_workers)
    whole.batch_sampler.set_epoch(2)
    batches = iter(whole)
    for _ in range(done):
        next(batches)
    state = whole.state_dict()
    left = _lists(batches)

    resumed = _train(num_workers)
    resumed.load_state_dict(state)
    resumed.batch_sampler.set_epoch(2)  # as Lightning does
    assert len(left) == LENGTH // BATCH - done
    assert _lists(resumed) == left
    assert _epoch(resumed, 3) == _epoch(whole, 3)  # the offset holds for one epoch only


def test_the_position_belongs_to_its_epoch():
    loader = _train()
    loader.load_state_dict(_state(epoch=0, done=3))
    assert _epoch(loader, 1) == _epoch(_train(), 1)


def test_batches_cut_otherwise_are_refused_inside_an_epoch():
    loader = ResumableLoader(Numbers(), BATCH + 1, seed=0)
    with pytest.raises(DataError, match=r"'batch_size': 6.* the data is now .*'batch_size': 7.*resume with the same"):
        loader.load_state_dict(_state(done=3))
    loader.load_state_dict(_state(done=0))  # between epochs nothing can be skipped or repeated
    assert len(_lists(loader)) == LENGTH // (BATCH + 1)


def test_a_state_taken_after_resuming_counts_from_the_start_of_the_epoch():
    loader = _train()
    loader.load_state_dict(_state(done=3))
    batches = iter(loader)
    next(batches)
    assert loader.state_dict() == _state(done=4)


def test_a_loader_abandoned_and_resumed_goes_on_with_the_same_workers():
    loader = _train(num_workers=2)
    expected = _lists(_train())
    batches = iter(loader)
    next(batches), next(batches)
    loader.load_state_dict(loader.state_dict())
    assert _lists(loader) == expected[2:]


def test_skipped_batches_are_not_loaded():
    loader = _train()
    loader.load_state_dict(_state(done=5))
    batches = _lists(loader)
    assert _flat(batches) == loader.dataset.asked


def test_a_finished_epoch_is_stored_as_none_begun():
    loader = _train()
    loader.batch_sampler.set_epoch(4)
    for done, _ in enumerate(loader, 1):  # a checkpoint may be written before the loader knows that it is at its end
        assert loader.state_dict() == _state(epoch=4, done=done % (LENGTH // BATCH))
    assert loader.state_dict() == _state(epoch=4, done=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_streams_are_left_alone(num_workers):
    torch.manual_seed(0)
    before, python = torch.get_rng_state(), random.getstate()
    for loader in (
        _train(num_workers),
        eval_loader(_module(), Numbers(), batch_size=BATCH, num_workers=num_workers),
        eval_loader(_module(1, 2), Numbers(), batch_size=BATCH, num_workers=num_workers),
    ):
        _lists(loader), _lists(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


@pytest.mark.parametrize(("length", "world"), [(0, 1), (BATCH - 1, 1), (2 * BATCH - 1, 2)])
def test_too_few_training_examples_are_refused(length, world):
    with pytest.raises(
        DataError,
        match=rf"^the training split holds {length} examples, fewer than one batch of 6 for each of {world} process",
    ):
        SeededBatches(length, BATCH, 0, 0, world)
    SeededBatches(BATCH * world, BATCH, 0, 0, world)


def test_fewer_evaluation_examples_than_processes_are_refused():
    with pytest.raises(DataError, match=r"^a split of 2 example\(s\) cannot be shared by 3 processes"):
        eval_loader(_module(0, 3), Numbers(2), batch_size=1, num_workers=0)


class _Recorder(L.LightningModule):
    """Notes the batches it is given and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch.tolist())
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _Data(L.LightningDataModule):
    def train_dataloader(self) -> ResumableLoader:
        return train_loader(self, Numbers(), batch_size=BATCH, seed=0, num_workers=0)


class _SaveAt(L.Callback):
    """Write a checkpoint right after given steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loggers and workers
def test_lightning_sets_the_epoch_and_resumes_inside_it(tmp_path):
    stops = (1, 7, 10, 13)  # 7 is the end of an epoch

    def fit(ckpt_path: Path | None = None) -> dict[int, list[list[int]]]:
        recorder = _Recorder()
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=None if ckpt_path else _SaveAt(tmp_path, stops),
        )
        trainer.fit(recorder, datamodule=_Data(), ckpt_path=ckpt_path)
        return recorder.seen

    expected = {epoch: _epoch(_train(), epoch) for epoch in range(3)}
    assert fit() == expected
    for stop in stops:
        epoch, done = divmod(stop, 7)
        left = {epoch: expected[epoch][done:], **{later: expected[later] for later in range(epoch + 1, 3)}}
        assert fit(tmp_path / f"{stop}.ckpt") == left
