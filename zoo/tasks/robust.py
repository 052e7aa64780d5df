"""Callbacks of robust training: accuracy under attack, averaged weights, and ramps of what a loss weighs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from ..attacks import PGDAttack, evaluate_robustness, make_attack, mini_autoattack
from ..attacks.modes import attacking
from ..errors import ComponentArgumentError, RunError

AutoAttackName = Literal["none", "mini", "full"]
Rampable = Literal["tau", "nu", "beta", "eps"]
Mode = Literal["linear", "cosine"]


class RobustEval(L.Callback):
    """Log `val/robust_acc`, and `test/robust_acc` in a test: the share of pictures right as they are and attacked.

    The first pictures of a validation are attacked batch by batch, while the weights that are validated (averaged
    ones, with :class:`EMA`) are in place, in float32 whatever the precision of training. Starting points come from a
    generator of the callback's own, set anew for each validation: two validations of the same weights agree, and a
    resumed run draws what the uninterrupted one drew. The sanity check before training is left out.

    To keep the most robust checkpoint, say `best: {monitor: val/robust_acc, mode: max}`; of pictures that are not the
    test pictures, see `holdout` of :class:`zoo.data.ImageFolder`.

    Args:
        attack: arguments of :class:`zoo.attacks.PGDAttack` upon those of the preset of the key "preset", "gowal_eval"
            (PGD-40 on the margin) by default: {eps: 0.1, restarts: 2}; or an attack.
        every_n_epochs: epochs from one evaluation to the next. With more than 1 give `best.every_n_epochs` the same.
        max_samples: how many pictures, over all processes; None for all.
        autoattack: "mini" lets APGD-CE and targeted APGD-DLR attack what `attack` left right, "full" AutoAttack with
            its four attacks, by the package `autoattack`. `robust_acc` is then the worst case, `pgd_acc` what `attack`
            alone left.
        seed: seed of the generator.

    Raises:
        ValueError: if an argument is out of range.
        RunError: if "full" is asked for and the package is not installed.
    """

    def __init__(
        self,
        attack: dict[str, Any] | PGDAttack | None = None,
        every_n_epochs: int = 1,
        max_samples: int | None = 1024,
        autoattack: AutoAttackName = "none",
        seed: int = 0,
    ) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "max_samples": max_samples}.items():
            if value is not None and value < 1:
                raise ValueError(f"RobustEval: {name} must be at least 1, got {value}")
        if autoattack not in get_args(AutoAttackName):
            raise ValueError(f"RobustEval: autoattack must be none, mini or full, got {autoattack!r}")
        made = make_attack(attack, PGDAttack.gowal_eval())
        self._generator = torch.Generator()
        attacks: dict[str, Any] = {"pgd": made}
        if autoattack == "mini":
            attacks |= mini_autoattack(made.eps, made.norm)
        # not the user's own objects: their generator stays theirs
        self._attacks = {name: dataclasses.replace(a, generator=self._generator) for name, a in attacks.items()}
        if autoattack == "full":
            self._attacks["autoattack"] = FullAutoAttack(made.eps, made.norm, seed)
        self.every_n_epochs, self.max_samples, self.seed = every_n_epochs, max_samples, seed
        self._left = 0.0

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        due = trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._begin(trainer, due and not trainer.sanity_checking)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(pl_module, batch, "val")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(pl_module, batch, "test")

    def _begin(self, trainer: L.Trainer, due: bool) -> None:
        every = math.inf if self.max_samples is None else math.ceil(self.max_samples / trainer.world_size)
        self._left = every if due else 0
        self._generator.manual_seed(self.seed * 1_000_003 + trainer.global_rank)

    def _evaluate(self, module: L.LightningModule, batch: Any, stage: str) -> None:
        if not self._left:
            return
        images, target = batch[:2]
        n = int(min(len(images), self._left))
        self._left -= n
        found = evaluate_robustness(module, [(images[:n], target[:n])], self._attacks)
        figures = {f"{stage}/robust_acc": found["worst_case"]}
        if len(self._attacks) > 1:
            figures[f"{stage}/pgd_acc"] = found["pgd"]
        module.log_dict(figures, on_step=False, on_epoch=True, prog_bar=True, batch_size=n, sync_dist=True)


class FullAutoAttack:
    """AutoAttack's standard version by its authors' package, called as the attacks of :mod:`zoo.attacks` are.

    Args:
        eps: radius, in the unit of pictures.
        norm: "linf" or "l2".
        seed: of its random starts.

    Raises:
        RunError: if the package `autoattack` is not installed.

    Source:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-Free
        Attacks, ICML 2020, arXiv:2003.01690.
    """

    def __init__(self, eps: float, norm: str, seed: int) -> None:
        try:
            from autoattack import AutoAttack  # pyrefly: ignore[missing-import]  # on no package index
        except ImportError:
            raise RunError(
                "RobustEval: autoattack: full needs the package autoattack, which is not installed; run pip install"
                " git+https://github.com/fra31/auto-attack, or take autoattack: mini"
            ) from None
        self._make, self.eps, self.norm, self.seed = AutoAttack, eps, norm, seed

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        devices = [x.device] if x.is_cuda else []
        # its attacks seed the global generators
        with torch.random.fork_rng(devices), attacking(model, "eval", True, x.device, "AutoAttack") as inner:
            x, y = x.clone(), y.clone()
            made = self._make(
                inner,
                norm={"linf": "Linf", "l2": "L2"}[self.norm],
                eps=self.eps,
                seed=self.seed,
                verbose=False,
                device=x.device,
            )
            others = inner(x[:1]).shape[1] - 1
            for targeted in (made.apgd_targeted, made.fab):  # of fewer classes than ten they would ask for missing ones
                targeted.n_target_classes = min(targeted.n_target_classes, others)
            return made.run_standard_evaluation(x, y, bs=len(x)).detach()


class EMA(WeightAveraging):
    """Train as usual, and validate, keep and test an exponential moving average of the weights.

    After t steps the average takes min(decay, (1 + t) / (10 + t)) of itself, so that it soon forgets where training
    started. Buffers, such as the running statistics of BatchNorm, are those of the trained model, not averages.

    In checkpoints `state_dict` is the average, which is what `zoo test` loads; a resume finds the trained weights
    beside it.

    Args:
        decay: in [0, 1); 0.9975 as Awasthi et al. 2023 have it.
        device: where the average is kept; None for that of the model.

    Raises:
        ValueError: if `decay` is out of range.

    Source:
        Gowal et al., Uncovering the Limits of Adversarial Training, 2020, arXiv:2010.03593, for the decay at the start
        and the buffers.
    """

    def __init__(self, decay: float = 0.9975, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must lie in [0, 1), got {decay}")
        self.decay = decay
        super().__init__(device, use_buffers=False, multi_avg_fn=self._average)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._device is None:
            self._device = trainer.strategy.root_device  # the model is moved there only after this
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing yet: a last checkpoint is still to be written, and a resume from it needs the trained weights."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:  # else nothing is trained, and the average is what was loaded
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, updates: Tensor | int) -> None:
        kept = min(self.decay, (1 + int(updates)) / (10 + int(updates)))
        averaged = list(averaged)
        # averages are made before a "true" precision casts the model, and stay in the better one
        current = [weights.to(mean) for mean, weights in zip(averaged, current, strict=True)]
        torch._foreach_lerp_(averaged, current, 1 - kept)


class LossRamp(L.Callback):
    """Lead one number of the loss from `start` to `end` over the first steps of a run, and leave it there.

    What is set for a step depends on the number of the step alone: a resumed run goes on where it was. Several ramps
    may run at once, of different numbers.

    Args:
        what: "tau", "nu" or "beta" of the task's loss, or "eps" of its attack, whose steps follow if the attack was
            given `step_ratio` rather than `step_size`.
        start, end: the first value and the last.
        share: share of the run's steps that the ramp takes.
        steps: its length in steps, in place of the share.
        mode: "linear", or "cosine", which starts and ends flat.

    Raises:
        ValueError: if `share` or `steps` is out of range, or `what` or `mode` unknown.
        ComponentArgumentError: at the start of training, if the loss has no such number.
    """

    def __init__(
        self,
        what: Rampable,
        start: float,
        end: float,
        share: float = 0.2,
        steps: int | None = None,
        mode: Mode = "linear",
    ) -> None:
        if what not in get_args(Rampable):
            raise ValueError(f"LossRamp: what must be one of {', '.join(get_args(Rampable))}, got {what!r}")
        if mode not in get_args(Mode):
            raise ValueError(f"LossRamp: mode must be linear or cosine, got {mode!r}")
        if not 0 < share <= 1:
            raise ValueError(f"LossRamp: share must lie in (0, 1], got {share}")
        if steps is not None and steps < 1:
            raise ValueError(f"LossRamp: steps must be at least 1, got {steps}")
        self.what: Rampable = what
        self.start, self.end, self.share, self.steps, self.mode = start, end, share, steps, mode

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._set(pl_module, self.start)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        steps = self.share * trainer.estimated_stepping_batches if self.steps is None else self.steps
        self._set(pl_module, self.value(trainer.global_step, steps))

    def value(self, step: int, steps: float) -> float:
        """What the number is in a step, counted from 0, of a ramp of so many."""
        done = min(1.0, step / steps)
        if self.mode == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return (1 - done) * self.start + done * self.end

    def _set(self, module: L.LightningModule, value: float) -> None:
        loss = getattr(module, "loss", None)
        owner = getattr(loss, "attack", None) if self.what == "eps" else loss
        if not hasattr(owner, self.what):
            kind = "the task has no loss" if loss is None else f"{type(loss).__name__} has no {self.what}"
            raise ComponentArgumentError(f"LossRamp: {kind}; ramp a number that the loss has, or take another loss")
        setattr(owner, self.what, value)
