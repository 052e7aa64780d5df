"""Break a kernel on purpose, and see whether anything notices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zoo.kernels import sources
from zoo.kernels.emulate import EmulatorError
from zoo.kernels.emulation import SCHEDULES, EmulatedMachine


def schedules_that_notice(
    results: Callable[[EmulatedMachine], list[Tensor]],
    source: str,
    line: str,
    occurrence: int,
    *,
    scratch: Path,
    kernel_folder: Path,
) -> list[str]:
    """Names of the schedules in which results differ, or the emulator reports, without one line of a source.

    The whole kernel must give the same bits in every schedule.

    Args:
        results: runs the kernels on a machine.
        source: below `cuda_kernels`.
        line: text to remove.
        occurrence: which of its occurrences.
        scratch: for the broken copy.
        kernel_folder: where the whole kernels are compiled.
    """
    broken = scratch / "cuda_kernels"
    shutil.copytree(sources.folder(), broken)
    path = broken / source
    parts = path.read_text().split(line)
    parts[occurrence : occurrence + 2] = [parts[occurrence] + parts[occurrence + 1]]
    path.write_text(line.join(parts))
    expected = results(EmulatedMachine(kernel_folder))
    noticed = []
    for name, schedule in SCHEDULES.items():
        whole = results(EmulatedMachine(kernel_folder, schedule))
        assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True)), name
        try:
            found = results(EmulatedMachine(scratch, schedule, kernels=broken))
        except EmulatorError:
            noticed.append(name)
        else:
            same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            noticed += [] if same else [name]
    return noticed
