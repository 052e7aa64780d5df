"""CUDA C++ to a cubin through NVRTC. Works on a machine without a GPU, nvcc or a C++ compiler."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from ..errors import KernelBuildError
from ..warn import warn_once
from . import store
from .sources import ARCHITECTURES, Unit, closure, fingerprint

# Without -lineinfo: it makes a cubin ten times as large and writes this machine's paths into it.
_OPTIONS = ("--std=c++17",)
_TEGRA = ("72", "87", "101", "110")  # Xavier, Orin, Thor: no binary compatibility with anything else


def cubin(unit: Unit, arch: str) -> bytes:
    """The machine code of a unit for a compute capability such as "90": built ahead of time, cached, or compiled now.

    Raises:
        KernelBuildError: if NVRTC is missing or the source does not compile.
    """
    path = find(unit, arch)
    if path is not None:
        return path.read_bytes()
    data = compile_unit(unit, arch)
    path = store.cache_folder() / file_name(unit, arch, version())
    try:
        store.write(path, data)
    except OSError as error:
        warn_once(
            f"cannot keep compiled kernels in {path.parent} ({error.strerror or error}): every process compiles them"
            " again; set ZOO_CACHE_DIR to a folder that can be written"
        )
    return data


def find(unit: Unit, arch: str) -> Path | None:
    """A compiled file that serves: exactly this architecture, or ahead of time for an older one of the same family."""
    for folder in store.ahead_of_time():
        for candidate in _same_family(arch):
            path = folder / file_name(unit, candidate)
            if store.is_whole(path):
                return path
    try:
        path = store.cache_folder() / file_name(unit, arch, version())
    except KernelBuildError:
        return None
    return path if store.is_whole(path) else None


def file_name(unit: Unit, arch: str, compiler: tuple[int, int] | None = None) -> str:
    """Depends on sources and options; in the cache also on the compiler."""
    key = fingerprint(closure(unit.source), unit.macros, _OPTIONS, compiler)
    return f"{unit.name}-sm{arch}-{key}.cubin"


def _same_family(arch: str) -> list[str]:
    """Machine code for 8.0 runs on 8.6, not the other way round, not across major versions, and never on a Tegra."""
    if arch in _TEGRA:
        return [arch]
    major, minor = arch[:-1], int(arch[-1])
    return [f"{major}{older}" for older in range(minor, -1, -1)]


@functools.cache
def bindings() -> Any:
    """NVIDIA's `cuda.bindings.nvrtc`.

    Raises:
        KernelBuildError: if the package or the compiler's library is not installed.
    """
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except Exception as error:  # the import and the library it loads fail in ways of their own
        raise KernelBuildError(
            f"NVIDIA's run-time compiler cannot be used ({type(error).__name__}: {error}); pip install 'paperzoo[cuda]'"
        ) from error
    return nvrtc


@functools.cache
def version() -> tuple[int, int]:
    """Of NVRTC."""
    _, major, minor = bindings().nvrtcVersion()
    return major, minor


@functools.cache
def architectures() -> tuple[str, ...]:
    """Compute capabilities that this NVRTC compiles for and that the kernels are written for, such as "90"."""
    found = _checked(bindings().nvrtcGetSupportedArchs())
    return tuple(str(arch) for arch in found if arch >= int(ARCHITECTURES[0]))


def compile_unit(unit: Unit, arch: str) -> bytes:
    """Compile, without looking at or writing any file.

    Raises:
        KernelBuildError: with NVRTC's messages, which name file and line.
    """
    nvrtc, texts = bindings(), closure(unit.source)
    # Headers travel as text: what was hashed is what is compiled, and no path of this machine gets into the cubin.
    headers = {name: text for name, text in texts.items() if name != unit.source}
    source, name = texts[unit.source].encode(), unit.source.encode()
    bodies, names = [text.encode() for text in headers.values()], [header.encode() for header in headers]
    options = [f"--gpu-architecture=sm_{arch}", *_OPTIONS, *(f"-D{macro}" for macro in unit.macros)]
    program = _checked(nvrtc.nvrtcCreateProgram(source, name, len(headers), bodies, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            what = ".".join(map(str, version()))
            raise KernelBuildError(f"NVRTC {what} cannot compile {unit.name} for sm_{arch}:\n{_log(program)}")
        data = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, data))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(data)


def _log(program: Any) -> str:
    nvrtc = bindings()
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    return bytes(log).rstrip(b"\0").decode(errors="replace").strip()


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    nvrtc = bindings()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelBuildError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None
