"""Which objects are activations. By name, so that timm, torchvision and transformers need not be imported."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from .. import registry
from .report import short_name
from .traverse import features, has_matrices, is_function

# "hidden": between the layers of a network; "bounded": gates and outputs; "zoo": an activation of this project.
ActivationKind = Literal["hidden", "bounded", "zoo"]

_HIDDEN = re.compile(
    r"(new|fast|quick|clipped|accurate|pytorch|bloom|squared|sqrt)*"
    r"(relu|leakyrelu|prelu|rrelu|elu|celu|selu|gelu|silu|xielu|swish|mish|hardswish|hswish|hardmish"
    r"|softplus|squareplus|laplace)"
    r"(new|fast|quick|python|accurate|squared|tanh|erf|none|impl|me|jit|2|6|10)*"
)
_BOUNDED = re.compile(
    r"(sigmoid|hardsigmoid|hsigmoid|logsigmoid|tanh|hardtanh|softsign|tanhshrink|softshrink|hardshrink|threshold)"
    r"(me|jit)?"
)


def activation_kind(value: object) -> ActivationKind | None:
    """What kind of activation a module or function is, None for anything else.

    Subclasses count as what they derive from, a `functools.partial` as the function it calls. A module with a matrix
    inside is a layer whatever its name, as the `GELU` of diffusers, which projects first.
    """
    if isinstance(value, nn.Module) and _is_ours(type(value)):
        return "zoo"
    if isinstance(value, nn.Module) and has_matrices(value):
        return None
    for word in _words(value):
        if _HIDDEN.fullmatch(word):
            return "hidden"
        if _BOUNDED.fullmatch(word):
            return "bounded"
    return None


def is_sigmoid(value: object) -> bool:
    """Whether this is a sigmoid, soft or hard."""
    return any(re.fullmatch(r"(hard|h)?sigmoid(me|jit)?", word) for word in _words(value))


def squeezes(owner: nn.Module) -> bool:
    """Two pointwise layers through a bottleneck and back, then a sigmoid: squeeze-and-excitation, whatever its name."""
    children = list(owner.children())
    layers = [child for child in children if features(child, "in") is not None and has_matrices(child)]
    if len(layers) != 2 or not any(map(is_sigmoid, children)):
        return False
    pointwise = all(set(getattr(layer, "kernel_size", (1,))) == {1} for layer in layers)
    width, narrow = features(layers[0], "in"), features(layers[0], "out")
    return pointwise and width == features(layers[1], "out") and (narrow or 0) < (width or 0)


def _words(value: object) -> list[str]:
    if isinstance(value, nn.Module):
        names = [cls.__name__ for cls in type(value).__mro__]
    else:
        names = [short_name(value)] if is_function(value) else []
    return [re.sub(r"_|activation$", "", name.lower()) for name in names]


def _is_ours(cls: type) -> bool:
    for row in registry.rows("activation"):
        module, _, qualname = row.target.partition(":")
        # a target names the package that exports the class; the class itself may live in a file of it
        if cls.__qualname__ == qualname and f"{cls.__module__}.".startswith(f"{module}."):
            return True
    return False
