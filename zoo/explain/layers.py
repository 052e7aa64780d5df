"""Which layers: by name or module as the user says, or chosen by looking at the network.

A layer behind which the score is linear has the same gradient for every input: noise changes nothing there, and
smoothing is lost on it. The automatic choice is the deepest block with a map of its own, a gradient on it, and a tail
that is not linear.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from .engine import Taps, partial_gradients
from .errors import CAMError, UnknownLayer
from .reshape import Reshape, resolve_reshape
from .targets import Scorer, Targets

LayerSpec: TypeAlias = "str | nn.Module | Sequence[str | nn.Module] | None"

_AT_A_TIME = 6  # blocks that are looked at in one pass: the deepest ones, nearly always enough
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# of leaves, by their class's name: layers of other libraries share no base class
_PASSIVE = ("pool", "dropout", "droppath", "identity", "flatten")


def named_layers(model: nn.Module, layers: LayerSpec) -> dict[str, nn.Module]:
    """The layers that were named, by name, in that order.

    Raises:
        UnknownLayer: if one is not in the model, or named twice.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for layer in [layers] if isinstance(layers, (str, nn.Module)) else layers or []:
        if isinstance(layer, nn.Module):
            if id(layer) not in names:
                raise UnknownLayer(
                    f"the {type(layer).__name__} given as layer is not inside the model; take it from"
                    " model.named_modules()"
                )
            name = names[id(layer)]
        else:
            name = layer
        if name not in known or not name:
            near = difflib.get_close_matches(name, [n for n in known if n], n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
            raise UnknownLayer(f"the model has no layer {name!r}.{hint}")
        if name in found:
            raise UnknownLayer(f"layer {name!r} is given twice")
        found[name] = known[name]
    if not found:
        raise UnknownLayer("layers: name at least one layer, or give None for an automatic choice")
    return found


def choose_layer(
    model: nn.Module,
    x: Tensor,
    targets: Targets,
    reshape: Literal["auto"] | Reshape,
    output_fn: Callable[[Any], Any],
    arguments: Callable[[Sequence[int]], Mapping[str, Any]],
    last: bool = False,
) -> tuple[str, bool]:
    """Name of the best layer for x [1, ...], and whether the score is linear behind it.

    Args:
        model: in evaluation, its parameters without gradients.
        x: one image.
        targets: of it; of several the first counts.
        reshape: as the explainers take it.
        output_fn: finds the scores.
        arguments: further ones of a pass, for rows of these images.
        last: the deepest layer with a map and a gradient, linear or not.

    Raises:
        UnknownLayer: if no layer has a map with a gradient.
    """
    linear: str | None = None
    for candidates in _candidates(model, x, arguments([0]), reshape):
        deepest = list(candidates)[::-1]
        for first in range(0, len(deepest), _AT_A_TIME):
            at = {name: candidates[name] for name in deepest[first : first + _AT_A_TIME]}
            for name, silent, same in _looked_at(model, at, x, targets, reshape, output_fn, arguments([0, 0])):
                if silent:
                    continue
                if last or not same:
                    return _before_pooling(model, name), same
                linear = linear or name
        if linear is not None:
            return _before_pooling(model, linear), True
    raise UnknownLayer(
        "no layer was found that returns a map the score depends on; name one in layers=, and its layout in reshape="
    )


def _candidates(
    model: nn.Module, x: Tensor, kwargs: Mapping[str, Any], reshape: Literal["auto"] | Reshape
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Blocks, and single layers, whose output is a map of at least 2 x 2; in the order in which they end, one a map."""
    watched = dict(model.named_modules())
    groups: dict[str, int] = {}  # of layers with a map; a block and its last layer return one and the same tensor
    calls = dict.fromkeys(watched, 0)
    latest: list[Any] = [None]

    def note(name: str, output: Any) -> None:
        calls[name] += 1
        output = _first(output)
        if isinstance(output, Tensor) and _has_map(name, output, model, x, reshape):
            groups[name] = max(groups.values(), default=0) + (output is not latest[0])
        latest[0] = output

    handles = []
    try:
        for name, module in watched.items():
            if name:
                handles.append(module.register_forward_hook(lambda _, __, out, name=name: note(name, out)))
        with torch.no_grad():
            model(x, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    names = set(_block_names(model))
    found: tuple[dict[str, nn.Module], dict[str, nn.Module]] = ({}, {})
    taken: tuple[set[int], set[int]] = (set(), set())
    # Of names for one output that with the fewest dots but one at least: blocks.6 rather than blocks or blocks.6.0.
    for name in sorted(groups, key=lambda n: (n.count(".") == 0, n.count("."))):
        module = watched[name]
        if calls[name] > 1:
            continue
        is_leaf = next(module.children(), None) is None
        if is_leaf and any(word in type(module).__name__.lower() for word in _PASSIVE):
            continue
        if (is_leaf or name in names) and groups[name] not in taken[is_leaf]:
            taken[is_leaf].add(groups[name])
            found[is_leaf][name] = module
    blocks, leaves = ({n: of[n] for n in sorted(of, key=groups.__getitem__)} for of in found)
    return blocks, leaves


def _block_names(model: nn.Module) -> Iterator[str]:
    """Top-level children and members of containers; of a model that only wraps another, those of the other."""
    root, prefix = model, ""
    while len(inner := list(root.named_children())) == 1 and next(inner[0][1].children(), None) is not None:
        prefix, root = f"{prefix}{inner[0][0]}.", inner[0][1]
    yield from (prefix + name for name, _ in root.named_children())
    for name, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            yield from (f"{name}.{child}" if name else child for child, _ in module.named_children())


def _looked_at(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    x: Tensor,
    targets: Targets,
    reshape: Literal["auto"] | Reshape,
    output_fn: Callable[[Any], Any],
    kwargs: Mapping[str, Any],
) -> Iterator[tuple[str, bool, bool]]:
    """Of each layer: its name, whether its gradient is 0, and whether it is the same for another input."""
    pair = torch.cat([x, unrelated(x)])
    taps = Taps(candidates, call="last")
    output = taps.run(model, pair, kwargs)
    with torch.enable_grad():
        scores = Scorer(targets, 1)(output_fn(output), [0, 0], [True, False])
    grads = partial_gradients(scores, 0, taps.maps)
    for name in candidates:
        grad = grads[name]
        if grad is None:
            continue
        maps = resolve_reshape(reshape, name, grad, model, x.shape[2:])(grad)
        yield name, not bool(maps[0].any()), torch.equal(maps[0], maps[1])


def unrelated(x: Tensor) -> Tensor:
    """Another input for each of x [B, ...]: the same normal numbers, less ten times x.

    Units of a small network that are on for x, copies and noise alike, are off for the opposite of x.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape[1:], generator=generator).to(x) - 10 * x


def _has_map(name: str, output: Tensor, model: nn.Module, x: Tensor, reshape: Literal["auto"] | Reshape) -> bool:
    if len(output) != len(x):  # windows, or tokens first
        return False
    try:
        maps = resolve_reshape(reshape, name, output, model, x.shape[2:])(output)
    except (CAMError, RuntimeError):  # no map, or a user's function for another layer
        return False
    return maps.is_floating_point() and all(side >= 2 for side in maps.shape[2:])


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _before_pooling(model: nn.Module, name: str) -> str:
    """The layer itself; of a Sequential that ends in pooling the layer before that."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Sequential) or not len(module):
        return name
    children = list(module.named_children())
    if "pool" not in type(children[-1][1]).__name__.lower():
        return name
    for child, layer in reversed(children):
        if not any(word in type(layer).__name__.lower() for word in _PASSIVE):
            return f"{name}.{child}"
    return name
