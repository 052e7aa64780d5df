"""Adversarial training: a classifier whose loss attacks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..errors import DataError
from ..registry import factory
from ..spec import ActivationSpec, LossSpec, NormSpec
from .backbones import BackboneSpec
from .classify import ImageClassifier


class AdversarialClassifier(ImageClassifier):
    """Train a classifier on pictures and on what an attack makes of them.

    Pictures are in [0, 1], where the attack's bounds and radius are meant: the data module must not normalise them,
    `mean` and `std` here do.

    Validation reports clean accuracy and cross-entropy; accuracy under attack takes the callback
    :class:`zoo.tasks.RobustEval`. While training, `train/acc` and `train/adv_acc` are those of the batch, clean and
    attacked; an `adv_acc` that leaves the validation's behind within an epoch shows that only the training attack is
    resisted.

    Args:
        num_classes, in_channels, mean, std, backbone, width, depth, act, norm, optimizer, lr_scheduler: as for
            :class:`ImageClassifier`.
        loss: "adv_comp_sum", "smooth_adv_comp_sum", "psal", "trades" or "pgd_at", with arguments as {name: trades,
            beta: 3, attack: {eps: 0.1, steps: 5}}, or another loss called as `loss(model, x, y)` which returns a
            :class:`zoo.losses.AdvLossOutput`.

    Shape:
        [B, in_channels, H, W] pictures -> [B, num_classes] logits.

    Raises:
        ValueError: as :class:`ImageClassifier`, and if the loss runs no attack.
        DataError: when training starts, if the data module normalises.

    Source:
        Mao, Mohri, Zhong, Cross-Entropy Loss Functions, ICML 2023, arXiv:2304.07288, for the default loss.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        backbone: BackboneSpec | None = None,
        width: int = 16,
        depth: int = 1,
        act: ActivationSpec | None = None,
        norm: NormSpec | None = None,
        loss: LossSpec = "adv_comp_sum",
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            mean=mean,
            std=std,
            backbone=backbone,
            width=width,
            depth=depth,
            act=act,
            norm=norm,
            loss=loss,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        mean, std = getattr(data, "mean", 0.0), getattr(data, "std", 1.0)
        if any(_numbers(mean)) or any(value != 1 for value in _numbers(std)):
            raise DataError(
                f"the data module normalises its pictures (mean {mean}, std {std}), an attack needs them in [0, 1];"
                " give the data mean 0 and std 1, and these to model.mean and model.std"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = batch[:2]
        out = self.loss(self, images, target)
        figures = {
            "train/loss": out.loss,
            "train/clean_loss": out.clean_loss,
            "train/penalty": out.penalty,
            "train/adv_acc": _accuracy(out.logits_adv, target),
        }
        if out.logits is not None:  # PGD-AT never looks at the clean pictures
            figures["train/acc"] = _accuracy(out.logits, target)
        self.log_dict({name: value.detach() for name, value in figures.items()})
        return out.loss

    def _make_loss(self, loss: LossSpec | None) -> nn.Module:
        if loss is None:
            raise ValueError("AdversarialClassifier: loss must be given, e.g. adv_comp_sum, got None")
        made = factory("loss", loss)()
        if not hasattr(made, "attack"):
            raise ValueError(
                f"AdversarialClassifier: {type(made).__name__} runs no attack; take adv_comp_sum, trades or pgd_at, or"
                " train with class_path: ImageClassifier"
            )
        return made

    def _criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


def _numbers(values: float | Sequence[float]) -> Sequence[float]:
    return values if isinstance(values, Sequence) else [values]


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == target).float().mean()
