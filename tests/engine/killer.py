"""A callback that kills its own process, as a power cut would."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L


class KillAt(L.Callback):
    """SIGKILL after `step` optimizer steps; `during_validation` waits for the validation that follows.

    Args:
        step: optimizer steps to make first.
        during_validation: die in the validation after that step instead of right after the step.
    """

    def __init__(self, step: int, during_validation: bool = False) -> None:
        self.step, self.during_validation = step, during_validation

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.during_validation:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.during_validation:
            os.kill(os.getpid(), signal.SIGKILL)
