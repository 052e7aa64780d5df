"""The callback that draws class activation maps while a model trains."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor, nn

from ..errors import RunError
from ..explain import CAMError, CAMWarning
from ..explain.engine import explaining
from ..explain.errors import NonFinite
from ..explain.overlay import colorize, denormalize, grid
from ..explain.targets import default_output
from ..registry import factory

Stage = Literal["validation", "test"]
Explained = Literal["label", "prediction", "both"]
MetricName = Literal["average_drop", "increase_in_confidence", "insertion_auc", "deletion_auc"]


class CAMCallback(L.Callback):
    """Draw the class activation maps of the same few pictures after each validation, and log what the maps are worth.

    The pictures are the first of the validation loader, so that the drawings of a run, resumed or not, can be laid
    side by side. Those of a layer go to TensorBoard and Weights & Biases as `cam/<layer>`, and for any other logger, or
    none, to `cam/step_<step>_<layer>.png` in the run directory; a later `zoo validate` or `zoo test` names them by its
    checkpoint. Metrics are logged as `val/<name>`, of the first layer and the last target. The process of rank 0 does
    it all (the metrics can be monitored only where it is alone), the sanity check before training is left out, and
    training goes on as if nothing had been drawn.

    What is explained is the task's network (`model_attr`), on what the task's `forward` gives it: normalisation in
    there needs no mention.

    Args:
        method: "smooth_grad_cam_pp", "grad_cam_pp" or "grad_cam", with arguments as {name: smooth_grad_cam_pp,
            n_samples: 8, sigma: 0.15}.
        layers: names in the network, one or several; None for an automatic choice, kept from the first drawing on;
            "last" for the deepest.
        num_images: pictures of a drawing.
        every_n_epochs: epochs from one drawing to the next.
        stage: "validation", of a fit or of `zoo validate`, or "test".
        targets: explain the "label", the "prediction", or "both" in this order. Of several labels a picture, [B, C] of
            0 and 1, the first that is present is explained; of a picture without any, or with one that is no class,
            the prediction.
        class_names: names by number; None for those of the data module, or else the numbers.
        cmap, alpha: of :func:`zoo.explain.overlay`.
        log_metrics: of "average_drop", "increase_in_confidence", "insertion_auc" and "deletion_auc"; () for none. With
            several labels a picture a class's confidence is its sigmoid.
        metric_images: how many pictures, the first ones, metrics are of.
        model_attr: attribute of the task that holds the network; None for `net` or `model`, or else the task itself.
        input_key, label_key: where a batch has its pictures [B, C, H, W] and labels; `label_key` may be None if the
            prediction is explained.
        mean, std: of the normalisation that a batch's pictures have behind them, to draw them; None for those of the
            data module, and for pictures outside of [0, 1] the task's hyper-parameters.

    Raises:
        ValueError: if an argument is out of range.
        UnknownComponentError, ComponentArgumentError: if the method or one of its arguments does not exist.
        RunError: when training starts if there is no such network or layer, and at the first drawing if nothing can
            be explained. What goes wrong later is a warning, and training goes on.
    """

    def __init__(
        self,
        method: str | dict[str, Any] = "smooth_grad_cam_pp",
        layers: str | list[str] | None = None,
        num_images: int = 8,
        every_n_epochs: int = 1,
        stage: Stage = "validation",
        targets: Explained = "label",
        class_names: Sequence[str] | None = None,
        cmap: str = "turbo",
        alpha: float = 0.5,
        log_metrics: Sequence[MetricName] = ("average_drop", "increase_in_confidence"),
        metric_images: int = 64,
        model_attr: str | None = None,
        input_key: int | str = 0,
        label_key: int | str | None = 1,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> None:
        counts = {"num_images": num_images, "every_n_epochs": every_n_epochs, "metric_images": metric_images}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"CAMCallback: {name} must be at least 1, got {count}")
        _check_choice("stage", stage, get_args(Stage))
        _check_choice("targets", targets, get_args(Explained))
        for name in log_metrics:
            _check_choice("log_metrics", name, get_args(MetricName))
        if label_key is None and targets != "prediction":
            raise ValueError(f"CAMCallback: targets: {targets} needs a label_key; say targets: prediction without one")
        if (mean is None) != (std is None):
            raise ValueError("CAMCallback: give mean and std together, or neither")
        if not 0 <= alpha <= 1:
            raise ValueError(f"CAMCallback: alpha must lie in [0, 1], got {alpha}")
        colorize(torch.zeros(1, 1), cmap)  # refuses an unknown one, now rather than after an epoch
        self._make = factory("explainer", method)
        self._make(nn.Identity())  # refuses arguments out of range
        self.layers, self.num_images, self.every_n_epochs, self.stage = layers, num_images, every_n_epochs, stage
        self.targets: Explained = targets
        self.class_names, self.cmap, self.alpha = class_names, cmap, alpha
        self.log_metrics, self.metric_images, self.model_attr = tuple(log_metrics), metric_images, model_attr
        self.input_key, self.label_key, self.mean, self.std = input_key, label_key, mean, std
        self._begin()

    # What is drawn, and when

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._begin()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find mistakes in the configuration before an epoch is trained."""
        try:
            self._make(self._network(pl_module), self._layers)
        except CAMError as error:
            raise RunError(f"CAMCallback: {error}") from None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.stage == "validation" and not trainer.sanity_checking and not dataloader_idx:
            self._keep(trainer, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.stage == "test" and not dataloader_idx:
            self._keep(trainer, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        due = trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if self.stage == "validation" and not trainer.sanity_checking:
            self._explain(trainer, pl_module, "val", due)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stage == "test":
            self._explain(trainer, pl_module, "test", True)

    def _begin(self) -> None:
        self._layers = self.layers
        self._kept: list[tuple[Tensor, Tensor | None]] = []
        self._missing = max(self.num_images, self.metric_images if self.log_metrics else 0)
        self._drawn = False

    def _keep(self, trainer: L.Trainer, batch: Any) -> None:
        if not self._missing or not trainer.is_global_zero:
            return
        images = _of(batch, self.input_key, "input_key")
        labels = None if self.label_key is None else _of(batch, self.label_key, "label_key")
        if images.ndim != 4 or not images.is_floating_point():
            raise RunError(
                f"CAMCallback: pictures must be floating point [B, C, H, W], batch[{self.input_key!r}] is"
                f" {images.dtype} {list(images.shape)}; give the input_key of what the model takes"
            )
        if labels is not None and labels.ndim not in (1, 2):
            raise RunError(
                f"CAMCallback: labels must be [B] classes or [B, C] of 0 and 1, batch[{self.label_key!r}] is"
                f" {list(labels.shape)}; give the label_key of such, or targets: prediction and label_key: null"
            )
        n = min(len(images), self._missing)
        self._missing -= n
        self._kept.append((images[:n].cpu().clone(), None if labels is None else labels[:n].cpu().clone()))

    def _explain(self, trainer: L.Trainer, module: L.LightningModule, prefix: str, due: bool) -> None:
        self._missing = 0  # a loader with fewer pictures than wanted must not fill up with its first ones again
        if not self._kept or not due:
            return
        try:
            self._draw(trainer, module, prefix)
            self._drawn = True
        except CAMError as error:
            # numbers that are no longer finite are training's fault, not the configuration's
            if not self._drawn and not isinstance(error, NonFinite):
                raise RunError(f"CAMCallback: {error}") from error
            warnings.warn(f"no class activation maps at step {trainer.global_step}: {error}", CAMWarning, stacklevel=2)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, prefix: str) -> None:
        network = self._network(module)
        explainer = self._make(network, self._layers)
        names = self.class_names or getattr(getattr(trainer, "datamodule", None), "class_names", None)
        drawing, worth = _Drawing(names, self.num_images), {}
        for images, labels in self._kept:
            x, logits = _passed(module, network, images.to(module.device))
            classes = _classes(labels, logits, self.targets)
            result = explainer(x, classes)
            self._layers = list(result.maps)  # an automatic choice stays
            drawing.add(self._pictures(images, trainer, module), labels, classes, logits, result)
            for name in self.log_metrics:
                several = labels is not None and labels.ndim == 2
                if name not in worth:
                    options = {"scores": "sigmoid" if several else "softmax", "output_fn": default_output}
                    worth[name] = factory("metric", name)(**options, sync_on_compute=False).to(x.device)
                worth[name].update(network, x, result.heatmap(self._layers[0])[:, -1], classes[:, -1])
        for layer in drawing.maps:
            self._show(trainer, layer, drawing.picture(layer, cmap=self.cmap, alpha=self.alpha))
        figures = {f"{prefix}/{name}": metric.compute() for name, metric in worth.items()}
        # NaN, of which the metric warns, says no more than a missing line
        figures = {name: value for name, value in figures.items() if not value.isnan()}
        # sync_dist does nothing beside rank_zero_only, but for Lightning's advice to set it
        module.log_dict(figures, on_epoch=True, batch_size=1, rank_zero_only=True, sync_dist=True)

    def _network(self, module: L.LightningModule) -> nn.Module:
        for name in [self.model_attr] if self.model_attr else ["net", "model"]:
            found = getattr(module, name, None)
            if isinstance(found, nn.Module):
                return found
        if self.model_attr:
            names = ", ".join(name for name, _ in module.named_children())
            raise RunError(
                f"CAMCallback: model_attr: {type(module).__name__} has no network {self.model_attr!r}; it has {names}"
            )
        return module

    def _pictures(self, images: Tensor, trainer: L.Trainer, module: L.LightningModule) -> Tensor:
        """uint8, of a batch's pictures."""
        if self.mean is not None and self.std is not None:
            return denormalize(images, self.mean, self.std)
        data = getattr(trainer, "datamodule", None)
        if (mean := getattr(data, "mean", None)) is not None and (std := getattr(data, "std", None)) is not None:
            return denormalize(images, mean, std)
        low, high = float(images.min()), float(images.max())
        if low >= 0 and high <= 1:
            return denormalize(images, 0.0, 1.0)
        if "mean" in module.hparams and "std" in module.hparams:
            return denormalize(images, module.hparams["mean"], module.hparams["std"])
        raise RunError(
            f"CAMCallback: the pictures of a batch lie in [{low:.3g}, {high:.3g}], not in [0, 1]; give the mean and std"
            " they were normalised by"
        )

    def _show(self, trainer: L.Trainer, layer: str, picture: Image.Image) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        step = trainer.global_step
        for logger in trainer.loggers or [None]:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"cam/{layer}", np.asarray(picture), step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(f"cam/{layer}", [picture], step)
            else:
                name = f"step_{step:06d}"
                if trainer.state.fn not in (None, "fit"):
                    weights = Path(trainer.ckpt_path).stem if trainer.ckpt_path else "weights"
                    name = f"{trainer.state.fn.value}_{weights}"
                folder = Path(getattr(logger, "log_dir", None) or trainer.default_root_dir) / "cam"
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{name}_{layer}.png")


class _Drawing:
    """Pictures with their maps, a picture a row.

    Args:
        names: of the classes; None for their numbers.
        wanted: pictures at most.
    """

    def __init__(self, names: Sequence[str] | None, wanted: int) -> None:
        self.names, self.wanted = names, wanted
        self.images: list[Tensor] = []
        self.titles: list[str] = []
        self.maps: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, images: Tensor, labels: Tensor | None, classes: Tensor, logits: Tensor, result: Any) -> None:
        """A batch.

        Args:
            images: uint8 [B, C, H, W].
            labels: [B], or [B, C] of 0 and 1.
            classes: [B, T], explained.
            logits: [B, C].
            result: a :class:`zoo.explain.CAMResult` of them.
        """
        several = labels is not None and labels.ndim == 2
        shares = logits.sigmoid() if several else logits.softmax(1)
        heat = {layer: result.heatmap(layer).cpu() for layer in result.maps}
        for i in range(min(len(images), self.wanted - len(self.images))):
            self.images.append(images[i])
            present = [] if labels is None else labels[i].nonzero().flatten() if several else [labels[i]]
            self.titles.append(", ".join(self._name(c) for c in present) or "no label")
            self.titles += [f"{self._name(c)} {float(shares[i, c]):.2f}" for c in classes[i]]
            for layer, maps in heat.items():
                self.maps[layer].append(maps[i])

    def picture(self, layer: str, **options: Any) -> Image.Image:
        """All of them with the maps of a layer."""
        return grid(self.images, self.maps[layer], self.titles, **options)

    def _name(self, number: Tensor) -> str:
        return str(int(number)) if self.names is None else self.names[int(number)]


def _passed(module: L.LightningModule, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the task gives its network for these pictures, and the scores that come back, on the CPU."""
    seen: list[tuple[Any, Any]] = []
    handle = network.register_forward_hook(lambda _, given, output: seen.append((given, output)))
    try:
        with explaining(module, images.device, None):
            # a task without a forward of its own calls its network in the steps
            (network if type(module).forward is L.LightningModule.forward else module)(images)
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0][0]) != 1:
        raise RunError(
            f"CAMCallback: forward of {type(module).__name__} must call its network once, with the pictures alone; name"
            " another as model_attr"
        )
    (x,), output = seen[0]
    scores = default_output(output)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RunError(f"CAMCallback: the network must return scores [B, C], got {got}; name another as model_attr")
    return x, scores.float().cpu()


def _classes(labels: Tensor | None, logits: Tensor, wanted: Explained) -> Tensor:
    """[B, T] classes to explain."""
    predicted = logits.argmax(1)
    if labels is None or wanted == "prediction":
        return predicted[:, None]
    true = labels.long()
    if labels.ndim == 2:
        true = torch.where((labels > 0).any(1), labels.argmax(1), predicted)  # of equal ones the first
    true = torch.where((true >= 0) & (true < logits.shape[1]), true, predicted)  # others are there to be ignored
    return true[:, None] if wanted == "label" else torch.stack([true, predicted], 1)


def _of(batch: Any, key: int | str, argument: str) -> Tensor:
    try:
        found = batch[key]
    except (IndexError, KeyError, TypeError):
        found = None
    if not isinstance(found, Tensor):
        raise RunError(
            f"CAMCallback: {argument}: a batch of the loader has no tensor at {key!r}, it is a {type(batch).__name__}"
        )
    return found


def _check_choice(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"CAMCallback: {argument} must be one of {', '.join(known)}, got {value!r}")
