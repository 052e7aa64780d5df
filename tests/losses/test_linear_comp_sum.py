"""linear_comp_sum_loss is the linear layer followed by comp_sum_loss, in values and gradients of both orders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.implementations import running_on
from zoo.losses import LinearCompSumLoss, comp_sum_loss, linear_comp_sum_loss

ROWS, WIDTH, CLASSES = 9, 5, 7


@pytest.fixture(params=["formula", "closed_form", "native"])
def implementation(request: pytest.FixtureRequest, kernel_folder: Path) -> Iterator[str]:
    with running_on(request.param, kernel_folder):
        yield request.param


def _problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, matrix = torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(CLASSES, WIDTH, dtype=dtype)
    target = torch.randint(CLASSES, (ROWS,))
    target[2] = -100
    return (
        features.requires_grad_(),
        matrix.requires_grad_(),
        torch.randn(CLASSES, dtype=dtype).requires_grad_(),
        target,
    )


@pytest.mark.parametrize("chunk_size", [None, 1, ROWS - 1, ROWS, ROWS + 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_composition(implementation: str, reduction: str, chunk_size: int | None) -> None:
    features, matrix, bias, target = _problem()
    factors = torch.rand(CLASSES, dtype=torch.float64)
    for tau, weight, smoothing, offset in itertools.product((0.5, 1.0, 1.7), (None, factors), (0.0, 0.1), (None, bias)):
        if smoothing and tau < 1:
            continue
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        ours = linear_comp_sum_loss(features, matrix, target, tau, linear_bias=offset, chunk_size=chunk_size, **options)
        expected = comp_sum_loss(F.linear(features, matrix, offset), target, tau, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
        wanted = [features, matrix] if offset is None else [features, matrix, offset]
        grad = torch.randn(expected.shape, dtype=torch.float64)
        for got, right in zip(
            torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
        ):
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-13)


def test_equals_the_composition_in_float32() -> None:
    features, matrix, bias, target = _problem(torch.float32)
    ours = linear_comp_sum_loss(features, matrix, target, 1.5, linear_bias=bias, reduction="none", chunk_size=4)
    expected = comp_sum_loss(F.linear(features, matrix, bias), target, 1.5, reduction="none")
    grad = torch.randn(ROWS)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for got, right in zip(
        torch.autograd.grad(ours, (features, matrix, bias), grad),
        torch.autograd.grad(expected, (features, matrix, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_both_orders(reduction: str) -> None:
    features, matrix, bias, target = _problem()

    def function(features: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return linear_comp_sum_loss(features, matrix, target, 1.3, linear_bias=bias, reduction=reduction, chunk_size=4)

    assert torch.autograd.gradcheck(function, (features, matrix, bias))
    assert torch.autograd.gradgradcheck(function, (features, matrix, bias))


def test_frozen_parts_get_no_gradient_and_the_graph_can_be_walked_twice() -> None:
    features, matrix, bias, target = _problem()
    loss = linear_comp_sum_loss(features, matrix.detach(), target, 1.3, linear_bias=bias.detach())
    loss.backward(retain_graph=True)
    assert features.grad is not None
    once = features.grad.clone()
    loss.backward()
    assert torch.equal(features.grad, 2 * once)
    with torch.no_grad():
        assert linear_comp_sum_loss(features, matrix, target, 1.3).requires_grad is False


def test_scores_of_all_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    features, matrix, bias, target = _problem()
    seen = []
    real = F.linear

    def watched(rows: Tensor, *more: Tensor) -> Tensor:
        seen.append(len(rows))
        return real(rows, *more)

    monkeypatch.setattr(F, "linear", watched)
    linear_comp_sum_loss(features, matrix, target, chunk_size=2, linear_bias=bias).backward()
    assert seen == [2, 2, 2, 2, 1]


def test_features_of_any_rank() -> None:
    features, matrix, _, target = _problem()
    loss = linear_comp_sum_loss(features.reshape(3, 3, WIDTH), matrix, target.reshape(3, 3), 1.5, reduction="none")
    expected = linear_comp_sum_loss(features, matrix, target, 1.5, reduction="none")
    assert torch.equal(loss, expected.reshape(3, 3))
    empty = linear_comp_sum_loss(features[:0], matrix, target[:0], reduction="none")
    assert empty.shape == (0,)
    assert linear_comp_sum_loss(features[:0], matrix, target[:0]).isnan()


def test_autocast_multiplies_in_low_precision() -> None:
    features, matrix, bias, target = _problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_comp_sum_loss(features, matrix, target, 1.5, linear_bias=bias)
        scores = F.linear(features, matrix, bias)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, comp_sum_loss(scores, target, 1.5))
    for leaf in torch.autograd.grad(loss, (features, matrix, bias)):
        assert leaf.dtype is torch.float32


def test_bfloat16_adds_its_gradient_up_in_float32() -> None:
    """256 chunks of equal gradients: added up in bfloat16 the sum would stop growing."""
    features = torch.ones(256, 1, dtype=torch.bfloat16)
    matrix = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(256, dtype=torch.long)
    linear_comp_sum_loss(features, matrix, target, reduction="sum", chunk_size=1).backward()
    assert matrix.grad is not None
    assert matrix.grad[:, 0].tolist() == [-128.0, 128.0]
    features = torch.ones(1024, 1, dtype=torch.bfloat16)
    matrix.grad = None
    linear_comp_sum_loss(
        features, matrix, torch.zeros(1024, dtype=torch.long), reduction="sum", chunk_size=1
    ).backward()
    assert matrix.grad[:, 0].tolist() == [-512.0, 512.0]


def test_module_is_the_function() -> None:
    head = LinearCompSumLoss(WIDTH, CLASSES, tau=1.4, bias=True, dtype=torch.float64)
    features, _, _, target = _problem()
    expected = comp_sum_loss(head.linear(features), target, 1.4)
    torch.testing.assert_close(head(features, target), expected)
    head.tau = 2.0
    torch.testing.assert_close(head(features, target), comp_sum_loss(head.linear(features), target, 2.0))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tau": -1.0}, ValueError, "tau must be finite"),
        ({"linear_weight": torch.zeros(4, 3)}, ValueError, r"linear_weight must be \[classes, 2\]"),
        ({"linear_bias": torch.zeros(3)}, ValueError, r"linear_bias must have shape \(4,\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \(4,\)"),
        ({"target": torch.zeros(3)}, TypeError, "target must hold integer classes"),
        ({"target": torch.zeros(2, dtype=torch.long)}, ValueError, r"need classes of shape \(3,\)"),
        ({"target": torch.tensor([0, 1, 4])}, IndexError, r"target\[2\] is 4, but there are 4 classes"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"reduction": "avg"}, ValueError, "reduction must be"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must lie"),
        ({"input": torch.zeros(3, 2, dtype=torch.long)}, ValueError, "floating point"),
    ],
)
def test_mistakes_are_named(arguments: dict, error: type[Exception], words: str) -> None:
    given = {
        "input": torch.zeros(3, 2),
        "linear_weight": torch.zeros(4, 2),
        "target": torch.tensor([0, 1, 3]),
        **arguments,
    }
    with pytest.raises(error, match=words):
        linear_comp_sum_loss(**given)
