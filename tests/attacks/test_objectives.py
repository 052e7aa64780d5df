"""The objectives against their definitions, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close
from zoo.attacks.objectives import OBJECTIVES, ce, dlr, dlr_targeted, is_correct, kl, margin, score_difference

SAMPLES, CLASSES = 7, 5


def _scores() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits, clean = torch.randn(2, SAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (SAMPLES,), generator=generator), clean


def _each(function) -> Tensor:
    logits, y, clean = _scores()
    return torch.tensor(
        [function(z.tolist(), int(k), c.tolist()) for z, k, c in zip(logits, y, clean, strict=True)],
        dtype=torch.float64,
    )


def test_score_difference_is_the_squared_distance_of_the_leads() -> None:
    def of_one(z: list[float], y: int, c: list[float]) -> float:
        return sum(((z[y] - z[j]) - (c[y] - c[j])) ** 2 for j in range(CLASSES))

    assert_close(score_difference(*_scores()), _each(of_one))


def test_score_difference_does_not_cancel_at_large_scores() -> None:
    clean = torch.tensor([[4096.0, 0.0, -4096.0]])
    moved = clean + torch.tensor([[0.0, 0.0009765625, 0.0]])
    assert score_difference(moved, torch.tensor([0]), clean) == (moved - clean)[0, 1] ** 2


def test_ce_and_kl() -> None:
    def probabilities(z: list[float]) -> list[float]:
        total = sum(map(math.exp, z))
        return [math.exp(value) / total for value in z]

    assert_close(ce(*_scores()), _each(lambda z, y, c: -math.log(probabilities(z)[y])))
    divergence = _each(
        lambda z, y, c: sum(p * math.log(p / q) for p, q in zip(probabilities(c), probabilities(z), strict=True))
    )
    assert_close(kl(*_scores()), divergence)


def test_margin_and_dlr() -> None:
    def lead(z: list[float], y: int) -> float:
        return max(value for j, value in enumerate(z) if j != y) - z[y]

    def ratio(z: list[float], y: int, c: list[float]) -> float:
        ordered = sorted(z, reverse=True)
        return lead(z, y) / (ordered[0] - ordered[2])

    assert_close(margin(*_scores()), _each(lambda z, y, c: lead(z, y)))
    assert_close(dlr(*_scores()), _each(ratio))


def test_dlr_targeted_of_every_target() -> None:
    logits, y, _ = _scores()
    for shift in range(1, CLASSES):
        target = (y + shift) % CLASSES

        def of_one(z: list[float], y: int, c: list[float], shift: int = shift) -> float:
            ordered = sorted(z, reverse=True)
            return (z[(y + shift) % CLASSES] - z[y]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)

        assert_close(dlr_targeted(logits, y, target), _each(of_one))


def test_dlr_does_not_depend_on_shift_and_scale() -> None:
    logits, y, _ = _scores()
    assert_close(dlr(3 * logits + 7, y), dlr(logits, y))
    assert_close(dlr_targeted(3 * logits + 7, y, (y + 1) % CLASSES), dlr_targeted(logits, y, (y + 1) % CLASSES))


def test_dlr_of_equal_scores_is_zero_not_nan() -> None:
    logits, y = torch.zeros(1, 5, requires_grad=True), torch.tensor([0])
    for values in (dlr(logits, y), dlr_targeted(logits, y, torch.tensor([1]))):
        assert values == 0


@pytest.mark.parametrize(("function", "least"), [(dlr, 3), (dlr_targeted, 4)])
def test_dlr_wants_enough_classes(function, least: int) -> None:
    with pytest.raises(ValueError, match=f"needs at least {least} classes to scale the margin, got {least - 1}; use"):
        function(torch.zeros(1, least - 1), torch.tensor([0]), torch.tensor([1]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sample_depends_on_its_own_row(name: str) -> None:
    logits, y, clean = _scores()
    values = OBJECTIVES[name](logits, y, clean)
    spoiled = logits.clone().requires_grad_()
    with torch.no_grad():
        spoiled[3] = torch.nan
    found = OBJECTIVES[name](spoiled, y, clean)
    others = torch.arange(SAMPLES) != 3
    assert torch.equal(found[others].detach(), values[others])
    assert found[3].isnan()
    (gradient,) = torch.autograd.grad(found.sum(), spoiled)
    assert gradient[others].isfinite().all()


def test_a_nan_score_is_not_correct() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0], [0.0, torch.nan]])
    assert is_correct(logits, torch.tensor([0, 0, 0, 0])).tolist() == [True, False, False, False]
