"""The CPU library: built once for all processes, found again, loaded, and missed with a sentence."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import ELF, failing, forget_sources
from zoo.activations.polycom import eager
from zoo.errors import KernelBuildError, KernelError
from zoo.kernels import cpu, store, use_cpu_library
from zoo.warn import KernelWarning

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
OPS = [f"poly_{op}{suffix}" for op in ("relu", "norm", "norm_mul") for suffix in ("", "_backward")]


def ask() -> bool:
    """use_cpu_library as a new process would see it."""
    return use_cpu_library.__wrapped__()


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What would have been loaded."""
    loaded: list[Path] = []
    monkeypatch.setattr(cpu, "load", loaded.append)
    return loaded


# Building


def test_it_is_built_once_and_found_again(cache: Path, fake_compiler, nothing_loads, capsys) -> None:
    compiler = fake_compiler()
    assert cpu.find() is None
    assert ask()
    assert ask()
    path = cache / cpu.file_name(cpu.levels()[0])
    assert nothing_loads == [path, path]
    assert cpu.find() == path
    assert os.listdir(cache) == [path.name]
    assert capsys.readouterr().err == f"zoo: compiling the CPU kernels, once, into {cache}\n"
    *compiled, linked = compiler.calls
    assert len(compiled) == len(cpu._sources())
    assert linked.startswith("-shared")
    for call in compiled:
        assert f"-march={cpu.levels()[0]}" in call or not cpu.levels()[0].startswith(("x86", "arm"))
        assert "-march=native" not in call


@forks
def test_processes_that_want_it_at_once_wait_for_the_first(cache: Path, fake_compiler) -> None:
    compiler = fake_compiler(gated=True)
    context = multiprocessing.get_context("fork")
    at_the_lock = context.Event()

    def second() -> None:
        import fcntl

        flock = fcntl.flock

        def announced(*arguments) -> None:
            at_the_lock.set()
            flock(*arguments)

        fcntl.flock = announced
        assert cpu.library() == cache / cpu.file_name(cpu.levels()[0])
        assert store.is_whole(cpu.library())

    children = [context.Process(target=cpu.library), context.Process(target=second)]
    children[0].start()
    compiler.wait_until_started()
    children[1].start()
    assert at_the_lock.wait(60)
    compiler.release()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert compiler.builds == 1
    assert os.listdir(cache) == [cpu.file_name(cpu.levels()[0])]


@forks
def test_a_killed_build_stands_in_nobodys_way(cache: Path, fake_compiler) -> None:
    compiler = fake_compiler(gated=True)
    child = multiprocessing.get_context("fork").Process(target=cpu.library)
    child.start()
    compiler.wait_until_started()
    child.kill()
    child.join(60)
    assert cpu.find() is None
    assert store.compiled(cache) == []
    assert {path.suffix for path in store.leftovers(cache)} == {".lock", ".tmp"}
    path = cpu.library()
    assert path.read_bytes() == ELF
    assert compiler.builds == 1  # the killed one came to no library
    compiler.release()  # the orphan


@pytest.mark.parametrize("damaged", [b"", bytes(len(ELF)), ELF[:40]])
def test_a_damaged_library_is_built_again(cache: Path, fake_compiler, damaged: bytes) -> None:
    compiler = fake_compiler()
    path = cpu.library()
    path.write_bytes(damaged)
    assert cpu.find() is None
    assert cpu.library() == path
    assert path.read_bytes() == ELF
    assert compiler.builds == 2


def test_it_is_built_anew_when_a_source_changes(cache: Path, copied_sources: Path, fake_compiler) -> None:
    compiler = fake_compiler()
    first = cpu.library()
    with (copied_sources / "polycom/math.h").open("a") as file:
        file.write("// changed\n")
    forget_sources()
    assert cpu.library() != first
    assert compiler.builds == 2
    assert str(copied_sources) in compiler.calls[-2]


def test_a_prebuilt_library_goes_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler
) -> None:
    compiler = fake_compiler()
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path / "prebuilt"))
    cached = cpu.library()
    prebuilt = cpu.build(tmp_path / "prebuilt", cpu.levels()[-1])
    assert cpu.library() == prebuilt != cached
    assert compiler.builds == 2


# Which instruction set


@pytest.mark.parametrize(
    ("machine", "flags", "levels"),
    [
        ("x86_64", cpu._V3 | {"sse2"}, ("x86-64-v3", "x86-64")),
        ("AMD64", cpu._V3, ("x86-64-v3", "x86-64")),
        ("x86_64", cpu._V3 - {"avx2"}, ("x86-64",)),
        ("x86_64", cpu._V3 - {"fma"}, ("x86-64",)),
        ("x86_64", set(), ("x86-64",)),
        ("aarch64", {"asimd"}, ("armv8-a",)),
        ("riscv64", set(), ("riscv64",)),
    ],
)
def test_a_processor_gets_what_it_can_run(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], levels: tuple[str, ...]
) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "_processor_flags", lambda: flags)
    assert cpu.levels.__wrapped__() == levels


def test_flags_are_those_of_the_first_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "processor : 0\nflags\t\t: fpu avx2 fma\nvmx flags : ept\n")
    assert cpu._processor_flags() == {"fpu", "avx2", "fma"}


def test_without_avx2_the_library_for_avx2_is_not_taken(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler
) -> None:
    compiler = fake_compiler()
    monkeypatch.setattr(cpu, "levels", lambda: ("x86-64-v3", "x86-64"))
    assert cpu.library().name == cpu.file_name("x86-64-v3")
    monkeypatch.setattr(cpu, "levels", lambda: ("x86-64",))
    assert cpu.find() is None
    assert cpu.library().name == cpu.file_name("x86-64")
    assert "-march=x86-64 " in compiler.calls[-2]


# What is said when it cannot be had


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_says_what_to_install(cache: Path) -> None:
    expected = (
        r"There is no C\+\+ compiler on the PATH; install one \(Debian: apt install g\+\+\), or a wheel of paperzoo"
    )
    with pytest.raises(KernelBuildError, match=expected):
        cpu.library()
    assert not cache.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nowhere/g++ -m64", "CXX names '/nowhere/g++', which is not there; install one"),
        ("'g++", 'CXX must be a command, got "\'g++" (No closing quotation)'),
    ],
)
def test_a_wrong_cxx_is_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(KernelBuildError, match=re.escape(message)):
        cpu.library()


def test_cxx_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler) -> None:
    compiler = fake_compiler()
    monkeypatch.setenv("CXX", f"{compiler.command} -stdlib=libc++")
    cpu.library()
    assert compiler.calls[0].startswith("-stdlib=libc++ -std=c++20")


def test_what_is_no_program_is_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c++").write_bytes(b"\0\1\2")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(KernelBuildError, match=r"the C\+\+ compiler .* cannot be run: Exec format error; set CXX"):
        cpu.library()
    assert list(cache.iterdir()) == []


def test_other_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(KernelBuildError, match="The native kernels are for Linux and macOS, this is win32."):
        cpu.compiler()


def test_a_failing_compiler_is_quoted_and_leaves_nothing(cache: Path, fake_compiler) -> None:
    compiler = fake_compiler(status=3, says="note: hm\nmath.h:7:1: error: no such thing")
    with pytest.raises(KernelBuildError) as caught:
        cpu.library()
    first, command, *log = str(caught.value).splitlines()
    assert first == f"{compiler.command} failed with status 3 on the CPU kernels: math.h:7:1: error: no such thing"
    assert command.startswith(f"{compiler.command} -std=c++20")
    assert log == ["note: hm", "math.h:7:1: error: no such thing"]
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_the_compilers_to_report(cache: Path, fake_compiler) -> None:
    fake_compiler(status=1, says="ld: final link failed: error: No space left on device")
    with pytest.raises(KernelBuildError, match="No space left on device"):
        cpu.library()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("obstacle", ["a file in its place", "read-only", "full"])
def test_a_cache_that_cannot_be_written_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler, obstacle: str
) -> None:
    fake_compiler()
    number = {"a file in its place": errno.ENOTDIR, "read-only": errno.EROFS, "full": errno.ENOSPC}[obstacle]
    if obstacle == "a file in its place":
        cache.parent.write_text("here already")
    elif obstacle == "read-only":
        monkeypatch.setattr(tempfile, "mkstemp", failing(number))
    else:
        monkeypatch.setattr(os, "replace", failing(number))
    expected = rf"cannot write the compiled kernels to {cache} \({os.strerror(number)}\); set ZOO_CACHE_DIR"
    with pytest.raises(KernelBuildError, match=expected):
        cpu.library()
    assert not cache.exists() or os.listdir(cache) == []


@pytest.mark.usefixtures("no_compiler")
def test_auto_falls_back_with_one_warning(cache: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [ask(), ask()] == [False, False]
    (warning,) = caught
    assert warning.category is KernelWarning
    assert re.match(
        r"no native CPU kernels, the affected ops run through PyTorch, several times slower. There is no C\+\+ compiler"
        r".*\(ZOO_KERNELS=off accepts this silently\)$",
        str(warning.message),
    )


@pytest.mark.usefixtures("no_compiler")
def test_require_raises(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "require")
    with pytest.raises(KernelBuildError, match="There is no C\\+\\+ compiler"):
        ask()


def test_off_is_silent_and_loads_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler, nothing_loads
) -> None:
    compiler = fake_compiler()
    cpu.library()
    monkeypatch.setenv("ZOO_KERNELS", "off")
    assert not ask()
    assert nothing_loads == []
    assert compiler.builds == 1


def test_an_unknown_mode_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_KERNELS", "yes")
    with pytest.raises(KernelError, match="ZOO_KERNELS must be auto, off or require, got 'yes'"):
        ask()


def test_a_library_that_does_not_load_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch, fake_compiler) -> None:
    fake_compiler(product=ELF.ljust(4096, b"\0"))  # whole, and no library
    with pytest.warns(KernelWarning, match=r"zoo_cpu.*\.so cannot be loaded: .*; delete it to have it built again"):
        assert not ask()
    monkeypatch.setenv("ZOO_KERNELS", "require")
    with pytest.raises(KernelError, match="cannot be loaded"):
        ask()


# The real one, from the user's cache: half a minute of compiling where it is not there yet


@pytest.fixture(scope="module")
def native() -> None:
    if not use_cpu_library():
        pytest.skip("no CPU library: needs a C++ compiler, and ZOO_KERNELS other than off")


@pytest.mark.parametrize("name", OPS)
def test_it_registers_every_op(native: None, name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zoo::{name}", "CPU")


def test_its_ops_equal_the_closed_forms(native: None) -> None:
    x, mul, grad = torch.randn(3, 5, 33, dtype=torch.float64)
    weight, bias, scores = (torch.randn(n, dtype=torch.float64) for n in (3, 1, 5))
    ops = torch.ops.zoo
    row = (1e-6, True)
    stats = eager.poly_norm_forward(x, weight, bias, *row)[1]
    gated = (x, mul, weight, bias, scores)
    gated_stats = eager.poly_norm_mul_forward(*gated, *row, 1.5)[1]
    pairs = [
        (ops.poly_relu(x, weight, bias), eager.poly_relu_forward(x, weight, bias)),
        (ops.poly_relu_backward(grad, x, weight), eager.poly_relu_backward(grad, x, weight)),
        (ops.poly_norm(x, weight, bias, *row), eager.poly_norm_forward(x, weight, bias, *row)),
        (
            ops.poly_norm_backward(grad, x, weight, stats, *row),
            eager.poly_norm_backward(grad, x, weight, stats, row[1]),
        ),
        (ops.poly_norm_mul(*gated, *row, 1.5), eager.poly_norm_mul_forward(*gated, *row, 1.5)),
        (
            ops.poly_norm_mul_backward(grad, *gated, gated_stats, *row, 1.5),
            eager.poly_norm_mul_backward(grad, *gated, gated_stats, row[1], 1.5),
        ),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


FIRST_USE = """
import resource, torch, numpy
def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
before = seconds()
from zoo import PolyNorm
PolyNorm()(torch.randn(2, 8))
print(seconds() - before, torch._C._dispatch_has_kernel_for_dispatch_key("zoo::poly_norm", "CPU"))
"""


def first_use(mode: str) -> tuple[float, bool]:
    """CPU seconds beyond torch's import until the first result, and whether the library was loaded for it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FIRST_USE],
        env={**os.environ, "ZOO_KERNELS": mode},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    cost, loaded = done.stdout.split()
    return float(cost), loaded == "True"


def test_the_first_use_is_fast_when_the_library_is_there(native: None) -> None:
    runs = [first_use("require") for _ in range(3)]
    assert all(loaded for _, loaded in runs)
    assert min(cost for cost, _ in runs) < 0.2


def test_nothing_is_loaded_when_off(native: None) -> None:
    assert not first_use("off")[1]
