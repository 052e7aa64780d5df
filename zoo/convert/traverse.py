"""Finding and replacing things inside a model. Shared by every converter.

A site is a name on an owner, not an object: one `nn.GELU` held by twelve blocks is twelve sites, while a block that
is itself reached by two paths is one owner, whose sites are changed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from .report import ConversionError

# Where the features of a layer's output lie: on dim 1, on the last dim, or, as far as we can tell, on either.
Layout = Literal["first", "last", "mixed"]

# Wrappers that keep a list of parameters or a trace of the code: what is put below them afterwards, they never see.
_WRAPPERS = {
    "OptimizedModule": "torch.compile",
    "DataParallel": "wrapping it in DataParallel",
    "DistributedDataParallel": "wrapping it in DistributedDataParallel",
    "FullyShardedDataParallel": "sharding it",
    "FSDPModule": "sharding it",
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

    @property
    def training(self) -> bool:
        """Mode of what is held; a function has its owner's."""
        return (self.value if isinstance(self.value, nn.Module) else self.owner).training


def owners(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every distinct module of the model, itself included, with all its paths."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(path)
    for module, paths in found.values():
        yield module, tuple(paths)


def find_sites(model: nn.Module) -> list[Site]:
    """Every child module and every function held as an attribute, in the model's order."""
    sites = []
    for owner, paths in owners(model):
        held = {name: child for name, child in owner._modules.items() if child is not None}
        held.update((name, value) for name, value in vars(owner).items() if is_function(value))
        for name, value in held.items():
            sites.append(Site(owner, name, tuple(f"{path}.{name}" if path else name for path in paths), value))
    return sites


def outermost(sites: list[Site]) -> list[Site]:
    """The sites that do not lie inside another: `transformers.GELUActivation` keeps a function, which is its own."""
    inside = {id(part) for site in sites if isinstance(site.value, nn.Module) for part in site.value.modules()}
    return [site for site in sites if id(site.owner) not in inside]


def is_function(value: object) -> bool:
    """Whether an attribute is a function to call on tensors; classes and their partials build things instead."""
    while isinstance(value, partial):
        value = value.func
    return callable(value) and not isinstance(value, (type, nn.Module))


def places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (owner, name) under which a module is registered."""
    return [(owner, name) for owner, _ in owners(model) for name, child in owner._modules.items() if child is module]


def count_parameters(module: object) -> int:
    """Number of parameters, shared ones once; 0 for what is no module. Lazy ones count when they have a shape."""
    if not isinstance(module, nn.Module):
        return 0
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def has_matrices(module: nn.Module) -> bool:
    """Whether a module holds parameters of two or more dimensions, as layers do and activations do not."""
    return any(is_lazy(parameter) or parameter.ndim > 1 for parameter in module.parameters())


def check_convertible(model: nn.Module) -> None:
    """Refuse models whose code or parameter list was captured, where a conversion would silently have no effect.

    Raises:
        ConversionError: if a part is scripted, compiled or wrapped for distributed training.
    """
    for path, module in model.named_modules():
        where = f"{path or 'the model'} is a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(f"{where}, whose code is fixed; convert before torch.jit.script or trace")
        for wrapper in (base.__name__ for base in type(module).__mro__):
            if wrapper in _WRAPPERS:
                raise ConversionError(f"{where}; convert the model before {_WRAPPERS[wrapper]}")
        if module._compiled_call_impl is not None:
            raise ConversionError(f"{where} and compiled; convert the model before .compile()")


def neighbour(site: Site) -> tuple[nn.Module | None, Layout | None]:
    """The layer whose output most likely enters a site, and the layout of that output; None, None without a layer.

    The layer is the owner (a norm that holds its activation), else the nearest one registered before the site, else
    the nearest one after, unless the owner is a Sequential, which runs in order.
    """
    owner, ordered = site.owner, isinstance(site.owner, nn.Sequential)
    own = layout_of(owner)
    if own is not None:
        return owner, own
    # a function has no place among the children: every child counts as before it
    names = list(owner._modules)
    position = names.index(site.name) if site.name in names else len(names)
    before = [child for child in map(owner._modules.get, names[:position]) if child is not None]
    after = [child for child in map(owner._modules.get, names[position + 1 :]) if child is not None]
    backwards = (part for child in reversed(before) for part in reversed(list(child.modules())))
    forwards = (part for child in after for part in child.modules())
    layer = next(filter(layout_of, backwards), None)
    if layer is None and not ordered:
        layer = next(filter(layout_of, forwards), None)
    if layer is None:
        return None, None
    # one activation registered after all convolutions and linear layers of a small network is called after both
    if not ordered and not any(map(layout_of, after)) and {"first", "last"} <= set(map(layout_of, before)):
        return layer, "mixed"
    return layer, layout_of(layer)


def layout_of(layer: nn.Module) -> Layout | None:
    """Layout of a layer's output; None for what is no layer or does not tell, as a BatchNorm1d over [B, C]."""
    if isinstance(layer, (nn.Embedding, nn.BatchNorm1d, nn.InstanceNorm1d)):
        return None
    if isinstance(layer, (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return "first"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and type(layer).__name__.endswith(("2d", "3d")):
        return "first"  # the LayerNorm2d of timm and torchvision derive from LayerNorm, FrozenBatchNorm2d from Module
    if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
        return "last"
    # linear layers of other libraries (Conv1D of transformers, LoRA, quantised), and experts kept in one tensor
    if isinstance(weight, Tensor) and not is_lazy(weight) and weight.ndim == 2:
        return "last"
    own = [parameter for parameter in layer.parameters(recurse=False) if not is_lazy(parameter)]
    return "last" if any(parameter.ndim == 3 and len(parameter) > 1 for parameter in own) else None


def features(layer: nn.Module, side: Literal["in", "out"]) -> int | None:
    """Width of a linear layer or convolution, of whatever library; None if it does not tell."""
    return getattr(layer, f"{side}_features", getattr(layer, f"{side}_channels", None))


def follow(new: nn.Module, *hosts: nn.Module | None, training: bool) -> nn.Module:
    """Give a new module the device, dtype and mode of its surroundings.

    Args:
        new: the module.
        hosts: where to look for a parameter to follow, the nearest first.
        training: mode of what it replaces.

    Returns:
        The module.
    """
    new.train(training)
    for host in hosts:
        for parameter in host.parameters() if host is not None else ():
            # 8-bit floats and integers are storage formats of quantised weights, nothing to compute in
            if parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1:
                return new.to(device=parameter.device, dtype=parameter.dtype)
    return new
