"""Switch the emulator on: kernels launched on CPU tensors then run on the host, thread by thread.

Slow, and meant for tests: it finds missing barriers, divergent ones, writes beyond shared memory and reads of what
nobody wrote, and runs the host code that chooses grids and packs arguments as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import emulate, sources
from .launch import Extent, emulator
from .sources import Unit


class EmulatedMachine:
    """A small GPU: few multiprocessors, so that loops over rows are taken even with few rows.

    Args:
        folder: where the compiled kernels go.
        schedule: order of threads and blocks, see :data:`SCHEDULES`.
        kernels: where the sources are; another copy in tests that break one on purpose.
        sanitize: with the address and undefined-behaviour sanitizers.
    """

    multiprocessors = 2

    def __init__(
        self,
        folder: Path,
        schedule: int = 0,
        *,
        kernels: Path | None = None,
        shared_bytes: int = 4096,
        sanitize: bool = False,
    ) -> None:
        self.shared_bytes = shared_bytes
        self._folder, self._schedule, self._sanitize = folder, schedule, sanitize
        self._kernels = sources.folder() if kernels is None else kernels
        self._libraries: dict[Unit, emulate.Library] = {}
        self.launched: list[tuple[str, Extent, Extent]] = []

    def load(self, unit: Unit) -> None:
        """Compile with the host's C++ compiler."""
        if unit not in self._libraries:
            path = emulate.build(
                self._kernels / unit.source,
                unit.macros,
                include=self._kernels,
                folder=self._folder,
                sanitize=self._sanitize,
            )
            self._libraries[unit] = emulate.Library(path)

    def run(self, unit: Unit, name: str, grid: Extent, block: Extent, shared: int, arguments: list[Any]) -> None:
        """Run every block, one thread after the other."""
        self.load(unit)
        self.launched.append((name, grid, block))
        self._libraries[unit].launch(name, grid, block, shared, arguments, schedule=self._schedule)


SCHEDULES = {"ascending": 0, "descending": 1, "shuffled": 2}


@contextlib.contextmanager
def emulated(machine: EmulatedMachine) -> Iterator[EmulatedMachine]:
    """CPU tensors go to this machine inside the block."""
    token = emulator.set(machine)
    try:
        yield machine
    finally:
        emulator.reset(token)
