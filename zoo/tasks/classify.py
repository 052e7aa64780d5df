"""Image classification with a small residual network made of zoo parts, or any timm model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
)

from ..errors import DataError
from ..registry import factory
from ..spec import ActivationSpec, LossSpec, NormSpec
from .backbones import BackboneSpec, build_backbone
from .optim import configure


class ImageClassifier(L.LightningModule):
    """Classify pictures, one label each or several.

    Args:
        num_classes: number of classes.
        multi_label: several labels a picture; targets are then [B, num_classes] of 0 and 1, `val/acc` is the share of
            labels told right at a probability of 1/2, and `val/map` (mean average precision) stands beside it.
        in_channels: channels of a picture: 3 for colour, 1 for grey.
        mean, std: the network sees (picture - mean) / std, with one number or one for each channel; for data that
            leaves its pictures in [0, 1]. Layers that do not subtract a mean themselves, as EvoNorm, need centred
            pictures to train well.
        backbone: None for :class:`SmallResNet`; "mlp", "plain_cnn", "small_vgg", "preact_resnet18" or "wide_resnet" of
            :mod:`zoo.tasks.backbones`, with arguments as {name: wide_resnet, depth: 16}; the name of a timm model; or
            any class that takes `num_classes` and `in_channels`, by dotted path or {class_path: ..., init_args: ...}.
        width, depth: channels of the first stage and blocks a stage of :class:`SmallResNet`.
        act: activation, by registry name, dotted path or mapping; None keeps a backbone's own. Beside an EvoNorm,
            which contains its activation, `torch.nn.Identity`.
        norm: normalisation, likewise. A timm model made of layers of norm and activation, such as `resnetv2_50`, takes
            an EvoNorm for both.
        loss: loss of (logits, target); by default cross-entropy, binary for several labels.
        optimizer: optimizer, given parameter groups; see :func:`zoo.tasks.optim.decay_groups`.
        lr_scheduler: schedule, given the optimizer.

    Shape:
        [B, in_channels, H, W] pictures -> [B, num_classes] logits.

    Raises:
        ValueError: if `num_classes` is below 2, `in_channels` below 1 or `std` not positive, if `mean` or `std` are
            sequences of another length than `in_channels`, if there is no such backbone, or the loss runs an attack,
            which takes :class:`zoo.tasks.AdversarialClassifier`.
    """

    mean: float | Tensor
    std: float | Tensor

    def __init__(
        self,
        num_classes: int = 6,
        multi_label: bool = False,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        backbone: BackboneSpec | None = None,
        width: int = 16,
        depth: int = 1,
        act: ActivationSpec | None = None,
        norm: NormSpec | None = None,
        loss: LossSpec | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"ImageClassifier: num_classes must be at least 2, got {num_classes}")
        if in_channels < 1:
            raise ValueError(f"ImageClassifier: in_channels must be at least 1, got {in_channels}")
        for name, values in {"mean": mean, "std": std}.items():
            if isinstance(values, Sequence) and len(values) != in_channels:
                raise ValueError(
                    f"ImageClassifier: {name} must be a number, or one for each of {in_channels} channel(s), got"
                    f" {values}"
                )
        if not all(value > 0 for value in (std if isinstance(std, Sequence) else [std])):
            raise ValueError(f"ImageClassifier: std must be positive, got {std}")
        self.save_hyperparameters(ignore=("optimizer", "lr_scheduler"))
        self.num_classes, self.multi_label, self.in_channels = num_classes, multi_label, in_channels
        for name, values in {"mean": mean, "std": std}.items():
            if isinstance(values, Sequence):
                self.register_buffer(name, torch.tensor(list(values))[:, None, None], persistent=False)
            else:
                setattr(self, name, values)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        act_layer = None if act is None else factory("activation", act)
        norm_layer = None if norm is None else factory("norm", norm)
        if backbone is None:
            self.net: nn.Module = SmallResNet(
                num_classes, width, depth, act_layer or nn.ReLU, norm_layer or nn.BatchNorm2d, in_channels
            )
        else:
            self.net = build_backbone(backbone, num_classes, in_channels, act_layer, norm_layer)
        self.loss = self._make_loss(loss)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_quality, self.test_quality = self._quality(), self._quality()
        self.confusion = None if multi_label else MulticlassConfusionMatrix(num_classes)

    def _make_loss(self, loss: LossSpec | None) -> nn.Module:
        if loss is None:
            return (nn.BCEWithLogitsLoss if self.multi_label else nn.CrossEntropyLoss)()
        made = factory("loss", loss)()
        if hasattr(made, "attack"):
            raise ValueError(
                f"ImageClassifier: {type(made).__name__} attacks the model it is given; train with class_path:"
                " AdversarialClassifier, or take a loss of scores and targets"
            )
        return made

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "num_classes", None)
        if found is not None and found != self.num_classes:
            raise DataError(
                f"the data has {found} classes, the model {self.num_classes}; give model.num_classes and"
                " data.num_classes the same value"
            )
        channels = getattr(data, "channels", None)
        if channels is not None and channels != self.in_channels:
            raise DataError(
                f"the pictures have {channels} channel(s), the model takes {self.in_channels}; pass"
                f" --model.in_channels {channels}"
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - self.mean) / self.std)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, target = batch[:2]
        loss = self.loss(self(images), target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_loss, self.val_quality)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_loss, self.test_quality)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities, [B, num_classes]."""
        logits = self(batch[0])
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def on_validation_epoch_start(self) -> None:
        if self.confusion is not None:
            self.confusion.reset()

    def configure_optimizers(self) -> Any:
        return configure(self, self.optimizer, self.lr_scheduler)

    def write_report(self, folder: Path) -> dict[str, Any]:
        """Confusion matrix of the last validation."""
        if self.confusion is None or not self.confusion.update_called:
            return {}
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        counts = self.confusion.confmat.cpu()
        draw_confusion(counts, list(names or map(str, range(self.num_classes))), folder / "confusion.png")
        return {"confusion": counts.tolist()}

    def _criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        """What validation reports as the loss."""
        return self.loss(logits, target)

    def _quality(self) -> MetricCollection:
        """Metrics by the name they are logged under."""
        metrics: dict[str, Metric | MetricCollection] = {"acc": MulticlassAccuracy(self.num_classes, average="micro")}
        if self.multi_label:
            metrics["acc"] = MultilabelAccuracy(self.num_classes, average="micro")
            metrics["map"] = MultilabelAveragePrecision(self.num_classes, thresholds=200)
        return MetricCollection(metrics, compute_groups=False)  # logged one by one

    def _evaluate(self, batch: Any, stage: str, loss: MeanMetric, quality: MetricCollection) -> None:
        images, target = batch[:2]
        logits = self(images)
        loss.update(self._criterion(logits, target), len(images))  # weighted: the last batch may be smaller
        # Probabilities: the metrics of several labels take a batch of logits for such if all lie in [0, 1].
        quality.update(logits.sigmoid() if self.multi_label else logits, target.long())
        if self.confusion is not None and stage == "val" and not self.trainer.sanity_checking:
            self.confusion.update(logits, target)
        metrics = {f"{stage}/loss": loss, **{f"{stage}/{name}": metric for name, metric in quality.items()}}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)


class SmallResNet(nn.Module):
    """A 3x3 stem and three stages of residual blocks, halving the picture and doubling the channels between stages.

    Pre-activation (He et al., Identity Mappings, 2016, arXiv:1603.05027): every activation sees normalised input, which
    keeps polynomial ones from growing block by block.

    Args:
        num_classes: outputs.
        width: channels of the first stage.
        depth: blocks a stage.
        act: makes an activation, called without arguments.
        norm: makes a normalisation, called with the number of channels.
        in_channels: channels of a picture.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        depth: int,
        act: Callable[..., nn.Module],
        norm: Callable[..., nn.Module],
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        before = width
        for stage, after in enumerate([width, 2 * width, 4 * width]):
            for i in range(depth):
                blocks.append(ResidualBlock(before, after, 2 if stage and i == 0 else 1, act, norm))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.act = norm(before), act()
        self.head = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.norm(self.blocks(self.stem(images))))
        return self.head(features.mean((2, 3)))


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(
        self, before: int, after: int, stride: int, act: Callable[..., nn.Module], norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            norm(before),
            act(),
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            norm(after),
            act(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


def draw_confusion(counts: Tensor, names: list[str], path: Path) -> None:
    """Confusion matrix, true classes down, predicted ones across."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    side = 1.8 + 0.55 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axis.set_xticks(ticks, names, rotation=45, ha="right")
    axis.set_yticks(ticks, names)
    axis.set(xlabel="predicted", ylabel="true")
    for i in ticks:
        for j in ticks:
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=color)
    figure.savefig(path, dpi=120)
