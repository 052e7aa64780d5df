"""Cubins: compiled when needed, kept, found again, and never trusted when damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

from tests.kernels.conftest import ELF, failing, forget_sources
from zoo.errors import KernelBuildError
from zoo.kernels import nvrtc, sources, store
from zoo.warn import KernelWarning

UNIT = sources.poly_relu_unit("float32", 3)
compiles = pytest.mark.usefixtures("needs_nvrtc")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Compilations, which give a short file at once."""
    calls: list[tuple[str, str]] = []

    def compile_unit(unit: sources.Unit, arch: str) -> bytes:
        calls.append((unit.name, arch))
        return ELF + arch.encode()

    monkeypatch.setattr(nvrtc, "compile_unit", compile_unit)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return calls


@compiles
def test_a_cubin_is_compiled_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = nvrtc.cubin(UNIT, "90")
    assert b"poly_relu" in data
    (path,) = cache.iterdir()
    assert store.compiled(cache) == [path] == [nvrtc.find(UNIT, "90")]
    assert store.is_whole(path)
    monkeypatch.setattr(nvrtc, "compile_unit", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin(UNIT, "90") == data


@compiles
def test_a_cubin_holds_no_path_of_this_machine(copied_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = nvrtc.compile_unit(UNIT, "80")
    for folder in (copied_sources, Path.cwd(), Path.home(), Path(sys.prefix)):
        assert str(folder).encode() not in data
    monkeypatch.undo()
    forget_sources()
    assert nvrtc.compile_unit(UNIT, "80") == data


@compiles
@pytest.mark.parametrize("source", ["polycom/poly_relu.cu", "polycom/math.h", "common/rows.cuh"])
def test_a_broken_source_is_named_with_its_line(cache: Path, copied_sources: Path, source: str) -> None:
    path = copied_sources / source
    line = len(path.read_text().splitlines()) + 2
    path.write_text(path.read_text() + "\nint broken = absent;\n")
    forget_sources()
    with pytest.raises(KernelBuildError) as caught:
        nvrtc.cubin(UNIT, "90")
    message = str(caught.value)
    assert re.match(r"NVRTC [\d.]+ cannot compile poly_relu-order3-float32 for sm_90:\n", message)
    assert re.search(rf'^{source}\({line}\): error: identifier "absent" is undefined', message, re.MULTILINE)
    assert "\0" not in message
    assert not cache.exists()


@compiles
def test_an_unknown_architecture_is_an_error_of_ours(cache: Path) -> None:
    with pytest.raises(KernelBuildError, match=r"cannot compile .* for sm_999:\n.*gpu-architecture"):
        nvrtc.cubin(UNIT, "999")


@compiles
def test_architectures_are_those_that_nvrtc_and_the_kernels_know() -> None:
    known = nvrtc.architectures()
    assert set(sources.ARCHITECTURES) <= set(known)
    assert known[0] == "75"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"<html>" + data,
    ],
    ids=["empty", "zeros", "half", "one byte short", "something else"],
)
@compiles
def test_a_damaged_cubin_is_compiled_again(cache: Path, damage) -> None:
    data = nvrtc.cubin(UNIT, "90")
    (path,) = cache.iterdir()
    path.write_bytes(damage(data))
    assert nvrtc.find(UNIT, "90") is None
    assert nvrtc.cubin(UNIT, "90") == data
    assert path.read_bytes() == data


def test_a_prebuilt_cubin_serves_newer_devices_of_its_family(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list
) -> None:
    folder = tmp_path / "prebuilt"
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(folder))
    path = folder / nvrtc.file_name(UNIT, "80")
    store.write(path, ELF)
    assert nvrtc.find(UNIT, "80") == path
    assert nvrtc.find(UNIT, "86") == path
    assert nvrtc.cubin(UNIT, "86") == ELF
    assert [nvrtc.find(UNIT, arch) for arch in ("75", "90", "100", "120")] == [None] * 4
    assert counted == []
    assert nvrtc.cubin(UNIT, "90") == ELF + b"90"
    assert counted == [(UNIT.name, "90")]


def test_minor_versions_of_two_digits_are_families_of_their_own(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list
) -> None:
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path))
    store.write(tmp_path / nvrtc.file_name(UNIT, "100"), ELF)
    assert nvrtc.find(UNIT, "103") is not None
    assert nvrtc.find(UNIT, "110") is None
    assert nvrtc.find(UNIT, "120") is None


def test_the_closest_prebuilt_cubin_is_taken_and_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list
) -> None:
    nvrtc.cubin(UNIT, "89")
    assert nvrtc.find(UNIT, "89") == cache / nvrtc.file_name(UNIT, "89", (13, 0))
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path))
    for arch in ("80", "86"):
        store.write(tmp_path / nvrtc.file_name(UNIT, arch), ELF)
        assert nvrtc.find(UNIT, "89") == tmp_path / nvrtc.file_name(UNIT, arch)
    (tmp_path / nvrtc.file_name(UNIT, "86")).write_bytes(b"")
    assert nvrtc.find(UNIT, "89") == tmp_path / nvrtc.file_name(UNIT, "80")


def test_another_compiler_compiles_anew(cache: Path, monkeypatch: pytest.MonkeyPatch, counted: list) -> None:
    nvrtc.cubin(UNIT, "90")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    assert nvrtc.find(UNIT, "90") is None
    nvrtc.cubin(UNIT, "90")
    assert len(counted) == len(list(cache.iterdir())) == 2


def test_prebuilt_cubins_need_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise KernelBuildError("no NVRTC here")

    monkeypatch.setattr(nvrtc, "bindings", missing)
    monkeypatch.setattr(nvrtc, "version", missing)
    assert nvrtc.find(UNIT, "90") is None
    with pytest.raises(KernelBuildError, match="no NVRTC here"):
        nvrtc.cubin(UNIT, "90")
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path))
    store.write(tmp_path / nvrtc.file_name(UNIT, "90"), ELF)
    assert nvrtc.cubin(UNIT, "90") == ELF


def test_missing_bindings_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(KernelBuildError, match=r"ModuleNotFoundError.*pip install 'paperzoo\[cuda\]'"):
        nvrtc.bindings.__wrapped__()


@pytest.mark.parametrize("obstacle", ["a file in its place", "read-only", "full"])
def test_a_cache_that_cannot_be_written_costs_time_and_one_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, counted: list, obstacle: str
) -> None:
    if obstacle == "a file in its place":
        cache.parent.write_text("here already")
    elif obstacle == "read-only":
        monkeypatch.setattr(os, "replace", failing(errno.EROFS))
    else:
        monkeypatch.setattr(Path, "write_bytes", failing(errno.ENOSPC))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        received = [nvrtc.cubin(UNIT, arch) for arch in ("90", "90", "80")]
    assert received == [ELF + b"90", ELF + b"90", ELF + b"80"]
    assert len(counted) == 3
    (warning,) = caught
    assert warning.category is KernelWarning
    expected = rf"cannot keep compiled kernels in {cache} \(.*\): every process compiles them again; set ZOO_CACHE_DIR"
    assert re.match(expected, str(warning.message))
    assert not cache.exists() or os.listdir(cache) == []


@compiles
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_may_compile_the_same_cubin_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither finds the other's: both have written when they move their files into place."""
    context = multiprocessing.get_context("fork")
    both, results = context.Barrier(2), context.SimpleQueue()
    replace = os.replace

    def together(source: str, target: str) -> None:
        both.wait(60)
        replace(source, target)

    def build() -> None:
        warnings.simplefilter("error")  # of a cubin that could not be kept
        results.put(nvrtc.cubin(UNIT, "90"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", together)
        children = [context.Process(target=build) for _ in range(2)]
        for child in children:
            child.start()
    received = [results.get() for _ in children]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    (path,) = cache.iterdir()
    assert path == nvrtc.find(UNIT, "90")
    assert received == [path.read_bytes()] * 2
