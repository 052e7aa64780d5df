"""Which modules are normalisations, what they hold, and the EvoNorm in their place. By name, as :mod:`.known`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .. import norms
from ..errors import ComponentArgumentError
from ..norms import ConditionalEvoNorm2d, EvoNorm, EvoNorm1d, EvoNorm2d, EvoNorm3d
from ..registry import factory
from ..spec import NormSpec
from .known import activation_kind
from .report import ConversionError, short_name

# "channels": with statistics over maps, what EvoNorm takes the place of; "timm": an EvoNorm of timm; "zoo": of this
# project; "features": over the features of a place, as in transformers; "frozen": of fixed statistics.
NormKind = Literal["channels", "timm", "zoo", "features", "frozen"]

_CHANNELS = {
    "_BatchNorm",
    "_InstanceNorm",
    "GroupNorm",
    "FilterResponseNormAct2d",
    "FilterResponseNormTlu2d",
    "InplaceAbn",
}
_FEATURES = re.compile(r"\w*(layer|rms|simple)norm\w*", re.IGNORECASE)
_TIMM = re.compile(r"EvoNorm2d(B[012]|S[012]a?)")
_RANKS: dict[int, type[EvoNorm]] = {3: EvoNorm1d, 4: EvoNorm2d, 5: EvoNorm3d}


def norm_kind(value: object) -> NormKind | None:
    """What kind of normalisation a module is, None for anything else."""
    if not isinstance(value, nn.Module):
        return None
    if isinstance(value, (EvoNorm, ConditionalEvoNorm2d)):
        return "zoo"
    if timm_name(value):
        return "timm"
    names = [cls.__name__ for cls in type(value).__mro__]
    if any(name.startswith("FrozenBatchNorm") for name in names):
        return "frozen"
    if not _CHANNELS.isdisjoint(names):
        return "channels"
    return "features" if any(map(_FEATURES.fullmatch, names)) else None


def timm_name(module: nn.Module) -> str | None:
    """Name of the EvoNorm of timm that a module is; other libraries use these names for other formulas."""
    names = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("timm."))
    return next(filter(_TIMM.fullmatch, names), None)


def held_activation(norm: nn.Module) -> str:
    """Name of the activation a normalisation applies itself, as timm's do; empty if none."""
    act = norm._modules.get("act")
    if act is not None:
        return "" if isinstance(act, nn.Identity) else short_name(act)
    if "act_name" in vars(norm):  # timm's InplaceAbn
        return "" if norm.act_name == "identity" else str(norm.act_name)
    return "TLU" if getattr(norm, "apply_act", False) else ""


def unfit(norm: nn.Module) -> str:
    """Why a normalisation must stay whatever follows it, empty if it need not."""
    match norm_kind(norm):
        case "zoo":
            return "is of the zoo already"
        case "features":
            return "normalises over the features of a place, not over a map"
        case "frozen":
            return "is frozen"
        case "timm":
            act = norm._modules.get("act")
            foreign = act is not None and not isinstance(act, (nn.Identity, nn.SiLU))
            return f"has {short_name(act)} where EvoNorm has SiLU" if foreign else ""
    if any(is_lazy(tensor) for tensor in (*norm.parameters(), *norm.buffers())):
        return "has no shape before the first batch"
    drop, act = norm._modules.get("drop"), norm._modules.get("act")
    if drop is not None and not isinstance(drop, nn.Identity):
        return f"holds a {short_name(drop)}, which EvoNorm does not"
    if act is not None and not isinstance(act, nn.Identity) and activation_kind(act) != "hidden":
        return f"holds a {short_name(act)}, which EvoNorm does not replace"
    return ""


def channels(norm: nn.Module) -> int:
    """Number of channels of a normalisation of kind "channels" or "timm"."""
    for name in ("num_features", "num_channels"):
        if isinstance(found := getattr(norm, name, None), int):
            return found
    weight = norm.weight
    assert isinstance(weight, Tensor)  # those of timm that do not say how many channels they have always scale them
    return weight.numel()


def rank_of(norm: nn.Module, *layers: nn.Module | None) -> int | None:
    """Dimensions of a normalisation's input, by its name or by a convolution beside it; None if neither tells."""
    for cls in type(norm).__mro__:
        if found := re.search(r"([123])d$", cls.__name__):
            return int(found[1]) + 2
    kernels = (getattr(layer, "kernel_size", None) for layer in layers if isinstance(layer, _ConvNd))
    return next((len(kernel) + 2 for kernel in kernels if kernel), None)


class Target:
    """The layer to put in, as a constructor of one for each normalisation.

    Args:
        spec: name, mapping, class or callable that takes the channels and `apply_act`.

    Raises:
        UnknownComponentError: if there is no such layer.
        ComponentArgumentError: if it does not take an argument, `apply_act` among them.
    """

    def __init__(self, spec: NormSpec) -> None:
        if isinstance(spec, nn.Module):
            raise ComponentArgumentError(
                f"target must build a new layer for every site, got the module {short_name(spec)}; pass its class, or "
                "a mapping with its arguments"
            )
        self.make: Callable[..., Any] = factory("norm", spec)
        self.name = short_name(self.make)
        self.given = _given(spec)
        self.built: set[nn.Module] = set()
        takes = inspect.signature(self.make).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        if "apply_act" in self.given:
            raise ComponentArgumentError(
                "target must leave apply_act open, which each site decides; drop it, or pass fold_act=False to keep "
                "the activations"
            )
        if "apply_act" not in takes and not takes_all:
            raise ComponentArgumentError(
                f"target must take apply_act, by which it is told whether an activation follows, and {self.name} does "
                'not; pass an EvoNorm, such as "evonorm_s0"'
            )
        self.takes_groups = "groups" in takes and self.given.isdisjoint({"groups", "group_size"})

    def build(self, norm: nn.Module, rank: int | None, *, apply_act: bool, normalize: bool, path: str) -> nn.Module:
        """The layer in place of `norm`.

        Args:
            norm: what it replaces; a GroupNorm hands on its number of groups unless the target names one.
            rank: dimensions of the input, None for any.
            apply_act: whether it takes the place of an activation, too.
            normalize: without activation, divide by the deviation rather than scale and shift alone.
            path: where, for the message.
        """
        options: dict[str, Any] = {"apply_act": apply_act}
        if self.takes_groups and isinstance(norm, nn.GroupNorm):
            options["groups"] = norm.num_groups
        try:
            new = self.make(channels(norm), **options)
        except (TypeError, ValueError) as error:
            raise ConversionError(f"target {self.name} cannot be built for {path}: {error}") from error
        if not isinstance(new, nn.Module) or new in self.built:
            again = "the same one again" if isinstance(new, nn.Module) else repr(new)
            raise ComponentArgumentError(f"target must build a module at each call, {self.name} gave {again}")
        self.built.add(new)
        if isinstance(new, EvoNorm):
            new = of_rank(new, rank)
            _synchronise(new, norm)
        if normalize:
            if not isinstance(new, EvoNorm) or not new.variant.startswith("s"):
                raise ConversionError(
                    "fold_act=False needs a layer that can normalise without an activation, an S layer of EvoNorm, "
                    f"got {self.name}"
                )
            new.normalize_when_linear = True
        return new


def _given(spec: NormSpec) -> set[str]:
    """Arguments the user named."""
    if isinstance(spec, Mapping):
        return set(spec) | set(spec.get("init_args") or {})
    return set(spec.keywords) if isinstance(spec, partial) else set()


def of_rank(layer: EvoNorm, rank: int | None) -> EvoNorm:
    """The layer, as the class for inputs of that many dimensions if its own class is for others."""
    if not layer._ranks or rank in layer._ranks:
        return layer
    return _RANKS.get(rank or 0, EvoNorm)(
        layer.num_features,
        layer.variant,
        apply_act=layer.apply_act,
        groups=layer.groups,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        zero_init=layer.zero_init,
        normalize_when_linear=layer.normalize_when_linear,
        unbiased_running_var=layer.unbiased_running_var,
        track_running_stats=layer.running_var is not None,
        process_group=layer.process_group,
        backend=layer.backend,
    )


def _synchronise(new: EvoNorm, norm: nn.Module) -> None:
    """B layers in place of a SyncBatchNorm share their statistics as it did."""
    if isinstance(norm, nn.SyncBatchNorm) and new.variant.startswith("b") and new.process_group is None:
        new.process_group = norm.process_group or "world"


def of_timm(norm: nn.Module) -> EvoNorm:
    """The zoo's layer that computes what an EvoNorm of timm does, without its weights."""
    name = timm_name(norm)
    assert name is not None
    options: dict[str, Any] = {"apply_act": norm.apply_act, "eps": norm.eps}
    if "S" in name:
        options["groups"] = norm.groups
    else:
        options |= {"momentum": norm.momentum, "unbiased_running_var": True}
    return getattr(norms, name)(channels(norm), **options)


@torch.no_grad()
def start_affine(new: nn.Module, norm: nn.Module, *, copy: bool, zero: bool) -> bool:
    """Scale and shift of a new layer: the host's if `copy`, else 1 and 0, with a scale of 0 kept or asked for.

    Returns:
        Whether the scale starts at zero.
    """
    weight, bias = getattr(new, "weight", None), getattr(new, "bias", None)
    old = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:  # a meta tensor has no values to set
        return False
    if copy and isinstance(old, Tensor):
        weight.copy_(old)
        if isinstance(bias, Tensor) and isinstance(norm.bias, Tensor):
            bias.copy_(norm.bias)
    elif zero or (isinstance(old, Tensor) and not old.is_meta and not old.any()):
        weight.zero_()
    return not weight.any()
