"""The platform wheel runs the CPU library where there is no compiler; the pure one says what is missing, and works."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename
from wheel.wheelfile import WheelFile

from scripts import build_wheel
from scripts.build_wheel import Needs
from zoo.errors import KernelBuildError, KernelError
from zoo.kernels import cpu, nvrtc, sources

ROOT = Path(__file__).parents[1]

# What readelf --dynamic --version-info prints, cut to what matters.
READELF = """
 0x0000000000000001 (NEEDED)             Shared library: [libtorch_cpu.so]
 0x0000000000000001 (NEEDED)             Shared library: [libstdc++.so.6]
 0x000000000000000e (SONAME)             Library soname: [libzoo.so]
Version needs section '.gnu.version_r' contains 2 entries:
  000000: Version: 1  File: libc.so.6  Cnt: 3
  0x0010:   Name: GLIBC_2.4  Flags: none  Version: 7
  0x0020:   Name: GLIBC_2.29  Flags: none  Version: 11
  0x0030:   Name: GLIBC_2.2.5  Flags: none  Version: 12
  0x0040: Version: 1  File: libstdc++.so.6  Cnt: 2
  0x0050:   Name: GLIBCXX_3.4.21  Flags: none  Version: 10
  0x0060:   Name: CXXABI_1.3.9  Flags: WEAK  Version: 6
"""


def test_needs_are_read_from_readelf() -> None:
    needs = Needs.parse(READELF)
    assert needs.libraries == {"libtorch_cpu.so", "libstdc++.so.6"}
    assert needs.newest() == {"GLIBC": (2, 29), "GLIBCXX": (3, 4, 21), "CXXABI": (1, 3, 9)}
    assert needs.manylinux() == 29


@pytest.mark.parametrize(
    ("old", "new", "n"),
    [
        ("GLIBC_2.29", "GLIBC_2.14", 28),  # torch's own wheels are for 2.28
        ("GLIBC_2.29", "GLIBC_2.36", 36),
        ("GLIBC_2.29", "GLIBC_3.0", None),
        ("GLIBC_2.29", "GLIBC_PRIVATE", None),
        ("GLIBC_2.29", "GLIBC_ABI_DT_RELR", None),
        ("GLIBCXX_3.4.21", "GLIBCXX_3.4.28", 31),
        ("GLIBCXX_3.4.21", "GLIBCXX_3.4.29", 34),
        ("GLIBCXX_3.4.21", "GLIBCXX_3.4.33", 39),
        ("GLIBCXX_3.4.21", "GLIBCXX_3.4.99", None),
        ("CXXABI_1.3.9", "CXXABI_1.3.13", 34),
        ("CXXABI_1.3.9", "OPENSSL_3.0.0", None),
        ("libstdc++.so.6", "libc++.so.1", None),
        ("libstdc++.so.6", "libgomp.so.1", None),
    ],
)
def test_tag_promises_no_more_than_manylinux(old: str, new: str, n: int | None) -> None:
    needs = Needs.parse(READELF.replace(old, new))
    assert needs.manylinux() == n
    if sys.platform == "linux":
        assert build_wheel.platform_tag(needs) == (f"manylinux_2_{n}" if n else "linux") + f"_{platform.machine()}"


def test_musl_is_not_manylinux() -> None:
    assert Needs(frozenset({"libc.so"}), frozenset()).manylinux() is None


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_needs_are_unknown_without_readelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Needs.of(tmp_path / "absent.so") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Needs.of(Path(sys.executable).resolve()) is None
    assert build_wheel.platform_tag(None) == f"linux_{platform.machine()}"


@pytest.mark.parametrize(
    "place",
    [ROOT / "cuda_kernels/x.h", Path(torch.__file__).parent / "include/x.h", Path("/tmp/x.cpp")],
    ids=["checkout", "torch", "temporary"],
)
def test_a_place_on_this_machine_is_not_shipped(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "library.so"
    file.write_bytes(b"\x7fELF\0cuda_kernels/x.h\0torch/include/x.h\0/usr/include/c++/12/x\0")
    build_wheel.check_no_machine_path(file)
    with file.open("ab") as stream:
        stream.write(os.fsencode(place) + b"\0")
    with pytest.raises(KernelError, match=re.escape(f"but holds {str(place)!r}; delete it")):
        build_wheel.check_no_machine_path(file)


def test_no_wheel_is_made_of_a_library_that_names_such_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(os.fsencode(ROOT) + b"/cuda_kernels/x.h")
    monkeypatch.setattr(build_wheel, "cpu_library", lambda: library)
    assert build_wheel.main(["--out", str(tmp_path / "dist")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {library} must not name a place on the machine")
    assert list((tmp_path / "dist").iterdir()) == []


@dataclass(frozen=True)
class Wheels:
    """What the script made."""

    pure: Path
    platform: Path
    printed: str


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Both wheels, without CUDA kernels."""
    try:
        cpu.compiler()
    except KernelBuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "scripts.build_wheel", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (pure,) = folder.glob("*-none-any.whl")
    (other,) = set(folder.iterdir()) - {pure}
    return Wheels(pure, other, done.stdout)


@pytest.mark.slow
def test_platform_wheel_is_the_pure_one_and_the_library(wheels: Wheels) -> None:
    library = f"zoo/_prebuilt/{cpu.file_name(build_wheel.shipped_level())}"
    with WheelFile(wheels.pure) as pure, WheelFile(wheels.platform) as other:
        assert set(other.namelist()) == {*pure.namelist(), library}
        contents = {name: other.read(name) for name in other.namelist()}  # compares with the hashes in RECORD
        listed = {line.split(",")[0] for line in contents[other.record_path].decode().splitlines()}
        assert listed == set(contents)
        changed = {name for name in pure.namelist() if pure.read(name) != contents[name]}
        assert changed == {other.record_path, f"{other.dist_info_path}/WHEEL"}
        # A date of today would give other bytes tomorrow.
        assert {info.date_time for info in other.infolist()} == {info.date_time for info in pure.infolist()}
        metadata = message_from_bytes(contents[f"{other.dist_info_path}/WHEEL"])
    assert metadata["Root-Is-Purelib"] == "false"
    assert metadata.get_all("Tag") == [wheels.platform.stem.split("-", 2)[2]]
    assert "py3-none-any" not in wheels.platform.name
    if sys.platform == "linux" and shutil.which("readelf"):
        assert "manylinux_2_" in wheels.platform.name
    _, _, _, tags = parse_wheel_filename(wheels.platform.name)
    assert tags & set(sys_tags())
    assert f"{wheels.platform}: " in wheels.printed
    assert library in wheels.printed


@pytest.mark.slow
def test_same_files_give_the_same_wheel(wheels: Wheels, tmp_path: Path) -> None:
    pure = Path(shutil.copy(wheels.pure, tmp_path))
    with zipfile.ZipFile(wheels.platform) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(name, tmp_path)
    tag = wheels.platform.stem.split("-")[-1]
    again = build_wheel.add(pure, [tmp_path / name], tag)
    assert again.name == wheels.platform.name
    assert again.read_bytes() == wheels.platform.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {pure.name, again.name, "zoo"}


# Prints what happened, as JSON: the closed form is eq. 3 of the paper, written out.
CHILD = """
import json, shutil, sys, warnings
import torch
import zoo
from zoo.errors import ZooError
from zoo.kernels import cpu, use_cpu_library

assert not any(map(shutil.which, ("g++", "c++", "clang++", "cc", "gcc")))
said = {"zoo": zoo.__file__, "library": cpu.find() and str(cpu.find())}
x = torch.linspace(-2, 3, 15, dtype=torch.float64).reshape(3, 5).requires_grad_()
layer = zoo.PolyNorm(dtype=torch.float64)
given = (x, layer.weight, layer.bias)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        y = layer(x)
        ours = (y, *torch.autograd.grad(y.pow(3).sum(), given))
        layer(x)
    except ZooError as error:
        print(json.dumps({**said, "error": type(error).__name__, "message": str(error)}))
        sys.exit()
    said["uses"] = use_cpu_library()
powers = [x**p for p in (3, 2, 1)]
z = sum(w * u * (u.square().mean(-1, keepdim=True) + layer.eps).rsqrt() for w, u in zip(layer.weight, powers))
z = z + layer.bias
expected = (z, *torch.autograd.grad(z.pow(3).sum(), given))
said["difference"] = max(float((a - b).abs().max()) for a, b in zip(ours, expected))
said["registered"] = torch._C._dispatch_has_kernel_for_dispatch_key("zoo::poly_norm", "CPU")
said["warnings"] = [[w.category.__name__, str(w.message)] for w in caught]
print(json.dumps(said))
"""

# The best level that is there for a processor with all that x86-64-v3 has, and for one without AVX2.
LESSER = """
import json
from zoo.kernels import cpu

def found(flags):
    cpu._processor_flags = lambda: flags
    cpu.levels.cache_clear()
    return cpu.find() and cpu.find().name

print(json.dumps([found(cpu._V3), found(cpu._V3 - {"avx2"})]))
"""


@dataclass(frozen=True)
class Installed:
    """A wheel in an environment of its own that sees this one's libraries and no compiler."""

    home: Path
    cache: Path

    def run(self, program: str, **variables: str) -> Any:
        environment = {"PATH": str(self.home / "bin"), "HOME": str(self.home), "OMP_NUM_THREADS": "1", **variables}
        environment |= {"ZOO_CACHE_DIR": str(self.cache), "ZOO_PLUGINS": "0"}
        done = subprocess.run(
            [str(self.home / "bin/python"), "-c", program],
            cwd=self.home,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def install(tmp_path: Path) -> Callable[[Path], Installed]:
    """Install a wheel as a user would."""

    def installed(wheel: Path) -> Installed:
        home = tmp_path / "venv"
        venv.create(home, with_pip=False)
        (site,) = home.glob("lib/python*/site-packages")
        libraries = [path for path in sys.path if path.endswith("site-packages")]
        (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
        options = ["--no-index", "--no-deps", "--ignore-installed", str(wheel)]
        command = [str(home / "bin/python"), "-m", "pip", "install", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return Installed(home, tmp_path / "cache")

    return installed


@pytest.mark.slow
def test_platform_wheel_needs_no_compiler(wheels: Wheels, install: Callable[[Path], Installed]) -> None:
    place = install(wheels.platform)
    said = place.run(CHILD, ZOO_KERNELS="require")
    assert said.pop("difference") < 1e-12
    assert Path(said.pop("zoo")).is_relative_to(place.home)
    library = Path(said.pop("library"))
    assert library.parent.name == "_prebuilt"
    assert library.is_relative_to(place.home)
    assert said == {"uses": True, "registered": True, "warnings": []}
    assert not place.cache.exists()
    if platform.machine() == "x86_64":
        assert place.run(LESSER) == [library.name, None]


@pytest.mark.slow
def test_pure_wheel_without_a_compiler_says_so_and_works(wheels: Wheels, install: Callable[[Path], Installed]) -> None:
    place = install(wheels.pure)
    said = place.run(CHILD)
    assert said.pop("difference") < 1e-12
    assert Path(said.pop("zoo")).is_relative_to(place.home)
    ((category, message),) = said.pop("warnings")
    assert said == {"library": None, "uses": False, "registered": False}
    assert category == "KernelWarning"
    assert "There is no C++ compiler on the PATH; install one" in message
    assert "or a wheel of paperzoo for this platform" in message

    required = place.run(CHILD, ZOO_KERNELS="require")
    assert required["error"] == "KernelBuildError"
    assert required["message"].startswith("There is no C++ compiler on the PATH; install one")
    assert place.run(CHILD, ZOO_KERNELS="off")["warnings"] == []


@pytest.mark.slow
def test_cuda_kernels_in_the_wheel_serve_without_nvrtc(
    wheels: Wheels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One quick kernel stands for all."""
    try:
        nvrtc.bindings()
    except KernelBuildError as error:
        pytest.skip(str(error))
    unit = sources.poly_relu_unit("float32", 3)
    monkeypatch.setattr(sources, "units", lambda orders: iter([unit]))
    assert build_wheel.main(["--arch", "80", "--out", str(tmp_path / "dist")]) == 0
    assert "1 kernels for sm80" in capsys.readouterr().out
    (wheel,) = set((tmp_path / "dist").iterdir()) - {tmp_path / "dist" / wheels.pure.name}
    assert wheel.name == wheels.platform.name
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(wheels.platform) as without:
        (name,) = set(archive.namelist()) - set(without.namelist())
        archive.extract(name, tmp_path)
    assert Path(name).name == nvrtc.file_name(unit, "80")

    monkeypatch.setenv("ZOO_KERNEL_DIR", str((tmp_path / name).parent))
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compile_unit", None)
    assert nvrtc.cubin(unit, "80").startswith(b"\x7fELF")
    assert nvrtc.cubin(unit, "86") == nvrtc.cubin(unit, "80")


def test_wrong_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert build_wheel.main(["--arch", "80", "--orders", "many", "--out", str(tmp_path / "dist")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --orders: expected an order")
    assert printed.count("\n") == 1
    assert list((tmp_path / "dist").iterdir()) == []
