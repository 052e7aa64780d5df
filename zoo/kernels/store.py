"""Where compiled kernels lie, and how a file gets there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import settings

_PACKAGE = Path(__file__).resolve().parents[1]


def ahead_of_time() -> list[Path]:
    """Folders of kernels compiled earlier, in the order they are looked at: the user's, then the wheel's."""
    chosen, shipped = settings.prebuilt_folder(), _PACKAGE / "_prebuilt"
    return [folder for folder in (chosen, shipped) if folder is not None and folder.is_dir()]


def cache_folder() -> Path:
    """Kernels compiled on this machine."""
    return settings.cache_folder() / "kernels"


def write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and move it into place.

    Two processes may write the same file at once and a kill leaves nothing half-written: a reader finds the whole file
    or none. There is no lock that could go stale.

    Raises:
        OSError: if the folder cannot be written or the disk is full; nothing is left behind.
    """
    with scratch(path) as temporary:
        temporary.write_bytes(data)


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
        yield


def leftovers() -> list[Path]:
    """Temporary files that killed builds left in the cache."""
    return sorted(cache_folder().glob(".*.tmp"))


def compiled() -> list[Path]:
    """Everything in the cache."""
    folder = cache_folder()
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
