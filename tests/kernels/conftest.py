"""Fixtures of the loader's tests: a cache of their own, a copy of the sources, a compiler that only pretends."""

from __future__ import annotations

import functools
import os
import select
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zoo import warn
from zoo.kernels import cpu, nvrtc, sources

ELF = b"\x7fELF\x02\x01\x01" + bytes(57)
"""The shortest file that is whole: a header that promises nothing."""


def failing(number: int) -> Callable[..., None]:
    """A function that fails with what the system says for this errno."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache, with nothing in the environment that decides about kernels."""
    for variable in ("ZOO_KERNELS", "ZOO_KERNEL_DIR", "ZOO_DEBUG", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    # What other tests warned of counts for nothing here, and the other way round.
    fresh = functools.cache(warn.warn_once.__wrapped__)
    for module in ("cpu", "nvrtc", "launch"):
        monkeypatch.setattr(f"zoo.kernels.{module}.warn_once", fresh)
    return tmp_path / "cache" / "kernels"


def forget_sources() -> None:
    """What was read of the sources, so that a change to them is seen."""
    sources.closure.cache_clear()
    cpu._fingerprint.cache_clear()


@pytest.fixture
def copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `cuda_kernels` that stands for the real one; call :func:`forget_sources` after a change."""
    folder = tmp_path / "copied"
    shutil.copytree(sources.folder(), folder)
    monkeypatch.setattr(sources, "folder", lambda: folder)
    forget_sources()
    yield folder
    forget_sources()


@pytest.fixture
def needs_nvrtc() -> None:
    """Skip where NVIDIA's compiler is not installed."""
    try:
        nvrtc.bindings()
    except nvrtc.KernelBuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def needs_compiler() -> None:
    """Skip where there is no C++ compiler."""
    try:
        cpu.compiler()
    except cpu.KernelBuildError as error:
        pytest.skip(str(error))


class FakeCompiler:
    """A command for CXX that records its calls and copies a file to the output.

    With `gated`, its first call writes half of the output, tells :meth:`wait_until_started` and waits for
    :meth:`release`.
    """

    def __init__(self, folder: Path, product: bytes = ELF, *, status: int = 0, says: str = "", gated: bool = False):
        folder.mkdir()
        self.command = folder / "c++"
        self._calls, self._product = folder / "calls", folder / "product"
        self._product.write_bytes(product)
        started, gate = folder / "started", folder / "gate"
        os.mkfifo(started)
        os.mkfifo(gate)
        self._started, self._gate = (os.open(fifo, os.O_RDWR) for fifo in (started, gate))  # so that nobody blocks
        half = f"head -c {len(product) // 2} {self._product} > $output; echo >{started}; read -r _ <{gate}"
        lines = [
            "#!/bin/sh",
            f'echo "$@" >>{self._calls}',
            'while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done',
            f"mkdir {folder}/first 2>/dev/null && {{ {half}; }}" if gated else "",
            f"echo {shlex.quote(says)} >&2" if says else "",
            f"cp {self._product} $output" if status == 0 else f"exit {status}",
        ]
        self.command.write_text("\n".join(lines) + "\n")
        self.command.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """Arguments of each call so far."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    @property
    def builds(self) -> int:
        """How many libraries were linked."""
        return sum(call.startswith("-shared") for call in self.calls)

    def wait_until_started(self) -> None:
        """Return when a gated compiler is in the middle of its work."""
        assert select.select([self._started], [], [], 60)[0], "the compiler was not called"

    def release(self) -> None:
        """Let it finish."""
        os.write(self._gate, b"\n")

    def close(self) -> None:
        """Give back the descriptors."""
        os.close(self._started)
        os.close(self._gate)


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Make a :class:`FakeCompiler` and name it in CXX; called with its arguments."""
    made: list[FakeCompiler] = []

    def make(**arguments) -> FakeCompiler:
        made.append(FakeCompiler(tmp_path / f"compiler{len(made)}", **arguments))
        monkeypatch.setenv("CXX", str(made[-1].command))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH without any."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
