"""What every model with EvoNorm put in must do. Shared by the tests of the conversion."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from zoo.convert import ConversionError, convert_norm_act
from zoo.convert.norm_hosts import norm_kind
from zoo.norms import EvoNorm

ACTIVATIONS = {"relu", "relu_", "relu6", "silu", "hardswish", "leaky_relu", "gelu"}


class _Watch(TorchFunctionMode):
    """Names of the activations applied to one of the outputs it was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Tensor, int]] = []
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        # an addition in place makes another value of it
        if name in ACTIVATIONS and any(args[0] is y and y._version == version for y, version in self.outputs):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def activations_after(model: nn.Module, x: Tensor) -> list[str]:
    """Activations that the forward of a model applies to outputs of its EvoNorm layers."""
    watch, layers = _Watch(), evonorms(model)
    handles = [layer.register_forward_hook(lambda _, __, y: watch.outputs.append((y, y._version))) for layer in layers]
    with watch, torch.no_grad():
        model(x)
    assert len(watch.outputs) >= len(layers)
    for handle in handles:
        handle.remove()
    return watch.seen


def evonorms(model: nn.Module) -> list[EvoNorm]:
    return [module for module in model.modules() if isinstance(module, EvoNorm)]


def check(model: nn.Module, x: Tensor, *, acts: int, affine: int, left: int = 0) -> None:
    """So many layers with and without activation, no activation after any, no other norm; a gradient for each."""
    layers = evonorms(model)
    assert (sum(layer.apply_act for layer in layers), sum(not layer.apply_act for layer in layers)) == (acts, affine)
    assert sum(norm_kind(module) == "channels" for module in model.modules()) == left
    assert activations_after(model, x) == []
    model.train()
    model(x).square().sum().backward()
    for layer in layers:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def check_round_trips(model: nn.Module, x: Tensor, fresh: nn.Module, **options) -> None:
    """deepcopy, pickle and a state dict loaded into a model converted alike give the same output."""
    model.eval()
    y = model(x)
    assert_close(deepcopy(model)(x), y, rtol=0, atol=0)
    assert_close(pickle.loads(pickle.dumps(model))(x), y, rtol=0, atol=0)
    convert_norm_act(fresh, **options)
    assert list(fresh.state_dict()) == list(model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert_close(fresh.eval()(x), y, rtol=0, atol=0)


@contextmanager
def refused(model: nn.Module, message: str) -> Iterator[None]:
    """The conversion raises, and leaves the model as it was."""

    def state() -> list[tuple[object, ...]]:
        parts = model.named_modules()
        return [(name, id(part), type(part), part.training, sorted(vars(part))) for name, part in parts]

    before = state()
    with pytest.raises(ConversionError, match=message):
        yield
    assert state() == before


def randomise(model: nn.Module) -> nn.Module:
    """Scales, shifts and statistics that are not what layers start with."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + (0.5 if name.endswith("running_var") else 0.0))
    return model
