"""PolyNorm on a gate, and one set of coefficients a row, against the product of their factors in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close, rms_ratio
from tests.activations.polycom_baselines import oracle_poly_norm
from tests.implementations import IMPLEMENTATIONS
from zoo.functional import poly_norm, poly_norm_mul

F64 = torch.float64
pytestmark = [
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True),
    pytest.mark.usefixtures("implementation"),
]


@pytest.mark.parametrize("clamp", [None, 0.8])
@pytest.mark.parametrize("with_scores", [True, False])
def test_gated_form_equals_its_factors(clamp: float | None, with_scores: bool) -> None:
    x, mul = (torch.randn(3, 5, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 1))
    scores = torch.rand(3, 5, dtype=torch.float64, requires_grad=True) if with_scores else None
    leaves = [t for t in (x, mul, weight, bias, scores) if t is not None]
    gate, up = (x, mul) if clamp is None else (x.clamp(-clamp, clamp), mul.clamp(-clamp, clamp))
    expected = oracle_poly_norm(gate, weight, bias) * up * (1 if scores is None else scores[..., None])
    grad = torch.randn_like(expected)
    y = poly_norm_mul(x, mul, weight, bias, clamp=clamp, scores=scores)
    assert_close(y, expected)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for actual, gradient in zip(torch.autograd.grad(y, leaves, grad), wanted, strict=True):
        assert_close(actual, gradient)


@pytest.mark.parametrize("scale", [1e12, 1e30])
def test_gated_form_rescales(scale: float) -> None:
    x, mul, weight, grad = scale * torch.randn(4, 9), torch.randn(4, 9), torch.randn(3), torch.randn(4, 9)
    leaves = [t.requires_grad_() for t in (x, mul, weight)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ours = torch.autograd.grad(poly_norm_mul(*leaves), leaves, grad)
    expected = torch.autograd.grad(oracle_poly_norm(exact[0], exact[2], None) * exact[1], exact, grad.double())
    for actual, wanted in zip(ours, expected, strict=True):
        assert_close(actual, wanted, like=torch.float32, loose=4)


@pytest.mark.parametrize("with_scores", [True, False])
def test_gated_form_derivatives(with_scores: bool) -> None:
    """First and second, for every argument, clamp included."""
    x, mul = (1.5 * torch.randn(3, 5, dtype=F64) for _ in range(2))
    weight, bias, scores = torch.randn(3, dtype=F64), torch.randn(1, dtype=F64), torch.rand(3, dtype=F64)
    leaves = [t.requires_grad_() for t in ((x, mul, weight, bias, scores) if with_scores else (x, mul, weight, bias))]

    def function(*arguments: Tensor) -> Tensor:
        x, mul, weight, bias, *scores = arguments
        return poly_norm_mul(x, mul, weight, bias, clamp=1.0, scores=scores[0] if scores else None)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(
    ("dtype", "scale", "bounds"),
    [
        (torch.float32, 1.0, (3e-7, 5e-7, 5e-7, 1e-6)),
        (torch.bfloat16, 8.0, (1.8e-3, 1.9e-3, 1.9e-3, 2e-3)),
        (torch.float16, 8.0, (3e-4, 3e-4, 3e-4, 3e-4)),
    ],
)
def test_gated_form_is_rounded_once(dtype: torch.dtype, scale: float, bounds: tuple[float, ...]) -> None:
    """The bounds of the plain form hold: nothing between gate and product is rounded to the half type."""
    x, mul, grad = (f * torch.randn(16, 512) for f in (scale, 1.0, 1.0))
    x, mul, grad = x.to(dtype), mul.to(dtype), (grad + x * mul / scale).to(dtype)
    weight = torch.tensor([0.3, 0.4, 0.3])
    leaves = [t.detach().requires_grad_() for t in (x, mul, weight)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = poly_norm_mul(*leaves)
    expected = oracle_poly_norm(exact[0], exact[2], None) * exact[1]
    gradients = torch.autograd.grad(y, leaves, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for actual, exactly, bound in zip((y, *gradients), (expected, *wanted), bounds, strict=True):
        assert rms_ratio(actual, exactly) <= bound


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
def test_groups_use_their_own_coefficients(gated: bool, with_bias: bool) -> None:
    """Each expert's rows as if it were alone, an expert without rows included."""
    counts = [3, 0, 4]
    x, mul = torch.randn(7, 33, dtype=F64), torch.randn(7, 33, dtype=F64)
    weight, bias = torch.randn(3, 3, dtype=F64), torch.randn(3, 1, dtype=F64) if with_bias else None
    leaves = [t.requires_grad_() for t in (x, weight, *(() if bias is None else (bias,)))]
    if gated:
        y = poly_norm_mul(x, mul, weight, bias, tokens_per_expert=counts)
    else:
        y = poly_norm(x, weight, bias, tokens_per_expert=counts)
    parts, start = [], 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        part = oracle_poly_norm(x[rows], weight[expert], None if bias is None else bias[expert])
        parts.append(part * mul[rows] if gated else part)
    expected, grad = torch.cat(parts), torch.randn(7, 33, dtype=F64)
    assert_close(y, expected)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for actual, gradient in zip(torch.autograd.grad(y, leaves, grad), wanted, strict=True):
        assert_close(actual, gradient)


def test_scores_of_any_stride() -> None:
    """Every other element of a buffer: kernels read memory in order."""
    x, mul, weight = torch.randn(5, 9, dtype=F64), torch.randn(5, 9, dtype=F64), torch.randn(3, dtype=F64)
    scores = torch.rand(10, dtype=F64)[::2]
    expected = oracle_poly_norm(x, weight, None) * mul * scores[:, None]
    assert_close(poly_norm_mul(x, mul, weight, scores=scores), expected)


def test_gradient_stops_beyond_the_clamp_and_not_at_it() -> None:
    x = torch.tensor([[1.0, 2.0, -2.0, 2.5, -3.0]], dtype=F64, requires_grad=True)
    mul = torch.tensor([[2.0, 2.5, -2.5, 1.0, -2.0]], dtype=F64, requires_grad=True)
    y = poly_norm_mul(x, mul, torch.tensor([0.3, 0.2, 0.5], dtype=F64), clamp=2.0)
    dx, dmul = torch.autograd.grad(y, (x, mul), torch.ones_like(y))
    assert (dx != 0).tolist() == [[True, True, True, False, False]]
    assert (dmul != 0).tolist() == [[True, False, False, True, True]]
