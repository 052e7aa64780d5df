"""Finding and replacing things inside a model. Shared by every converter.

A site is a name on an owner, not an object: one `nn.GELU` held by twelve blocks is twelve sites, while a block that
is itself reached by two paths is one owner, whose sites are changed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from .report import ConversionError

# Where the features of a layer's output lie: on dim 1, on the last dim, or used in both ways as far as we can tell.
Layout = Literal["first", "last", "mixed"]

# Wrappers that keep a list of parameters or a trace of the code: what is put below them afterwards, they never see.
_WRAPPERS = {
    "DistributedDataParallel": "wrapping it in DistributedDataParallel",
    "FullyShardedDataParallel": "sharding it",
    "OptimizedModule": "torch.compile",
}


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A child module, or a function held as an attribute.

    Args:
        owner: the module that holds it.
        name: under which attribute.
        paths: dotted paths from the model, several if the owner is shared.
        value: what is held.
    """

    owner: nn.Module
    name: str
    paths: tuple[str, ...]
    value: nn.Module | Callable[..., Any]

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]


def owners(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every distinct module of the model, itself included, with all its paths."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(path)
    for module, paths in found.values():
        yield module, tuple(paths)


def find_sites(model: nn.Module, wanted: Callable[[object], bool]) -> list[Site]:
    """Sites whose value is wanted, in the model's order.

    What lies inside a wanted value is its own business: the function that `transformers.GELUActivation` keeps as an
    attribute is no site.
    """
    sites = []
    for owner, paths in owners(model):
        if wanted(owner):
            continue
        held = {**owner._modules, **{name: value for name, value in vars(owner).items() if callable(value)}}
        sites += [
            Site(owner, name, tuple(f"{path}.{name}" if path else name for path in paths), value)
            for name, value in held.items()
            if value is not None and wanted(value)
        ]
    return sites


def places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (owner, name) under which a module is registered."""
    return [(owner, name) for owner, _ in owners(model) for name, child in owner._modules.items() if child is module]


def count_parameters(module: object) -> int:
    """Number of parameters, shared ones once; 0 for what is no module. Lazy ones count when they have a shape."""
    if not isinstance(module, nn.Module):
        return 0
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def check_convertible(model: nn.Module) -> None:
    """Refuse models whose code or parameter list was captured, where a conversion would silently have no effect.

    Raises:
        ConversionError: if a part is scripted, compiled or wrapped for distributed training.
    """
    for path, module in model.named_modules():
        where = f"{path or 'the model'} is a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(f"{where}, whose code is fixed; convert before torch.jit.script or trace")
        if type(module).__name__ in _WRAPPERS:
            raise ConversionError(f"{where}; convert the model before {_WRAPPERS[type(module).__name__]}")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ConversionError(f"{where} and compiled; convert the model before .compile()")


def neighbour(owner: nn.Module, name: str) -> tuple[nn.Module | None, Layout | None]:
    """The layer whose output most likely enters `owner.name`, and the layout of that output.

    The layer is the owner (a norm that holds its activation), else the nearest one registered before the site, else,
    unless the owner is a Sequential, which runs in order, the nearest one after. Both are None if there is no layer.
    """
    own = layout_of(owner)
    if own is not None:
        return owner, own
    children = list(owner._modules.items())
    # a function is kept apart from the children, so that it has no position: every child counts as before it
    position = next((i for i, (key, _) in enumerate(children) if key == name), len(children))
    before = [child for _, child in children[:position] if child is not None]
    after = [child for _, child in children[position + 1 :] if child is not None]
    ordered = isinstance(owner, nn.Sequential)
    layer = _last_layer(before)
    if layer is None and not ordered:
        layer = next((inner for child in after for inner in child.modules() if layout_of(inner)), None)
    if layer is None:
        return None, None
    # one activation registered after all convolutions and linear layers of a small network is called after both
    if not ordered and not any(map(layout_of, after)) and {"first", "last"} <= set(map(layout_of, before)):
        return layer, "mixed"
    return layer, layout_of(layer)


def _last_layer(children: list[nn.Module]) -> nn.Module | None:
    inner = (module for child in reversed(children) for module in reversed(list(child.modules())))
    return next((module for module in inner if layout_of(module)), None)


def layout_of(module: nn.Module | None) -> Layout | None:
    """Layout of a layer's output, None for what is no layer or does not tell."""
    if module is None or isinstance(module, (nn.Embedding, nn.BatchNorm1d, nn.InstanceNorm1d)):
        return None
    if isinstance(module, (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return "first"
    if isinstance(module, nn.Linear):
        return "last"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(module).__name__.endswith(("2d", "3d")):
        return "first"  # LayerNorm2d of timm and torchvision, which derive from LayerNorm
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return "last"
    # linear layers of other libraries (HF's Conv1D, LoRA, quantised), and experts kept in one tensor
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return "last"
    return "last" if any(p.ndim == 3 for p in module.parameters(recurse=False) if not is_lazy(p)) else None


def follow(new: nn.Module, *hosts: nn.Module | None, training: bool) -> nn.Module:
    """Give a new module the device, dtype and mode of its surroundings.

    Args:
        new: the module.
        hosts: where to look for a parameter to follow, the nearest first.
        training: mode of what it replaces.
    """
    new.train(training)
    for host in hosts:
        for parameter in host.parameters() if host is not None else ():
            # 8-bit floats and integers are storage formats of quantised weights, nothing to compute in
            if parameter.is_floating_point() and parameter.element_size() > 1:
                return new.to(device=parameter.device, dtype=parameter.dtype)
    return new
