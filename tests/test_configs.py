"""Every shipped config parses, builds and takes a step; its optimizer says everything that matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from zoo.cli import main
from zoo.engine.configs import resolve, shipped_configs

CONFIGS = {name: path for name, path in shipped_configs().items() if not name.startswith("_")}
PARTS = {name: path for name, path in shipped_configs().items() if name.startswith("_")}
PAPER = "lm/paper_1b_polynorm"  # too large to step here

# What a laptop needs to take a step of a config made for a GPU.
ON_CPU = {"lm/bytes_gpu_polynorm": ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--data.batch_size=1"]}


def test_the_shipped_configs_are_found() -> None:
    assert {"quickstart", "classify/shapes_polyrelu", PAPER, *ON_CPU} <= set(CONFIGS)
    activations = ("polynorm", "polyrelu", "relu", "relu2", "gelu", "swiglu")
    assert {f"lm/stdlib_{activation}" for activation in activations} <= set(CONFIGS)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {PAPER}))
def test_config_takes_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["--config=_parts/quiet", "--trainer.fast_dev_run=true", "--data.num_workers=0"]
    assert main(["fit", f"--config={name}", *quiet, *ON_CPU.get(name, [])]) == 0


@pytest.mark.parametrize("name", sorted(PARTS))
def test_part_composes_with_a_config(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=quickstart", f"--config={name}", "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for key, value in yaml.safe_load(PARTS[name].read_text())["trainer"].items():
        assert resolved["trainer"][key] == value


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_optimizer_is_fully_named(name: str, capsys: pytest.CaptureFixture) -> None:
    """jsonargparse keeps an earlier class's defaults when the class is switched, so nothing may rest on a default."""
    given = yaml.safe_load(CONFIGS[name].read_text())["model"]["init_args"]["optimizer"]
    assert given["class_path"] == "torch.optim.AdamW"
    assert {"lr", "betas", "weight_decay"} <= set(given["init_args"])
    with pytest.raises(SystemExit):
        main(["fit", f"--config={name}", "--print_config"])
    resolved = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert resolved["class_path"] == given["class_path"]
    assert {key: resolved["init_args"][key] for key in given["init_args"]} == given["init_args"]


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


@pytest.mark.parametrize("given", ["lm/stdlib_relu", "lm/stdlib_relu.yaml", "configs/lm/stdlib_relu.yaml"])
def test_shipped_config_is_found_from_anywhere(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(given) == CONFIGS["lm/stdlib_relu"]


def test_file_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("trainer: {}\n")
    assert resolve("quickstart.yaml") == Path("quickstart.yaml")
