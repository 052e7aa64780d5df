"""What a compiled kernel is named after: everything it depends on, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kernels.conftest import forget_sources
from zoo.errors import KernelError
from zoo.kernels import cpu, nvrtc, sources
from zoo.kernels.sources import Unit, poly_norm_unit, poly_relu_unit

UNIT = poly_relu_unit("float32", 3)
SOURCES = ("polycom/poly_relu.cu", "polycom/poly_norm.cu")


def key(unit: Unit = UNIT) -> str:
    return nvrtc.file_name(unit, "90", (13, 0))


def test_a_name_says_what_is_in_the_file() -> None:
    assert key().startswith("poly_relu-order3-float32-sm90-")
    assert key(poly_norm_unit("bfloat16", 2, True)).startswith("poly_norm-order2-gated-bfloat16-sm90-")


@pytest.mark.parametrize("source", SOURCES)
def test_a_cubin_is_named_after_every_source_it_includes(copied_sources: Path, source: str) -> None:
    unit = Unit(source, "float32", "any")
    included = list(sources.closure(source))
    assert {source, "common/scalar.h", "common/rows.cuh", "polycom/math.h"} <= set(included)
    keys = {key(unit)}
    for name in included:
        with (copied_sources / name).open("a") as file:
            file.write("// changed\n")
        forget_sources()
        keys.add(key(unit))
    assert len(keys) == len(included) + 1


def test_the_cpu_library_is_named_after_every_source_it_includes(copied_sources: Path) -> None:
    included = list(sources.closure("polycom/cpu.cpp"))
    names = {cpu.file_name("x86-64")}
    for name in included:
        with (copied_sources / name).open("a") as file:
            file.write("// changed\n")
        forget_sources()
        names.add(cpu.file_name("x86-64"))
    assert len(names) == len(included) + 1


def test_no_compiled_kernel_depends_on_the_emulator(copied_sources: Path) -> None:
    before = key(), cpu.file_name("x86-64")
    headers = [copied_sources / "common/emu.h", *(copied_sources / "common/emu").iterdir()]
    assert len(headers) > 3
    for header in headers:
        header.write_text("#error changed\n")
    forget_sources()
    assert (key(), cpu.file_name("x86-64")) == before


def test_a_name_depends_on_defines_types_options_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key(), key(poly_relu_unit("float32", 4)), key(poly_relu_unit("float64", 3))]
    keys.append(key(Unit(UNIT.source, UNIT.dtype, UNIT.variant, (*UNIT.defines, ("ZOO_MORE", 1)))))
    keys.append(nvrtc.file_name(UNIT, "90", (13, 1)))
    keys.append(nvrtc.file_name(UNIT, "90"))
    keys.append(nvrtc.file_name(UNIT, "80", (13, 0)))
    monkeypatch.setattr(nvrtc, "_OPTIONS", ("--std=c++20",))
    keys.append(key())
    hashes = [name.rpartition("-")[2] for name in keys]
    # Of the last but one only the architecture differs, which is in the name itself.
    assert len(set(keys)) == len(keys)
    assert len(set(hashes)) == len(keys) - 1


def test_the_cpu_library_is_named_after_flags_and_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [cpu.file_name("x86-64"), cpu.file_name("x86-64-v3")]
    monkeypatch.setattr(cpu, "_FLAGS", (*cpu._FLAGS, "-DMORE"))
    cpu._fingerprint.cache_clear()
    names.append(cpu.file_name("x86-64"))
    cpu._fingerprint.cache_clear()
    assert len(set(names)) == 3


def test_the_same_sources_elsewhere_have_the_same_name(copied_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = key(), cpu.file_name("x86-64")
    monkeypatch.undo()
    forget_sources()
    assert (key(), cpu.file_name("x86-64")) == there


@pytest.mark.usefixtures("needs_compiler")
def test_what_the_compiler_reads_of_ours_is_what_the_name_depends_on() -> None:
    """By the compiler's own list; NVRTC needs no such test, it is given nothing but the closure."""
    folder, torch_home = sources.folder(), Path(pytest.importorskip("torch").__file__).parent
    command = [*cpu.compiler(), *cpu._FLAGS, "-M", f"-I{folder}", f"-I{torch_home / 'include'}"]
    done = subprocess.run([*command, str(folder / "polycom/cpu.cpp")], capture_output=True, text=True, check=True)
    read = {Path(word).resolve() for word in done.stdout.replace("\\\n", " ").split()[1:]}
    ours = {path.relative_to(folder).as_posix() for path in read if path.is_relative_to(folder)}
    assert ours == set(sources.closure("polycom/cpu.cpp"))


def test_a_missing_source_is_named() -> None:
    with pytest.raises(KernelError, match=r"no kernel source 'polycom/none.cu' in .*cuda_kernels; reinstall paperzoo"):
        sources.closure("polycom/none.cu")


def test_units_ahead_of_time_have_names_of_their_own() -> None:
    units = list(sources.units())
    of_polycom = {unit.name for unit in units if unit.source.startswith("polycom/")}
    assert len({unit.name for unit in units}) == len(units)
    assert len(of_polycom) == len(sources.SCALARS) * len(sources.ORDERS) * 3
    others = {unit.name for unit in units} - of_polycom
    assert {unit.name for unit in sources.units([3])} == {name for name in of_polycom if "order3" in name} | others


def test_every_source_has_units() -> None:
    found = {path.relative_to(sources.folder()).as_posix() for path in sources.folder().glob("*/*.cu")}
    assert {unit.source for unit in sources.units()} == found


def test_every_order_reaches_the_compiler() -> None:
    assert poly_relu_unit("float16", 5).macros == ["ZOO_SCALAR=zoo::half", "ZOO_ORDER=5"]
