"""Gated feed-forward blocks of timm and transformers: recognising one, and rebuilding it without its gate."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .report import ConversionError, short_name
from .traverse import Site, features

Resize = Literal["params"] | None


@dataclass(frozen=True, slots=True)
class GluForm:
    """Attribute names of a block that computes `down(act(gate(x)) * up(x))`.

    Args:
        gate: the gate projection, None if `up` computes both halves in one product.
        up: the value projection.
        down: the projection back.
        plain: what the same library calls the first projection of a block without a gate.
    """

    gate: str | None
    up: str
    down: str
    plain: str


_FORMS = (
    GluForm("gate_proj", "up_proj", "down_proj", plain="up_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, DeepSeek
    GluForm(None, "gate_up_proj", "down_proj", plain="up_proj"),  # Phi-3, GLM
    GluForm("wi_0", "wi_1", "wo", plain="wi"),  # T5 1.1
    GluForm(None, "Wi", "Wo", plain="Wi"),  # ModernBERT
    GluForm("w1", "w3", "w2", plain="w1"),  # Meta's Llama, Mixtral's experts before transformers 5
    GluForm("fc1_g", "fc1_x", "fc2", plain="fc1"),  # timm SwiGLU
    GluForm(None, "fc1", "fc2", plain="fc1"),  # timm GluMlp, SwiGLUPacked
)
# What stands before and after the second projection, in the order of the calls; a block has some of them.
_BETWEEN = ("drop1", "dropout", "drop", "norm")
_AFTER = ("drop2",)


def glu_form(owner: nn.Module) -> GluForm | None:
    """The form of a gated block, None if it is none that we know."""
    return next((form for form in _FORMS if _has_form(owner, form)), None)


def _has_form(owner: nn.Module, form: GluForm) -> bool:
    children = owner._modules
    up, down = children.get(form.up), children.get(form.down)
    if up is None or down is None:
        return False
    if form.gate is not None:
        gate = children.get(form.gate)
        widths = {features(up, "out"), features(down, "in"), None if gate is None else features(gate, "out")}
        return gate is not None and len(widths) == 1  # three layers one after the other may bear these names too
    # timm's GatedMlp is twice as wide too, but activates both halves; only GluMlp says which half gates
    if form.up == "fc1" and not hasattr(owner, "gate_last"):
        return False
    width, half = features(up, "out"), features(down, "in")
    return width is not None and half is not None and width == 2 * half


def has_experts(owner: nn.Module) -> bool:
    """Whether a block keeps the gates of all its experts in one tensor, as the mixtures of transformers 5."""
    return isinstance(owner._parameters.get("gate_up_proj"), nn.Parameter)


def is_gated(owner: nn.Module) -> bool:
    """Whether a block's activation acts on a gate."""
    return has_experts(owner) or glu_form(owner) is not None


def without_gate(site: Site, act: nn.Module, resize: Resize) -> nn.Sequential:
    """The block around a gate's activation, rebuilt as `down(act(up(x)))` with fresh projections.

    Args:
        site: the activation of the gate.
        act: what takes its place.
        resize: "params" widens the hidden layer until the block has as many parameters as before.

    Returns:
        The new block; its children keep the host's names, so that name patterns of LoRA or of a sharding plan hold.

    Raises:
        ConversionError: if the block has parts that cannot be rebuilt or have no known place.
    """
    owner, where = site.owner, site.path.rpartition(".")[0]
    form = glu_form(owner)
    if form is None:
        raise ConversionError(f"{site.path} serves experts kept in one tensor, which cannot lose their gate; "
                              "pass glu='keep', or leave it out with match")  # fmt: skip
    names = dict.fromkeys(name for name in (form.gate, form.up, form.down) if name is not None)
    up, down = [_linear(owner, name, where) for name in names][-2:]
    for name, part in owner._modules.items():
        if part is not None and name not in {*names, site.name, *_BETWEEN, *_AFTER}:
            raise ConversionError(
                f"cannot drop the gate of {where}: {where}.{name}, a {short_name(part)}, has no known place in a block "
                "without one; pass glu='keep', or leave it out with match"
            )
    norm = owner._modules.get("norm")
    extra = sum(1 for _ in norm.parameters()) if norm is not None else 0
    old = down.in_features
    row, column = up.in_features + (up.bias is not None), down.out_features + extra
    new = parity_width(old, row, column) if resize == "params" else old
    value = _value_half(owner, form, up.weight)
    parts = OrderedDict[str, nn.Module]()
    parts[form.plain] = _fresh(up, value, up.in_features, new)
    parts[site.name] = act
    parts |= {name: _rewidened(part, old, new, f"{where}.{name}") for name, part in _parts(owner, _BETWEEN)}
    parts[form.down] = _fresh(down, down.weight, new, down.out_features)
    parts |= dict(_parts(owner, _AFTER))
    block = nn.Sequential(parts)
    block.training = owner.training  # the parts have a mode each, a frozen dropout too
    return block


def parity_width(gated: int, row: int, column: int) -> int:
    """Hidden width at which one matrix in and one out hold what two in and one out did, within one percent.

    Args:
        gated: hidden width with the gate.
        row: parameters a hidden unit has in each matrix that makes it.
        column: parameters it has after its activation.

    Returns:
        3/2 `gated` if `row` equals `column`, in a multiple of 64 as in the paper (5504 -> 8256), or for small widths
        of the largest power of two that stays within one percent.
    """
    exact = gated * (2 * row + column) / (row + column)
    for multiple in (64, 32, 16, 8, 4, 2):
        rounded = multiple * round(exact / multiple)
        if abs(rounded - exact) <= exact / 100:
            return rounded
    return round(exact)


def _parts(owner: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name in names if (part := owner._modules.get(name)) is not None]


def _linear(owner: nn.Module, name: str, where: str) -> nn.Linear:
    layer = owner._modules[name]
    # exactly nn.Linear: a subclass (LoRA, quantised, parametrised) holds what a fresh layer would lose
    if type(layer) is not nn.Linear:
        raise ConversionError(
            f"cannot drop the gate of {where}: {where}.{name} is a {short_name(layer)}, not an nn.Linear; convert "
            "before adding adapters or quantising, or pass glu='keep'"
        )
    return layer


def _value_half(owner: nn.Module, form: GluForm, weight: Tensor) -> Tensor:
    """Rows of the first projection that make the value; timm starts those that make the gate at almost zero."""
    if form.gate is not None:
        return weight
    first, second = weight.chunk(2)
    return first if getattr(owner, "gate_last", False) else second


@torch.no_grad()
def _fresh(host: nn.Linear, like: Tensor, inputs: int, outputs: int) -> nn.Linear:
    """A new layer in the host's place, normal with the spread of `like`, which may be part of the host's weight."""
    layer = nn.Linear(inputs, outputs, bias=host.bias is not None, device=like.device, dtype=like.dtype)
    if not like.is_meta:  # a meta tensor has no values to measure, and none to fill
        nn.init.normal_(layer.weight, std=like.float().std(correction=0).item())
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer.train(host.training)


@torch.no_grad()
def _rewidened(part: nn.Module, old: int, new: int, where: str) -> nn.Module:
    """A norm over the hidden layer for its new width, as at its start; what has no width is passed on."""
    shape = getattr(part, "normalized_shape", None)
    if shape is None and not part.state_dict():
        return part
    if shape is None or tuple(shape) != (old,):
        raise ConversionError(
            f"cannot drop the gate: {where}, a {short_name(part)}, cannot be rebuilt for another width; pass glu='keep'"
        )
    wider = copy.deepcopy(part)
    object.__setattr__(wider, "normalized_shape", (new,))
    for name, parameter in part.named_parameters(recurse=False):
        fill = parameter.new_ones(new) if name == "weight" else parameter.new_zeros(new)
        setattr(wider, name, nn.Parameter(fill))
    return wider
