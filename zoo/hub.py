"""Save a component to one .safetensors file and load it back by name. No pickle."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalog import Kind
from .errors import ZooError
from .registry import create

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT = 1
_HEADER = "zoo"


class FileFormatError(ZooError, ValueError):
    """A file that :func:`load` cannot read."""


def save(module: nn.Module, path: str | Path, *, kind: Kind, name: str, kwargs: dict[str, Any] | None = None) -> None:
    """Write a component's tensors and the call that rebuilds it to one file.

    The file is written beside its final place and moved there, so an earlier file survives a failed save.

    Args:
        module: the component; every tensor of its state dict is stored.
        path: file to write, usually `*.safetensors`.
        kind, name, kwargs: what :func:`zoo.create` needs to build it again; kwargs must be plain JSON data.

    Raises:
        ComponentArgumentError, UnknownComponentError: if that call would not build a component.
        ValueError: if the rebuilt component would not take these tensors, or kwargs are not JSON.
    """
    from safetensors.torch import save_file

    kwargs = dict(kwargs or {})
    try:
        header = json.dumps({"format": FORMAT, "kind": kind, "name": name, "kwargs": kwargs})
    except TypeError as error:
        raise ValueError(f"kwargs of {kind} {name!r} must be plain JSON data to be saved: {error}") from None
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    _check_rebuilds(tensors, kind, name, kwargs)

    path = Path(path)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file(tensors, scratch, metadata={_HEADER: header})
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a component written by :func:`save`.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        FileFormatError: if the file was not written by :func:`save`, or by a newer version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise FileFormatError(f"{path} is not a whole .safetensors file ({error}); save it again") from None
    if header is None:
        raise FileFormatError(
            f"{path} was not written by zoo.save: it has no {_HEADER!r} header; load it with safetensors instead"
        )
    call = json.loads(header)
    if call["format"] > FORMAT:
        raise FileFormatError(
            f"{path} uses file format {call['format']}, newer than this version reads ({FORMAT}); upgrade paperzoo"
        )
    module = create(call["kind"], call["name"], **call["kwargs"])
    module.load_state_dict(tensors, assign=True)  # assign: keep the dtype and device of the file
    return module


def _check_rebuilds(tensors: dict[str, torch.Tensor], kind: Kind, name: str, kwargs: dict[str, Any]) -> None:
    import torch

    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in create(kind, name, **kwargs).state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if given != expected:
        raise ValueError(
            f"{kind} {name!r} with {kwargs} has tensors {expected}, but the module to save has {given}; "
            "pass the kwargs it was built with"
        )
