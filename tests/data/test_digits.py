"""Digits: the split, the shape of a batch, and what is said without scikit-learn."""

from __future__ import annotations

import sys

import pytest
import torch

from zoo.data import Digits
from zoo.data.digits import TRAINING
from zoo.errors import DataError
from zoo.tasks import ImageClassifier


def test_the_splits_are_scikit_learns_pictures_in_order() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the digits extra")
    digits = datasets.load_digits()
    data = Digits()
    pictures = torch.cat([data.train_set.tensors[0], data.val_set.tensors[0]])
    targets = torch.cat([data.train_set.tensors[1], data.val_set.tensors[1]])
    assert (len(data.train_set), len(data.val_set)) == (TRAINING, 597)
    torch.testing.assert_close(pictures[:, 0].double() * 16, torch.from_numpy(digits.images))
    assert targets.tolist() == digits.target.tolist()
    assert targets.unique().tolist() == list(range(data.num_classes))


def test_batches_are_what_the_docstring_says() -> None:
    pytest.importorskip("sklearn", reason="needs the digits extra")
    data = Digits(batch_size=100)
    seen = []
    for pictures, targets in data.train_dataloader():
        assert (pictures.shape, pictures.dtype) == ((100, 1, 8, 8), torch.float32)
        assert 0 <= pictures.min() < pictures.max() <= 1
        assert (targets.shape, targets.dtype) == ((100,), torch.int64)
        seen.append(targets)
    assert torch.cat(seen).bincount().tolist() == data.train_set.tensors[1].bincount().tolist()
    assert torch.cat(seen).tolist() != data.train_set.tensors[1].tolist()  # shuffled
    assert sum(len(pictures) for pictures, _ in data.val_dataloader()) == 597


def test_the_first_digits_are_those_one_sees() -> None:
    """The rows of the first picture, a 0, from scikit-learn's documentation of the data set."""
    pytest.importorskip("sklearn", reason="needs the digits extra")
    picture, target = Digits().train_set[0]
    assert int(target) == 0
    assert (picture[0, 0] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_a_model_takes_the_one_channel() -> None:
    pytest.importorskip("sklearn", reason="needs the digits extra")
    data = Digits(batch_size=3)
    model = ImageClassifier(num_classes=data.num_classes, in_channels=data.channels, width=8)
    assert model(next(iter(data.train_dataloader()))[0]).shape == (3, 10)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"pip install 'paperzoo\[digits\]'$"):
        Digits().setup("fit")


def test_the_split_may_lie_elsewhere() -> None:
    pytest.importorskip("sklearn", reason="needs the digits extra")
    usual, other = Digits(), Digits(train_size=1297)
    assert (len(other.train_set), len(other.val_set)) == (1297, 500)
    assert torch.equal(other.val_set.tensors[0], usual.val_set.tensors[0][97:])
    assert torch.equal(other.train_set.tensors[1][:TRAINING], usual.train_set.tensors[1])


@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_noise_replaces_training_labels_by_each_other_class_equally(rate: float) -> None:
    pytest.importorskip("sklearn", reason="needs the digits extra")
    clean = Digits(train_size=1700)
    truth = clean.train_set.tensors[1]
    moves = torch.zeros(10, dtype=torch.long)
    for seed in range(20):
        noisy = Digits(train_size=1700, label_noise=rate, noise_seed=seed)
        assert torch.equal(noisy.train_set.tensors[0], clean.train_set.tensors[0])
        assert torch.equal(noisy.val_set.tensors[1], clean.val_set.tensors[1])
        moves += ((noisy.train_set.tensors[1] - truth) % 10).bincount(minlength=10)
    share = moves / moves.sum()
    assert share[0].item() == pytest.approx(1 - rate, abs=0.01)  # 34,000 labels: a standard error of 0.003
    assert share[1:].tolist() == pytest.approx([rate / 9] * 9, abs=0.005)


def test_noise_depends_on_its_seed_alone() -> None:
    pytest.importorskip("sklearn", reason="needs the digits extra")
    labels = [
        Digits(seed=seed, label_noise=0.5, noise_seed=noise_seed).train_set.tensors[1]
        for seed, noise_seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "Digits: batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "Digits: num_workers must not be negative, got -1"),
        ({"train_size": 0}, "Digits: train_size must leave some of the 1797 pictures for each split, got 0"),
        ({"train_size": 1797}, "Digits: train_size must leave some of the 1797 pictures for each split, got 1797"),
        ({"label_noise": -0.1}, "Digits: label_noise must lie in [0, 1), got -0.1"),
        ({"label_noise": 1.0}, "Digits: label_noise must lie in [0, 1), got 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(DataError) as error:
        Digits(**arguments)
    assert str(error.value) == message
