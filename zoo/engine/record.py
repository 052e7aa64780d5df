"""config.yaml and environment.json: what is needed to repeat a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from .. import __version__
from . import rundir

_PACKAGES = ("torch", "torchvision", "lightning", "jsonargparse", "timm", "torchmetrics", "safetensors", "numpy")


class RunRecord(L.Callback):
    """Claim the run directory and write its record, before the first step.

    Args:
        folder: the run directory.
        config: the resolved config as YAML text.
        seed: the seed of the run.
        resuming: whether the directory's own run goes on.
    """

    def __init__(self, folder: Path, config: str, seed: int | bool, *, resuming: bool) -> None:
        self.folder, self.config, self.seed, self.resuming = folder, config, seed, resuming

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # by now every process has settled on the directory, so making it cannot send another one elsewhere
        if not trainer.is_global_zero:
            return
        rundir.claim(self.folder, resuming=self.resuming)
        write_text(self.folder / "config.yaml", self.config)
        record = {**describe_environment(), "command": sys.argv, "seed": self.seed, "run_dir": str(self.folder)}
        text = json.dumps(record, indent=2) + "\n"
        path = self.folder / rundir.RECORD
        if self.resuming and path.exists():
            previous = json.loads(path.read_text() or "{}")
            record["resumed"] = [*previous.pop("resumed", []), previous]
            text = json.dumps(record, indent=2) + "\n"
        write_text(path, text)


def describe_environment() -> dict[str, Any]:
    """Versions, machine, devices, repository state and determinism settings, as plain data."""
    packages = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    return {
        "paperzoo": __version__,
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "git": _repository_state(),
    }


def write_text(path: Path, text: str) -> None:
    """Write beside the final place and move, so that an earlier file survives a failure."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _repository_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, or not in a repository
        return None
