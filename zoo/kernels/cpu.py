"""The CPU library: every `cuda_kernels/*/cpu.cpp` in one shared object that registers its ops with torch.

It speaks libtorch's stable ABI and knows nothing of Python, so one file serves every Python and every torch from 2.10
on. It comes ready in a platform wheel, or from a folder filled by `zoo kernels build`, or the C++ compiler builds it at
the first use.
"""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import settings
from ..errors import KernelBuildError, KernelError
from ..warn import warn_once
from . import sources, store

TORCH_TARGET = "0x020a000000000000"  # 2.10
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}")
# What __FILE__ becomes in messages: a library that is handed on must not name places on the machine that built it.
_PREFIXES = ("cuda_kernels", "torch")
# What x86-64-v3 promises, as Linux calls it; abm is lzcnt.
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_SLOWER = "the affected ops run through PyTorch, several times slower"


@functools.cache
def use_cpu_library() -> bool:
    """Load the library, once; see the package's docstring for what happens when that fails.

    Raises:
        KernelError: with ZOO_KERNELS=require, if it cannot be had.
    """
    mode = settings.kernel_mode()
    if mode == "off":
        return False
    try:
        load(library())
    except KernelError as error:
        if mode == "require":
            raise
        warn_once(f"no native CPU kernels, {_SLOWER}. {error} (ZOO_KERNELS=off accepts this silently)")
        return False
    return True


def load(path: Path) -> None:
    """Register the ops of a library with torch.

    Raises:
        KernelError: if the dynamic linker refuses the file.
    """
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise KernelError(f"{path} cannot be loaded: {error}; delete it to have it built again") from error


def library() -> Path:
    """The library for this machine: built ahead of time, cached, or built now.

    Raises:
        KernelBuildError: if it must be built and cannot be.
    """
    path = find()
    return build(store.cache_folder()) if path is None else path


def find() -> Path | None:
    """The best library that is there and that this processor can run."""
    for folder in (*store.ahead_of_time(), store.cache_folder()):
        for level in levels():
            path = folder / file_name(level)
            if store.is_whole(path):
                return path
    return None


def file_name(level: str) -> str:
    """Depends on the sources and the flags; not on torch or the compiler."""
    return f"zoo_cpu-{level}-{_fingerprint()}.so"


@functools.cache
def _fingerprint() -> str:
    texts: dict[str, str] = {}
    for source in _sources():
        texts |= sources.closure(source)
    return sources.fingerprint(texts, _FLAGS, _PREFIXES)


def _sources() -> list[str]:
    return sorted(path.relative_to(sources.folder()).as_posix() for path in sources.folder().glob("*/cpu.cpp"))


@functools.cache
def levels() -> tuple[str, ...]:
    """Instruction sets this processor runs, the best first, as `-march` names them; never `native`.

    A cache may be shared by machines that differ, and what was tested is what runs.
    """
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return ("x86-64-v3", "x86-64") if _processor_flags() >= _V3 else ("x86-64",)
    return ("armv8-a",) if machine in ("aarch64", "arm64") else (machine,)


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def build(folder: Path, level: str | None = None) -> Path:
    """Compile the library into a folder, unless it is there. Processes that want the same one wait for the first.

    Args:
        folder: made if absent.
        level: the instruction set; the best of this processor by default.

    Raises:
        KernelBuildError: without a compiler, with the compiler's messages, or if the folder cannot be written.
    """
    path = folder / file_name(level or levels()[0])
    command = compiler()
    try:
        with store.lock(folder / f".{path.stem}.lock"):
            if not store.is_whole(path):
                print(f"zoo: compiling the CPU kernels, once, into {folder}", file=sys.stderr)
                with store.scratch(path) as temporary:
                    _compile(command, level or levels()[0], temporary)
    except OSError as error:
        raise store.cannot_write(folder, error) from error
    return path


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else g++, c++ or clang++.

    Raises:
        KernelBuildError: if there is none, or none for this system.
    """
    if sys.platform not in ("linux", "darwin"):
        raise KernelBuildError(f"The native kernels are for Linux and macOS, this is {sys.platform}.")
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise KernelBuildError(f"CXX must be a command, got {os.environ['CXX']!r} ({error})") from None
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    what = f"CXX names {chosen[0]!r}, which is not there" if chosen else "There is no C++ compiler on the PATH"
    raise KernelBuildError(
        f"{what}; install one (Debian: apt install g++), or a wheel of paperzoo for this platform, which needs none."
    )


def _compile(command: list[str], level: str, output: Path) -> None:
    """One object a source, side by side, and then the library."""
    import torch

    home = Path(torch.__file__).parent
    # The libraries are loaded when this one is; naming them makes the linker check that nothing is missing.
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ltorch_cpu", "-Wl,-z,defs"]
    march = [f"-march={level}"] if level.startswith(("x86", "arm")) else []
    include = [f"-I{sources.folder()}", f"-I{home / 'include'}"]
    places = zip((sources.folder(), home), _PREFIXES, strict=True)
    shorten = [f"-ffile-prefix-map={place}={name}" for place, name in places]
    options = [*command, *_FLAGS, *shorten, *march, *include]
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        objects = [str(Path(scratch) / f"{number}.o") for number, _ in enumerate(_sources())]
        commands = [
            [*options, "-c", str(sources.folder() / source), "-o", made]
            for source, made in zip(_sources(), objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        _run([*command, "-shared", *objects, "-o", str(output), f"-L{home / 'lib'}", *link])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelBuildError(f"the C++ compiler {command[0]} cannot be run: {error.strerror}; set CXX") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "")
        raise KernelBuildError(
            f"{command[0]} failed with status {done.returncode} on the CPU kernels: {first.strip()}\n"
            f"{shlex.join(command)}\n{done.stderr.strip()}"
        )
