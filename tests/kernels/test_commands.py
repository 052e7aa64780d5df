"""`zoo kernels` and what `zoo doctor` says about kernels, with a compiler that only pretends unless said otherwise."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.conftest import ELF, failing, forget_sources
from tests.test_import import measured
from zoo.cli import main
from zoo.errors import KernelBuildError, KernelError
from zoo.kernels import commands, cpu, nvrtc, sources, store
from zoo.kernels.commands import GpuState

DEVICES = [("Tesla V100", 7, 0), ("Tesla T4", 7, 5), ("RTX PRO 6000", 12, 0)]
UNITS = [sources.poly_relu_unit(dtype, 3) for dtype in ("float32", "float64")]
REAL_GPUS = commands._gpus
H100 = GpuState(0, "NVIDIA H100", "90", True)


@pytest.fixture(autouse=True)
def alone(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device, nothing shipped with the package, two units, one instruction set."""
    monkeypatch.setattr(commands, "_gpus", list)
    monkeypatch.setattr(store, "_PACKAGE", tmp_path)
    monkeypatch.setattr(sources, "units", lambda orders=(3,): iter(UNITS))
    monkeypatch.setattr(cpu, "levels", lambda: ("x86-64",))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Compilations, which give a short file at once, by an NVRTC 13.0."""
    calls: list[tuple[str, str]] = []

    def compile_unit(unit: sources.Unit, arch: str) -> bytes:
        calls.append((unit.dtype, arch))
        return ELF

    monkeypatch.setattr(nvrtc, "compile_unit", compile_unit)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "architectures", lambda: ("75", "80", "90", "120"))
    return calls


def cubins(*architectures: str, compiler: tuple[int, int] | None = (13, 0)) -> set[str]:
    """Names of what a build leaves."""
    return {nvrtc.file_name(unit, arch, compiler) for unit in UNITS for arch in architectures}


def error_of(*arguments: str, capsys: pytest.CaptureFixture) -> str:
    """What stderr says of a command that must exit with status 2."""
    assert main(["kernels", *arguments]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.strip().removeprefix("error: ")


# build


def test_build_fills_the_cache_and_compiles_nothing_twice(
    cache: Path, compiled: list, fake_compiler, capsys: pytest.CaptureFixture
) -> None:
    compiler = fake_compiler()
    build = ["kernels", "build", "--arch", "80,90"]
    assert main(build) == 0
    assert capsys.readouterr().out.splitlines() == [
        "CPU library for x86-64: compiled, 64 bytes",
        "sm_80: 2 compiled, 0 were there, 128 bytes",
        "sm_90: 2 compiled, 0 were there, 128 bytes",
        f"5 compiled, 0 were there; 320 bytes in {cache}",
    ]
    assert {path.name for path in cache.iterdir()} == cubins("80", "90") | {cpu.file_name("x86-64")}
    assert all(nvrtc.find(unit, "90").parent == cache for unit in UNITS)

    (cache / nvrtc.file_name(UNITS[0], "80", (13, 0))).write_bytes(b"damaged")
    assert main(build) == 0
    assert capsys.readouterr().out.splitlines() == [
        "CPU library for x86-64: was there, 64 bytes",
        "sm_80: 1 compiled, 1 were there, 128 bytes",
        "sm_90: 0 compiled, 2 were there, 128 bytes",
        f"1 compiled, 4 were there; 320 bytes in {cache}",
    ]
    assert compiler.builds == 1
    assert sorted(compiled) == sorted(
        [(unit.dtype, arch) for unit in UNITS for arch in ("80", "90")] + [("float32", "80")]
    )


def test_build_out_makes_a_folder_for_zoo_kernel_dir(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list, fake_compiler
) -> None:
    fake_compiler()
    monkeypatch.setattr(cpu, "levels", lambda: ("x86-64-v3", "x86-64"))
    folder = tmp_path / "new" / "kernels"
    assert main(["kernels", "build", "--arch", "80", "--out", str(folder)]) == 0
    libraries = {cpu.file_name("x86-64-v3"), cpu.file_name("x86-64")}  # it may be carried to a lesser processor
    assert {path.name for path in folder.iterdir()} == cubins("80", compiler=None) | libraries
    assert not cache.exists()
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(folder))
    assert cpu.find() == folder / cpu.file_name("x86-64-v3")
    assert nvrtc.find(UNITS[0], "86") == folder / nvrtc.file_name(UNITS[0], "80")


@pytest.mark.usefixtures("needs_nvrtc", "no_compiler")
def test_build_compiles_with_nvrtc(cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["kernels", "build", "--arch", "90", "--jobs", "2", "--orders", "3"]) == 0
    assert "sm_90: 2 compiled, 0 were there" in capsys.readouterr().out
    for unit in UNITS:
        assert nvrtc.find(unit, "90").read_bytes() == nvrtc.compile_unit(unit, "90")


@pytest.mark.usefixtures("needs_nvrtc", "no_compiler")
def test_a_broken_source_ends_a_build(
    cache: Path, copied_sources: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied_sources / "polycom/math.h"
    path.write_text("int broken = absent;\n" + path.read_text())
    forget_sources()
    message = error_of("build", "--arch", "90,80", "--jobs", "1", capsys=capsys)
    assert re.match(
        r"NVRTC [\d.]+ cannot compile poly_relu-order3-float32 for sm_90:\npolycom/math.h\(1\): error", message
    )
    assert not cache.exists()


def test_after_an_error_nothing_more_is_begun(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiled: list, capsys: pytest.CaptureFixture
) -> None:
    def fail(unit: sources.Unit, arch: str) -> bytes:
        compiled.append((unit.dtype, arch))
        raise KernelBuildError("math.h(7): error")

    monkeypatch.setattr(nvrtc, "compile_unit", fail)
    monkeypatch.setattr(sources, "units", lambda _: iter(UNITS * 50))
    assert error_of("build", "--arch", "80,90", "--no-cpu", "--jobs", "1", capsys=capsys) == "math.h(7): error"
    assert len(compiled) < 100  # of 200
    assert not cache.exists()


def test_jobs_compile_at_the_same_time(compiled: list, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def compile_unit(*_: object) -> bytes:
        both.wait(60)
        return ELF

    monkeypatch.setattr(nvrtc, "compile_unit", compile_unit)
    assert main(["kernels", "build", "--arch", "90", "--no-cpu", "--jobs", "2"]) == 0


@pytest.mark.parametrize("word", ["90", "sm_90", "9.0", " 90 ", "90,9.0,sm90"])
def test_an_architecture_has_several_spellings(cache: Path, compiled: list, word: str) -> None:
    assert main(["kernels", "build", "--no-cpu", "--arch", word]) == 0
    assert {path.name for path in cache.iterdir()} == cubins("90")


@pytest.mark.parametrize("word", ["12.0", "120", "sm_120"])
def test_an_architecture_may_have_three_digits(cache: Path, compiled: list, word: str) -> None:
    assert main(["kernels", "build", "--no-cpu", "--arch", word]) == 0
    assert {path.name for path in cache.iterdir()} == cubins("120")


@pytest.mark.parametrize("word", ["foo", "9", "91", "compute_90", "90a", "", "1.20", "9.00"])
def test_another_architecture_is_answered_with_the_possible_ones(
    cache: Path, compiled: list, capsys: pytest.CaptureFixture, word: str
) -> None:
    message = error_of("build", "--no-cpu", "--arch", f"80,{word}", capsys=capsys)
    assert message == (
        f"--arch: expected compute capabilities such as 90, sm_90 or 9.0, got {word!r}; NVRTC 13.0 compiles for 75, 80,"
        " 90, 120"
    )
    assert compiled == []


def test_build_is_for_the_devices_that_are_there(
    cache: Path, compiled: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gpus = [H100, GpuState(1, "NVIDIA H100", "90", True), GpuState(2, "Tesla V100", "70", False)]
    monkeypatch.setattr(commands, "_gpus", lambda: gpus)
    assert main(["kernels", "build", "--no-cpu"]) == 0
    assert {path.name for path in cache.iterdir()} == cubins("90")


def test_without_a_device_only_the_cpu_library_is_built(
    cache: Path, compiled: list, fake_compiler, capsys: pytest.CaptureFixture
) -> None:
    fake_compiler()
    assert main(["kernels", "build"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "no CUDA device is here: only the CPU library; name architectures for more, as in --arch 80,90",
        "CPU library for x86-64: compiled, 64 bytes",
        f"1 compiled, 0 were there; 64 bytes in {cache}",
    ]
    message = error_of("build", "--no-cpu", capsys=capsys)
    assert message == "nothing to build: no CUDA device is here; name architectures, as in --arch 80,90"
    assert compiled == []


@pytest.mark.usefixtures("no_compiler")
def test_a_missing_compiler_is_an_error_when_it_is_needed(
    cache: Path, compiled: list, capsys: pytest.CaptureFixture
) -> None:
    assert main(["kernels", "build", "--arch", "90"]) == 0
    assert "no CPU library: There is no C++ compiler on the PATH; install one" in capsys.readouterr().out
    assert {path.name for path in cache.iterdir()} == cubins("90")
    for arguments in (["--cpu", "--arch", "90"], []):
        assert error_of("build", *arguments, capsys=capsys).startswith("There is no C++ compiler on the PATH")


def test_a_missing_nvrtc_is_an_error_when_it_is_needed(
    fake_compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing() -> Any:
        raise KernelBuildError("no NVRTC here")

    fake_compiler()
    monkeypatch.setattr(nvrtc, "bindings", missing)
    monkeypatch.setattr(nvrtc, "version", missing)
    monkeypatch.setattr(nvrtc, "architectures", nvrtc.architectures.__wrapped__)
    assert error_of("build", "--arch", "90", capsys=capsys) == "no NVRTC here"
    assert main(["kernels", "build"]) == 0


@pytest.mark.parametrize(
    ("text", "orders"), [("3", [3]), ("1-5", [1, 2, 3, 4, 5]), ("2-2", [2]), ("31-32", [31, sources.MOST_POWERS])]
)
def test_orders(text: str, orders: list[int]) -> None:
    assert commands._orders(text) == orders


@pytest.mark.parametrize("text", ["0", "0-3", "5-1", "1-33", "x", "", "1,2"])
def test_other_orders_are_an_error(compiled: list, capsys: pytest.CaptureFixture, text: str) -> None:
    message = error_of("build", "--arch", "90", "--orders", text, capsys=capsys)
    assert message == f"--orders: expected an order or a range from 1 to 32, as 3 or 1-5, got {text!r}"


def test_there_is_at_least_one_job(capsys: pytest.CaptureFixture) -> None:
    message = error_of("build", "--jobs", "0", capsys=capsys)
    assert message == "--jobs: expected a number of threads from 1, got 0"


@pytest.mark.parametrize("obstacle", ["a file in its place", "full"])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list, capsys: pytest.CaptureFixture, obstacle: str
) -> None:
    folder = tmp_path / "out"
    if obstacle == "full":
        monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    else:
        folder.write_text("here already")
    message = error_of("build", "--no-cpu", "--arch", "90", "--out", str(folder), capsys=capsys)
    assert re.match(rf"cannot write the compiled kernels to {folder} \(.*\); set ZOO_CACHE_DIR, or --out", message)
    assert not folder.is_dir() or os.listdir(folder) == []


# clear


def test_clear_deletes_what_is_ours_and_nothing_else(
    cache: Path, compiled: list, fake_compiler, capsys: pytest.CaptureFixture
) -> None:
    foreign = ["notes.txt", "model.cubin", "other.so", "zoo_cpu.so", ".hidden.tmp", "a.lock", ".x.cubin.1.tmp"]
    fake_compiler()
    main(["kernels", "build", "--arch", "90"])
    killed = [f".{nvrtc.file_name(UNITS[0], '80', (13, 0))}.a_b1.tmp", f".{cpu.file_name('x86-64')}.abc.tmp"]
    for name in [*foreign, *killed, f".{Path(cpu.file_name('x86-64')).stem}.lock"]:
        (cache / name).write_bytes(b"12345")
    (cache / "folder").mkdir()
    (cache.parent / nvrtc.file_name(UNITS[0], "90")).touch()
    capsys.readouterr()
    assert main(["kernels", "clear"]) == 0
    assert capsys.readouterr().out == f"deleted 6 files, {3 * len(ELF) + 15} bytes, from {cache}\n"
    assert {path.name for path in cache.iterdir()} == {*foreign, "folder"}
    assert len(list(cache.parent.iterdir())) == 2


def test_clear_leaves_prebuilt_kernels_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list, capsys: pytest.CaptureFixture
) -> None:
    main(["kernels", "build", "--no-cpu", "--arch", "90", "--out", str(tmp_path / "out")])
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path / "out"))
    assert main(["kernels", "clear"]) == 0
    assert "deleted 0 files, 0 bytes" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_file_that_cannot_be_deleted_is_named(
    cache: Path, compiled: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    main(["kernels", "build", "--no-cpu", "--arch", "90"])
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    message = error_of("clear", capsys=capsys)
    assert re.match(rf"cannot delete {cache}/poly_relu-.* \(Read-only file system\); 0 files were deleted", message)


# status


def status(capsys: pytest.CaptureFixture) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["kernels", "status", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_of_an_empty_cache(cache: Path, compiled: list, fake_compiler, capsys: pytest.CaptureFixture) -> None:
    compiler = fake_compiler()
    assert main(["kernels", "status"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mode          auto (ZOO_KERNELS)",
        f"looked at     {cache} (cache, not there)",
        f"CPU library   not there; {compiler.command} will build it at the first use",
        "NVRTC         13.0",
        "CUDA devices  none",
        "cache         0 cubins, 0 CPU libraries, 0 bytes",
    ]
    assert compiler.calls == compiled == []
    assert not cache.exists()


def test_status_counts_what_is_there(
    cache: Path, tmp_path: Path, compiled: list, fake_compiler, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    fake_compiler()
    monkeypatch.setattr(commands, "_gpus", lambda: [H100])
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path / "mispelt"))
    main(["kernels", "build", "--arch", "120,90"])
    (cache / f".{nvrtc.file_name(UNITS[0], '80')}.abc.tmp").write_bytes(b"123")
    (cache / "notes.txt").write_text("not counted")
    assert status(capsys) == {
        "mode": "auto",
        "folders": [
            {"path": str(tmp_path / "mispelt"), "origin": "ZOO_KERNEL_DIR", "exists": False},
            {"path": str(cache), "origin": "cache", "exists": True},
        ],
        "cpu_library": {"path": str(cache / cpu.file_name("x86-64")), "compiler": None, "problem": None},
        "nvrtc": {"version": "13.0", "problem": None},
        "gpus": [{"index": 0, "name": "NVIDIA H100", "arch": "90", "has_kernels": True}],
        "cache": {
            "path": str(cache),
            "cubins": {"90": 2, "120": 2},
            "libraries": 1,
            "bytes": 5 * len(ELF),
            "leftovers": 1,
            "leftover_bytes": 3,
        },
    }
    assert main(["kernels", "status"]) == 0
    assert capsys.readouterr().out.splitlines()[-6:] == [
        f"              {cache} (cache)",
        f"CPU library   {cache / cpu.file_name('x86-64')}",
        "NVRTC         13.0",
        "CUDA devices  cuda:0 NVIDIA H100, sm_90",
        "cache         4 cubins (2 for sm_90, 2 for sm_120), 1 CPU library, 320 bytes",
        "leftovers     1 files of killed or running builds, 3 bytes; `zoo kernels clear` deletes them",
    ]


def test_status_names_folders_in_the_order_they_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "_prebuilt").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path / "mine"))
    assert [folder["origin"] for folder in status(capsys)["folders"]] == ["ZOO_KERNEL_DIR", "package", "cache"]


@pytest.mark.usefixtures("no_compiler")
def test_status_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def missing() -> Any:
        raise KernelBuildError("no NVRTC here")

    monkeypatch.setattr(nvrtc, "version", missing)
    monkeypatch.setenv("ZOO_KERNELS", "require")
    state = status(capsys)
    assert state["mode"] == "require"
    assert state["cpu_library"]["problem"].startswith("There is no C++ compiler on the PATH")
    assert state["nvrtc"] == {"version": None, "problem": "no NVRTC here"}
    main(["kernels", "status"])
    shown = capsys.readouterr().out
    assert "CPU library   There is no C++ compiler" in shown
    assert "NVRTC         no NVRTC here" in shown


def test_status_sees_that_the_cache_cannot_be_written(
    cache: Path, compiled: list, fake_compiler, capsys: pytest.CaptureFixture
) -> None:
    fake_compiler()
    cache.parent.write_text("here already")
    assert status(capsys)["cpu_library"]["problem"].startswith(f"cannot write the compiled kernels to {cache};")


def test_a_bad_mode_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "yes")
    assert error_of("status", capsys=capsys) == "ZOO_KERNELS must be auto, off or require, got 'yes'"


def test_help_is_light() -> None:
    for command in (["kernels", "--help"], ["kernels", "build", "--help"]):
        code = f"from zoo.cli import main\ntry: main({command})\nexcept SystemExit: pass"
        _, loaded, printed = measured(code)
        assert loaded == []
        assert "clear" in printed or "--arch" in printed


def test_a_misspelt_action_is_answered_with_the_nearest(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["kernels", "biuld"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: 'biuld' is not one of build, status, clear. Did you mean 'build'?\n"


def test_devices_are_those_of_a_torch_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = [SimpleNamespace(name=name, major=major, minor=minor) for name, major, minor in DEVICES]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(DEVICES))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    assert [(gpu.index, gpu.arch, gpu.has_kernels) for gpu in REAL_GPUS()] == [
        (0, "70", False),
        (1, "75", True),
        (2, "120", True),
    ]
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm answers to torch.cuda too
    assert REAL_GPUS() == []


# doctor


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda _: None)


def doctor() -> tuple[list[str], list[str]]:
    """Its lines on kernels, and what it finds broken."""
    broken: list[str] = []
    return commands.diagnose(broken), broken


def test_doctor_builds_nothing(cache: Path, compiled: list, fake_compiler, capsys: pytest.CaptureFixture) -> None:
    compiler = fake_compiler()
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert f"CPU kernels: not there; {compiler.command} will build it at the first use" in lines
    assert "CUDA kernels: not needed without a CUDA device (NVRTC 13.0)" in lines
    assert f"kernel cache: 0 files, 0 bytes in {cache}" in lines
    assert not [line for line in lines if line.startswith("BROKEN") and "kernels" in line.lower()]
    assert compiler.calls == compiled == []
    assert not cache.exists()


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_doctor_says_what_is_ready(
    cache: Path, compiled: list, fake_compiler, nothing_loads: None, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    fake_compiler()
    monkeypatch.setattr(commands, "_gpus", lambda: [H100])
    monkeypatch.setattr(commands.launch, "driver", lambda: None)
    main(["kernels", "build"])
    monkeypatch.setenv("ZOO_KERNELS", mode)
    assert doctor() == (
        [
            f"CPU kernels: ready, {cache / cpu.file_name('x86-64')}",
            "CUDA kernels: ready, NVRTC 13.0 compiles them for sm_90 when needed",
            f"kernel cache: 3 files, 192 bytes in {cache}",
        ],
        [],
    )


@pytest.mark.usefixtures("no_compiler")
def test_doctor_finds_a_missing_compiler_broken_only_when_kernels_are_required(
    compiled: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, broken = doctor()
    assert lines[0].startswith("CPU kernels: There is no C++ compiler on the PATH; install one")
    assert broken == []
    monkeypatch.setenv("ZOO_KERNELS", "require")
    (problem,) = doctor()[1]
    assert problem.startswith("ZOO_KERNELS=require, but there are no CPU kernels: There is no C++ compiler")


def test_doctor_finds_a_library_that_does_not_load(
    cache: Path, compiled: list, fake_compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake_compiler()
    main(["kernels", "build"])
    assert "cannot be loaded" in doctor()[0][0]
    monkeypatch.setenv("ZOO_KERNELS", "require")
    assert main(["doctor"]) == 1
    assert re.search(r"^BROKEN: ZOO_KERNELS=require, but .*cannot be loaded", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("lacking", ["driver", "NVRTC", "capability"])
def test_doctor_finds_a_device_without_kernels_broken_only_when_they_are_required(
    compiled: list, fake_compiler, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    def missing() -> Any:
        raise KernelBuildError(f"no {lacking} here")

    fake_compiler()
    monkeypatch.setattr(commands, "_gpus", lambda: [H100])
    monkeypatch.setattr(commands.launch, "driver", lambda: None)
    expected = f"no {lacking} here"
    if lacking == "driver":
        monkeypatch.setattr(commands.launch, "driver", missing)
    elif lacking == "NVRTC":
        monkeypatch.setattr(nvrtc, "version", missing)
    else:
        monkeypatch.setattr(commands, "_gpus", lambda: [GpuState(0, "Tesla V100", "70", False)])
        expected = "they need compute capability 7.5, which Tesla V100 does not have"
    lines, broken = doctor()
    assert lines[1] == f"CUDA kernels: {expected}"
    assert broken == []
    monkeypatch.setenv("ZOO_KERNELS", "require")
    assert doctor()[1] == [f"ZOO_KERNELS=require, but there are no CUDA kernels: {expected}"]


def test_prebuilt_cubins_make_up_for_a_missing_nvrtc(
    tmp_path: Path, compiled: list, monkeypatch: pytest.MonkeyPatch, fake_compiler
) -> None:
    def missing() -> Any:
        raise KernelBuildError("no NVRTC here")

    fake_compiler()
    main(["kernels", "build", "--no-cpu", "--arch", "90", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(commands, "_gpus", lambda: [H100])
    monkeypatch.setattr(commands.launch, "driver", lambda: None)
    monkeypatch.setattr(nvrtc, "version", missing)
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path / "out"))
    assert doctor()[0][1] == "CUDA kernels: ready, compiled ahead of time"
    (tmp_path / "out" / nvrtc.file_name(UNITS[1], "90")).unlink()
    assert doctor()[0][1] == "CUDA kernels: no NVRTC here"


def test_doctor_takes_off_for_an_answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "off")
    monkeypatch.setattr(cpu, "find", lambda: pytest.fail("looked for it"))
    assert doctor() == (["native kernels: off (ZOO_KERNELS)", f"kernel cache: 0 files, 0 bytes in {cache}"], [])


def test_doctor_finds_a_bad_mode_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "yes")
    assert main(["doctor"]) == 1
    assert "BROKEN: ZOO_KERNELS must be auto, off or require, got 'yes'" in capsys.readouterr().out


def test_an_error_shows_its_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(KernelError, match="--jobs"):
        main(["kernels", "build", "--jobs", "0"])


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (10**6, "1.0 MB"), (23456789, "23.5 MB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert commands._bytes(count) == text
