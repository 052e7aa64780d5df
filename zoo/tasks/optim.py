"""Optimizers and schedules as every task sets them up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ComponentArgumentError
from ..norms import ConditionalEvoNorm2d

T = TypeVar("T")


class StepSchedule(LRScheduler):
    """A schedule counted in optimizer steps; a subclass says in `ratio` what share of the peak a step takes.

    A resumed run obeys its config: the state holds the position alone, not the shape of the schedule.
    """

    def attach(self, module: L.LightningModule) -> None:
        """Learn from a task, when asked first, what the arguments leave to the run."""
        raise NotImplementedError

    def ratio(self, step: int) -> float:
        """Learning rate of a step relative to the peak."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each parameter group at `last_epoch`, which counts steps here."""
        return [peak * self.ratio(self.last_epoch) for peak in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("last_epoch", "_step_count", "_last_lr")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


class WarmupCosine(StepSchedule):
    """Linear warm-up, then a half cosine down to a fraction of the peak, counted in optimizer steps.

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

    def attach(self, module: L.LightningModule) -> None:
        # a question for later: asked now, it would set the loaders up before their state is restored
        self.run_length = lambda: int(module.trainer.estimated_stepping_batches)

    def ratio(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.total_steps is None and self.run_length is not None:
            self.total_steps = self.run_length()
        if self.total_steps is None:
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final_ratio + (1 - self.final_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class WarmupMultiStep(StepSchedule):
    """Linear warm-up from 0, then a constant rate that is cut at milestones; epochs, counted in optimizer steps.

    Args:
        optimizer: holds the peak learning rates.
        warmup_epochs: epochs of the linear rise; the very first step has rate 0, as in the authors' code of EvoNorm.
        milestones: epochs, ascending, at which the rate is multiplied by `gamma`.
        gamma: factor of a milestone.
        epoch_steps: optimizer steps an epoch; None for those of the run, which the task fills in.

    Raises:
        ValueError: if the milestones do not ascend, or begin before the warm-up ends.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: float = 5,
        milestones: Sequence[float] = (30, 60, 80),
        gamma: float = 0.1,
        epoch_steps: int | None = None,
    ) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        marks = [warmup_epochs, *milestones]
        if any(a > b for a, b in itertools.pairwise(marks)):
            raise ValueError(
                f"milestones must ascend from the end of the warm-up at epoch {warmup_epochs}, got {list(milestones)}"
            )
        if epoch_steps is not None and epoch_steps < 1:
            raise ValueError(f"epoch_steps must be at least 1, got {epoch_steps}")
        self.warmup_epochs, self.milestones, self.gamma = warmup_epochs, tuple(milestones), gamma
        self.epoch_steps = epoch_steps
        self.epoch_length: Callable[[], int] | None = None  # asked when it is needed and epoch_steps is None
        super().__init__(optimizer)

    def attach(self, module: L.LightningModule) -> None:
        trainer = module.trainer
        # for later too: the number of batches is known when the loaders are
        self.epoch_length = lambda: math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def ratio(self, step: int) -> float:
        epoch = step / self._epoch_steps() if step else 0.0
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)

    def _epoch_steps(self) -> int:
        if self.epoch_steps is None:
            if self.epoch_length is None:
                raise ValueError("WarmupMultiStep: epoch_steps is not known outside a task; give it")
            self.epoch_steps = self.epoch_length()
        return self.epoch_steps


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups in which only matrices, kernels and embeddings decay.

    Parameters with fewer than two dimensions (biases, norm gains, activation coefficients) get `weight_decay` 0, and so
    do the matrices of a conditional norm: they make its gains. The others take the optimizer's own value. Frozen
    parameters are left out, shared ones counted once.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    gains = {id(p) for part in module.modules() if isinstance(part, ConditionalEvoNorm2d) for p in part.parameters()}
    decays = [p.ndim >= 2 and id(p) not in gains for p in trainable]
    groups: list[dict[str, Any]] = [
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if decay]},
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def configure(module: L.LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> Any:
    """What `configure_optimizers` returns: decayed groups, and the schedule in the unit it counts in."""
    built = build("optimizer", optimizer, decay_groups(module))
    if lr_scheduler is None:
        return built
    scheduler = build("lr_scheduler", lr_scheduler, built)
    entry: dict[str, Any] = {"scheduler": scheduler}
    if isinstance(scheduler, StepSchedule):
        entry["interval"] = "step"
        scheduler.attach(module)
    elif isinstance(scheduler, ReduceLROnPlateau):
        entry["monitor"] = scheduler.monitor
    return {"optimizer": built, "lr_scheduler": entry}


def build(what: str, make: Callable[..., T], argument: Any) -> T:
    """`make(argument)`; what an optimizer or schedule refuses becomes a mistake of the config, named `what`."""
    try:
        return make(argument)
    except (TypeError, ValueError) as error:  # an argument from the config is refused only now
        raise ComponentArgumentError(f"{what}: {error}") from error
