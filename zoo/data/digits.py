"""Handwritten digits of 8x8 pixels, which lie inside scikit-learn: real pictures without a download."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from ..errors import DataError
from .loader import eval_loader, train_loader

PICTURES = 1797
TRAINING = 1200  # pictures, by default; the other 597 validate


class Digits(L.LightningDataModule):
    """1797 handwritten digits, grey, 8x8: the first 1200 train, the other 597 validate.

    With `label_noise` each training label is wrong with that probability, and a wrong label is each of the other nine
    equally often: symmetric noise as the paper of generalised cross-entropy defines it. The labels that validate stay.

    The test split is the validation split: there are too few pictures for three.

    A batch is `(pictures, targets)`: float32 [B, 1, 8, 8] in [0, 1] and int64 [B]. A model takes one channel:
    `model.in_channels: 1` of :class:`zoo.tasks.ImageClassifier`.

    Args:
        batch_size: pictures a batch and process.
        seed: seed of the training order.
        num_workers: loader processes.
        train_size: how many pictures, from the first, train; the others validate.
        label_noise: probability in [0, 1) that a training label is replaced by another.
        noise_seed: seed of the labels that are replaced and of what they become.

    Raises:
        DataError: if an argument is out of range, or scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998: its test set. Zhang and Sabuncu,
        Generalized Cross Entropy Loss, NeurIPS 2018, arXiv:1805.07836, for the noise.
    """

    size, channels, num_classes = 8, 1, 10
    class_names = tuple("0123456789")

    def __init__(
        self,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        train_size: int = TRAINING,
        label_noise: float = 0.0,
        noise_seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise DataError(f"Digits: batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise DataError(f"Digits: num_workers must not be negative, got {num_workers}")
        if not 0 < train_size < PICTURES:
            raise DataError(
                f"Digits: train_size must leave some of the {PICTURES} pictures for each split, got {train_size}"
            )
        if not 0 <= label_noise < 1:
            raise DataError(f"Digits: label_noise must lie in [0, 1), got {label_noise}")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.train_size, self.label_noise, self.noise_seed = train_size, label_noise, noise_seed
        self._splits: tuple[TensorDataset, TensorDataset] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the pictures, once; every stage needs the same two splits."""
        if self._splits is None:
            pictures, targets = _read()
            n = self.train_size
            trained = _noisy(targets[:n], self.label_noise, self.num_classes, self.noise_seed)
            self._splits = TensorDataset(pictures[:n], trained), TensorDataset(pictures[n:], targets[n:])

    @property
    def train_set(self) -> TensorDataset:
        """The first pictures, `train_size` of them."""
        self.setup()
        assert self._splits is not None
        return self._splits[0]

    @property
    def val_set(self) -> TensorDataset:
        """The other pictures, which are the test split too."""
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


def _noisy(targets: torch.Tensor, rate: float, num_classes: int, seed: int) -> torch.Tensor:
    """Each target moved on by 1 to num_classes - 1 places, equally often, with the given probability."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(len(targets), generator=generator) < rate
    places = torch.randint(1, num_classes, (len(targets),), generator=generator)
    return torch.where(moved, (targets + places) % num_classes, targets)


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
