"""Optimizers and schedules as every task sets them up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ComponentArgumentError

T = TypeVar("T")


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a half cosine down to a fraction of the peak, counted in optimizer steps.

    A resumed run obeys its config: the state holds the position alone, not the shape of the schedule.

    Args:
        optimizer: holds the peak learning rates.
        warmup_steps: steps of the linear rise; the first step already moves.
        final_ratio: learning rate at the end, relative to the peak.
        total_steps: length of the whole schedule; None for the length of the run, which the task fills in.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, final_ratio: float = 0.1, total_steps: int | None = None
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.warmup_steps, self.final_ratio, self.total_steps = warmup_steps, final_ratio, total_steps
        self.run_length: Callable[[], int] | None = None  # asked when it is needed and total_steps is None
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each parameter group at `last_epoch`, which counts steps here."""
        return [peak * self.ratio(self.last_epoch) for peak in self.base_lrs]

    def ratio(self, step: int) -> float:
        """Learning rate of a step relative to the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.total_steps is None and self.run_length is not None:
            self.total_steps = self.run_length()
        if self.total_steps is None:
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final_ratio + (1 - self.final_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def state_dict(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("last_epoch", "_step_count", "_last_lr")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups in which only matrices, kernels and embeddings decay.

    Parameters with fewer than two dimensions (biases, norm gains, activation coefficients) get `weight_decay` 0; the
    others take the optimizer's own value. Frozen parameters are left out, shared ones counted once.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def configure(module: L.LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> Any:
    """What `configure_optimizers` returns: decayed groups, and the schedule in the unit it counts in."""
    built = _build("optimizer", optimizer, decay_groups(module))
    if lr_scheduler is None:
        return built
    scheduler = _build("lr_scheduler", lr_scheduler, built)
    entry: dict[str, Any] = {"scheduler": scheduler}
    if isinstance(scheduler, WarmupCosine):
        entry["interval"] = "step"
        # a question for later: asked now, it would set the loaders up before their state is restored
        scheduler.run_length = lambda: int(module.trainer.estimated_stepping_batches)
    elif isinstance(scheduler, ReduceLROnPlateau):
        entry["monitor"] = scheduler.monitor
    return {"optimizer": built, "lr_scheduler": entry}


def _build(what: str, make: Callable[..., T], argument: Any) -> T:
    try:
        return make(argument)
    except (TypeError, ValueError) as error:  # an argument from the config is refused only now
        raise ComponentArgumentError(f"{what}: {error}") from error
