"""The callback that draws class activation maps: it draws, logs, and leaves training alone."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from zoo.cli import main
from zoo.errors import ComponentArgumentError, RunError, UnknownComponentError
from zoo.explain import CAMError, CAMWarning, GradCAMpp
from zoo.metrics import AverageDrop
from zoo.tasks import CAMCallback, ImageClassifier
from zoo.tasks.explain import _classes

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
QUICK = {"name": "smooth_grad_cam_pp", "n_samples": 2}


class Scenes(L.LightningDataModule):
    """Twenty-four noisy pictures of a bright square in one of four corners, shuffled for training."""

    class_names = ("north-west", "north-east", "south-west", "south-east")

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.target = torch.arange(24) % 4
        self.pictures = 0.3 * torch.rand(24, 3, 16, 16, generator=draw)
        for picture, corner in zip(self.pictures, self.target.tolist(), strict=True):
            top, left = 8 * (corner // 2), 8 * (corner % 2)
            picture[:, top + 2 : top + 6, left + 2 : left + 6] += 0.6
        if several:
            self.target = nn.functional.one_hot(self.target, 4).float()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.pictures, self.target), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.pictures, self.target), batch_size=5)

    test_dataloader = val_dataloader


class Dropping(nn.Module):
    """Convolutions, a norm with running statistics, dropout, and a tail that is not linear."""

    def __init__(self, num_classes: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 8), nn.ReLU())
        self.head.append(nn.Linear(8, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def task(**arguments: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(4, backbone=Dropping, mean=0.4, std=0.25, **arguments)


def fitted(folder: Path, *callbacks: L.Callback, epochs: int = 2, several: bool = False, **more: Any) -> L.Trainer:
    model, data = task(multi_label=several), Scenes(several)
    given = {**QUIET, "logger": False, "default_root_dir": folder, "enable_checkpointing": False, **more}
    trainer = L.Trainer(**given, max_epochs=epochs, log_every_n_steps=1, callbacks=list(callbacks))
    torch.manual_seed(5)
    trainer.fit(model, data)
    return trainer


def drawn(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cam").glob("*"))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


# Drawings and figures


def test_a_fit_is_drawn_after_each_epoch_and_trains_to_the_same_bits(tmp_path: Path) -> None:
    plain = fitted(tmp_path / "plain")
    numbers = torch.get_rng_state()
    trainer = fitted(tmp_path / "drawn", CAMCallback(QUICK, num_images=4))
    assert torch.equal(torch.get_rng_state(), numbers)
    before, after = (t.lightning_module.state_dict() for t in (plain, trainer))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert drawn(tmp_path / "plain") == []
    assert drawn(tmp_path / "drawn") == ["step_000003_features.png", "step_000006_features.png"]
    assert 0 <= trainer.callback_metrics["val/average_drop"] <= 100
    assert 0 <= trainer.callback_metrics["val/increase_in_confidence"] <= 100
    # two tiles of 128 pixels across, four rows with a line of text
    width, height = size(tmp_path / "drawn/cam/step_000003_features.png")
    assert width == 2 * 132 + 4
    assert height > 4 * 132


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_without_training_it_draws_in_inference_mode(stage: str, tmp_path: Path) -> None:
    model = task()
    before = copy.deepcopy(model.state_dict())
    callback = CAMCallback(QUICK, layers="features.3", stage=stage)  # type: ignore[arg-type]
    trainer = L.Trainer(**QUIET, logger=False, default_root_dir=tmp_path, callbacks=[callback])
    run, other = (trainer.validate, trainer.test) if stage == "validation" else (trainer.test, trainer.validate)
    (found,) = run(model, datamodule=Scenes(), verbose=False)
    assert {"val/average_drop" if stage == "validation" else "test/average_drop"} <= found.keys()
    name = f"{'validate' if stage == 'validation' else 'test'}_weights_features.3.png"
    assert drawn(tmp_path) == [name]
    (found,) = other(model, datamodule=Scenes(), verbose=False)
    assert not [key for key in found if "average_drop" in key]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None and not p.is_inference() for p in model.parameters())


def test_figures_are_those_of_the_metric_on_what_the_network_sees(tmp_path: Path) -> None:
    model, data = task(), Scenes()
    x, target = (data.pictures[:7] - 0.4) / 0.25, data.target[:7]
    metric = AverageDrop()
    metric.update(model.net, x, GradCAMpp(model.net, "features").heatmap(x, target), target)
    callback = CAMCallback("grad_cam_pp", "features", log_metrics=["average_drop"], metric_images=7, num_images=1)
    trainer = L.Trainer(**QUIET, logger=False, default_root_dir=tmp_path, callbacks=[callback])
    (found,) = trainer.validate(model, data, verbose=False)
    assert found["val/average_drop"] == pytest.approx(float(metric.compute()), rel=1e-4)
    assert "val/increase_in_confidence" not in found


class Watch(CAMCallback):
    """Remembers pictures and layers of each drawing."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.seen: list[Tensor] = []
        self.chosen: list[Any] = []

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, prefix: str) -> None:
        super()._draw(trainer, module, prefix)
        self.seen.append(torch.cat([images for images, _ in self._kept]))
        self.chosen.append(self._layers)


def test_the_same_first_pictures_and_layer_every_so_many_epochs(tmp_path: Path) -> None:
    watch = Watch(QUICK, every_n_epochs=2, num_images=6, log_metrics=())
    fitted(tmp_path, watch, epochs=4)
    assert len(watch.seen) == 2
    assert all(torch.equal(seen, Scenes().pictures[:6]) for seen in watch.seen)
    assert watch.chosen == [["features"], ["features"]]
    assert drawn(tmp_path) == ["step_000006_features.png", "step_000012_features.png"]


def test_a_loader_with_fewer_pictures_gives_each_once(tmp_path: Path) -> None:
    watch = Watch(QUICK, num_images=99, log_metrics=())
    fitted(tmp_path, watch, epochs=2)
    assert [len(seen) for seen in watch.seen] == [24, 24]


def test_each_layer_has_a_drawing_and_both_targets_a_column(tmp_path: Path) -> None:
    callback = CAMCallback(QUICK, ["features.0", "features.3"], num_images=2, targets="both", metric_images=2)
    fitted(tmp_path, callback, epochs=1)
    assert drawn(tmp_path) == ["step_000003_features.0.png", "step_000003_features.3.png"]
    assert size(tmp_path / "cam/step_000003_features.3.png")[0] == 3 * 132 + 4


def test_several_labels_are_explained_by_the_first(tmp_path: Path) -> None:
    logits = torch.tensor([[0.0, 1, 2], [5, 1, 2], [0, 3, 1]])
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert _classes(labels, logits, "label").tolist() == [[1], [0], [1]]
    assert _classes(labels, logits, "both").tolist() == [[1, 2], [0, 0], [1, 1]]
    assert _classes(labels.argmax(1), logits, "prediction").tolist() == [[2], [0], [1]]
    assert _classes(None, logits, "prediction").tolist() == [[2], [0], [1]]
    trainer = fitted(tmp_path, CAMCallback(QUICK), epochs=1, several=True)
    assert "val/average_drop" in trainer.callback_metrics
    assert drawn(tmp_path) == ["step_000003_features.png"]


# Loggers


def test_tensorboard_gets_an_image_and_any_other_logger_a_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path, name="board", version=""), CSVLogger(tmp_path, name="csv", version="")]
    fitted(tmp_path, CAMCallback(QUICK), epochs=1, logger=loggers)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (image,) = events.Images("cam/features")
    assert (image.step, image.width) == (3, 268)
    assert drawn(tmp_path) == []
    assert drawn(tmp_path / "csv") == ["step_000003_features.png"]


def test_weights_and_biases_gets_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple] = []
    logger = WandbLogger.__new__(WandbLogger)
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, step: logged.append((key, images, step)))
    callback = CAMCallback(QUICK)
    trainer = type("Trainer", (), {"global_step": 7, "loggers": [logger], "fast_dev_run": False})()
    callback._show(trainer, "features", Image.new("RGB", (4, 4)))
    ((key, (picture,), step),) = logged
    assert (key, picture.size, step) == ("cam/features", (4, 4), 7)


# Tasks of other kinds


class Wrapped(L.LightningModule):
    """A task as others write it: its network called `model`, batches as mappings, no forward of its own."""

    def __init__(self, batch: dict[str, Tensor], mean: float = 0.5, std: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="batch")
        self.model, self.batch = Dropping(), batch

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(batch["image"]).mean())

    def val_dataloader(self) -> DataLoader:
        return DataLoader([{k: v[i] for k, v in self.batch.items()} for i in range(4)], batch_size=4)


class Forward(Wrapped):
    """The same with a forward that gives its network the pictures twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.model(x)


def validated(module: L.LightningModule, folder: Path, **arguments: Any) -> None:
    arguments = {"method": QUICK, "input_key": "image", "label_key": "label", **arguments}
    trainer = L.Trainer(**QUIET, logger=False, default_root_dir=folder, callbacks=[CAMCallback(**arguments)])
    trainer.validate(module, verbose=False)


BATCH = {"image": torch.randn(4, 3, 16, 16), "label": torch.arange(4)}


def test_batches_may_be_mappings_and_pictures_normalised_by_the_hyper_parameters(tmp_path: Path) -> None:
    validated(Wrapped(BATCH), tmp_path)
    validated(Wrapped(BATCH), tmp_path, mean=[0.1, 0.1, 0.1], std=1.0)
    validated(Wrapped({"image": BATCH["image"]}), tmp_path, targets="prediction", label_key=None)
    assert drawn(tmp_path) == ["validate_weights_features.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_key": 0}, "input_key: a batch of the loader has no tensor at 0, it is a dict"),
        ({"label_key": "class"}, "label_key: a batch of the loader has no tensor at 'class'"),
        ({"input_key": "label"}, r"must be floating point \[B, C, H, W\], batch\['label'\] is torch.int64 \[4\]"),
        ({"label_key": "image"}, r"labels must be \[B\] classes or \[B, C\] of 0 and 1, batch\['image'\] is"),
        ({"model_attr": "trunk"}, "model_attr: Wrapped has no network 'trunk'; it has model"),
        ({"model_attr": "model.features"}, "has no network 'model.features'"),
        ({"layers": "feature"}, "the model has no layer 'feature'. Did you mean 'features'"),
        ({"layers": "head.5"}, "head.5"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_sentence(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=message):
        validated(Wrapped(BATCH), tmp_path, **arguments)


def test_pictures_of_an_unknown_range_and_odd_forwards_are_refused(tmp_path: Path) -> None:
    module = Wrapped(BATCH)
    module.hparams.clear()
    with pytest.raises(RunError, match=r"lie in \[-.*\], not in \[0, 1\]; give the mean and std"):
        validated(module, tmp_path)
    with pytest.raises(RunError, match="forward of Forward must call its network once"):
        validated(Forward(BATCH), tmp_path)
    module = Wrapped(BATCH)
    module.net = module.model.features
    with pytest.raises(RunError, match=r"must return scores \[B, C\], got \[4, 8, 16, 16\]"):
        validated(module, tmp_path)


def test_a_layer_that_is_not_there_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="CAMCallback: the model has no layer 'backbone'"):
        fitted(tmp_path, CAMCallback(QUICK, layers="backbone"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "smooth_grad_cam"}, UnknownComponentError, "Did you mean 'smooth_grad_cam_pp'"),
        ({"method": {"name": "grad_cam", "n_samples": 3}}, ComponentArgumentError, "has no argument 'n_samples'"),
        ({"method": {"name": "smooth_grad_cam_pp", "sigma": -1}}, ValueError, "sigma must be finite and not negative"),
        ({"num_images": 0}, ValueError, "num_images must be at least 1, got 0"),
        ({"stage": "val"}, ValueError, "stage must be one of validation, test, got 'val'"),
        ({"targets": "true"}, ValueError, "targets must be one of label, prediction, both, got 'true'"),
        ({"log_metrics": ["drop"]}, ValueError, "log_metrics must be one of average_drop, .* got 'drop'"),
        ({"label_key": None}, ValueError, "targets: label needs a label_key"),
        ({"mean": 0.5}, ValueError, "give mean and std together"),
        ({"alpha": 2}, ValueError, r"alpha must lie in \[0, 1\], got 2"),
        ({"cmap": "turbot"}, CAMError, "turbot"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CAMCallback(**arguments)


def test_what_fails_later_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(CAMCallback):
        def _draw(self, trainer: L.Trainer, module: L.LightningModule, prefix: str) -> None:
            if trainer.current_epoch == 1:
                raise CAMError("the score is saturated")
            super()._draw(trainer, module, prefix)

    with pytest.warns(CAMWarning, match="no class activation maps at step 6: the score is saturated"):
        fitted(tmp_path, Fails(QUICK), epochs=3)
    assert drawn(tmp_path) == ["step_000003_features.png", "step_000009_features.png"]


def test_a_network_that_has_diverged_is_a_warning_at_once(tmp_path: Path) -> None:
    module = Wrapped(BATCH)
    nn.init.constant_(module.model.head[-1].weight, torch.nan)
    with pytest.warns(CAMWarning, match="no class activation maps at step 0: .*NaN"):
        validated(module, tmp_path)


# From a config


def config(folder: Path, **callback: Any) -> str:
    callbacks = [{"class_path": "CAMCallback", "init_args": {"method": dict(QUICK), "num_images": 2, **callback}}]
    data = {"size": 32, "num_classes": 4, "length": 32, "val_length": 16, "batch_size": 16}
    said = {
        "trainer": {**QUIET, "max_epochs": 2, "log_every_n_steps": 1, "callbacks": callbacks},
        "best": {"monitor": "val/acc", "mode": "max"},
        "model": {"class_path": "ImageClassifier", "init_args": {"num_classes": 4, "width": 4}},
        "data": {"class_path": "Shapes", "init_args": data},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(said))
    return str(folder / "tiny.yaml")


@pytest.mark.filterwarnings("ignore:.*some map is 0 everywhere")  # of a network so small
def test_a_run_draws_into_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--config", config(tmp_path, layers=["blocks.1"])]
    assert main(["fit", *given]) == 0
    assert drawn(tmp_path / "runs/tiny") == ["step_000002_blocks.1.png", "step_000004_blocks.1.png"]
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert sum("val/average_drop" in row for row in rows) == 2
    assert main(["validate", *given]) == 0
    assert "validate_best_blocks.1.png" in drawn(tmp_path / "runs/tiny")


@pytest.mark.filterwarnings("ignore:.*some map is 0 everywhere")
def test_a_resumed_run_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["fit", "--config", config(tmp_path, layers=["blocks.1"])]
    assert main([*given, "--run_dir", "whole"]) == 0
    assert main([*given, "--run_dir", "halves", "--trainer.max_epochs", "1"]) == 0
    assert main([*given, "--run_dir", "halves", "--ckpt_path", "last"]) == 0
    names = drawn(tmp_path / "whole")
    assert names == drawn(tmp_path / "halves")
    for name in names:
        assert (tmp_path / "whole/cam" / name).read_bytes() == (tmp_path / "halves/cam" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:.*some map is 0 everywhere")
def test_a_rehearsal_writes_nothing_and_a_mistake_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", config(tmp_path), "--trainer.fast_dev_run", "true"]) == 0
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config(tmp_path, layers="block")])
    assert stop.value.code == 2
    assert "error: CAMCallback: the model has no layer 'block'. Did you mean 'blocks'" in capsys.readouterr().err


def test_the_explainers_are_left_to_warn(tmp_path: Path) -> None:
    model = task()
    model.net.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    trainer = L.Trainer(**QUIET, logger=False, default_root_dir=tmp_path, callbacks=[CAMCallback(QUICK, "features")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(model, Scenes(), verbose=False)
    assert any("the score is linear behind features" in str(w.message) for w in caught)


def test_it_is_exported() -> None:
    assert CAMCallback.__module__ == "zoo.tasks.explain"
    assert "explainer" in zoo.registry.KINDS


def test_labels_that_are_to_be_ignored_are_not_explained() -> None:
    from zoo.tasks.explain import _classes

    logits = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert _classes(torch.tensor([0, -1, 2]), logits, "label").tolist() == [[0], [0], [1]]
