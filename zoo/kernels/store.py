"""Where compiled kernels lie, and how a file gets there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import settings
from ..errors import KernelBuildError

_PACKAGE = Path(__file__).resolve().parents[1]
# Names that only we give: `clear` deletes by them, and a cache folder may hold what somebody else put there.
_COMPILED = r"[\w-]+-sm\d+-[0-9a-f]{16}\.cubin|zoo_cpu-[\w-]+-[0-9a-f]{16}\.so"
_LEFTOVER = rf"\.({_COMPILED})\.\w+\.tmp|\.zoo_cpu-[\w-]+\.lock"


def ahead_of_time() -> list[Path]:
    """Folders of kernels compiled earlier, in the order they are looked at: the user's, then the wheel's."""
    chosen, shipped = settings.prebuilt_folder(), _PACKAGE / "_prebuilt"
    # os.path, because Path.is_dir raises where a parent may not be searched
    return [folder for folder in (chosen, shipped) if folder is not None and os.path.isdir(folder)]


def cache_folder() -> Path:
    """Kernels compiled on this machine."""
    return settings.cache_folder() / "kernels"


def is_whole(path: Path) -> bool:
    """Whether there is a compiled file with all its bytes.

    A disk that was full or lost its last writes leaves files of zeros and files cut short, and the dynamic linker may
    crash on the latter; the header of an ELF file tells how long it must be.
    """
    try:
        with path.open("rb") as file:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if head[:6] != b"\x7fELF\x02\x01":  # else it has 64 bits and is little endian, as everywhere but on macOS
        return head[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    if len(head) < 64:
        return False
    segments, sections = struct.unpack_from("<QQ", head, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", head, 54)
    return size >= max(segments + segment_size * segment_count, sections + section_size * section_count)


def write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and move it into place.

    Two processes may write the same file at once and a kill leaves nothing half-written: a reader finds the whole file
    or none. There is no lock that could go stale.

    Raises:
        OSError: if the folder cannot be written or the disk is full; nothing is left behind.
    """
    with scratch(path) as temporary:
        temporary.write_bytes(data)


def cannot_write(folder: Path, error: OSError | None = None) -> KernelBuildError:
    """What to tell a user whose folder does not take a compiled file."""
    why = f" ({error.strerror or error})" if error else ""
    return KernelBuildError(
        f"cannot write the compiled kernels to {folder}{why}; set ZOO_CACHE_DIR, or --out of `zoo kernels build`, to a"
        " folder with room that can be written"
    )


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and goes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o755 if path.suffix == ".so" else 0o644)  # mkstemp's 0600 would shut out others
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process at a time; the system frees it when its holder dies. Where locks do not exist, several may enter.

    For work that is worth waiting for rather than doing twice; correctness rests on :func:`scratch`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows; a network file system without locks
            pass
        try:
            yield
        finally:
            # Whoever waits on the removed file still enters one by one, and finds the work done.
            with contextlib.suppress(OSError):
                path.unlink()


def compiled(folder: Path) -> list[Path]:
    """Kernels and CPU libraries in a folder."""
    return _named(folder, _COMPILED)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and locks that killed builds left, and those of builds that are running."""
    return _named(folder, _LEFTOVER)


def _named(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
    except OSError:  # not there, not a folder, not ours to look into
        return []


def size(paths: list[Path]) -> int:
    """Bytes of files; one that has gone meanwhile has none."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
