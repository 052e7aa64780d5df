"""Text that a tokenizer has turned into arrays on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .text import TextModule, Windows


class TokenFiles(TextModule):
    """Token ids from two .npy files, mapped into memory, so they may exceed it.

    Args:
        train: .npy file of a one-dimensional unsigned integer array, e.g. uint16.
        val: the same for validation and test.
        vocab_size: size of the tokenizer's vocabulary; every id is below it.
        context: tokens in a sample; it reads context + 1, the last as a target only.
        batch_size: samples a batch and process.
        val_samples: validation windows, from the start of `val`; None takes all of them.
        seed: seed of the training order.
        num_workers: loader processes.

    Raises:
        DataError: if a file is missing, is no such array, or is shorter than a sample.
    """

    def __init__(
        self,
        train: str,
        val: str,
        vocab_size: int = 32000,
        context: int = 4096,
        batch_size: int = 8,
        val_samples: int | None = 1024,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "context": context, "batch_size": batch_size}.items():
            if value < 1:
                raise DataError(f"TokenFiles: {name} must be at least 1, got {value}")
        self.paths = {"train": Path(train).expanduser(), "val": Path(val).expanduser()}
        self.vocab_size, self.context, self.batch_size, self.val_samples = vocab_size, context, batch_size, val_samples
        self.seed, self.num_workers = seed, num_workers

    def _cut(self) -> tuple[Windows, Windows]:
        return self._windows("train", None), self._windows("val", self.val_samples)

    def _windows(self, split: str, most: int | None) -> Windows:
        path = self.paths[split]
        if not path.is_file():
            raise DataError(f"no token file at {path}; write one with numpy.save, a 1-D array of uint16 or uint32")
        try:
            tokens = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": torch wants memory it may write to
        except (ValueError, OSError) as error:
            raise DataError(f"{path} is not a .npy file of numbers: {error}") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise DataError(f"{path} must hold a 1-D array of integers, got shape {tokens.shape} {tokens.dtype}")
        starts = range(0, len(tokens) - self.context, self.context)[:most]
        if not starts:
            raise DataError(f"{path} holds {len(tokens)} tokens, but a sample reads {self.context + 1}; lower context")
        return Windows(torch.from_numpy(tokens), starts, self.context)
