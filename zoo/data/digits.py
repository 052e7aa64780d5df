"""Handwritten digits of 8x8 pixels, which lie inside scikit-learn: real pictures without a download."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from ..errors import DataError
from .loader import eval_loader, train_loader

TRAINING = 1200  # pictures; the other 597 validate


class Digits(L.LightningDataModule):
    """1797 handwritten digits, grey, 8x8: the first 1200 train, the other 597 validate.

    The test split is the validation split: there are too few pictures for three.

    A batch is `(pictures, targets)`: float32 [B, 1, 8, 8] in [0, 1] and int64 [B]. A model takes one channel:
    `model.in_channels: 1` of :class:`zoo.tasks.ImageClassifier`.

    Args:
        batch_size: pictures a batch and process.
        seed: seed of the training order.
        num_workers: loader processes.

    Raises:
        DataError: if an argument is out of range, or scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998: its test set.
    """

    size, channels, num_classes = 8, 1, 10
    class_names = tuple("0123456789")

    def __init__(self, batch_size: int = 32, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise DataError(f"Digits: batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise DataError(f"Digits: num_workers must not be negative, got {num_workers}")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._splits: tuple[TensorDataset, TensorDataset] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the pictures, once; every stage needs the same two splits."""
        if self._splits is None:
            pictures, targets = _read()
            self._splits = (
                TensorDataset(pictures[:TRAINING], targets[:TRAINING]),
                TensorDataset(pictures[TRAINING:], targets[TRAINING:]),
            )

    @property
    def train_set(self) -> TensorDataset:
        """The first 1200 pictures."""
        self.setup()
        assert self._splits is not None
        return self._splits[0]

    @property
    def val_set(self) -> TensorDataset:
        """The other 597 pictures, which are the test split too."""
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


def _read() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "Digits reads the pictures that scikit-learn ships, which is not installed; run"
            " pip install 'paperzoo[digits]'"
        ) from None
    pixels, targets = load_digits(return_X_y=True)
    pictures = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16  # 17 levels
    return pictures, torch.from_numpy(targets).long()
