"""A compiled file is there whole or not at all, whatever happens to the process that writes it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import struct
import tempfile
from pathlib import Path

import pytest

from tests.kernels.conftest import ELF, failing
from zoo import settings
from zoo.kernels import store

# Forking a process with threads is deprecated; the children touch nothing that threads hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
NAME = "poly_relu-order3-float32-sm90-0123456789abcdef.cubin"


def promising(segments_end: int = 0, sections_end: int = 0) -> bytes:
    """An ELF header whose tables end there."""
    head = bytearray(ELF)
    struct.pack_into(
        "<QQ", head, 32, segments_end - 56 if segments_end else 0, sections_end - 64 if sections_end else 0
    )
    struct.pack_into("<4H", head, 54, 56, int(segments_end > 0), 64, int(sections_end > 0))
    return bytes(head)


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (ELF, True),
        (promising(segments_end=200).ljust(200), True),
        (promising(segments_end=200).ljust(199), False),
        (promising(sections_end=300).ljust(300), True),
        (promising(sections_end=300).ljust(299), False),
        (promising(200, 300).ljust(299), False),
        (promising(300, 200).ljust(299), False),
        (ELF[:63], False),
        (b"", False),
        (bytes(4096), False),
        (b"not a library", False),
        (b"\xcf\xfa\xed\xfe on macOS", True),
    ],
)
def test_a_file_that_was_cut_short_is_not_whole(tmp_path: Path, data: bytes, whole: bool) -> None:
    (tmp_path / "file").write_bytes(data)
    assert store.is_whole(tmp_path / "file") is whole


def test_what_is_no_file_is_not_whole(tmp_path: Path) -> None:
    assert not store.is_whole(tmp_path)
    assert not store.is_whole(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert not store.is_whole(tmp_path / "file" / "below")


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    store.write(tmp_path / "new" / "a.cubin", b"abc")
    with store.scratch(tmp_path / "new" / "a.so") as temporary:
        temporary.write_bytes(b"def")
    assert (tmp_path / "new" / "a.cubin").read_bytes() == b"abc"
    modes = [stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) for name in ("a.cubin", "a.so")]
    assert modes == [0o644, 0o755]
    assert len(os.listdir(tmp_path / "new")) == 2


@pytest.mark.parametrize("where", ["mkstemp", "write_bytes", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    path = tmp_path / NAME
    store.write(path, b"old")
    real, fail = Path.write_bytes, failing(number)

    def half(self: Path, data: bytes) -> None:
        real(self, data[: len(data) // 2])
        fail()

    owner = {"mkstemp": tempfile, "write_bytes": Path, "replace": os}[where]
    monkeypatch.setattr(owner, where, half if where == "write_bytes" else fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        store.write(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [NAME]


def test_a_killed_write_leaves_nothing_that_is_taken_for_whole(cache: Path) -> None:
    path = cache / NAME

    def die_halfway() -> None:
        with store.scratch(path) as temporary:
            temporary.write_bytes(ELF[:32])
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=die_halfway)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not path.exists()
    assert store.compiled(cache) == []
    (left,) = store.leftovers(cache)
    assert not store.is_whole(left)
    store.write(path, ELF)
    assert path.read_bytes() == ELF


def test_two_processes_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    """Both have written all, and neither has moved it into place, when they go on."""
    context = multiprocessing.get_context("fork")
    both = context.Barrier(2)

    def write(data: bytes) -> None:
        with store.scratch(tmp_path / NAME) as temporary:
            temporary.write_bytes(data)
            both.wait(60)

    children = [context.Process(target=write, args=(letter * 1000,)) for letter in (b"a", b"b")]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert os.listdir(tmp_path) == [NAME]
    assert (tmp_path / NAME).read_bytes() in (b"a" * 1000, b"b" * 1000)


def test_a_lock_goes_with_its_holder(tmp_path: Path) -> None:
    """Killed while holding it: the next one enters, and then nothing is left of it."""
    path = tmp_path / ".lock"

    def die() -> None:
        with store.lock(path):
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert path.exists()
    with store.lock(path):
        assert path.exists()
    assert not path.exists()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with store.lock(tmp_path / ".lock"):
        pass


def test_folders_come_in_the_order_they_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PACKAGE", tmp_path / "package")
    monkeypatch.setenv("ZOO_KERNEL_DIR", str(tmp_path / "mine"))
    assert store.ahead_of_time() == []
    (tmp_path / "package/_prebuilt").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    assert store.ahead_of_time() == [tmp_path / "mine", tmp_path / "package/_prebuilt"]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"ZOO_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/zoo"),
        ({"HOME": "/c"}, "/c/.cache/zoo"),
    ],
)
def test_the_cache_is_where_the_user_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for variable in ("ZOO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert settings.cache_folder() == Path(folder)
    assert store.cache_folder() == Path(folder, "kernels")
