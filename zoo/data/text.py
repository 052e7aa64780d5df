"""Text as bytes, for language models whose vocabulary is the 256 byte values."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .loader import eval_loader, train_loader

# Folders of the standard library's tree that are not its sources: installed packages, tests, and generated prose.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"})


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text and the same windows one token later.

    Args:
        text: [N] tokens of any integer type; kept as they are, a sample converts its own.
        starts: first token of every window.
        context: tokens in a window.

    Returns:
        Per index, inputs and targets, both int64 [context]; `targets[t]` is the token after `inputs[t]`.
    """

    def __init__(self, text: Tensor, starts: Sequence[int], context: int) -> None:
        self.text, self.starts, self.context = text, starts, context

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]


class TextModule(L.LightningDataModule):
    """Loaders over windows of a text; a subclass says in `_cut` what the splits are. The test split is the validation
    split."""

    batch_size: int
    seed: int
    num_workers: int
    _splits: tuple[Windows, Windows] | None = None

    def _cut(self) -> tuple[Windows, Windows]:
        """Training and validation windows."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the text and cut it into windows, once; every stage needs the same two splits."""
        if self._splits is None:
            self._splits = self._cut()

    @property
    def train_set(self) -> Windows:
        """Training windows."""
        self.setup()
        assert self._splits is not None
        return self._splits[0]

    @property
    def val_set(self) -> Windows:
        """Validation windows, which are the test windows too."""
        self.setup()
        assert self._splits is not None
        return self._splits[1]

    def train_dataloader(self) -> DataLoader:
        return train_loader(
            self, self.train_set, batch_size=self.batch_size, seed=self.seed, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        return eval_loader(self, self.val_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()


class ByteText(TextModule):
    """Any text as a stream of bytes, cut into windows.

    A folder is split by a hash of each file's relative name, so a file stays in its split whatever machine reads it and
    whatever files join it later; the files of a split follow each other in the order of their names. If that leaves a
    split without a single window (few files), and for a single file, the last `val_fraction` of the bytes validates.
    The corpus is held once, one byte a character; a single file is mapped, not read, so it may exceed the memory.

    Without a path the corpus is the source of the Python standard library, tests left out: 11.3 MB, of which 1.8 MB
    validate. It differs between Python versions, and with it the loss: compare runs of one interpreter.

    Args:
        path: text file, folder, or None for the standard library's sources.
        pattern: files to take from a folder and its subfolders, e.g. ``*.md``.
        context: bytes in a sample; it reads context + 1, the last as a target only.
        batch_size: samples a batch and process.
        val_fraction: share of the files (folder) or bytes (file) that validates, in (0, 1).
        stride: bytes between the starts of training samples. None means `context`, windows that tile the text; less
            lets an epoch see each byte at several positions of the window.
        val_samples: validation windows, evenly spaced over the split; None takes all of them. The test split is the
            validation split.
        seed: seed of the training order.
        num_workers: loader processes.

    Raises:
        DataError: if there is no such path, no file matches, or the text is too short for one sample in either split.
    """

    vocab_size = 256

    def __init__(
        self,
        path: str | Path | None = None,
        pattern: str = "*.txt",
        context: int = 96,
        batch_size: int = 16,
        val_fraction: float = 0.15,
        stride: int | None = None,
        val_samples: int | None = 1024,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        at_least_one = {"context": context, "batch_size": batch_size, "stride": stride, "val_samples": val_samples}
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise DataError(f"ByteText: {name} must be at least 1, got {value}")
        if num_workers < 0:
            raise DataError(f"ByteText: num_workers must not be negative, got {num_workers}")
        if not 0 < val_fraction < 1:
            raise DataError(f"ByteText: val_fraction must lie between 0 and 1, both excluded, got {val_fraction}")
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and not self.path.exists():
            raise DataError(f"no text at {self.path}; pass a file, a folder, or nothing for Python's sources")
        self.pattern, self.context, self.batch_size = pattern, context, batch_size
        self.val_fraction, self.stride, self.val_samples = val_fraction, stride or context, val_samples
        self.seed, self.num_workers = seed, num_workers

    @staticmethod
    def encode(text: str) -> Tensor:
        """Bytes of a text in UTF-8, int64 [N]."""
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    @staticmethod
    def decode(ids: Tensor | Iterable[int]) -> str:
        """Text of byte values; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return bytes(ids.tolist() if isinstance(ids, Tensor) else ids).decode("utf-8", errors="replace")

    def _cut(self) -> tuple[Windows, Windows]:
        train, val = self._read()
        return (
            Windows(train, range(0, len(train) - self.context, self.stride), self.context),
            Windows(val, self._val_starts(len(val)), self.context),
        )

    def _val_starts(self, length: int) -> Sequence[int]:
        tiles = range(0, length - self.context, self.context)
        if self.val_samples is None or self.val_samples >= len(tiles):
            return tiles
        return [tiles[i * len(tiles) // self.val_samples] for i in range(self.val_samples)]

    def _read(self) -> tuple[Tensor, Tensor]:
        if self.path is not None and self.path.is_file():
            whole = _map(self.path)
        else:
            train, val = self._read_folder()
            if min(len(train), len(val)) > self.context:
                return train, val
            whole = torch.cat([train, val])
        # The boundary belongs to neither side: no window reaches across it.
        train, val = whole.tensor_split([round(len(whole) * (1 - self.val_fraction))])
        where = self.path or "the standard library"
        for name, part in (("training", train), ("validation", val)):
            if len(part) <= self.context:
                raise DataError(
                    f"the text of {where} holds {len(whole)} bytes, {len(part)} of them for {name}, but a sample"
                    f" reads {self.context + 1}; lower context, change val_fraction or add text"
                )
        return train, val

    def _read_folder(self) -> tuple[Tensor, Tensor]:
        """Contents of the training and of the validation files, each one after the other."""
        root = self.path or Path(sysconfig.get_path("stdlib"))
        files = _library_files(root) if self.path is None else _files(root, self.pattern)
        if not files and self.path is None:
            raise DataError(f"this Python has no sources of its standard library in {root}; pass path= with a text")
        if not files:
            raise DataError(
                f"text folder {root} holds no file matching {self.pattern!r}; pass pattern= or another path"
            )
        parts: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        for name in sorted(files):
            parts[_position(name) < self.val_fraction].extend(_read_bytes(root / name))
        if not any(parts):
            raise DataError(f"all {len(files)} files matching {self.pattern!r} in {root} are empty; pass another path")
        train, val = (torch.frombuffer(part, dtype=torch.uint8) if part else torch.empty(0).byte() for part in parts)
        return train, val


def _files(root: Path, pattern: str) -> list[str]:
    try:
        return [path.relative_to(root).as_posix() for path in root.rglob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError) as error:  # how pathlib refuses a pattern
        raise DataError(f"ByteText: pattern must be a relative glob such as '*.txt', got {pattern!r}") from error


def _library_files(root: Path) -> list[str]:
    # _sysconfigdata holds the machine's compiler flags, which must not decide a figure.
    names = (name for name in _files(root, "*.py") if not name.startswith("_sysconfigdata"))
    return [name for name in names if _NOT_LIBRARY.isdisjoint(name.split("/"))]


def _position(name: str) -> float:
    """Fixed place of a name in [0, 1)."""
    # 6 bytes fit the 53 bits of a float: the result can never round up to 1.
    return int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest()[:6], "big") / 2**48


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _map(path: Path) -> Tensor:
    """Contents of a file as uint8 [N], paged in when they are used."""
    size = path.stat().st_size
    if not size:
        raise DataError(f"the text file {path} is empty; pass another path")
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise DataError(f"cannot read {path}: {error}") from error
