"""Passes through the network: hooks that live as long as one pass, gradients at chosen layers, the state around.

Nothing before the first layer is recorded. Its hook turns gradients on and hands a copy of its output on; what follows
is recorded, and one call of autograd gives the gradients at all layers. The copy keeps the activation from layers that
work in place.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attacks.modes import attack_mode, frozen
from .errors import (
    CAMError,
    DisconnectedTarget,
    InferenceParameters,
    LayerCalledTwice,
    LayerNotReached,
    NotSpatial,
    ShardedModel,
)

LayerCall = Literal["only", "first", "last"]


class Taps:
    """Hooks on layers, for one pass.

    Args:
        layers: by name.
        call: which call counts of a layer that runs more than once; "only" refuses that.
    """

    def __init__(self, layers: Mapping[str, nn.Module], call: LayerCall = "only") -> None:
        self.layers, self.call = layers, call
        self.maps: dict[str, Tensor] = {}

    def run(self, model: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """The model's output, with a graph from the first of the layers on; their outputs are in `maps` then.

        Raises:
            LayerNotReached: if one did not run.
            LayerCalledTwice: if one ran twice and "only" was asked for.
            NotSpatial: if one returns no tensor.
        """
        self.maps = {}
        self._calls = dict.fromkeys(self.layers, 0)
        handles = []
        try:
            for name, layer in self.layers.items():
                # before hooks of the user's: what a model keeps by a hook must be what is differentiated
                handles.append(layer.register_forward_hook(partial(self._tapped, name), prepend=True))
            with torch.no_grad():  # until a hook turns gradients on
                output = model(x, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name, calls in self._calls.items():
            if not calls:
                raise LayerNotReached(
                    f"the forward pass does not run layer {name!r} (or a compiled graph does without it); name another"
                )
            if calls > 1 and self.call == "only":
                raise LayerCalledTwice(
                    f"the forward pass runs layer {name!r} {calls} times; say layer_call='first' or 'last', or name"
                    " another"
                )
            if len(self.maps[name]) != len(x):
                raise NotSpatial(
                    f"layer {name!r} returns {len(self.maps[name])} rows for {len(x)} images: windows, or tokens"
                    " before the batch; name the block around it"
                )
        return output

    def _tapped(self, name: str, _: nn.Module, __: Any, output: Any) -> Any:
        self._calls[name] += 1
        if self._calls[name] > 1 and self.call != "last":
            return None
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise NotSpatial(f"layer {name!r} returns {type(first).__name__}, which holds no map; name another")
        torch.set_grad_enabled(True)
        if not first.requires_grad:
            first = first.detach().requires_grad_()
        self.maps[name] = first
        if hasattr(output, "_replace"):  # a namedtuple
            return output._replace(**{output._fields[0]: first.clone()})
        if isinstance(output, (tuple, list)):
            rest = [first.clone(), *output[1:]]
            return rest if isinstance(output, list) else tuple(rest)
        return first.clone()


def gradients(scores: Tensor, maps: Mapping[str, Tensor], *, graph: bool = False) -> dict[str, list[Tensor]]:
    """At every layer the gradient of each column of scores, row by row: rows do not hang on one another.

    Args:
        scores: [rows, T], with their graph.
        maps: of :class:`Taps`.
        graph: let the gradients be differentiated again.

    Raises:
        DisconnectedTarget: if the scores do not depend on a layer.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in maps}
    for i in range(scores.shape[1]):
        keep = graph or i + 1 < scores.shape[1]
        for name, grad in partial_gradients(scores, i, maps, keep=keep, graph=graph).items():
            if grad is None:
                raise DisconnectedTarget(
                    f"the score does not depend on layer {name!r}, or a part of the model behind it runs without"
                    " gradients (torch.no_grad); name another layer"
                )
            found[name].append(grad)
    return found


def partial_gradients(
    scores: Tensor, column: int, maps: Mapping[str, Tensor], *, keep: bool = False, graph: bool = False
) -> dict[str, Tensor | None]:
    """The gradient of one column of scores at every layer; None at those it does not depend on."""
    if not scores.requires_grad:
        return dict.fromkeys(maps)
    layers = list(maps.values())
    with torch.enable_grad():
        total = scores[:, column].sum()
    grads = torch.autograd.grad(total, layers, retain_graph=keep, create_graph=graph, allow_unused=True)
    return dict(zip(maps, grads, strict=True))


def diagonal(map: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Second and third derivative of a score for each neuron alone, shaped like the map [rows, ...].

    One pass through the tail a neuron and order: for small tails.

    Args:
        map: of :class:`Taps`, what it is differentiated for.
        grad: the score's gradient, differentiable.
    """
    second, third = torch.zeros(2, len(map), map[0].numel(), dtype=map.dtype, device=map.device)
    for i in range(map[0].numel()):
        slope = _again(grad, map, i)
        if slope is None:
            continue
        second[:, i] = slope.flatten(1)[:, i].detach()
        bend = _again(slope, map, i)
        if bend is not None:
            third[:, i] = bend.flatten(1)[:, i].detach()
    return second.view(map.shape), third.view(map.shape)


def _again(grad: Tensor, map: Tensor, i: int) -> Tensor | None:
    if not grad.requires_grad:
        return None
    return torch.autograd.grad(grad.flatten(1)[:, i].sum(), map, create_graph=True, allow_unused=True)[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel or torch.compile's wrapper.

    Raises:
        TypeError: if it is no module.
        ShardedModel: if its parameters are spread over processes.
        InferenceParameters: if it was made in inference mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    for parameter in model.parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CAMError("the model has lazy layers that have not run; call it once before it is explained")
        if parameter.is_inference():
            raise InferenceParameters(
                "gradients cannot pass parameters made in inference mode; build or load the model outside"
                " torch.inference_mode()"
            )
        if type(parameter).__name__ in ("DTensor", "FlatParameter") or hasattr(parameter, "device_mesh"):
            raise ShardedModel("the parameters are spread over processes; gather the model into one, then explain it")
    return model


@contextlib.contextmanager
def explaining(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """Evaluation, without gradients for parameters, in eager mode, under the asked autocast alone; then all as it was.

    Args:
        model: of :func:`unwrapped`.
        device: of the inputs.
        autocast: dtype, or None for none, whatever surrounds the call.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # hooks turn gradients on where they are wanted
        if autocast is not None or torch.is_autocast_enabled(device.type):
            enabled = autocast is not None
            stack.enter_context(torch.autocast(device.type, dtype=autocast, enabled=enabled, cache_enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the question would cost a second
            # hooks that come after the compilation are passed over
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(attack_mode(model, "eval"))
        stack.enter_context(frozen(model))
        yield


def rows_of(kwargs: Mapping[str, Any], images: int, image_of: Sequence[int]) -> dict[str, Any]:
    """Arguments of a pass: tensors that hold something for each image follow the rows."""
    index = torch.tensor(image_of)
    return {
        key: value[index.to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == images
        else value
        for key, value in kwargs.items()
    }


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a pass failed because there were too many images in it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
