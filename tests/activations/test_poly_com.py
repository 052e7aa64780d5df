"""The general form of eq. 1 against its definition, and against the members of the family with names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close, max_ratio
from tests.activations.polycom_baselines import oracle_poly_norm
from zoo.activations.polycom import PolyCom, PolyNorm, PolyPReLU, PolyReLU, PolyReLUNorm
from zoo.functional import poly_com

F64 = torch.float64


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rho", ["relu", "prelu", "sigmoid", "silu", "norm", "relu_norm", torch.tanh])
@pytest.mark.parametrize("kind", [1, 2])
def test_poly_com_derivatives(order: int, rho, kind: int) -> None:
    x, weight = torch.randn(2, 4, dtype=F64, requires_grad=True), torch.randn(order, dtype=F64, requires_grad=True)
    bias, slope = torch.randn(1, dtype=F64, requires_grad=True), torch.rand(1, dtype=F64, requires_grad=True)
    used = (slope,) if rho == "prelu" else ()

    def function(x: Tensor, weight: Tensor, bias: Tensor, *slope: Tensor) -> Tensor:
        return poly_com(x, weight, bias, rho=rho, kind=kind, slope=slope[0] if slope else None)

    assert torch.autograd.gradcheck(function, (x, weight, bias, *used))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, *used), fast_mode=True)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (PolyCom("relu", 1, dtype=F64), PolyReLU(dtype=F64)),
        (PolyCom("norm", 2, dtype=F64), PolyNorm(dtype=F64)),
        (PolyCom("prelu", 1, dtype=F64), PolyPReLU(dtype=F64)),
        (PolyCom("relu_norm", 2, dtype=F64), PolyReLUNorm(dtype=F64)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_general_form_holds_the_named_ones(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    expected.load_state_dict(module.state_dict())
    x = torch.randn(4, 9, dtype=F64)
    assert torch.equal(module(x), expected(x))


@pytest.mark.parametrize("kind", [1, 2])
def test_poly_com_is_the_sum_of_its_definition(kind: int) -> None:
    x, weight, bias = torch.randn(4, 9, dtype=F64), torch.randn(3, dtype=F64), torch.randn(1, dtype=F64)
    slope = torch.tensor([0.25], dtype=F64)
    rules = {
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "silu": lambda u: u * torch.sigmoid(u),
        "prelu": lambda u: torch.where(u > 0, u, 0.25 * u),
        "norm": lambda u: u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    }
    for rho, rule in rules.items():
        y = poly_com(x, weight, bias, rho=rho, kind=kind, slope=slope)
        terms = [rule(x) ** p if kind == 1 else rule(x**p) for p in (3, 2, 1)]
        assert_close(y, sum(w * term for w, term in zip(weight, terms, strict=True)) + bias)


def test_relu_norm_rectifies_before_powers_and_norm() -> None:
    x, weight = torch.randn(4, 9, dtype=F64), torch.randn(3, dtype=F64)
    assert_close(poly_com(x, weight, rho="relu_norm", kind=2), oracle_poly_norm(x.relu(), weight, None))
    normalised = oracle_poly_norm(x.relu(), torch.ones(1, dtype=F64), None)
    powers = torch.stack([normalised**p for p in (3, 2, 1)], -1)
    assert_close(poly_com(x, weight, rho="relu_norm", kind=1), powers @ weight)


def test_low_precision_of_the_general_form() -> None:
    """Powers of an ablation activation leave float16 long before float32."""
    x = (8 * torch.randn(16, 64)).half()
    y = poly_com(x, torch.tensor([0.3, 0.4, 0.3]), rho="silu", kind=2)
    exact = poly_com(x.double(), torch.tensor([0.3, 0.4, 0.3]).double(), rho="silu", kind=2)
    assert max_ratio(y, exact) < 5e-4
