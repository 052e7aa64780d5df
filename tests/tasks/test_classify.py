"""The classifier: networks, losses, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo import PolyReLU
from zoo.cli import main
from zoo.tasks import ImageClassifier


def test_components_are_built_at_every_place() -> None:
    model = ImageClassifier(
        num_classes=4, width=8, act={"name": "polyrelu", "order": 2}, norm="torch.nn.InstanceNorm2d"
    )
    activations = [m for m in model.modules() if isinstance(m, PolyReLU)]
    assert len(activations) == len({id(m) for m in activations}) == 7
    assert not any(isinstance(m, (nn.ReLU, nn.BatchNorm2d)) for m in model.modules())
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 4)


def test_timm_model_takes_our_parts() -> None:
    model = ImageClassifier(num_classes=3, backbone="resnet10t", act="polyrelu")
    assert any(isinstance(m, PolyReLU) for m in model.modules())
    assert not any(isinstance(m, nn.ReLU) for m in model.net.modules())
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_loss_follows_the_labels() -> None:
    assert isinstance(ImageClassifier().loss, nn.CrossEntropyLoss)
    assert isinstance(ImageClassifier(multi_label=True).loss, nn.BCEWithLogitsLoss)
    given = ImageClassifier(loss={"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}})
    assert given.loss.label_smoothing == 0.1


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        ImageClassifier(num_classes=1)


@pytest.mark.parametrize("multi_label", [False, True])
def test_training_improves_and_reports(multi_label: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quality = "val/map" if multi_label else "val/acc"
    flag = str(multi_label).lower()
    small = ["--data.size=24", "--data.length=640", "--data.val_length=60", "--model.width=8", "--model.num_classes=3"]
    given = [*small, "--data.num_classes=3", f"--data.multi_label={flag}", f"--model.multi_label={flag}"]
    given += ["--data.max_objects=1", f"--best.monitor={quality}", "--trainer.max_epochs=8", "--config=_parts/quiet"]
    assert main(["fit", "--config=classify/shapes_polyrelu", *given]) == 0
    result = json.loads(Path("runs/shapes_polyrelu/report/result.json").read_text())
    assert result["best"]["metric"] == quality
    assert result["best"]["value"] > 0.5  # a third would be chance
    assert Path("runs/shapes_polyrelu/report/confusion.png").exists() is not multi_label
