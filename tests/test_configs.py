"""Every shipped config parses, builds and takes a step; its optimizer says everything that matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from zoo.cli import main
from zoo.engine.configs import resolve, shipped_configs

CONFIGS = {name: path for name, path in shipped_configs().items() if not name.startswith("_")}
PARTS = {name: path for name, path in shipped_configs().items() if name.startswith("_")}
PAPER = "lm/paper_1b_polynorm"  # too large to step here
IMAGENET = "classify/imagenet_r50_evonorm_s0"  # likewise
WIDE = "robust/paper_wrn28"  # likewise
NORMS = ("evonorm_s0", "evonorm_b0", "bn_relu", "gn_relu")
BATCHES = (1, 2, 32)
SWEEP = {f"classify/shapes_{norm}_b{batch}": (norm, batch) for norm in NORMS for batch in BATCHES}

# A step of each norm is enough: the twelve differ in nothing else, see test_sweep_differs_in_layers_and_batch_alone.
STEPPED = sorted(set(CONFIGS) - {PAPER, IMAGENET, WIDE} - {name for name, (_, batch) in SWEEP.items() if batch != 2})

# Of ten pictures in each split; resized_crop keeps nothing in the cache.
FEW_PICTURES = ["--data.batch_size=2", "--data.augment=resized_crop"]
HELD_OUT = [*FEW_PICTURES, "--data.holdout=4", "--data.limit=6"]
LAPTOP = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
METHODS = ("advcompsum", "trades", "pgd_at")

# What a laptop needs to take a step of a config made for a GPU, or for pictures that are not there.
ON_CPU = {
    **{f"robust/cifar16_{method}": HELD_OUT for method in METHODS},
    **{f"robust/cifar10_{method}": [*LAPTOP, *HELD_OUT] for method in METHODS},
    "lm/bytes_gpu_polynorm": [*LAPTOP, "--data.batch_size=1"],
    "classify/cifar10_evonorm_s0": [*LAPTOP, *FEW_PICTURES],
    "splat/boxes_cpu_medium": ["--data.size=32", "--data.num_points=9"],
}


def test_the_shipped_configs_are_found() -> None:
    named = {"quickstart", "classify/shapes_polyrelu", "explain/shapes_cnn", "gan/shapes_r1", PAPER, IMAGENET}
    assert {*named, *ON_CPU, *SWEEP} <= set(CONFIGS)
    activations = ("polynorm", "polyrelu", "relu", "relu2", "gelu", "swiglu")
    assert {f"lm/stdlib_{activation}" for activation in activations} <= set(CONFIGS)


def write_pictures(root: Path, splits: tuple[str, ...], classes: int, size: int) -> None:
    """One picture of each class in each split."""
    for split in splits:
        for k in range(classes):
            folder = root / split / f"{k:04d}"
            folder.mkdir(parents=True)
            Image.new("RGB", (size, size), (k % 256, 0, 0)).save(folder / "0.png")


@pytest.mark.parametrize("name", STEPPED)
def test_config_takes_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "digits" in name:
        pytest.importorskip("sklearn", reason="needs the digits extra")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    if "cifar" in name:
        write_pictures(tmp_path / "cifar10_images.tar.xz", ("train", "test"), 10, 32)  # a folder does as well
    quiet = ["--config=_parts/quiet", "--trainer.fast_dev_run=true", "--data.num_workers=0"]
    many = name in SWEEP or name in ("explain/shapes_cnn", "gan/shapes_r1")
    few = ["--data.length=64", "--data.val_length=64"] if many else []
    assert main(["fit", f"--config={name}", *quiet, *few, *ON_CPU.get(name, [])]) == 0


@pytest.mark.parametrize("name", sorted(PARTS))
def test_part_composes_with_a_config(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=quickstart", f"--config={name}", "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for key, value in yaml.safe_load(PARTS[name].read_text())["trainer"].items():
        assert resolved["trainer"][key] == value


# What decides a figure in each optimizer.
TOLD = {
    "torch.optim.Adam": {"lr", "betas", "eps", "weight_decay"},
    "torch.optim.AdamW": {"lr", "betas", "weight_decay"},
    "torch.optim.SGD": {"lr", "momentum", "nesterov", "weight_decay"},
}


@pytest.mark.parametrize("name", sorted(name for name in CONFIGS if not name.startswith("splat/")))  # those have rates
def test_optimizer_is_fully_named(name: str, capsys: pytest.CaptureFixture) -> None:
    """jsonargparse keeps an earlier class's defaults when the class is switched, so nothing may rest on a default."""
    arguments = yaml.safe_load(CONFIGS[name].read_text())["model"]["init_args"]
    optimizers = {key: value for key, value in arguments.items() if key.endswith("optimizer")}
    assert "optimizer" in optimizers
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={name}", "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    for key, given in optimizers.items():
        assert TOLD[given["class_path"]] <= set(given["init_args"])
        assert resolved[key]["class_path"] == given["class_path"]
        assert {k: resolved[key]["init_args"][k] for k in given["init_args"]} == given["init_args"]


def test_sweep_differs_in_layers_and_batch_alone() -> None:
    layers = {}
    for name, (norm, batch) in SWEEP.items():
        config = yaml.safe_load(CONFIGS[name].read_text())
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        assert data.pop("batch_size") == batch
        assert model["optimizer"]["init_args"].pop("lr") == 0.1 * batch / 64
        steps = data["length"] // batch
        assert model["lr_scheduler"]["init_args"].pop("warmup_steps") == steps // 10
        assert config["trainer"].pop("log_every_n_steps") < steps / 40
        assert config.pop("last")["every_n_train_steps"] < steps / 2
        made = (model.pop("norm"), model.pop("act"))
        assert layers.setdefault(norm, made) == made
        if batch == 1 and norm == NORMS[0]:
            first = config
        assert config == first
    assert len(layers) == len({str(made) for made in layers.values()}) == 4


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_config_begins_with_what_it_shows_and_takes(name: str) -> None:
    assert CONFIGS[name].read_text().startswith("# ")


def test_language_models_are_of_equal_size() -> None:
    from zoo.tasks import LanguageModel

    sizes = {}
    for name, path in CONFIGS.items():
        if name.startswith("lm/stdlib_"):
            arguments = dict(yaml.safe_load(path.read_text())["model"]["init_args"])
            arguments = {k: v for k, v in arguments.items() if k not in {"optimizer", "lr_scheduler"}}
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in LanguageModel(**arguments).parameters())
    assert len(sizes) == 6
    assert max(sizes.values()) - min(sizes.values()) <= 12  # PolyCom's own four coefficients a block


def test_paper_model_builds_at_its_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from zoo.data import TokenFiles
    from zoo.tasks import LanguageModel

    np.save(tmp_path / "tokens.npy", np.arange(9000, dtype=np.uint16))
    files = [f"--data.train={tmp_path}/tokens.npy", f"--data.val={tmp_path}/tokens.npy"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={PAPER}", *files, "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    arguments = {k: v for k, v in resolved["model"]["init_args"].items() if k not in {"optimizer", "lr_scheduler"}}
    with torch.device("meta"):
        model = LanguageModel(**arguments)
        logits = model(torch.zeros(1, 4096, dtype=torch.long))
    assert logits.shape == (1, 4096, 32000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.35e9, rel=0.02)
    data = TokenFiles(**resolved["data"]["init_args"])
    data.setup()
    assert data.train_set[0][0].shape == (4096,)


def test_imagenet_model_builds_at_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.data import ImageFolder
    from zoo.norms import EvoNorm2d
    from zoo.tasks import ImageClassifier
    from zoo.tasks.optim import WarmupMultiStep, decay_groups

    write_pictures(tmp_path / "imagenet", ("train", "val"), 3, 300)
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={IMAGENET}", "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    arguments = resolved["model"]["init_args"]
    built = {k: v for k, v in arguments.items() if k not in {"optimizer", "lr_scheduler"}}
    with torch.device("meta"):
        model = ImageClassifier(**built)
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(25.6e6, rel=0.01)
    norms = [m for m in model.modules() if isinstance(m, EvoNorm2d)]
    assert {(m.variant, m.groups, m.apply_act) for m in norms} == {("s0", 32, True)}

    optimizer = torch.optim.SGD(decay_groups(model), **arguments["optimizer"]["init_args"])
    assert {id(p) for m in norms for p in m.parameters()} <= {id(p) for p in optimizer.param_groups[1]["params"]}
    schedule = WarmupMultiStep(optimizer, **{**arguments["lr_scheduler"]["init_args"], "epoch_steps": 10})
    rates = [0.4 * schedule.ratio(10 * epoch) for epoch in (0, 5, 29, 30, 60, 80, 89)]
    assert rates == pytest.approx([0, 0.4, 0.4, 0.04, 0.004, 0.0004, 0.0004])
    assert resolved["trainer"]["max_epochs"] == 90
    assert resolved["trainer"]["devices"] * resolved["data"]["init_args"]["batch_size"] == 1024

    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    data = ImageFolder(**resolved["data"]["init_args"])
    for pictures in (data.train_set, data.val_set):
        assert pictures.held is None  # ImageNet does not fit the memory
        assert pictures[0][0].shape == (3, 224, 224)


def test_wide_network_builds_at_its_size(capsys: pytest.CaptureFixture) -> None:
    from zoo.tasks import AdversarialClassifier

    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={WIDE}", "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    arguments = resolved["model"]["init_args"]
    built = {k: v for k, v in arguments.items() if k not in {"optimizer", "lr_scheduler"}}
    with torch.device("meta"):
        model = AdversarialClassifier(**built)
        assert model.net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(36.5e6, rel=0.01)
    assert any(isinstance(m, torch.nn.SiLU) for m in model.modules())
    assert resolved["trainer"]["devices"] * resolved["data"]["init_args"]["batch_size"] == 1024


@pytest.mark.parametrize("method", METHODS)
def test_robust_configs_of_one_data_set_differ_in_the_loss_alone(method: str) -> None:
    for data in ("digits", "cifar16", "cifar10"):
        configs = [yaml.safe_load(CONFIGS[f"robust/{data}_{which}"].read_text()) for which in (method, METHODS[0])]
        losses = [config["model"]["init_args"].pop("loss") for config in configs]
        assert configs[0] == configs[1]
        assert losses[0]["attack"]["eps"] == losses[1]["attack"]["eps"]


@pytest.mark.parametrize("given", ["lm/stdlib_relu", "lm/stdlib_relu.yaml", "configs/lm/stdlib_relu.yaml"])
def test_shipped_config_is_found_from_anywhere(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(given) == CONFIGS["lm/stdlib_relu"]


def test_file_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("trainer: {}\n")
    assert resolve("quickstart.yaml") == Path("quickstart.yaml")
