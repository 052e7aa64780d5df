"""Weights for answers that cost something, and what the loss makes of them."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.losses import comp_sum_loss, targets
from zoo.losses.targets import abstention_targets, cost_sensitive_targets, deferral_targets

F64 = torch.float64
K = 4
LABELS = {"rows": torch.tensor([0, 3, 1]), "maps": torch.arange(12).view(2, 3, 2) % K}


def one_hot(target: Tensor, classes: int = K) -> Tensor:
    return F.one_hot(target, classes).movedim(-1, 1)


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_abstention_at_cost_1_is_the_one_hot_with_a_column_of_zeros(target: Tensor) -> None:
    weights = abstention_targets(target, K, 1.0)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, one_hot(target, K + 1).float())


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_abstention_mixes_refusal_at_no_cost_and_none_at_all(target: Tensor) -> None:
    costs = torch.linspace(0, 1, target.numel(), dtype=F64).view_as(target)
    free, never = (abstention_targets(target, K, torch.tensor(cost, dtype=F64)) for cost in (0.0, 1.0))
    mix = torch.lerp(free, never, costs.unsqueeze(1))
    weights = abstention_targets(target, K, costs)
    torch.testing.assert_close(weights, mix, rtol=0, atol=1e-15)
    assert torch.equal(weights.sum(1), 2 - costs)


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_abstention_is_the_answer_with_one_cost_for_every_label(target: Tensor) -> None:
    costs = torch.cat([1 - torch.eye(K), torch.full((K, 1), 0.3)], 1)
    torch.testing.assert_close(abstention_targets(target, K, 0.3), cost_sensitive_targets(costs, target))


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_one_expert_of_constant_cost_is_abstention(target: Tensor) -> None:
    costs = torch.full((target.shape[0], 1, *target.shape[1:]), 0.3)
    assert torch.equal(deferral_targets(target, K, costs), abstention_targets(target, K, 0.3))


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_experts_keep_their_order_and_their_own_costs(target: Tensor) -> None:
    costs = torch.rand(target.shape[0], 3, *target.shape[1:], dtype=F64)
    weights = deferral_targets(target, K, costs)
    assert weights.shape == (target.shape[0], K + 3, *target.shape[1:])
    assert torch.equal(weights[:, :K], one_hot(target).double())
    assert torch.equal(weights[:, K:], 1 - costs)


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_costs_of_0_and_1_give_the_one_hot(target: Tensor) -> None:
    assert torch.equal(cost_sensitive_targets(1 - torch.eye(K), target), one_hot(target).float())


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_rows_of_the_matrix_are_labels_and_columns_answers(target: Tensor) -> None:
    costs = torch.rand(K, 6, dtype=F64)
    weights = cost_sensitive_targets(costs, target)
    assert weights.shape == (target.shape[0], 6, *target.shape[1:])
    for place in torch.cartesian_prod(*(torch.arange(n) for n in target.shape)).view(-1, target.ndim).tolist():
        row, *where = place
        assert torch.equal(weights[(row, slice(None), *where)], 1 - costs[target[tuple(place)]])


def test_costs_of_each_sample_need_no_label() -> None:
    costs = torch.rand(2, 5, 3)
    assert torch.equal(cost_sensitive_targets(costs), 1 - costs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_targets_of_any_integer_dtype(dtype: torch.dtype) -> None:
    target = LABELS["rows"]
    assert torch.equal(abstention_targets(target.to(dtype), K, 0.5), abstention_targets(target, K, 0.5))
    costs = torch.rand(K, K)
    assert torch.equal(cost_sensitive_targets(costs, target.to(dtype)), cost_sensitive_targets(costs, target))


def test_dtype_is_that_of_the_costs_and_they_are_left_alone() -> None:
    costs = torch.rand(3, 2, dtype=torch.bfloat16)
    before = costs.clone()
    assert deferral_targets(LABELS["rows"], K, costs).dtype == torch.bfloat16
    assert abstention_targets(LABELS["rows"], K, costs[:, 0]).dtype == torch.bfloat16
    assert cost_sensitive_targets(costs).dtype == torch.bfloat16
    assert torch.equal(costs, before)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5, 2.0])
def test_loss_is_the_sum_over_answers_of_what_they_save(tau: float) -> None:
    target = LABELS["maps"]
    scores = torch.randn(2, K + 1, 3, 2, dtype=F64)
    weights = abstention_targets(target, K, torch.tensor(0.3, dtype=F64))
    single = [comp_sum_loss(scores, t, tau, reduction="none") for t in (target, torch.full_like(target, K))]
    torch.testing.assert_close(comp_sum_loss(scores, weights, tau, reduction="none"), single[0] + 0.7 * single[1])


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("cost", "abstains"), [(0.35, True), (0.45, False)])
def test_best_scores_abstain_where_no_class_is_likelier_than_1_minus_cost(
    tau: float, cost: float, abstains: bool
) -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1], dtype=F64)  # 1 - 0.6 lies between the two costs
    weights = abstention_targets(torch.arange(3), 3, torch.tensor(cost, dtype=F64))
    scores = torch.zeros(4, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = comp_sum_loss(scores.expand(3, 4), weights, tau, reduction="none")
        expected = probabilities @ losses
        expected.backward()
        return expected

    optimizer.step(closure)
    assert int(scores.argmax()) == (3 if abstains else 0)


ROWS = LABELS["rows"]
OF_A_TARGET: dict[str, Callable[[Tensor], Any]] = {
    "abstention_targets": lambda target: abstention_targets(target, K, 0.5),
    "deferral_targets": lambda target: deferral_targets(target, K, torch.zeros(3, 1)),
    "cost_sensitive_targets": lambda target: cost_sensitive_targets(torch.zeros(K, 2), target),
}


@pytest.mark.parametrize("name", OF_A_TARGET)
def test_wrong_targets_are_named(name: str) -> None:
    call = OF_A_TARGET[name]
    with pytest.raises(IndexError, match=rf"{name}: target\[1\] is 4, but there are 4 classes"):
        call(torch.tensor([0, 4, -1]))
    with pytest.raises(IndexError, match=rf"{name}: target\[2\] is -100"):
        call(torch.tensor([0, 3, -100]))
    for target in (ROWS.float(), ROWS.bool(), ROWS.to(torch.complex64)):
        with pytest.raises(TypeError, match=f"{name}: target must hold classes .* got {target.dtype}"):
            call(target)
    with pytest.raises(ValueError, match=f"{name}: target must be .* got a single class"):
        call(torch.tensor(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: abstention_targets(ROWS, K, 1.5), r"abstention_targets: cost must lie in \[0, 1\], got .* 1.5"),
        (lambda: abstention_targets(ROWS, K, math.nan), "abstention_targets: cost must lie"),
        (lambda: abstention_targets(ROWS, K, torch.zeros(2)), r"cost \(2,\) does not broadcast to target \(3,\)"),
        (lambda: abstention_targets(ROWS, K, torch.zeros(1, 3)), r"cost \(1, 3\) does not broadcast"),
        (lambda: abstention_targets(ROWS, 0, 0.5), "abstention_targets: num_classes must be at least 1, got 0"),
        (lambda: deferral_targets(ROWS, 0, torch.zeros(3, 1)), "deferral_targets: num_classes must be at least 1"),
        (lambda: deferral_targets(ROWS, K, torch.zeros(3)), r"needs expert_costs .* \(3, 'E'\), got \(3,\)"),
        (lambda: deferral_targets(ROWS, K, torch.zeros(2, 3)), r"\(3, 'E'\), got \(2, 3\)"),
        (
            lambda: deferral_targets(ROWS, K, -torch.ones(3, 1)),
            r"expert_costs must lie in \[0, 1\], got values from -1",
        ),
        (lambda: cost_sensitive_targets(2 * torch.ones(K, K), ROWS), r"costs must lie in \[0, 1\], got .* to 2"),
        (lambda: cost_sensitive_targets(torch.zeros(3, K, 2), ROWS), r"must be a matrix .* got shape \(3, 4, 2\)"),
        (lambda: cost_sensitive_targets(torch.zeros(K)), r"costs must be \[N, K, ...\], got shape \(4,\)"),
    ],
)
def test_wrong_costs_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_costs_must_be_floating_point() -> None:
    with pytest.raises(TypeError, match="abstention_targets: cost must be floating point, got torch.int64"):
        abstention_targets(ROWS, K, torch.tensor(1))
    with pytest.raises(TypeError, match="deferral_targets: expert_costs must be floating point, got torch.bool"):
        deferral_targets(ROWS, K, torch.zeros(3, 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="cost_sensitive_targets: costs must be floating point"):
        cost_sensitive_targets(torch.zeros(K, K, dtype=torch.int32), ROWS)


def test_examples_of_the_docstrings_run() -> None:
    outcome = doctest.testmod(targets, extraglobs={"torch": torch})
    assert outcome.attempted >= 3
    assert outcome.failed == 0
