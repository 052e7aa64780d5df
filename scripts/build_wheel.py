"""Build the wheels: the pure one for every machine, and one for this platform that needs no compiler on the user's.

python -m scripts.build_wheel                                  # with the CPU library
python -m scripts.build_wheel --arch 80,90,120 --orders 1-5    # and with CUDA kernels for these GPUs

The platform wheel is the pure one and `zoo/_prebuilt/`. Its tag promises what was read from the CPU library, not what
the machine that built it has; nothing of that machine may be found inside.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipInfo

from packaging import tags
from wheel.wheelfile import WheelFile

from zoo import cli
from zoo.errors import KernelError, ZooError
from zoo.kernels import cpu, sources, store

ROOT = Path(__file__).resolve().parents[1]
PREBUILT = "zoo/_prebuilt"

# The newest symbols that manylinux_2_N promises on x86_64 and aarch64 (PEP 600; the table of auditwheel 6.8). From 28
# on, since torch's own wheels ask for that; a row holds until the next.
_PROMISED: dict[int, dict[str, tuple[int, ...]]] = {
    28: {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    31: {"GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)},
    34: {"GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    35: {"GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (11, 0)},
    39: {"GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0)},
}
# libtorch is there before the library is loaded; the others belong to manylinux.
_LIBRARIES = re.compile(r"lib(torch|torch_cpu|c10|stdc\+\+|gcc_s|m|c|dl|pthread|rt)\.so(\.\d+)?|ld-linux-.*")


@dataclass(frozen=True)
class Needs:
    """What the dynamic linker must find for a library."""

    libraries: frozenset[str]
    symbols: frozenset[str]
    """Symbol versions, e.g. "GLIBC_2.34"."""

    @classmethod
    def of(cls, library: Path) -> Needs | None:
        """None where it cannot be determined: no readelf, or not an ELF file."""
        if shutil.which("readelf") is None:
            return None
        command = ["readelf", "--wide", "--dynamic", "--version-info", str(library)]
        done = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False)
        return None if done.returncode else cls.parse(done.stdout)

    @classmethod
    def parse(cls, text: str) -> Needs:
        """From the output of readelf."""
        libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
        return cls(frozenset(libraries), frozenset(re.findall(r"Name: (\S+)\s+Flags:", text)))

    def newest(self) -> dict[str, tuple[int, ...]] | None:
        """By family, e.g. {"GLIBC": (2, 34)}; None if one is no number, such as GLIBC_PRIVATE."""
        found: dict[str, tuple[int, ...]] = {}
        for symbol in self.symbols:
            family, _, version = symbol.partition("_")
            if not re.fullmatch(r"\d+(\.\d+)*", version):
                return None
            found[family] = max(found.get(family, ()), tuple(map(int, version.split("."))))
        return found

    def manylinux(self) -> int | None:
        """The least N for which manylinux_2_N promises all of it; None if none does."""
        newest = self.newest()
        if newest is None or "GLIBC" not in newest or not all(map(_LIBRARIES.fullmatch, self.libraries)):
            return None
        major, minor, *_ = newest.pop("GLIBC")
        for n, promised in _PROMISED.items():
            if all(version <= promised.get(family, ()) for family, version in newest.items()):
                return max(n, minor) if major == 2 else None
        return None


def platform_tag(needs: Needs | None) -> str:
    """Where a wheel with such a library runs: manylinux if that can be promised, else systems like this one."""
    if sys.platform != "linux":
        return next(tags.platform_tags())
    n = None if needs is None else needs.manylinux()
    machine = platform.machine()
    return f"linux_{machine}" if n is None else f"manylinux_2_{n}_{machine}"


def check_no_machine_path(path: Path) -> None:
    """Neither the checkout nor torch's folder, the home or the temporary folder may be named in what is shipped.

    Raises:
        KernelError: with what was found.
    """
    import torch

    folders = {ROOT, sources.folder(), Path(torch.__file__).parent, Path.home(), Path(tempfile.gettempdir())}
    folders |= {Path("/root"), Path("/tmp")}
    data = path.read_bytes()
    for folder in sorted(folders - {Path("/")}):
        if found := re.search(re.escape(os.fsencode(f"{folder}/")) + rb"[!-~]*", data):
            raise KernelError(
                f"{path} must not name a place on the machine that built it, but holds {os.fsdecode(found[0])!r};"
                " delete it and build again with a compiler that knows -ffile-prefix-map (g++ 8, clang 10)"
            )


def shipped_level() -> str:
    """The instruction set of the library in the wheel; processors below it do not take it."""
    best = "x86-64-v3"
    return best if "x86-64" in cpu.levels() else cpu.levels()[0]


def cpu_library() -> Path:
    """The one that is there already, else built into the cache."""
    found, level = cpu.find(), shipped_level()
    if found is not None and found.name == cpu.file_name(level):
        return found
    return cpu.build(store.cache_folder(), level)


def build_pure(folder: Path) -> Path:
    """The wheel for every machine."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(
            f"python -m build failed; pip install -e '.[dev]' brings what it needs\n{done.stderr.strip()}"
        )
    (wheel,) = folder.glob("*-none-any.whl")
    return wheel


class _Wheel(WheelFile):
    """What has no date of its own, RECORD above all, takes that of the pure wheel's files."""

    def __init__(self, path: Path, date: tuple[int, int, int, int, int, int]) -> None:
        super().__init__(path, "w")
        self._date = date

    def writestr(self, member: ZipInfo | str, data: bytes | str, compress_type: int | None = None) -> None:
        if isinstance(member, str):
            member = ZipInfo(member, self._date)
            member.external_attr = (0o100755 if member.filename.endswith(".so") else 0o100644) << 16
            member.compress_type = self.compression
        super().writestr(member, data, compress_type)


def add(pure: Path, files: Sequence[Path], tag: str) -> Path:
    """The platform wheel beside the pure one: the same files, and `files` below zoo/_prebuilt.

    The same files give the same bytes, whenever that is done.
    """
    target = pure.with_name(pure.name.replace("-none-any.whl", f"-none-{tag}.whl"))
    with WheelFile(pure) as source, tempfile.TemporaryDirectory(dir=pure.parent) as scratch:
        info = source.dist_info_path
        members = [member for member in source.infolist() if member.filename != source.record_path]
        with _Wheel(Path(scratch) / target.name, source.getinfo(source.record_path).date_time) as wheel:
            # dist-info last, as the format recommends
            for member in (member for member in members if not member.filename.startswith(info)):
                wheel.writestr(member, source.read(member))
            for path in sorted(files, key=lambda path: path.name):
                wheel.writestr(f"{PREBUILT}/{path.name}", path.read_bytes())
            for member in (member for member in members if member.filename.startswith(info)):
                data = source.read(member)
                wheel.writestr(member, _retagged(data, tag) if member.filename == f"{info}/WHEEL" else data)
        os.replace(Path(scratch) / target.name, target)
    return target


def _retagged(text: bytes, tag: str) -> bytes:
    message = message_from_bytes(text)
    message.replace_header("Root-Is-Purelib", "false")
    message.replace_header("Tag", f"py3-none-{tag}")
    return message.as_bytes()


def describe(wheel: Path, files: Sequence[Path], needs: Needs | None) -> str:
    """Path, size, tag and what is inside."""
    lines = [f"{wheel}: {_megabytes(wheel)}, tag {wheel.stem.split('-', 2)[2]}"]
    newest = (needs.newest() if needs is not None else None) or {}
    wanted = ", ".join(f"{family}_{'.'.join(map(str, version))}" for family, version in sorted(newest.items()))
    cubins: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix == ".cubin":
            cubins.setdefault(path.stem.split("-")[-2], []).append(path)
        else:
            lines.append(f"  {PREBUILT}/{path.name}: {_megabytes(path)}, needs {wanted or 'what cannot be determined'}")
    for arch in sorted(cubins, key=lambda arch: int(arch.removeprefix("sm"))):
        lines.append(f"  {len(cubins[arch])} kernels for {arch}: {_megabytes(*cubins[arch])}")
    return "\n".join(lines)


def _megabytes(*paths: Path) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.2f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", help="compute capabilities of the GPUs to ship kernels for, as 80,90 (default: none)")
    parser.add_argument("--orders", default="3", help="of the polynomials in them, as 1-5 (default: 3, the papers')")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels (default: dist)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if options.arch:
            choice = ["--arch", options.arch, "--orders", options.orders]
            if status := cli.main(["kernels", "build", "--no-cpu", *choice, "--out", scratch]):
                return status
        try:
            library = cpu_library()
            files = [library, *sorted(Path(scratch).glob("*.cubin"))]
            for path in files:
                check_no_machine_path(path)
            needs = Needs.of(library)
            pure = build_pure(options.out)
            wheel = add(pure, files, platform_tag(needs))
        except ZooError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{pure}: {_megabytes(pure)}")
        print(describe(wheel, files, needs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
