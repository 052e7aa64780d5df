"""Small hosts of an activation, and what every converted model must do. Shared by the tests of this folder."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import timm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from zoo import PolyNorm, PolyReLU, convert_activation

DIM, HIDDEN = 16, 64
gelu_tanh = partial(F.gelu, approximate="tanh")


class LlamaMLP(nn.Module):
    """The parts and the forward of the Llama, Mistral and Qwen feed-forward."""

    def __init__(
        self, dim: int = DIM, hidden: int = HIDDEN, act: nn.Module | Callable[[Tensor], Tensor] = F.silu
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GPT2MLP(nn.Module):
    """The parts of the GPT-2 feed-forward, with a function as its activation."""

    def __init__(self, act: nn.Module | Callable[[Tensor], Tensor] = gelu_tanh) -> None:
        super().__init__()
        self.c_fc = nn.Linear(DIM, HIDDEN)
        self.c_proj = nn.Linear(HIDDEN, DIM)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class Scorer(nn.Module):
    """A known activation and one that bounds a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, 4)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(4, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x))))


def stack(make: Callable[[], nn.Module], depth: int = 2) -> nn.Sequential:
    return nn.Sequential(*(make() for _ in range(depth)))


def vit(**changes) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3, **changes
    )


def coefficients(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (PolyNorm, PolyReLU))]


def check_trains(model: nn.Module, *inputs: Tensor, sites: int, pick: Callable = lambda out: out) -> None:
    """Every site has its own instance, and each of its coefficients gets a gradient of its own."""
    found = coefficients(model)
    assert len(found) == len({id(module.weight) for module in found}) == sites
    model.train()
    pick(model(*inputs)).square().sum().backward()
    for module in found:
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.count_nonzero() == parameter.numel()


def check_round_trips(model: nn.Module, make: Callable[[], nn.Module], x: Tensor, **options) -> None:
    """deepcopy, pickle and a state dict loaded into a model converted alike give the same output."""
    model.eval()
    y = model(x)
    assert_close(deepcopy(model)(x), y, rtol=0, atol=0)
    assert_close(pickle.loads(pickle.dumps(model))(x), y, rtol=0, atol=0)
    other = make()
    convert_activation(other, **options)
    other.load_state_dict(model.state_dict())
    assert_close(other.eval()(x), y, rtol=0, atol=0)
