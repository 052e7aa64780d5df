"""Build and launch CUDA kernels on the host: the same source, compiled by g++ against `cuda_kernels/common/emu.h`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# Contraction into fused multiply-adds is off, so that results equal those of the reference to the last bit where the
# order of operations does; hidden symbols, so that two loaded libraries never share the emulator's state.
_FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden")
_SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
_SOURCES = {".h", ".hpp", ".cuh", ".cu", ".inc"}


class EmulatorError(RuntimeError):
    """What the emulator has to report on a launch: a deadlock, a write out of bounds, wrong arguments."""


class EmulatorBuildError(RuntimeError):
    """A kernel source that does not compile for the host, or no compiler; the message is the compiler's."""


def build(
    source: Path,
    defines: Sequence[str] = (),
    *,
    include: Path,
    folder: Path,
    sanitize: bool = False,
    flags: Sequence[str] = (),
) -> Path:
    """Compile a kernel source into a library for :class:`Library`, or find the one built before from the same text.

    Args:
        source: the `.cu` file.
        defines: macros, as `NAME` or `NAME=value`.
        include: folder of the headers; every source below it counts as part of the text.
        folder: where the library goes; made if absent.
        sanitize: with the address and undefined-behaviour sanitizers. A process that loads such a library must have
            been started with libasan preloaded.
        flags: further compiler flags.

    Raises:
        EmulatorBuildError: if there is no compiler ($CXX, else g++) or the source does not compile.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    options = [*_FLAGS, *(_SANITIZE if sanitize else ()), *(f"-D{define}" for define in defines), *flags]
    digest = hashlib.sha256(repr((compiler, _version(tuple(compiler)), options)).encode())
    for path in (source, *sorted(path for path in include.rglob("*") if path.suffix in _SOURCES)):
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    library = folder / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    folder.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=folder, prefix=f".{library.name}.")
    os.close(descriptor)
    try:
        _run([*compiler, *options, f"-I{include}", str(source), "-o", scratch])
        os.replace(scratch, library)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)  # a compiler that fails removes its output itself
        raise
    return library


@lru_cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EmulatorBuildError(
            f"no C++ compiler: {command[0]!r} cannot be run ({error.strerror}); install g++ or set CXX"
        ) from None
    if done.returncode:
        raise EmulatorBuildError(f"{shlex.join(command)}\n{done.stderr}")
    return done.stdout


class Library:
    """The kernels of one library that :func:`build` made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        name = self._library.zoo_emu_kernel_name
        name.argtypes, name.restype = [ctypes.c_size_t], ctypes.c_char_p
        names: list[str] = []
        while (found := name(len(names))) is not None:
            names.append(found.decode())
        self.kernels = tuple(names)
        """Their names, in the order of the source."""

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: Sequence[ctypes._SimpleCData[Any]],
        *,
        schedule: int = 0,
        seed: int = 1,
    ) -> None:
        """Run one kernel to its end.

        Args:
            name: of the kernel.
            grid, block: x, y, z.
            shared: bytes of dynamic shared memory.
            arguments: one ctypes value a parameter, pointers as `c_void_p`. What they point to is the caller's to keep.
            schedule: the order of blocks and threads: 0 ascending, 1 descending, 2 shuffled by `seed`. A correct
                kernel gives the same result in all of them, but for the rounding of reordered sums.

        Raises:
            EmulatorError: with the emulator's report; or if there is no such kernel, or the arguments do not fit it.
        """
        self._check(name, arguments)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        triple = ctypes.c_uint * 3
        # c_uint takes any Python integer modulo 2^32, so a negative size would become a large one.
        for what, sizes in (("grid", grid), ("block", block)):
            if len(sizes) != 3 or not all(0 <= size < 2**32 for size in sizes):
                raise EmulatorError(f"kernel {name!r}: {what} must be three sizes from 0 to 2^32 - 1, got {sizes}")
        entry = self._entry(f"zoo_emu_{name}", ctypes.c_char_p)
        report = entry(
            triple(*grid),
            triple(*block),
            ctypes.c_size_t(shared),
            pointers,
            ctypes.c_int(schedule),
            ctypes.c_uint(seed),
        )
        if report is not None:
            raise EmulatorError(report.decode())

    def _check(self, name: str, arguments: Sequence[ctypes._SimpleCData[Any]]) -> None:
        if name not in self.kernels:
            raise EmulatorError(f"no kernel {name!r} in {self.path}; it has {', '.join(self.kernels) or 'none'}")
        parameters = self._entry(f"zoo_emu_params_{name}", ctypes.c_int)
        count = parameters(None, 0)
        if count != len(arguments):
            raise EmulatorError(f"kernel {name!r} has {count} parameters, got {len(arguments)} arguments")
        sizes = (ctypes.c_int * count)()
        parameters(sizes, count)
        for index, (argument, expected) in enumerate(zip(arguments, sizes, strict=True)):
            given = ctypes.sizeof(argument)
            if given != expected:
                raise EmulatorError(
                    f"kernel {name!r}: parameter {index} has {expected} bytes, the argument {argument!r} has {given}"
                )

    def _entry(self, symbol: str, result: type[ctypes._SimpleCData[Any]]) -> Any:
        entry = self._library[symbol]  # a new object each time, so threads do not share its settings
        entry.restype = result
        return entry
