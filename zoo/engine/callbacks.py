"""What makes a resumed run equal the uninterrupted one, and the two checkpoints every run keeps."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from .jsonl import JSONLLogger


class RandomState(L.Callback):
    """Carry the random-number generators across a resume.

    NumPy's global generator is left alone: nothing of ours draws from it.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._restored is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, JSONLLogger):
                logger.rewind(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # not earlier: what Lightning does between loading a checkpoint and the first batch may draw numbers
        if self._restored is None:
            return
        torch.set_rng_state(self._restored["torch"])
        version, internal, gauss = self._restored["python"]
        random.setstate((version, tuple(internal), gauss))
        if "cuda" in self._restored and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._restored["cuda"])
        self._restored = None


class BestCheckpoint(ModelCheckpoint):
    """The best state so far by a monitored metric, under one fixed name; follows a run directory that was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = Path(str(self.dirpath)) / Path(state_dict["best_model_path"]).name
        if not state_dict["best_model_path"] or not best.exists():
            return  # the resumed run starts its own record
        scores = list(state_dict["best_k_models"].values())
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": str(best),
                "kth_best_model_path": str(best),
                "best_k_models": {str(best): scores[-1]} if scores else {},
            }
        )


class LastCheckpoint(Checkpoint):
    """The newest state, under one fixed name, written so that a resume from it repeats the uninterrupted run.

    A step at which validation is due is saved after the validation, so that its metrics are neither lost nor doubled.

    Args:
        dirpath: folder of `last.ckpt`; the run's checkpoint folder when not given.
        every_n_train_steps: optimizer steps between two saves; the final step is always saved.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 500) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"last.every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.dirpath = dirpath
        self.every_n_train_steps = every_n_train_steps
        self._saved_step = 0

    @property
    def path(self) -> Path:
        """Where the state is written."""
        return Path(str(self.dirpath)) / "last.ckpt"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due(trainer) and not _validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit" and self._due(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._saved_step and not _rehearsing(trainer):  # stopped early, between two saves
            self._save(trainer)

    def _due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        if _rehearsing(trainer) or step == self._saved_step:  # also the further batches of one accumulated step
            return False
        return step % self.every_n_train_steps == 0 or step == trainer.estimated_stepping_batches

    def _save(self, trainer: L.Trainer) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path)


def _rehearsing(trainer: L.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set on every trainer, declared nowhere


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning validates right after the batch that has just ended."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]  # it has no public form


class StepMetrics(L.Callback):
    """Log the learning rate, seconds a step and, on a GPU, the peak of memory in MiB."""

    def __init__(self) -> None:
        self._last: float | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        metrics = {}
        if trainer.optimizers:
            metrics["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        if self._last is not None:
            metrics["time/step_s"] = now - self._last
        if pl_module.device.type == "cuda":
            metrics["mem/peak_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
        pl_module.log_dict(metrics)
        self._last = now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = None  # a step that spans a validation is not timed
