"""`zoo doctor`: versions, devices, optional parts, plug-ins, and what is broken."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from . import __version__, registry

_OPTIONAL = {"tensorboard": "curves in TensorBoard; pip install 'paperzoo[track]'"}


def diagnose() -> tuple[str, bool]:
    """A report for people, and whether everything that must work does."""
    lines = [f"paperzoo {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    broken: list[str] = []
    for name, needed in _dependencies():
        try:
            found = version(name)
        except PackageNotFoundError:
            broken.append(f"{name} is not installed; pip install '{name}{needed}'")
        else:
            lines.append(f"  {name} {found}")
            if not _satisfies(found, needed):
                broken.append(f"{name} {found} is installed, {needed} is needed; pip install '{name}{needed}'")
    lines += _devices(broken)
    for name, use in _OPTIONAL.items():
        try:
            lines.append(f"  {name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"  {name} not installed: {use}")
    lines.append(f"{len(registry.rows())} components")
    broken += [f"plug-in {entry} failed to load: {error!r}" for entry, error in registry.plugin_errors().items()]
    lines += [f"BROKEN: {what}" for what in broken] or ["everything that must work does"]
    return "\n".join(lines), not broken


def _dependencies() -> list[tuple[str, str]]:
    """Required distributions and their version bounds, from our own metadata."""
    found = []
    for line in requires("paperzoo") or []:
        requirement, _, marker = line.partition(";")
        match = re.match(r"\s*([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(.*)", requirement)
        if match and "extra ==" not in marker:
            found.append((match.group(1), match.group(2).strip()))
    return sorted(found)


def _satisfies(found: str, needed: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(needed).contains(found, prereleases=True)


def _devices(broken: list[str]) -> list[str]:
    try:
        import torch
    except Exception as error:  # whatever keeps torch from importing is the diagnosis
        broken.append(f"torch does not import: {error!r}")
        return []
    lines = [f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            capability = f"sm_{properties.major}{properties.minor}"
            memory = properties.total_memory / 2**30
            lines.append(f"cuda:{i}: {properties.name}, {capability}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        lines.append(f"CUDA: no device ({built})")
    from .kernels.commands import diagnose  # needs torch, which is there

    return lines + diagnose(broken)
