"""What a record of results needs beside the figures: versions, machine, devices, repository state."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__

_PACKAGES = ("torch", "torchvision", "lightning", "jsonargparse", "timm", "torchmetrics", "safetensors", "numpy")


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
