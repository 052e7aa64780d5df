"""The classifier: networks, losses, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zoo import PolyReLU
from zoo.cli import main
from zoo.errors import DataError
from zoo.norms import EvoNorm2d
from zoo.tasks import ImageClassifier, PreActResNet18


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


def test_a_timm_model_takes_an_evonorm_for_norm_and_activation() -> None:
    with torch.device("meta"):
        model = ImageClassifier(num_classes=3, backbone="resnetv2_50", norm={"name": "evonorm_s0", "groups": 8})
        layers = [m for m in model.modules() if isinstance(m, EvoNorm2d)]
        assert len(layers) == 49
        assert all(layer.apply_act and layer.groups == 8 for layer in layers)
        assert not any(isinstance(m, (nn.ReLU, nn.BatchNorm2d)) for m in model.net.modules())
        assert model(torch.rand(2, 3, 64, 64)).shape == (2, 3)
        linear = ImageClassifier(num_classes=3, backbone="efficientnet_b0", norm="evonorm_b0")
    without_activation = [m for m in linear.modules() if isinstance(m, EvoNorm2d) and not m.apply_act]
    assert len(without_activation) == 16  # the last of each block


def test_a_timm_model_puts_its_activation_behind_a_norm_without_one() -> None:
    with torch.device("meta"):
        model = ImageClassifier(num_classes=3, backbone="resnetv2_50", norm="torch.nn.BatchNorm2d")
    assert sum(isinstance(m, nn.ReLU) for m in model.net.modules()) == 49


@pytest.mark.parametrize("backbone", [None, "resnet10t"])
def test_pictures_of_one_channel_are_taken(backbone: str | None) -> None:
    model = ImageClassifier(num_classes=3, in_channels=1, backbone=backbone, width=8)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 3)


def test_the_network_sees_centred_pictures() -> None:
    model = ImageClassifier(num_classes=3, width=8, mean=0.5, std=0.25).eval()
    pictures = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(pictures), model.net((pictures - 0.5) / 0.25))


def test_each_channel_may_have_its_own_mean_and_std() -> None:
    mean, std = [0.1, 0.5, 0.9], [0.5, 0.25, 1.0]
    model = ImageClassifier(num_classes=3, width=8, mean=mean, std=std).eval()
    pictures = torch.rand(2, 3, 16, 16)
    centred = torch.stack([(pictures[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(model(pictures), model.net(centred))
    assert not {"mean", "std"} & set(model.state_dict())  # as before there were any


def test_a_network_of_ours_goes_by_name() -> None:
    model = ImageClassifier(num_classes=3, in_channels=1, backbone={"name": "mlp", "size": 8, "hidden": [4]})
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert isinstance(ImageClassifier(backbone="preact_resnet18").net, PreActResNet18)


def test_data_of_other_channels_are_refused() -> None:
    model = ImageClassifier(num_classes=10)
    model.trainer = SimpleNamespace(datamodule=SimpleNamespace(num_classes=10, channels=1))  # type: ignore[assignment]
    with pytest.raises(
        DataError, match="the pictures have 1 channel.s., the model takes 3; pass --model.in_channels 1"
    ):
        model.setup("fit")


def test_loss_follows_the_labels() -> None:
    assert isinstance(ImageClassifier().loss, nn.CrossEntropyLoss)
    assert isinstance(ImageClassifier(multi_label=True).loss, nn.BCEWithLogitsLoss)
    assert ImageClassifier(loss={"name": "comp_sum", "tau": 1.7}).loss.tau == 1.7
    given = ImageClassifier(loss={"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}})
    assert given.loss.label_smoothing == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"std": [0.5, 0.5, 0.0]}, r"std must be positive, got \[0.5, 0.5, 0.0\]"),
        ({"mean": [0.5]}, r"mean must be a number, or one for each of 3 channel.s., got \[0.5\]"),
        ({"std": (1.0, 1.0)}, r"std must be a number, or one for each of 3 channel.s., got \(1.0, 1.0\)"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**arguments)


def test_several_labels_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a probability of 1/2, also in a batch whose logits could be probabilities."""
    model = ImageClassifier(num_classes=2, multi_label=True)
    logits = torch.tensor([[0.2, 0.9], [0.4, 0.1], [0.3, 0.0]])
    model.net = nn.Identity()
    logged: dict = {}
    monkeypatch.setattr(model, "log_dict", lambda metrics, **_: logged.update(metrics))
    target = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    model._evaluate((logits, target), "val", model.val_loss, model.val_quality)
    assert set(logged) == {"val/loss", "val/acc", "val/map"}
    assert logged["val/acc"].compute().item() == pytest.approx(5 / 6)
    assert logged["val/map"].compute().item() == pytest.approx((1 / 2 * (1 + 2 / 3) + 1) / 2, abs=0.01)
    assert set(ImageClassifier(num_classes=2).val_quality) == {"acc"}


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
    assert ("val/map" in result["final"]) is multi_label
    assert "val/acc" in result["final"]
    assert Path("runs/shapes_polyrelu/report/confusion.png").exists() is not multi_label
