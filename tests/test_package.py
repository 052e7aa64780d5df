"""The wheel from the sdist holds everything, and installs and works where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheel_ships_configs_kernels_and_types(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith("paperzoo-")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"zoo/py.typed", "zoo/_configs/quickstart.yaml", "zoo/_cuda_kernels/README.md", "zoo/tasks/lm.py"} <= names
    shipped = {
        f"zoo/_configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert shipped <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "scripts/")) or "__pycache__" in name]


def test_sdist_holds_no_data(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        members = file.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "tests/conftest.py",
        "configs/quickstart.yaml",
    } <= names
    assert sum(member.size for member in members) < 5e6


@pytest.mark.slow
def test_sdist_installs_and_trains_without_a_compiler(built: Path, tmp_path: Path) -> None:
    """In an environment of its own that sees this one's libraries but no compiler, outside the repository."""
    (archive,) = built.glob("*.tar.gz")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    environment = {"PATH": str(home / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CC": "/nonexistent/cc"}
    if "PIP_CONFIG_FILE" in os.environ:
        environment["PIP_CONFIG_FILE"] = os.environ["PIP_CONFIG_FILE"]

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = str(home / "bin/python")
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed", str(archive))
    where = run(python, "-c", "import zoo; print(zoo.__file__)").strip()
    assert Path(where).is_relative_to(home)
    assert "polynorm" in run(str(home / "bin/zoo"), "list")
    short = [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
        "--data.val_samples=16",
        "--config=_parts/quiet",
    ]
    assert "report: runs/quickstart/report" in run(str(home / "bin/zoo"), "fit", "--config=quickstart", *short)
