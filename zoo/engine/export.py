"""Weights of a run's checkpoint, and predictions, as .safetensors files."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from ..errors import RunError


def export(run_dir: str, checkpoint: str, output: str) -> str:
    """Write the network's state dict of a checkpoint, with the model's part of the config in the header.

    Args:
        run_dir: directory of the run.
        checkpoint: "best" or "last".
        output: file to write; must not exist yet.

    Returns:
        A line that says what was written.

    Raises:
        RunError: if there is no such checkpoint, or the output exists or cannot be written.
    """
    source = Path(run_dir) / "checkpoints" / f"{checkpoint}.ckpt"
    target = Path(output)
    if not source.is_file():
        raise RunError(f"no checkpoint at {source}; train first with `zoo fit`, or pass another run directory")
    if target.exists():
        raise RunError(f"{target} exists already; pass another --output")
    state = torch.load(source, map_location="cpu", weights_only=True)
    config = yaml.safe_load((Path(run_dir) / "config.yaml").read_text())
    header = {"zoo.model": json.dumps(config.get("model")), "zoo.step": str(state["global_step"])}
    tensors = {key: value.contiguous().clone() for key, value in state["state_dict"].items()}
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        save_file(tensors, scratch, metadata=header)
        os.replace(scratch, target)
    except OSError as error:
        raise RunError(f"cannot write {target} ({error.strerror}); pass another --output") from None
    return f"{target}: {len(tensors)} tensors of step {state['global_step']} from {source}"


def write_predictions(outputs: Sequence[Any], run_dir: Path) -> Path:
    """Write one batch's predictions after the other as `predictions.safetensors`, or with the next free number.

    Args:
        outputs: [B, ...] of each batch, in the order of the data.
        run_dir: folder of the file.

    Raises:
        RunError: if the task predicts something other than tensors of one shape a picture or text.
    """
    if not outputs or not all(isinstance(batch, torch.Tensor) for batch in outputs):
        raise RunError("the task predicted no tensors; give its predict_step a tensor of the batch to return")
    numbers = (f"-{i}" if i > 1 else "" for i in itertools.count(1))
    target = next(path for n in numbers if not (path := run_dir / f"predictions{n}.safetensors").exists())
    run_dir.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tmp")
    save_file({"predictions": torch.cat(list(outputs)).contiguous()}, scratch)
    os.replace(scratch, target)
    return target
