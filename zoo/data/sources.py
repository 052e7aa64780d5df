"""Where the pictures of an `ImageFolder` lie: a folder, or a tar archive of the same layout."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import DataError
from ..settings import data_folder

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_BROKEN_ARCHIVE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)


class Entry(NamedTuple):
    """One picture of a source; `offset` is its first byte in an archive, decompressed, and 0 in a folder."""

    split: str
    label: str
    name: str
    size: int = 0
    offset: int = 0


class Folder:
    """Pictures below a folder, `<split>/<class>/.../<file>`."""

    seekable = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def index(self, splits: Sequence[str]) -> tuple[list[Entry], set[tuple[str, str]]]:
        """The pictures of the splits, and the (split, class) pairs there are, also those without a picture."""
        found: list[Entry] = []
        classes = set()
        for split in splits:
            folder = self.root / split
            for each in folder.iterdir() if folder.is_dir() else []:
                if each.is_dir() and not each.name.startswith("."):
                    classes.add((split, each.name))
                    for path, _, files in os.walk(each, followlinks=True):
                        names = (Path(path, file).relative_to(self.root).as_posix() for file in files)
                        found += [Entry(split, each.name, name) for name in names if _is_picture(name)]
        return found, classes

    def key(self, splits: Sequence[str]) -> list[Any]:
        """What changes when a picture does."""
        facts = ((name, (self.root / name).stat()) for name in sorted(entry.name for entry in self.index(splits)[0]))
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]

    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[int, bytes]]:
        """Position in `entries` and contents of every picture."""
        for i, entry in enumerate(entries):
            try:
                content = (self.root / entry.name).read_bytes()
            except OSError as error:
                raise DataError(f"cannot read the picture {self.root / entry.name}: {error.strerror}") from error
            yield i, content


class Archive:
    """The same below the root of a tar archive, read where it lies: nothing of it is written to disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with self._opened() as archive:
            # of a compressed archive, a picture can only be had by decompressing all that comes before
            self.seekable = isinstance(archive.fileobj, io.BufferedReader)

    def index(self, splits: Sequence[str]) -> tuple[list[Entry], set[tuple[str, str]]]:
        """As :meth:`Folder.index`."""
        found: list[Entry] = []
        classes = set()
        with self._opened() as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise DataError(
                        f"the archive {self.root} names a file outside of itself, {member.name!r}; pack it anew, if you"
                        " trust it at all"
                    )
                if len(path.parts) < 2 or path.parts[0] not in splits or path.parts[1].startswith("."):
                    continue
                split, label, *rest = path.parts
                if rest or member.isdir():
                    classes.add((split, label))
                # links and sparse files have no contents of their own at the offset
                if rest and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and _is_picture(member.name):
                    found.append(Entry(split, label, path.as_posix(), member.size, member.offset_data))
        return found, classes

    def key(self, splits: Sequence[str]) -> list[Any]:
        """As :meth:`Folder.key`, without a look inside."""
        stat = self.root.stat()
        return [self.root.name, stat.st_size, stat.st_mtime_ns]

    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[int, bytes]]:
        """As :meth:`Folder.read`, in the order in which the pictures lie in the archive: one way through it."""
        with self._opened() as archive:
            assert archive.fileobj is not None
            for i in sorted(range(len(entries)), key=lambda i: entries[i].offset):
                archive.fileobj.seek(entries[i].offset)
                yield i, archive.fileobj.read(entries[i].size)

    @contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.root) as archive:
                yield archive
        except _BROKEN_ARCHIVE as error:
            raise DataError(
                f"cannot read the archive {self.root}: {_first_line(error)}; fetch or pack it anew"
            ) from error


def find(root: str) -> Path:
    """A path as given, or below the folder of real data.

    Raises:
        DataError: if there is neither.
    """
    given = Path(root).expanduser()
    data = data_folder()
    for path in [given] if data is None or given.is_absolute() else [given, data / given]:
        if path.exists():
            return path
    where = "here, nor below ZOO_DATA, which is not set" if data is None else f"here, nor in ZOO_DATA, {data}"
    also = "" if given.is_absolute() else f" {where}"
    raise DataError(f"ImageFolder: there is no {given}{also}; pass root= with a folder or a .tar archive of pictures")


def take_turns(root: Path, split: str, labels: Sequence[str], found: Sequence[Entry]) -> list[Entry]:
    """The pictures of a split, by name within a class: the first of each class, then the second of each."""
    by_label: dict[str, list[Entry]] = {label: [] for label in labels}
    by_name = {entry.name: entry for entry in found if entry.split == split}  # of an archive's repeated names the last
    for _, entry in sorted(by_name.items()):
        by_label[entry.label].append(entry)
    for label, entries in by_label.items():
        if not entries:
            raise DataError(
                f"the class folder {split}/{label} of {root} holds no picture; add some"
                f" ({', '.join(sorted(SUFFIXES))}), or remove it in every split"
            )
    ranked = [(rank, i, entry) for i, label in enumerate(labels) for rank, entry in enumerate(by_label[label])]
    return [entry for _, _, entry in sorted(ranked)]


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _first_line(error: BaseException) -> str:
    # tarfile lists what every decompressor has to say
    return str(error).partition(":\n")[0] or type(error).__name__
