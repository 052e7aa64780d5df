"""Saving to and loading from .safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.hub import FileFormatError


def test_round_trip_keeps_bits_dtype_and_arguments(tmp_path: Path) -> None:
    module = zoo.PolyNorm(2, eps=1e-4, norm="l2", dtype=torch.float64)
    torch.nn.init.normal_(module.weight)
    path = tmp_path / "act.safetensors"
    kwargs = {"order": 2, "eps": 1e-4, "norm": "l2"}
    zoo.save(module, path, kind="activation", name="polynorm", kwargs=kwargs)
    loaded = zoo.load(path)
    assert repr(loaded) == repr(module)
    assert loaded.weight.dtype is torch.float64
    assert loaded.weight.requires_grad
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(loaded(x), module(x))
    assert [p.name for p in tmp_path.iterdir()] == ["act.safetensors"]


def test_arguments_that_would_not_rebuild_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "act.safetensors"
    zoo.save(zoo.PolyReLU(), path, kind="activation", name="polyrelu")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"activation 'polyrelu' with \{\} has tensors .*\(3,\).*pass the kwargs"):
        zoo.save(zoo.PolyReLU(2), path, kind="activation", name="polyrelu")
    with pytest.raises(ValueError, match="must be plain JSON data"):
        zoo.save(zoo.PolyReLU(), path, kind="activation", name="polyrelu", kwargs={"dtype": torch.float32})
    with pytest.raises(zoo.ComponentArgumentError, match="has no argument 'ordr'"):
        zoo.save(zoo.PolyReLU(), path, kind="activation", name="polyrelu", kwargs={"ordr": 3})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_not_ours_get_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(FileFormatError, match=r"was not written by zoo\.save"):
        zoo.load(path)
    header = json.dumps({"format": 99, "kind": "activation", "name": "polyrelu", "kwargs": {}})
    save_file({"weight": torch.ones(3)}, path, metadata={"zoo": header})
    with pytest.raises(FileFormatError, match="uses file format 99, newer than this version reads"):
        zoo.load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FileFormatError, match=r"is not a whole \.safetensors file"):
        zoo.load(path)
    with pytest.raises(FileNotFoundError):
        zoo.load(tmp_path / "absent.safetensors")
