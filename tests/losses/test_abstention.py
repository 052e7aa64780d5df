"""Predictor and rejector, and the normalised and truncated forms, against the formulas as papers print them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.losses import CompSumLoss, PredictorRejectorLoss, comp_sum_loss, predictor_rejector_loss

TAUS = (1.0, 1.3, 1.7, 2.0)


def scored(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return scores, torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)


def by_probability(p: Tensor, tau: float) -> Tensor:
    return -p.log() if tau == 1 else (1 - p ** (tau - 1)) / (tau - 1)


# Normalised


@pytest.mark.parametrize("tau", TAUS)
def test_normalised_losses_are_shares_of_all_classes(tau: float) -> None:
    scores, target = scored(6, 5, 3)
    each = by_probability(scores.softmax(1), tau)
    expected = each.gather(1, target.unsqueeze(1)).squeeze(1) / each.sum(1)
    found = comp_sum_loss(scores, target, tau, normalized=True, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    total = sum(
        comp_sum_loss(scores, torch.full_like(target, k), tau, normalized=True, reduction="none") for k in range(5)
    )
    torch.testing.assert_close(total, torch.ones_like(found))


def test_two_members_have_names() -> None:
    """tau = 1 is the normalised cross-entropy, tau = 2 the mean absolute error over n - 1."""
    scores, target = scored(6, 5)
    log_p = scores.log_softmax(1)
    nce = comp_sum_loss(scores, target, 1.0, normalized=True, reduction="none")
    torch.testing.assert_close(nce, log_p.gather(1, target[:, None])[:, 0] / log_p.sum(1))
    mae = comp_sum_loss(scores, target, 2.0, normalized=True, reduction="none")
    torch.testing.assert_close(mae, (1 - log_p.exp().gather(1, target[:, None])[:, 0]) / 4)


def test_normalised_losses_with_ignored_rows_and_classes_that_are_out() -> None:
    scores, target = scored(4, 5)
    scores[:, 4] = -math.inf
    target = torch.tensor([0, 1, -100, 3])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    found = comp_sum_loss(scores.requires_grad_(), target, 1.5, normalized=True, weight=weight)
    four = comp_sum_loss(scores[:, :4], target, 1.5, normalized=True, weight=weight[:4])
    torch.testing.assert_close(found, four)
    (gradient,) = torch.autograd.grad(found, scores)
    assert bool(gradient.isfinite().all())
    assert not gradient[2].any()


# Truncated


@pytest.mark.parametrize("tau", [0.0, 0.5, *TAUS])
def test_truncated_losses_are_constant_below_a_probability(tau: float) -> None:
    scores, target = scored(40, 5)
    scores.requires_grad_()
    p = scores.softmax(1).gather(1, target[:, None])[:, 0]
    expected = torch.where(p <= 0.3, by_probability(torch.full_like(p, 0.3), tau), by_probability(p, tau))
    found = comp_sum_loss(scores, target, tau, truncation=0.3, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    assert torch.equal(gradient.any(1), p > 0.3)
    taus = torch.full((40,), tau, dtype=torch.float64)
    torch.testing.assert_close(comp_sum_loss(scores, target, taus, truncation=0.3, reduction="none"), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": 0.0}, r"truncation must lie in \(0, 1\), got 0.0"),
        ({"truncation": 1.0}, r"truncation must lie in \(0, 1\), got 1.0"),
        ({"tau": 0.5, "normalized": True}, "normalized takes tau >= 1, got 0.5"),
        ({"normalized": True, "truncation": 0.5}, "give normalized or truncation, not both"),
        ({"normalized": True, "label_smoothing": 0.1}, "take classes for targets, without label smoothing"),
        ({"truncation": 0.5, "aux": "rho_margin"}, "and aux='exp'"),
    ],
)
def test_what_does_not_go_together(options: dict, message: str) -> None:
    scores, target = scored(3, 4)
    with pytest.raises(ValueError, match=message):
        comp_sum_loss(scores, target, **options)
    with pytest.raises(ValueError, match="take classes for targets"):
        comp_sum_loss(scores, scores.softmax(1), truncation=0.5)


def test_modules_tell_of_them() -> None:
    scores, target = scored(6, 5)
    loss = CompSumLoss(1.7, truncation=0.5)
    assert repr(loss) == "CompSumLoss(tau=1.7, truncation=0.5)"
    torch.testing.assert_close(loss(scores, target), comp_sum_loss(scores, target, 1.7, truncation=0.5))
    assert repr(CompSumLoss(normalized=True)) == "CompSumLoss(tau=1, normalized=True)"


# Predictor and rejector


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_both_stages_are_the_formula(alpha: float) -> None:
    scores, target = scored(6, 5, 2)
    r = torch.linspace(-2, 3, 12, dtype=torch.float64).view(6, 2)
    p = scores.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    options = {"cost": 0.2, "alpha": alpha, "reduction": "none"}
    expected = (1 - p) * torch.exp(alpha * r) + 0.2 * torch.exp(-alpha * r)
    torch.testing.assert_close(predictor_rejector_loss(scores, r, target, **options), expected, rtol=1e-12, atol=0)
    wrong = (scores.argmax(1) != target).double()
    second = wrong * torch.exp(alpha * r) + 0.2 * torch.exp(-alpha * r)
    scores.requires_grad_()
    found = predictor_rejector_loss(scores, r.requires_grad_(), target, stage="second", **options)
    torch.testing.assert_close(found, second, rtol=1e-12, atol=0)
    assert torch.autograd.grad(found.sum(), [r, scores], allow_unused=True)[1] is None
    for reduction in ("mean", "sum"):
        loss = PredictorRejectorLoss(0.2, alpha=alpha, reduction=reduction)
        torch.testing.assert_close(loss(scores, r, target), getattr(expected, reduction)())


def test_the_rejector_learns_whom_not_to_answer() -> None:
    """Two kinds of inputs: of one the class can be known, the label of the other is a coin."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(2, (400,), generator=generator)
    label = torch.where(kind == 1, torch.randint(2, (400,), generator=generator), 0)
    x = F.one_hot(kind, 2).double()
    predictor, rejector = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    parameters = [predictor.requires_grad_(), rejector.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        predictor_rejector_loss(x @ predictor, x @ rejector, label, cost=0.2).backward()
        optimizer.step()
    known, coin = rejector.tolist()
    assert known > 1
    assert coin < -0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": 1.2}, r"cost must lie in \[0, 1\], got 1.2"),
        ({"cost": 0.1, "alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"cost": 0.1, "stage": "first"}, "stage must be 'single' or 'second', got 'first'"),
        ({"cost": 0.1, "reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"PredictorRejectorLoss: {message}"):
        PredictorRejectorLoss(**options)


def test_shapes_that_do_not_fit() -> None:
    scores, target = scored(3, 4)
    with pytest.raises(ValueError, match=r"rejector and target \[N, ...\], got \[3, 4\], \[3, 1\] and \[3\]"):
        predictor_rejector_loss(scores, torch.zeros(3, 1), target, 0.1)
