"""What a run leaves behind, and that nothing of it is lost by later commands."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from zoo.cli import main

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_bytes(bytes((i * i + 7 * i) % 251 for i in range(660)))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder in which the tiny config was trained once."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", f"--config={TINY}", f"--data.path={text}"]) == 0
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_run_directory_holds_the_whole_record(here: Path) -> None:
    run = here / "runs/tiny"
    expected = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "report/result.json",
        "report/learning_curves.png",
        "report/activations.png",
        "report/sample.txt",
    }
    assert expected <= set(fingerprint(run))
    result = json.loads((run / "report/result.json").read_text())
    assert result["steps"] == 24
    assert result["best"]["metric"] == "val/loss"
    assert result["final"]["val/loss"] == pytest.approx(result["best"]["value"])
    assert result["parameters"] == result["trainable_parameters"] > 1000
    environment = json.loads((run / "environment.json").read_text())
    assert {"packages", "python", "platform", "command", "seed", "threads", "git"} <= set(environment)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run_dir"] is None
    assert config["model"]["init_args"]["dim"] == 16


def test_checkpoints_load_without_running_code(here: Path) -> None:
    for name in ("best", "last"):
        state = torch.load(here / f"runs/tiny/checkpoints/{name}.ckpt", weights_only=True)
        assert "state_dict" in state


def test_evaluation_adds_a_line_and_touches_nothing_else(here: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    before = fingerprint(here / "runs/tiny")
    given = [f"--config={TINY}", f"--data.path={text}"]
    assert main(["test", *given]) == 0
    assert main(["validate", *given, "--ckpt_path=last"]) == 0
    after = fingerprint(here / "runs/tiny")
    rows = [json.loads(line) for line in (here / "runs/tiny/evaluations.jsonl").read_text().splitlines()]
    assert [row["command"] for row in rows] == ["test", "validate"]
    assert [Path(row["checkpoint"]).name for row in rows] == ["best.ckpt", "last.ckpt"]
    trained = json.loads((here / "runs/tiny/report/result.json").read_text())
    assert rows[0]["test/loss"] == pytest.approx(trained["best"]["value"])
    after.pop("evaluations.jsonl")
    assert after == before


def test_predictions_are_numbered(here: Path, text: Path) -> None:
    given = ["predict", f"--config={TINY}", f"--data.path={text}"]
    assert main(given) == 0
    assert main(given) == 0
    with safe_open(here / "runs/tiny/predictions-2.safetensors", "pt") as file:
        assert file.get_tensor("predictions").shape[1] == 16


def test_repeating_a_run_from_its_record_gives_the_same_weights_in_a_directory_of_its_own(here: Path) -> None:
    before = fingerprint(here / "runs/tiny")
    assert main(["fit", "--config=runs/tiny/config.yaml"]) == 0
    assert fingerprint(here / "runs/tiny") == before
    first, second = (
        torch.load(here / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("runs/tiny", "runs/tiny-2")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resume_obeys_its_config_and_keeps_the_earlier_record(here: Path, text: Path) -> None:
    """The checkpoint was written with three epochs and drop 0.2; Lightning alone would let it win over the command."""
    given = ["fit", f"--config={TINY}", f"--data.path={text}", "--run_dir=longer"]
    assert main(given) == 0
    lines = (here / "longer/metrics.jsonl").read_text().splitlines()
    assert main([*given, "--ckpt_path=last", "--trainer.max_epochs=4", "--model.drop=0.0"]) == 0
    assert (here / "longer/metrics.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert yaml.safe_load((here / "longer/config.yaml").read_text())["model"]["init_args"]["drop"] == 0.0
    environment = json.loads((here / "longer/environment.json").read_text())
    assert len(environment["resumed"]) == 1


def test_export_writes_the_weights(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", "runs/tiny", "-o", "model.safetensors"]) == 0
    assert "tensors of step 24" in capsys.readouterr().out
    state = torch.load(here / "runs/tiny/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    with safe_open(here / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)
        assert json.loads(file.metadata()["zoo.model"])["class_path"] == "zoo.tasks.LanguageModel"
    assert main(["export", "runs/tiny", "-o", "model.safetensors"]) == 2
    assert "model.safetensors exists already" in capsys.readouterr().err
    assert main(["export", "nowhere", "-o", "x.safetensors"]) == 2
    assert "no checkpoint at nowhere/checkpoints/best.ckpt; train first" in capsys.readouterr().err


def test_fast_dev_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", f"--config={TINY}", f"--data.path={text}", "--trainer.fast_dev_run=true"]) == 0
    assert [str(path) for path in tmp_path.rglob("*")] == []
