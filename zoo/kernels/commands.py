"""`zoo kernels build`, `status` and `clear`, and what `zoo doctor` says about kernels."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import KernelBuildError, KernelError
from . import cpu, launch, nvrtc, sources, store
from .sources import Unit


def build(options: argparse.Namespace) -> int:
    """Compile every unit for some architectures, and the CPU library, into a folder; what is there stays."""
    folder = store.cache_folder() if options.out is None else Path(options.out)
    if options.jobs is not None and options.jobs < 1:
        raise KernelError(f"--jobs: expected a number of threads from 1, got {options.jobs}")
    orders = _orders(options.orders)
    architectures = _present() if options.arch is None else _architectures(options.arch)
    if not architectures and options.cpu is False:
        raise KernelError("nothing to build: no CUDA device is here; name architectures, as in --arch 80,90")
    if not architectures:
        print("no CUDA device is here: only the CPU library; name architectures for more, as in --arch 80,90")
    made = []
    if options.cpu is not False:
        # A folder of --out may be carried to lesser processors.
        levels = cpu.levels()[:1] if options.out is None else cpu.levels()
        made += _build_cpu(folder, levels, required=options.cpu or not architectures)
    made += _build_cubins(folder, architectures, orders, options)
    new = [file for file in made if file.is_new]
    size = _bytes(sum(file.size for file in made))
    print(f"{len(new)} compiled, {len(made) - len(new)} were there; {size} in {folder}")
    return 0


@dataclass(frozen=True)
class _Made:
    """A compiled file in the folder that is being filled."""

    is_new: bool
    size: int


def _build_cpu(folder: Path, levels: Sequence[str], *, required: bool) -> list[_Made]:
    try:
        cpu.compiler()
    except KernelBuildError as error:
        if required:
            raise
        print(f"no CPU library: {error}")
        return []
    made = []
    for level in levels:
        was_there = store.is_whole(folder / cpu.file_name(level))
        made.append(_Made(not was_there, store.size([cpu.build(folder, level)])))
        print(f"CPU library for {level}: {'was there' if was_there else 'compiled'}, {_bytes(made[-1].size)}")
    return made


def _build_cubins(
    folder: Path, architectures: Sequence[str], orders: Sequence[int], options: argparse.Namespace
) -> list[_Made]:
    units = list(sources.units(orders))
    # In the cache the compiler is part of the name; a folder of --out is read without one.
    compiler = nvrtc.version() if architectures and options.out is None else None

    def ensure(unit: Unit, arch: str) -> _Made:
        path = folder / nvrtc.file_name(unit, arch, compiler)
        if store.is_whole(path):
            return _Made(False, store.size([path]))
        data = nvrtc.compile_unit(unit, arch)
        try:
            store.write(path, data)
        except OSError as error:
            raise store.cannot_write(folder, error) from error
        return _Made(True, len(data))

    # NVRTC releases the interpreter's lock and compiles several programs at once.
    pool = ThreadPoolExecutor(options.jobs or os.cpu_count())
    try:
        waiting = {arch: [pool.submit(ensure, unit, arch) for unit in units] for arch in architectures}
        made = []
        for arch, futures in waiting.items():
            of_arch = [future.result() for future in futures]
            new = sum(file.is_new for file in of_arch)
            size = _bytes(sum(file.size for file in of_arch))
            print(f"sm_{arch}: {new} compiled, {len(of_arch) - new} were there, {size}", flush=True)
            made += of_arch
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what has not begun is not begun
    return made


def _architectures(text: str) -> list[str]:
    found = []
    known = nvrtc.architectures()
    for word in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d+)(?:\.(\d))?", word.strip())
        arch = "".join(match.groups("")) if match else ""
        if arch not in known:
            version = ".".join(map(str, nvrtc.version()))
            raise KernelError(
                f"--arch: expected compute capabilities such as 90, sm_90 or 9.0, got {word.strip()!r};"
                f" NVRTC {version} compiles for {', '.join(known)}"
            )
        found.append(arch)
    return list(dict.fromkeys(found))


def _present() -> list[str]:
    """Compute capabilities of the CUDA devices here that have kernels."""
    found = dict.fromkeys(gpu.arch for gpu in _gpus() if gpu.has_kernels)
    return _architectures(",".join(found)) if found else []


def _orders(text: str) -> list[int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= sources.MOST_POWERS:
        raise KernelError(
            f"--orders: expected an order or a range from 1 to {sources.MOST_POWERS}, as 3 or 1-5, got {text!r}"
        )
    return list(range(first, last + 1))


def clear(_: argparse.Namespace) -> int:
    """Delete what we compiled from the cache, and nothing else."""
    folder = store.cache_folder()
    gone = 0
    files = [*store.compiled(folder), *store.leftovers(folder)]
    size = store.size(files)
    for path in files:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise KernelError(
                f"cannot delete {path} ({error.strerror}); {gone} files were deleted before it"
            ) from error
        gone += 1
    print(f"deleted {gone} files, {_bytes(size)}, from {folder}")
    return 0


def status(options: argparse.Namespace) -> int:
    """Say what is there, what would be compiled, and with what."""
    state = {
        "mode": settings.kernel_mode(),
        "folders": [asdict(folder) for folder in _folders()],
        "cpu_library": asdict(cpu_library_state()),
        "nvrtc": asdict(_nvrtc_state()),
        "gpus": [asdict(gpu) for gpu in _gpus()],
        "cache": asdict(cache_state()),
    }
    print(json.dumps(state, indent=2) if options.json else "\n".join(_described(state)))
    return 0


def _described(state: dict[str, Any]) -> Iterator[str]:
    """The state for people."""
    yield f"mode          {state['mode']} (ZOO_KERNELS)"
    for index, folder in enumerate(state["folders"]):
        absent = "" if folder["exists"] else ", not there"
        yield f"{'' if index else 'looked at':<13} {folder['path']} ({folder['origin']}{absent})"
    library, compiler = state["cpu_library"], state["nvrtc"]
    yield f"CPU library   {library['path'] or library['problem'] or _will_be_built(library['compiler'])}"
    yield f"NVRTC         {compiler['version'] or compiler['problem']}"
    gpus = [f"cuda:{gpu['index']} {gpu['name']}, sm_{gpu['arch']}" for gpu in state["gpus"]]
    yield f"CUDA devices  {'; '.join(gpus) or 'none'}"
    cache = state["cache"]
    kinds = ", ".join(f"{count} for sm_{arch}" for arch, count in cache["cubins"].items())
    cubins = f"{sum(cache['cubins'].values())} cubins{f' ({kinds})' if kinds else ''}"
    libraries = "1 CPU library" if cache["libraries"] == 1 else f"{cache['libraries']} CPU libraries"
    yield f"cache         {cubins}, {libraries}, {_bytes(cache['bytes'])}"
    if cache["leftovers"]:
        left = f"{cache['leftovers']} files of killed or running builds, {_bytes(cache['leftover_bytes'])}"
        yield f"leftovers     {left}; `zoo kernels clear` deletes them"


@dataclass(frozen=True)
class Folder:
    """A place where compiled kernels are looked for."""

    path: str
    origin: str
    exists: bool


def _folders() -> list[Folder]:
    named = settings.prebuilt_folder()
    places = [(folder, "ZOO_KERNEL_DIR" if folder == named else "package") for folder in store.ahead_of_time()]
    if named is not None and (named, "ZOO_KERNEL_DIR") not in places:
        places.insert(0, (named, "ZOO_KERNEL_DIR"))  # misspelt, perhaps
    places.append((store.cache_folder(), "cache"))
    return [Folder(str(path), origin, os.path.isdir(path)) for path, origin in places]


@dataclass(frozen=True)
class CpuLibraryState:
    """Where the CPU library is; else by which command it will be built; else why neither."""

    path: str | None = None
    compiler: str | None = None
    problem: str | None = None


def cpu_library_state() -> CpuLibraryState:
    """Looks, and builds nothing."""
    path = cpu.find()
    if path is not None:
        return CpuLibraryState(path=str(path))
    try:
        command = cpu.compiler()
    except KernelBuildError as error:
        return CpuLibraryState(problem=str(error))
    if not _can_be_written(store.cache_folder()):
        return CpuLibraryState(problem=f"{store.cannot_write(store.cache_folder())}")
    return CpuLibraryState(compiler=shlex.join(command))


def _can_be_written(folder: Path) -> bool:
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _will_be_built(compiler: str) -> str:
    return f"not there; {compiler} will build it at the first use"


@dataclass(frozen=True)
class NvrtcState:
    """The version of NVRTC, or why there is none."""

    version: str | None = None
    problem: str | None = None


def _nvrtc_state() -> NvrtcState:
    try:
        return NvrtcState(version=".".join(map(str, nvrtc.version())))
    except KernelBuildError as error:
        return NvrtcState(problem=str(error))


@dataclass(frozen=True)
class GpuState:
    """A CUDA device."""

    index: int
    name: str
    arch: str
    has_kernels: bool


def _gpus() -> list[GpuState]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"{properties.major}{properties.minor}"
        found.append(GpuState(index, properties.name, arch, int(arch) >= int(sources.ARCHITECTURES[0])))
    return found


@dataclass(frozen=True)
class CacheState:
    """What is in the cache: cubins by architecture, CPU libraries, what killed builds left."""

    path: str
    cubins: dict[str, int]
    libraries: int
    bytes: int
    leftovers: int
    leftover_bytes: int


def cache_state() -> CacheState:
    """Counts the files."""
    folder = store.cache_folder()
    files, left = store.compiled(folder), store.leftovers(folder)
    cubins = Counter(path.stem.split("-")[-2].removeprefix("sm") for path in files if path.suffix == ".cubin")
    by_arch = {arch: cubins[arch] for arch in sorted(cubins, key=int)}
    libraries = sum(path.suffix == ".so" for path in files)
    return CacheState(str(folder), by_arch, libraries, store.size(files), len(left), store.size(left))


def diagnose(broken: list[str]) -> list[str]:
    """Lines for `zoo doctor`; to `broken` goes what ZOO_KERNELS asks for and cannot be had."""
    try:
        mode = settings.kernel_mode()
    except KernelError as error:
        broken.append(str(error))
        return []
    cache = cache_state()
    count = sum(cache.cubins.values()) + cache.libraries
    kept = f"kernel cache: {count} files, {_bytes(cache.bytes + cache.leftover_bytes)} in {cache.path}"
    if mode == "off":
        return ["native kernels: off (ZOO_KERNELS)", kept]
    lines = []
    for kind, (text, works) in (("CPU", _diagnose_cpu()), ("CUDA", _diagnose_cuda())):
        lines.append(f"{kind} kernels: {text}")
        if not works and mode == "require":
            broken.append(f"ZOO_KERNELS=require, but there are no {kind} kernels: {text}")
    return [*lines, kept]


def _diagnose_cpu() -> tuple[str, bool]:
    state = cpu_library_state()
    if state.problem is not None:
        return state.problem, False
    if state.path is None:
        return _will_be_built(state.compiler or ""), True
    try:
        cpu.load(Path(state.path))  # that it is there does not mean that it fits this system
    except KernelError as error:
        return str(error), False
    return f"ready, {state.path}", True


def _diagnose_cuda() -> tuple[str, bool]:
    gpus, compiler = _gpus(), _nvrtc_state()
    if not gpus:
        return f"not needed without a CUDA device (NVRTC {compiler.version or 'is not there'})", True
    too_old = [gpu.name for gpu in gpus if not gpu.has_kernels]
    if too_old:
        return f"they need compute capability 7.5, which {', '.join(too_old)} does not have", False
    try:
        launch.driver()
    except KernelError as error:
        return str(error), False
    architectures = list(dict.fromkeys(gpu.arch for gpu in gpus))
    if compiler.version is not None:
        return f"ready, NVRTC {compiler.version} compiles them for sm_{', sm_'.join(architectures)} when needed", True
    if all(nvrtc.find(unit, arch) for arch in architectures for unit in sources.units()):
        return "ready, compiled ahead of time", True
    return compiler.problem or "", False


def _bytes(count: int) -> str:
    for unit, size in (("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
