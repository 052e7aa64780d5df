"""Token files on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import TokenFiles
from zoo.errors import DataError


def write(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32])
def test_windows_tile_the_file_and_targets_follow(tmp_path: Path, dtype: type) -> None:
    tokens = np.arange(103).astype(dtype)
    data = TokenFiles(
        write(tmp_path / "t.npy", tokens), write(tmp_path / "v.npy", tokens[:50]), context=10, batch_size=2
    )
    data.setup()
    assert len(data.train_set) == 10
    assert len(data.val_set) == 4
    for i, (inputs, targets) in enumerate(data.train_set[j] for j in range(10)):
        assert torch.equal(inputs, torch.arange(10 * i, 10 * i + 10))
        assert torch.equal(targets, inputs + 1)
    batch = next(iter(data.train_dataloader()))
    assert batch[0].shape == batch[1].shape == (2, 10)
    assert batch[0].dtype is torch.int64
    assert sum(len(inputs) for inputs, _ in data.val_dataloader()) == 4


def test_bad_files_get_a_sentence(tmp_path: Path) -> None:
    good = write(tmp_path / "good.npy", np.arange(100, dtype=np.uint16))
    text = tmp_path / "text.npy"
    text.write_text("not an array")
    cases = {
        "absent.npy": "no token file at absent.npy; write one with numpy.save",
        str(text): "text.npy is not a .npy file of numbers",
        write(tmp_path / "real.npy", np.zeros(9)): r"must hold a 1-D array of integers, got shape \(9,\) float64",
        write(tmp_path / "short.npy", np.zeros(9, np.uint8)): "holds 9 tokens, but a sample reads 11; lower context",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            TokenFiles(path, good, context=10).setup()
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        TokenFiles(good, good, batch_size=0)
