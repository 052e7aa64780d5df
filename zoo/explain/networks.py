"""Networks for `zoo explain`: weights from files, and what must be done to a photo before. Nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import DataError, RunError
from ..registry import did_you_mean
from .demo import NETWORK, demo_network

# under which Lightning modules and DistributedDataParallel keep a network
_PREFIXES = ("", "net.", "model.", "module.")


@dataclass(frozen=True)
class Network:
    """A network, and how to ask it.

    Args:
        model: picture [B, C, H, W], prepared -> scores [B, classes].
        prepare: photo -> [C, H, W] as the model takes it.
        mean, std: of the normalisation in there.
        names: of the classes, by number; None if they have none.
        several: whether a picture may have several labels, so that each has a probability of its own.
        weights: where they come from, for people.
    """

    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    mean: float | Sequence[float] | Tensor
    std: float | Sequence[float] | Tensor
    names: Sequence[str] | None
    several: bool
    weights: str


def load_network(model: str | None, weights: str | None, checkpoint: str | None, seed: int) -> Network:
    """A model of timm, or the task of a run.

    Args:
        model: name in timm; None for the task in the checkpoint.
        weights: file of a state dict, "demo", or None.
        checkpoint: of Lightning, or None.
        seed: of random weights, where there are no others.

    Raises:
        RunError: if there is no such model or file, or they do not fit.
    """
    if weights is not None and checkpoint is not None:
        raise RunError("give --weights or --checkpoint, not both")
    if model is None:
        if checkpoint is None:
            raise RunError("give --model, a model of timm, or --checkpoint, of a run of `zoo fit`")
        return _of_run(Path(checkpoint))
    return _of_timm(model, weights, checkpoint, seed)


def _of_timm(name: str, weights: str | None, checkpoint: str | None, seed: int) -> Network:
    import timm
    from timm.data import ImageNetInfo, create_transform, resolve_data_config

    if not timm.is_model(name):  # also of names that timm would look up on a hub
        raise RunError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    if weights == "demo":
        if name != NETWORK:
            raise RunError(f"the demo weights are those of {NETWORK}; say --model {NETWORK}, or give a file")
        model: Any = demo_network()
    else:
        file = weights or checkpoint
        state = None if file is None else _read(Path(file))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(name, **_classes_of(name, state))
        if state is not None:
            _fill(model, state, f"--model {name}")
    config: dict[str, Any] = resolve_data_config({}, model=model)
    info, classes = ImageNetInfo(), cast(int, model.num_classes)
    return Network(
        model=model.eval(),
        prepare=cast(Any, create_transform(**config)),
        mean=config["mean"],
        std=config["std"],
        names=[info.index_to_description(i) for i in range(classes)] if classes == info.num_classes() else None,
        several=False,
        weights=weights or checkpoint or "random",
    )


def _of_run(checkpoint: Path) -> Network:
    """The task in a run's checkpoint, and its data's preparation, by the run's config."""
    import yaml

    found = _load(checkpoint)
    if not {"hyper_parameters", "state_dict"} <= found.keys():
        raise RunError(f"{checkpoint} is no checkpoint of a run; of a state dict say --model and --weights")
    config = checkpoint.absolute().parent.parent / "config.yaml"
    if not config.is_file():
        raise RunError(
            f"there is no {config}, which says what is in {checkpoint}; leave a checkpoint in its run directory, or say"
            " by --model which model of timm it holds"
        )
    said = yaml.safe_load(config.read_text())
    task = _class(said["model"]["class_path"])(**found["hyper_parameters"])
    if not all(hasattr(task, name) for name in ("net", "mean", "std", "multi_label")):
        raise RunError(f"the run of {checkpoint} trained {type(task).__name__}, and only ImageClassifier is explained")
    task.load_state_dict(found["state_dict"])
    arguments = said["data"].get("init_args", {})
    size = arguments.get("size") or getattr(_class(said["data"]["class_path"]), "size", None)
    size = size or getattr(task.net, "size", None)
    if size is None:
        raise RunError(f"{config} does not say of what size the pictures are, by data.init_args.size")
    # what the data module does to a picture, then what the task does, in one
    mean, std = (torch.as_tensor(arguments.get(name, neutral)) for name, neutral in (("mean", 0.0), ("std", 1.0)))
    both = _column(mean) + _column(std) * _column(task.mean), _column(std) * _column(task.std)
    return Network(
        model=task.net.eval(),
        prepare=_preparation(int(size), task.in_channels, *both),
        mean=both[0].flatten(),
        std=both[1].flatten(),
        names=_class_names(said["data"]),
        several=task.multi_label,
        weights=str(checkpoint),
    )


def _preparation(size: int, channels: int, mean: Tensor, std: Tensor) -> Callable[[Image.Image], Tensor]:
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    return lambda photo: (resize(photo.convert("L" if channels == 1 else "RGB")).float() / 255 - mean) / std


def _column(values: float | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def _class_names(data: Mapping[str, Any]) -> Sequence[str] | None:
    """Those a data module knows before it has looked at its files."""
    cls = _class(data["class_path"])
    if isinstance(getattr(cls, "class_names", None), property):  # it would read all of them
        return None
    try:
        return getattr(cls(**data.get("init_args", {})), "class_names", None)
    except DataError:
        return None


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RunError(f"the run's config names {path}, which cannot be imported: {error}") from None


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict, of whatever wraps it."""
    found = _load(path)
    for key in ("state_dict", "model"):
        if isinstance(found.get(key), Mapping):
            found = found[key]
    return dict(found)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no telling what a damaged file makes of the two readers
        raise RunError(
            f"cannot read {path}: it is damaged, or holds more than tensors and plain data; save a state_dict by"
            " torch.save or safetensors"
        ) from error
    if not isinstance(found, Mapping):
        raise RunError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found


def _classes_of(name: str, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """How many classes weights were trained for, where that can be told."""
    import timm

    config = timm.get_pretrained_cfg(name)
    for prefix in _PREFIXES:
        weight = (state or {}).get(f"{prefix}{getattr(config, 'classifier', None)}.weight")
        if isinstance(weight, Tensor):
            return {"num_classes": len(weight)}
    return {}


def _fill(model: nn.Module, state: Mapping[str, Any], of: str) -> None:
    wanted = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    best: dict[str, Any] = {}
    for prefix in _PREFIXES:
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        part = {key: value for key, value in part.items() if key in wanted or not prefix}
        if len(part.keys() & wanted) > len(best.keys() & wanted):
            best = part
    wrong = sorted(key for key in wanted if tuple(getattr(best.get(key), "shape", (-1,))) != wanted[key])
    more = sorted(best.keys() - wanted)
    if wrong or more:
        raise RunError(
            f"the weights are not those of {of}: {len(wrong)} of its {len(wanted)} tensors are missing or of another"
            f" shape{f', as {wrong[0]}' if wrong else ''}, {len(more)} are unknown{f', as {more[0]}' if more else ''}"
        )
    model.load_state_dict(best)
