"""Swap the activations of a timm, torchvision, transformers or plain model for another one, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from torch import nn

from ..errors import ComponentArgumentError
from ..registry import factory
from ..spec import ActivationSpec
from .glu import Resize, has_experts, is_gated, without_gate
from .known import activation_kind, squeezes
from .report import ConversionError, ConversionReport, Kept, Replacement, short_name
from .traverse import (
    Site,
    check_convertible,
    count_parameters,
    find_sites,
    follow,
    has_matrices,
    neighbour,
    outermost,
    places_of,
)

Glu = Literal["keep", "drop"]
Match = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, Any], bool] | None


def convert_activation(
    model: nn.Module,
    target: ActivationSpec = "polynorm",
    *,
    match: Match = None,
    glu: Glu = "keep",
    resize: Resize = "params",
) -> ConversionReport:
    """Replace the activations of a model in place, each by an instance of its own.

    Finds child modules and functions kept as attributes (`self.act = F.gelu`), by their names, so no library is
    imported. A function called in `forward` by its own name (`F.relu(x)`) cannot be found. An activation that a block
    calls in several places, like the one `relu` of torchvision's ResNet blocks, is one site and gets one instance.

    The new modules take the device, dtype and mode of what surrounds them. Optimizers made before do not know their
    parameters: convert first. To load a checkpoint of a converted model, build, convert, then `load_state_dict`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> convert_activation(model, "polyrelu").parameters
        4

    Args:
        model: changed in place. It must not be compiled, scripted or wrapped for distributed training yet.
        target: name, mapping, class or callable that makes the new activation.
        match: which sites. None: every ReLU, GELU, SiLU or relative of them that comes after a layer, except in
            squeeze-and-excitation and where the target would normalise over the wrong dimension (PolyNorm with
            `dim=-1` after a convolution, with `dim=1` after a linear layer); the report lists those as kept. A string:
            known activations, sigmoid and tanh too, whose path fits the shell-style pattern, `"blocks.*.mlp.act"`.
            A type or tuple of types: modules of these types. A callable `(path, module_or_function) -> bool`: whatever
            it accepts. Sites that hold the target's type already are left alone unless chosen by type.
        glu: what to do where the activation acts on the gate of a gated block (Llama, Mistral, Qwen, Phi-3, T5 1.1,
            ModernBERT, timm's SwiGLU and GluMlp). "keep": `target(gate) * up`. "drop": replace the block by
            `down(target(up(x)))`, as in the paper: an `nn.Sequential` whose parts keep the host's names. Its two
            projections are new, normal with the standard deviation of those they replace, since their shapes differ.
            Experts kept in one tensor (the mixtures of transformers 5) cannot lose their gate; they share one
            activation a layer, without coefficients for each expert.
        resize: with `glu="drop"`, "params" widens the hidden layer to keep the number of parameters, 3/2 of the old
            width in a multiple of 64 (5504 -> 8256); None keeps the width.

    Returns:
        What was replaced and what was kept; prints as a table.

    Raises:
        ConversionError: if nothing matched, or what matched cannot be converted; the model is unchanged.
        UnknownComponentError: if there is no such target.
        ComponentArgumentError: if the target does not take an argument.

    Source:
        Zhuo et al., "Polynomial Composition Activations", 2025, arXiv:2411.03884: one PolyNorm a layer in place of the
        activation of a plain feed-forward block, 3/2 as wide as the gated one. PolyNorm on the gate follows Motif; for
        convolutional networks the paper has no experiment.
    """
    if glu not in ("keep", "drop"):
        raise ConversionError(f"glu must be 'keep' or 'drop', got {glu!r}")
    if resize not in ("params", None):
        raise ConversionError(f"resize must be 'params' or None, got {resize!r}")
    check_convertible(model)
    build = _builder(target)
    choice = _choose(model, match, build(), glu, dim_is_given=_gives_dim(target))
    # everything that can fail happens before the first change
    edits = [_edit(model, site, build(), glu, resize) for site in choice.chosen]
    before = count_parameters(model)
    for edit in edits:
        edit.apply()
    _leave_fused_paths(model, edits)
    rows = tuple(edit.row for edit in edits)
    return ConversionReport(type(model).__name__, rows, tuple(choice.kept), before, count_parameters(model))


# Reasons to keep an activation that its place in the list of what the model contains explains already.
_PLAIN_REASONS = ("is the target", "not matched", "bounds a value", "is of the zoo already")


@dataclass(frozen=True, slots=True)
class _Choice:
    chosen: list[Site]
    kept: list[Kept]


@dataclass(frozen=True, slots=True)
class _Edit:
    places: list[tuple[nn.Module, str]]
    new: nn.Module
    row: Replacement

    def apply(self) -> None:
        for owner, name in self.places:
            setattr(owner, name, self.new)  # registers it, and takes a function of that name out of the way


def _builder(target: ActivationSpec) -> Callable[[], nn.Module]:
    """The target's constructor, checked at each call, since every site needs a module of its own."""
    if isinstance(target, nn.Module):
        raise ComponentArgumentError(
            f"target must build a new module for every site, got the module {short_name(target)}; pass its class, or a "
            "mapping with its arguments"
        )
    make = factory("activation", target)
    built: set[nn.Module] = set()

    def build() -> nn.Module:
        try:
            new = make()
        except TypeError as error:
            if built:
                raise
            raise ComponentArgumentError(
                f"target {short_name(make)} cannot be built without arguments: {error}"
            ) from error
        if not isinstance(new, nn.Module) or new in built:
            again = "the same one again" if isinstance(new, nn.Module) else repr(new)
            raise ComponentArgumentError(
                f"target must build a new module at each call, {short_name(make)} gave {again}"
            )
        built.add(new)
        return new

    return build


def _gives_dim(target: ActivationSpec) -> bool:
    """Whether the user named the dimension, and so means it."""
    if isinstance(target, Mapping):
        return "dim" in target or "dim" in (target.get("init_args") or {})
    return isinstance(target, partial) and "dim" in target.keywords


def _choose(model: nn.Module, match: Match, sample: nn.Module, glu: Glu, *, dim_is_given: bool) -> _Choice:
    """Which sites become modules like `sample`, and why the other activations do not."""
    accepts, wanted = _matcher(match)
    found = find_sites(model)
    accepted = [site for site in found if accepts is not None and accepts(site)]
    sites = outermost([site for site in found if activation_kind(site.value) or site in accepted])
    choice = _Choice([], [])
    for site in sites:
        if type(site.value) is type(sample) and not _types(match):
            reason = "is the target"
        elif accepts is None:
            reason = _unfit(site, sample)
        else:
            reason = "" if site in accepted else "not matched"
        if reason:
            choice.kept.append(Kept(site.path, short_name(site.value), reason))
        else:
            if accepts is not None:
                _check_accepted(site, sample, dim_is_given)
            choice.chosen.append(site)
    has = ", ".join(f"{count} {name}" for name, count in Counter(short_name(site.value) for site in sites).items())
    place = f"to convert in this {short_name(model)}; as modules and attributes it contains: {has or 'none'}"
    if not choice.chosen:
        hints = [f". {kept.path} {kept.reason}" for kept in choice.kept if kept.reason not in _PLAIN_REASONS]
        raise ConversionError(f"no {wanted} {place}{''.join(hints[:1])}")
    if glu == "drop" and not any(is_gated(site.owner) for site in choice.chosen):
        raise ConversionError(f"no gated feed-forward {place}")
    return choice


def _types(match: Match) -> tuple[type[nn.Module], ...]:
    """The types of a match by type, empty for any other match."""
    types = match if isinstance(match, tuple) else (match,)
    return tuple(cls for cls in types if isinstance(cls, type))


def _matcher(match: Match) -> tuple[Callable[[Site], bool] | None, str]:
    """What decides on a site, None for the default, and what it looks for, in words."""
    types = _types(match)
    if match is None:
        return None, "GELU, ReLU, SiLU or relative of them"
    if isinstance(match, str):
        return partial(_fits, match), f"activation at {match!r}"
    if types and match in (types, types[0]):
        return lambda site: isinstance(site.value, types), " or ".join(cls.__name__ for cls in types)
    if isinstance(match, tuple) or not callable(match):
        raise ConversionError(f"match must be a glob, a type, a tuple of types or a callable, got {match!r}")
    predicate = match
    return (
        lambda site: any(predicate(path, site.value) for path in site.paths),
        f"activation accepted by {short_name(predicate)!r}",
    )


def _fits(pattern: str, site: Site) -> bool:
    return activation_kind(site.value) is not None and any(fnmatchcase(path, pattern) for path in site.paths)


def _unfit(site: Site, sample: nn.Module) -> str:
    """Why the default leaves an activation alone, empty if it does not."""
    kind = activation_kind(site.value)
    if kind == "bounded" and not is_gated(site.owner):  # timm's GluMlp gates by a sigmoid, as GLU does
        return "bounds a value"
    if kind == "zoo":
        return "is of the zoo already"
    layer, layout = neighbour(site)
    if layer is None:
        return "has no layer before it in its block"
    if squeezes(site.owner):
        return "is part of squeeze-and-excitation"
    if layout == "mixed" and getattr(sample, "dim", None) is not None:
        return "may follow convolutions and linear layers alike, so that the dim is unclear; choose it with match"
    return _wrong_dim(site, sample)


def _check_accepted(site: Site, sample: nn.Module, dim_is_given: bool) -> None:
    """Refuse what the user chose if it cannot be meant."""
    if isinstance(site.value, nn.Module) and has_matrices(site.value) and activation_kind(site.value) is None:
        raise ConversionError(f"match selected {site.path}, a {short_name(site.value)} with weights of its own; "
                              "it must select activations only")  # fmt: skip
    wrong = "" if dim_is_given else _wrong_dim(site, sample)
    if wrong:
        raise ConversionError(f"{site.path} {wrong}")


def _wrong_dim(site: Site, sample: nn.Module) -> str:
    """How the target would normalise over something else than the features, empty if it would not."""
    layer, layout = neighbour(site)
    has, wants = {"first": 1, "last": -1}.get(layout or "mixed"), getattr(sample, "dim", None)
    if layer is None or has is None or wants != -has:
        return ""
    other = ' or an elementwise one like "polyrelu"' if has == 1 else ""
    return (
        f"follows a {short_name(layer)}, whose features lie on dim {has}, where {short_name(sample)} would work on dim "
        f'{wants}: pass a target with "dim": {has}{other}'
    )


def _edit(model: nn.Module, site: Site, new: nn.Module, glu: Glu, resize: Resize) -> _Edit:
    """One change, prepared."""
    layer, _ = neighbour(site)
    act = follow(new, layer, site.owner, model, training=site.training)
    if glu == "drop" and is_gated(site.owner):
        return _drop_gate(model, site, act, resize)
    notes = ["one for all experts" if has_experts(site.owner) else "on the gate"] if is_gated(site.owner) else []
    notes += [f"also {path}" for path in site.paths[1:]]
    gained = count_parameters(act) - count_parameters(site.value)
    row = Replacement(site.path, short_name(site.value), short_name(act), gained, ", ".join(notes))
    return _Edit([(site.owner, site.name)], act, row)


def _drop_gate(model: nn.Module, site: Site, act: nn.Module, resize: Resize) -> _Edit:
    places = places_of(model, site.owner)
    if not places:
        raise ConversionError(
            f"the model itself is the gated {short_name(site.owner)} that glu='drop' would replace; pass a module that "
            "contains it"
        )
    block = without_gate(site, act, resize)
    path, *others = (path.rpartition(".")[0] for path in site.paths)
    gained = count_parameters(block) - count_parameters(site.owner)
    notes = ["fresh weights", *(f"also {other}" for other in others)]
    old, new = f"{short_name(site.owner)} of {short_name(site.value)}", f"plain block of {short_name(act)}"
    return _Edit(places, block, Replacement(path, old, new, gained, ", ".join(notes)))


def _leave_fused_paths(model: nn.Module, edits: list[_Edit]) -> None:
    """Switch off the fused inference of `nn.TransformerEncoder`, which computes relu or gelu by flag, not by module."""
    changed = {owner for edit in edits for owner, name in edit.places if name == "activation"}
    for layer in changed:
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not changed.isdisjoint(module.layers):
            module.use_nested_tensor = False  # only fused layers take nested tensors
