"""Swap the normalisations of a timm, torchvision or plain model, with the activations after them, for EvoNorm."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from ..spec import NormSpec
from .flow import Act, Flow, Place, Use, flow_of
from .known import squeezes
from .norm_hosts import Target, held_activation, norm_kind, of_timm, rank_of, start_affine, unfit
from .report import ConversionError, ConversionReport, Kept, Replacement, short_name
from .rewrite import without
from .traverse import Site, check_convertible, count_parameters, find_sites, follow, outermost, places_of

PostAct = Literal["raise", "affine"]


def convert_norm_act(
    model: nn.Module,
    target: NormSpec = "evonorm_s0",
    *,
    skip: str | Iterable[str] = (),
    fold_act: bool = True,
    keep_affine_init: bool = True,
    post_act: PostAct = "raise",
) -> ConversionReport:
    """Replace the normalisations of a model, and the activations after them, by EvoNorm, in place.

    A BatchNorm, SyncBatchNorm, GroupNorm, InstanceNorm or relative of them in timm becomes, with the activation that is
    its only user, one layer; without one, after a layer (the projections of MobileNetV2 and EfficientNet, shortcuts), a
    scale and a shift, as the authors have it. Norms that belong to neither, of attention or behind an activation, stay.
    What follows a norm is read off the classes of timm and a `torch.fx` trace of the model; where that fails, of the
    parts that can be traced, each taken to be called as a whole.

    The activation becomes an `nn.Identity`. If its block calls it elsewhere, too (the one `relu` of torchvision's
    ResNet blocks), or calls a function (`F.relu`), the block gets a forward without those calls, from its trace: it
    stays the same object with the same state-dict names, of a class derived from its own, and copies and pickles like
    before. A forward that a trace would change (a with statement, arguments that may be left out) is refused.

    Conversion is for training from scratch or fine-tuning; a trained network does not compute what it did. An EvoNorm
    of timm becomes ours with its weights, whatever the target, and computes the same. The new layers take device, dtype
    and mode of the old ones, those for GroupNorm the number of groups, those for SyncBatchNorm (B layers) its process
    group; eps and momentum are the target's. Convert before making optimizers. To load a checkpoint of a converted
    model, build, convert, then `load_state_dict`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        >>> convert_norm_act(model).replaced[0].old
        'BatchNorm2d + ReLU'

    Args:
        model: changed in place. It must not be compiled, scripted or wrapped for distributed training yet.
        target: name, mapping, class or callable that makes the new layer from the channels and `apply_act`. Layers for
            feature maps become those for sequences and volumes where the norm is for them.
        skip: shell-style patterns of paths to leave alone, `"stem.*"`; a pattern that fits a module fits what is in it.
        fold_act: False leaves every activation where it is, and makes every norm an S layer that divides by the
            deviation, without an activation (timm's S0a with apply_act=False).
        keep_affine_init: scale and shift start at 1 and 0, since those of a trained norm mean little here; a scale that
            is zero in the host (zero_init_residual) stays so. False copies both from the host.
        post_act: what to do where an activation follows the addition after a norm, as in ResNet v1. "raise": refuse.
            "affine": the norm becomes a scale, zero at the start where it ends the longer branch, and a shift; the
            activation stays.

    Returns:
        What was replaced and what was kept; prints as a table.

    Raises:
        ConversionError: if nothing matched, or what matched cannot be converted; the model is unchanged.
        UnknownComponentError: if there is no such target.
        ComponentArgumentError: if the target does not take an argument.

    Source:
        Liu et al., "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv:2004.02967; the authors' code for
        norms without activation and its demand for the pre-activation form of residual networks.
    """
    if post_act not in ("raise", "affine"):
        raise ConversionError(f"post_act must be 'raise' or 'affine', got {post_act!r}")
    check_convertible(model)
    maker = Target(target)
    hosts = _hosts(model)
    skipped = _skipped(hosts, (skip,) if isinstance(skip, str) else tuple(skip))
    flow = flow_of(model)
    plans, kept = [], []
    for host in hosts:
        reason = "is skipped" if host in skipped else _unfit(host, flow, fold_act)
        if reason:
            kept.append(Kept(host.path, host.label, reason))
        else:
            plans.append(_plan(host, flow, fold_act))
    _check_chosen(model, hosts, plans, kept, post_act)
    # everything that can fail happens before the first change
    removal = _removal(model, plans, flow)
    edits = [_edit(model, plan, maker, removal, keep_affine_init) for plan in plans]
    before = count_parameters(model)
    for plan, (new, _) in zip(plans, edits, strict=True):
        for site in plan.host.sites:
            setattr(site.owner, site.name, new)
    removal.apply()
    rows = tuple(row for _, row in edits)
    return ConversionReport(type(model).__name__, rows, tuple(kept), before, count_parameters(model))


@dataclass(frozen=True, eq=False)
class _Host:
    """A normalisation and everywhere it is registered."""

    norm: nn.Module
    sites: list[Site]

    @property
    def paths(self) -> list[str]:
        return [path for site in self.sites for path in site.paths]

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def label(self) -> str:
        return short_name(self.norm)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a normalisation becomes: with its activation, without one, or what it was in timm."""

    host: _Host
    form: Literal["act", "affine", "residual", "timm", "linear"]
    layers: tuple[nn.Module | None, ...]
    acts: tuple[Act, ...] = ()
    zero: bool = False


@dataclass(frozen=True, eq=False)
class _Removal:
    """How the activations go: modules from their places, calls from the forward of a class."""

    places: dict[Place, nn.Module] = field(default_factory=dict)
    classes: dict[nn.Module, type[nn.Module]] = field(default_factory=dict)
    paths: dict[nn.Module, str] = field(default_factory=dict)
    parameters: Counter[_Plan] = field(default_factory=Counter)

    def apply(self) -> None:
        for (owner, name), old in self.places.items():
            setattr(owner, name, nn.Identity().train(old.training))
        for module, cls in self.classes.items():
            module.__class__ = cls


def _hosts(model: nn.Module) -> list[_Host]:
    hosts: dict[int, _Host] = {}
    for site in outermost([site for site in find_sites(model) if norm_kind(site.value)]):
        assert isinstance(site.value, nn.Module)
        hosts.setdefault(id(site.value), _Host(site.value, [])).sites.append(site)
    return list(hosts.values())


def _skipped(hosts: list[_Host], patterns: tuple[str, ...]) -> set[_Host]:
    found = set()
    for pattern in patterns:
        fits = {host for host in hosts if any(fnmatchcase(part, pattern) for path in host.paths for part in _up(path))}
        if not fits:
            some = f", for example {hosts[0].path}" if hosts else ""
            raise ConversionError(
                f"skip must fit paths of norms{some}; {pattern!r} fits none, nor a module with one inside"
            )
        found |= fits
    return found


def _up(path: str) -> list[str]:
    """A path and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _unfit(host: _Host, flow: Flow, fold_act: bool) -> str:
    """Why a normalisation stays, empty if it does not."""
    if reason := unfit(host.norm):
        return reason
    if norm_kind(host.norm) == "timm":
        return ""
    held = held_activation(host.norm)
    if held and not fold_act and "act" not in host.norm._modules:
        return f"holds a {held} that cannot be kept without it"
    if any(squeezes(site.owner) for site in host.sites):
        return "is part of squeeze-and-excitation"
    uses = _uses(host, flow)
    if not uses:
        return "" if held else "is called by no forward that can be traced"
    if rank_of(host.norm) in (3, None) and all(isinstance(use.before, nn.Linear) for use in uses):
        return "normalises vectors, which are no map to take statistics of"
    if held:
        return ""
    match uses[0].following:
        case "condition":
            return "is scaled or shifted by a condition"
        case "zoo" if fold_act:
            return "is followed by an activation of the zoo, which EvoNorm does not replace"
        case "unknown" if fold_act:
            return "is followed by what cannot be traced"
        case "plain" if fold_act and all(use.on_input for use in uses):
            return "normalises the input of the model"
        case "plain" if fold_act and not any(use.on_layer for use in uses):
            return "comes after no layer and before no activation"
    return ""


def _uses(host: _Host, flow: Flow) -> list[Use]:
    """Calls of a normalisation; those of which it is not known what follows only if there are no others."""
    uses = flow.uses.get(id(host.norm), [])
    return [use for use in uses if use.following != "unknown"] or uses


def _plan(host: _Host, flow: Flow, fold_act: bool) -> _Plan:
    uses = _uses(host, flow)
    layers = (uses[0].before, uses[0].after) if uses else ()
    if norm_kind(host.norm) == "timm":
        return _Plan(host, "timm", layers)
    if not fold_act:
        return _Plan(host, "linear", layers)
    if held_activation(host.norm):
        return _Plan(host, "act", layers)
    following = dict.fromkeys(use.following for use in uses)
    if len(following) > 1:
        words = {
            "act": "an activation",
            "residual": "an addition",
            "plain": "no activation",
            "condition": "a condition",
        }
        calls = " and before ".join(words.get(kind, kind) for kind in following)
        raise ConversionError(
            f"{host.path} is called in several places, before {calls}, so that no one layer can take its place; give "
            "each place a norm of its own, or leave it out with skip"
        )
    match uses[0].following:
        case "act":
            return _Plan(host, "act", layers, tuple(act for use in uses for act in use.acts))
        case "residual":
            return _Plan(host, "residual", layers, zero=all(use.ends_residual for use in uses))
    return _Plan(host, "affine", layers)


def _check_chosen(
    model: nn.Module, hosts: list[_Host], plans: list[_Plan], kept: list[Kept], post_act: PostAct
) -> None:
    if not plans:
        has = ", ".join(f"{count} {name}" for name, count in Counter(host.label for host in hosts).items())
        hint = f". {kept[0].path} {kept[0].reason}" if kept else ""
        raise ConversionError(
            f"no BatchNorm, GroupNorm, InstanceNorm or relative of them to convert in this {short_name(model)}; of "
            f"normalisations it contains: {has or 'none'}{hint}"
        )
    after_add = [plan.host.path for plan in plans if plan.form == "residual"]
    if after_add and post_act == "raise":
        raise ConversionError(
            f"{after_add[0]} and {len(after_add) - 1} more norms come before an addition with an activation behind it; "
            "EvoNorm holds its activation, so that the authors' code demands the pre-activation form of a residual "
            "network (timm's resnetv2_50) here: use one, pass post_act='affine' to make them a scale, zero at the end "
            "of each branch, and a shift, and to keep the activation, or leave them out with skip"
        )


def _removal(model: nn.Module, plans: list[_Plan], flow: Flow) -> _Removal:
    """Take an activation out of its place where nothing else calls it there, and out of the forward otherwise."""
    gone = {act for plan in plans for act in plan.acts}
    at_place: dict[Place, list[Act]] = {}
    for act in flow.acts:
        if act.place is not None:
            at_place.setdefault(act.place, []).append(act)
    free = {place: acts for place, acts in at_place.items() if gone.issuperset(acts)}
    removal = _Removal({(owner, name): owner.get_submodule(name) for owner, name in free})
    for old in dict.fromkeys(removal.places.values()):
        if set(places_of(model, old)) <= free.keys():  # lost for good, with the first norm before it
            plan = next(plan for plan in plans if any(act.value is old for act in plan.acts))
            removal.parameters[plan] += count_parameters(old)
    calls = {act for act in gone if act.place not in free}
    for module in dict.fromkeys(act.call.module for act in flow.acts if act in calls):
        own = [act for act in flow.acts if act.call.module is module]
        indices = {act.index for act in own if act in calls}
        path = next(path for path, part in model.named_modules() if part is module)
        stays = next((act for act in own if act.index in indices and act not in calls), None)
        if stays is not None:
            raise ConversionError(
                f"{path or 'the model'} is called in several places, in some of which its {short_name(stays.value)} "
                "follows no norm to convert; give each place a module of its own, or leave its norms out with skip"
            )
        removal.classes[module] = without(module, path, {act.call for act in own}, indices)
        removal.paths[module] = path
    return removal


def _edit(
    model: nn.Module, plan: _Plan, maker: Target, removal: _Removal, keep_affine_init: bool
) -> tuple[nn.Module, Replacement]:
    """The new layer, and its row in the report."""
    host, norm = plan.host, plan.host.norm
    old, act, notes = host.label, norm._modules.get("act"), []
    if plan.form == "timm":
        layer = new = follow(of_timm(norm), norm, training=norm.training)
        layer.load_state_dict(norm.state_dict())
        for name, parameter in norm.named_parameters():
            layer.get_parameter(name).requires_grad_(parameter.requires_grad)
        notes.append("weights kept")
    else:
        rank, folds = rank_of(norm, *plan.layers), plan.form == "act"
        layer = new = maker.build(norm, rank, apply_act=folds, normalize=plan.form == "linear", path=host.path)
        follow(layer, norm, host.sites[0].owner, model, training=norm.training)
        zero = start_affine(layer, norm, copy=not keep_affine_init, zero=plan.zero)
        if folds:
            names = [held_activation(norm)] if not plan.acts else [short_name(act.value) for act in plan.acts]
            old = " + ".join([old, *dict.fromkeys(names)])
        else:
            notes.append("deviation only" if plan.form == "linear" else "affine only")
        if plan.form == "linear" and isinstance(act, nn.Module) and held_activation(norm):
            new = nn.Sequential(OrderedDict(norm=layer, act=act)).train(norm.training)
            notes.append(f"with its {short_name(act)} in a Sequential")
        notes += ["scale starts at 0"] if zero else []
    blocks = dict.fromkeys(act.call.module for act in plan.acts)
    notes += [
        f"forward of {removal.paths[block] or 'the model'} rewritten" for block in blocks if block in removal.paths
    ]
    notes += [f"also {path}" for path in host.paths[1:]]
    gained = count_parameters(new) - count_parameters(norm) - removal.parameters[plan]
    return new, Replacement(host.path, old, short_name(layer), gained, ", ".join(notes))
