"""Theory of the comp-sum family: against numbers of 60 digits, and what minimisation over scores and labels finds."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.losses import comp_sum_loss, theory

F64 = torch.float64
TINY, NEAR = 2.0**-20, 2.0**-30
BETAS = (TINY, 0.25, 0.75, 0.999999, 1.0)
TAUS = (0.0, 0.5, 1 - NEAR, 1.0, 1 + NEAR, 1.25, 1.75, 2 - TINY, 2.0, 3.0)

# mpmath at 60 digits, from the definition: e = 1 / (2 - tau), M = ((1 + b)^e + (1 - b)^e) / 2,
# 2^(1 - tau) / (1 - tau) (1 - M^(2 - tau)) below tau = 1, (M^(2 - tau) - 1) / ((tau - 1) n^(tau - 1)) above, and
# beta / ((tau - 1) n^(tau - 1)) from 2 on; printed with nstr(..., 17). Columns are BETAS.
TRANSFORM = {
    (0.0, 2): (4.5474735088656752e-13, 0.031754163448145779, 0.33856217223385235, 0.99858578679116001, 1.0),
    (0.5, 2): (
        4.2873991405133977e-13,
        0.029902183974605045,
        0.31409977970575805,
        0.82823913364385408,
        0.8284271247461901,
    ),
    (1 - NEAR, 2): (
        *(4.5474735075657583e-13, 0.03158394239340841, 0.31637701926827732),
        *(0.6931394264548802, 0.69314718078367368),
    ),
    (1.0, 2): (
        4.5474735088653305e-13,
        0.03158394240196325,
        0.31637701930350852,
        0.69313942623120084,
        0.69314718055994531,
    ),
    (1 + NEAR, 2): (
        *(4.5474735101649027e-13, 0.031583942410518089, 0.31637701933873973),
        *(0.69313942600752148, 0.69314718033621694),
    ),
    (1 + NEAR, 10): (
        *(4.5474735033486681e-13, 0.031583942363176732, 0.31637701886452036),
        *(0.69313942496857073, 0.69314717929725457),
    ),
    (1.25, 2): (
        5.0986055627543108e-13,
        0.035183175666597452,
        0.33067326173358189,
        0.63641235089065164,
        0.63641433898514183,
    ),
    (1.25, 10): (
        3.4096430389907996e-13,
        0.02352840762531941,
        0.22113453789926377,
        0.42559458962537608,
        0.42559591914429177,
    ),
    (1.75, 2): (
        1.0815775704035948e-12,
        0.066307532847735826,
        0.37398338152551977,
        0.54052792333151927,
        0.54052858999818596,
    ),
    (1.75, 10): (
        3.2346714033984487e-13,
        0.019830577685929563,
        0.11184711875223534,
        0.16165555427396494,
        0.16165575365380244,
    ),
    (2 - TINY, 2): (
        *(2.0684296789225204e-7, 0.12499978869064699, 0.37500002710945347),
        *(0.49999964631837985, 0.50000014631885671),
    ),
    (2 - TINY, 10): (
        *(4.136865707430954e-8, 0.024999996110084003, 0.075000120537957431),
        *(0.10000008275164529, 0.10000018275189414),
    ),
    (2.0, 2): (4.76837158203125e-7, 0.125, 0.375, 0.49999949999999999, 0.5),
    (2.0, 10): (9.5367431640625e-8, 0.025, 0.075, 0.099999899999999997, 0.1),
    (3.0, 2): (1.1920928955078125e-7, 0.03125, 0.09375, 0.124999875, 0.125),
    (3.0, 10): (4.76837158203125e-9, 0.00125, 0.00375, 0.0049999949999999999, 0.005),
}

# The same way, from ((sum p^e)^(2 - tau) - 1) / (1 - tau), the entropy, (1 - max p) / (tau - 1). Columns are TAUS.
LEAST_RISK = {
    (0.5, 0.25, 0.25): (
        *(1.914213562373095, 1.3973469510176934, 1.0397207713992389, 1.039720770839918, 1.039720770280597),
        *(0.90013737910335611, 0.64674428536429408, 0.50000047683761295, 0.5, 0.25),
    ),
    (0.75, 0.125, 0.0625, 0.0625): (
        *(1.9569512300735069, 1.2792061319876625, 0.82226533805684293, 0.82226533732878784, 0.82226533660073275),
        *(0.63696745998478087, 0.33311639005123677, 0.25000023841880648, 0.25, 0.125),
    ),
    (1 - TINY, TINY): (
        *(0.0019531240686772033, 0.00028876141292918749, 1.4174407218792863e-5, 1.4174407133447262e-5),
        *(1.4174407048101662e-5, 3.7865358267217534e-6, 1.2715657552083333e-6, 9.5367522590181914e-7),
        *(9.5367431640625e-7, 4.76837158203125e-7),
    ),
}


@pytest.mark.parametrize(("tau", "n"), TRANSFORM)
def test_transform_is_the_table(tau: float, n: int) -> None:
    for beta, expected in zip(BETAS, TRANSFORM[tau, n], strict=True):
        assert theory.h_consistency_transform(beta, tau, n) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("probabilities", LEAST_RISK)
def test_least_risk_is_the_table(probabilities: tuple[float, ...]) -> None:
    for tau, expected in zip(TAUS, LEAST_RISK[probabilities], strict=True):
        risk = theory.min_conditional_risk(torch.tensor(probabilities, dtype=F64), tau)
        assert risk.item() == pytest.approx(expected, rel=1e-12, abs=0)


def minimised(value: Callable[[], Tensor], *parameters: Tensor) -> Tensor:
    """The values, one a row of the parameters, after LBFGS on their sum."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=400, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = value().sum()
        total.backward()
        return total

    optimizer.step(closure)
    return value().detach()


def risk(p: Tensor, scores: Tensor, tau: float) -> Tensor:
    """Expected loss of each row under its distribution."""
    return comp_sum_loss(scores, p, tau, reduction="none")


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.6])
def test_least_risk_is_what_minimisation_finds_and_bayes_scores_attain_it(tau: float) -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.15, 0.05], [0.34, 0.33, 0.33]], dtype=F64)
    scores = p.log().requires_grad_()
    least = theory.min_conditional_risk(p, tau)
    torch.testing.assert_close(minimised(lambda: risk(p, scores, tau), scores), least, rtol=1e-8, atol=0)
    torch.testing.assert_close(risk(p, theory.bayes_scores(p, tau), tau), least, rtol=1e-12, atol=0)
    shift = scores.detach() - theory.bayes_scores(p, tau)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-3)


@pytest.mark.parametrize("tau", [2.0, 2.5])
def test_least_risk_from_tau_2_on_is_that_of_betting_all_on_one_class(tau: float) -> None:
    p = torch.rand(5, 4, dtype=F64).softmax(-1)
    bets = risk(p.repeat_interleave(4, 0), 400 * torch.eye(4, dtype=F64).repeat(5, 1), tau).view(5, 4)
    torch.testing.assert_close(theory.min_conditional_risk(p, tau), bets.amin(1), rtol=1e-12, atol=0)
    other = risk(p.repeat_interleave(1000, 0), 5 * torch.randn(5000, 4, dtype=F64), tau).view(5, 1000)
    assert bool((other.amin(1) >= theory.min_conditional_risk(p, tau)).all())


def least_regret(beta: float, tau: float, n: int) -> float:
    """Least surrogate regret over distributions and scores that err by beta: p_0 - p_1 = beta, and 1 is predicted."""
    starts = 6
    generator = torch.Generator().manual_seed(1)
    mass = torch.randn(starts, 1, dtype=F64, generator=generator).requires_grad_()
    rest = torch.randn(starts, max(n - 2, 1), dtype=F64, generator=generator).requires_grad_()
    below = torch.randn(starts, n - 1, dtype=F64, generator=generator).requires_grad_()
    zero = torch.zeros(starts, 1, dtype=F64)

    def regret() -> Tensor:
        two = torch.ones(starts, 1, dtype=F64) if n == 2 else beta + (1 - beta) * mass.sigmoid()
        others = (1 - two) * rest.softmax(1) if n > 2 else zero[:, :0]
        # the least mass keeps the derivative of p^e, e < 1, finite
        p = (1 - n * 1e-12) * torch.cat([(two + beta) / 2, (two - beta) / 2, others], 1) + 1e-12
        scores = torch.cat([-below[:, :1].square(), zero, -below[:, 1:].square()], 1)  # a tie is an error too
        return risk(p, scores, tau) - differentiable_least_risk(p, tau)

    return minimised(regret, mass, rest, below).min().item()


def differentiable_least_risk(p: Tensor, tau: float) -> Tensor:
    if tau == 1:
        return torch.special.entr(p).sum(1)
    if tau >= 2:
        return (1 - p.amax(1)) / (tau - 1)
    return ((p ** (1 / (2 - tau))).sum(1) ** (2 - tau) - 1) / (1 - tau)


@pytest.mark.parametrize(("tau", "n"), [(0.0, 2), (0.5, 3), (1.0, 3), (1.0, 5), (1.4, 2), (1.8, 2), (2.0, 2)])
def test_transform_is_the_least_regret(tau: float, n: int) -> None:
    for beta in (0.2, 0.7):
        expected = theory.h_consistency_transform(beta, tau, n)
        assert least_regret(beta, tau, n) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("tau", "n"), [(1.4, 3), (1.8, 5), (2.0, 3), (2.5, 2), (2.5, 4)])
def test_transform_is_below_the_least_regret(tau: float, n: int) -> None:
    for beta in (0.3, 0.7) if tau != 2 else (0.7,):
        assert theory.h_consistency_transform(beta, tau, n) < least_regret(beta, tau, n) - 1e-3


@pytest.mark.parametrize("n", [3, 6])
def test_transform_of_order_2_is_the_least_regret_up_to_1_over_n_minus_1(n: int) -> None:
    """All classes equally likely but the predicted one, all scores equal."""
    for beta in (0.1, 1 / (n - 1)):
        likely = (1 + beta) / n
        p = torch.tensor([[likely] * (n - 1) + [max(likely - beta, 0)]], dtype=F64)
        regret = risk(p, torch.zeros(1, n, dtype=F64), 2.0) - theory.min_conditional_risk(p, 2.0)
        assert regret.item() == pytest.approx(theory.h_consistency_transform(beta, 2.0, n), rel=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_transform_is_increasing_and_convex(tau: float) -> None:
    steps = theory.h_consistency_transform(torch.linspace(0, 1, 101, dtype=F64), tau, 5).diff()
    assert bool((steps > 0).all())
    assert bool((steps.diff() > -1e-15).all())


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("n", [2, 10, 1000])
def test_gamma_is_the_inverse(tau: float, n: int) -> None:
    beta = torch.cat([torch.logspace(-9, -1, 17, dtype=F64), torch.linspace(0.15, 1, 18, dtype=F64)])
    regret = theory.h_consistency_transform(beta, tau, n)
    torch.testing.assert_close(theory.gamma(regret, tau, n), beta, rtol=1e-11, atol=0)


def test_gamma_of_nothing_is_0_and_of_too_much_1() -> None:
    for tau in TAUS:
        assert theory.gamma(0.0, tau, 10) == 0
        assert theory.gamma(theory.h_consistency_transform(1.0, tau, 10), tau, 10) == pytest.approx(1, rel=1e-12)
        assert theory.gamma(5.0, tau, 10) == 1
        assert theory.gamma(math.inf, tau, 10) == 1


GRID = torch.logspace(-12, 0, 49, dtype=F64)
ORDERS = [0.0, 0.5, 0.99, 1.0, 1.01, 1.5, 1.9, 1.99, 1.999, 2.0, 2.5, 4.0]


def room(tau: float, n: int, factor: float = 1.0) -> float:
    """Least quotient of the closed form, its square times factor, and the exact bound, where that says something."""
    t = GRID * theory.h_consistency_transform(1.0, tau, n)
    return (theory.gamma_upper(t, tau, n) * math.sqrt(factor) / theory.gamma(t, tau, n)).min().item()


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
@pytest.mark.parametrize("tau", ORDERS)
def test_closed_form_is_above_gamma(tau: float, n: int) -> None:
    assert room(tau, n) >= 1 - 1e-11
    if tau <= 1:
        assert room(tau, n) <= 1 + 1e-6  # and meets it where the regret is small


@pytest.mark.parametrize("tau", [1.5, 1.9, 1.99, 1.999])
def test_factor_2_minus_tau_would_break_the_closed_form(tau: float) -> None:
    assert room(tau, 10, factor=2 - tau) < 1


def test_large_orders_do_not_overflow() -> None:
    assert theory.h_consistency_transform(1.0, 500, 1000) == 0
    assert theory.gamma(1e-3, 500, 1000) == 1
    assert theory.gamma_upper(1e-3, 500, 1000) == math.inf
    assert theory.gamma_upper(0.0, 500, 1000) == 0


@pytest.mark.parametrize("tau", TAUS)
def test_phi_is_the_loss_of_the_library(tau: float) -> None:
    scores = torch.tensor([[0.0, 3.0, -1.0], [5.0, 0.0, 1.0]], dtype=F64)
    u = (scores[:, 1:] - scores[:, :1]).exp().sum(1)
    expected = comp_sum_loss(scores, torch.zeros(2, dtype=torch.long), tau, reduction="none")
    torch.testing.assert_close(theory.phi_tau(u, tau), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("tau", TAUS)
def test_phi_inverse(tau: float) -> None:
    u = torch.tensor([0.0, 1e-12, 1e-3, 0.5, 20.0], dtype=F64)
    value = theory.phi_tau(u, tau)
    torch.testing.assert_close(theory.phi_tau_inv(value, tau), u, rtol=1e-12, atol=0)
    most = theory.phi_tau(math.inf, tau)
    assert most == (pytest.approx(1 / (tau - 1), rel=1e-15) if tau > 1 else math.inf)
    assert theory.phi_tau_inv(most, tau) == math.inf


def test_phi_has_slope_1_at_0_and_falls_with_tau() -> None:
    u = torch.tensor([1e-9, 0.5, 20.0], dtype=F64)
    values = torch.stack([theory.phi_tau(u, tau) for tau in (0, 0.5, 1 - 1e-6, 1, 1 + 1e-6, 1.5, 2, 3)])
    torch.testing.assert_close(values[:, 0], u[:1].expand(8), rtol=1e-8, atol=0)
    assert bool((values[:, 1:].diff(dim=0) < 0).all())


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 1.5, 1.99])
def test_softmax_of_bayes_scores_gives_the_distribution_back(tau: float) -> None:
    p = torch.tensor([[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]], dtype=F64)
    scores = theory.bayes_scores(p, tau)
    torch.testing.assert_close((scores * (2 - tau)).softmax(-1), p, rtol=1e-12, atol=0)
    sharpness = scores.softmax(-1)[0, 0].item() - 0.6
    assert (sharpness > 1e-3) == (tau > 1)
    assert (sharpness < -1e-3) == (tau < 1)


def test_impossible_classes_do_not_count() -> None:
    for tau in TAUS:
        with_zeros = theory.min_conditional_risk(torch.tensor([0.0, 0.7, 0.3, 0.0], dtype=F64), tau)
        torch.testing.assert_close(with_zeros, theory.min_conditional_risk(torch.tensor([0.7, 0.3], dtype=F64), tau))
        assert theory.min_conditional_risk(torch.tensor([0.0, 1.0]), tau) == 0


def gap(u: Tensor, labels: Tensor, weights: Tensor, tau: float) -> float:
    """Best risk less the mean of the best values, over hypotheses [H, X] given by their u."""
    losses = theory.phi_tau(u, tau)
    return ((losses * weights).sum(1).min() - (losses.amin(0) * weights).sum()).item()


def test_gap_of_every_order_is_below_its_bound() -> None:
    """Linear models with scores in [-L, L] on four points: the best value at each is the same, exp(-2 L)."""
    bound_of_scores, weights = 2.0, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    slopes = torch.linspace(-1, 1, 201, dtype=F64)
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=F64)  # no slope suits all
    u = torch.exp(-2 * bound_of_scores * slopes.unsqueeze(1) * signs)
    least = math.exp(-2 * bound_of_scores)
    best = (u * weights).sum(1).min().item()
    bounds = [theory.minimizability_gap_upper(best, least, tau) for tau in (0, 0.5, 1, 1.5, 2, 3)]
    assert bounds == sorted(bounds, reverse=True)
    for tau, bound in zip((0, 0.5, 1, 1.5, 2, 3), bounds, strict=True):
        measured = gap(u, signs, weights, tau)
        assert 0.01 < measured <= bound + 1e-12
        assert bound == pytest.approx(theory.phi_tau(best, tau) - theory.phi_tau(least, tau), rel=1e-12)
    assert bounds[0] == pytest.approx(gap(u, signs, weights, 0), rel=1e-12)


def test_gap_keeps_its_digits_where_both_figures_are_nearly_equal() -> None:
    expected = 2.0**-40 / 3.0**1.5  # the slope (1 + u)^-tau times the distance
    assert theory.minimizability_gap_upper(2 + 2.0**-40, 2.0, 1.5) == pytest.approx(expected, rel=1e-11)


def test_zero_one_bound_is_gamma_of_the_regret_with_the_gap() -> None:
    assert theory.zero_one_bound(0.3, 0.25, 0.05, 1.3, 10) == pytest.approx(theory.gamma(0.1, 1.3, 10), rel=1e-12)
    several = theory.zero_one_bound(torch.tensor([0.3, 0.4], dtype=F64), 0.25, 0.0, 1, 3)
    assert several.shape == (2,)
    assert 0 < several[0] < several[1] < 1


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.6, 2.0, 3.0])
def test_zero_one_regret_of_any_scores_is_below_the_bound(tau: float) -> None:
    p = (2 * torch.randn(2000, 4, dtype=F64)).softmax(1)
    scores = p.log() / 2 + torch.randn(2000, 4, dtype=F64)
    regret = p.amax(1) - p.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    bound = theory.zero_one_bound(risk(p, scores, tau), theory.min_conditional_risk(p, tau), 0.0, tau, 4)
    assert bool((bound >= regret).all())
    assert bool((regret > 0.1).any())


ONE_ARGUMENT: dict[str, Callable[[Any], Any]] = {
    "phi_tau": lambda x: theory.phi_tau(x, 1.5),
    "phi_tau_inv": lambda x: theory.phi_tau_inv(x, 1.5),
    "h_consistency_transform": lambda x: theory.h_consistency_transform(x, 1.5, 3),
    "gamma": lambda x: theory.gamma(x, 1.5, 3),
    "gamma_of_linear": lambda x: theory.gamma(x, 2.5, 3),
    "gamma_upper": lambda x: theory.gamma_upper(x, 1.5, 3),
    "minimizability_gap_upper": lambda x: theory.minimizability_gap_upper(1.0, x, 1.5),
    "zero_one_bound": lambda x: theory.zero_one_bound(x, 0.0, 0.0, 1.5, 3),
}


@pytest.mark.parametrize("name", ONE_ARGUMENT)
def test_float_gives_float_and_tensor_a_float64_tensor_without_gradient(name: str) -> None:
    function = ONE_ARGUMENT[name]
    single = function(0.25)
    assert type(single) is float
    assert type(function(1)) is float
    many = function(torch.full((2, 3), 0.25, requires_grad=True))
    assert (many.dtype, many.shape, many.requires_grad) == (F64, (2, 3), False)
    assert bool((many == single).all())
    assert function(torch.ones(0)).shape == (0,)


def test_distributions_may_be_narrow_and_many() -> None:
    p = torch.rand(2, 5, 3, dtype=torch.float32).softmax(-1)
    least = theory.min_conditional_risk(p, 1.5)
    assert (least.dtype, least.shape) == (F64, (2, 5))
    assert theory.bayes_scores(p, 1.5).shape == (2, 5, 3)
    torch.testing.assert_close(theory.min_conditional_risk(p * (1 + 5e-5), 1.5), least, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda f=f: f(-0.1), "must not be negative") for f in ONE_ARGUMENT.values()),
        *((lambda f=f: f(torch.tensor([0.1, math.nan])), "must not be negative") for f in ONE_ARGUMENT.values()),
        (lambda: theory.phi_tau_inv(2.1, 1.5), r"phi_tau_inv: a loss of order tau=1.5 is at most .* = 2, got 2.1"),
        (lambda: theory.h_consistency_transform(1.5, 1, 2), r"beta is .* in \[0, 1\], got 1.5"),
        (lambda: theory.h_consistency_transform(0.5, 1, 1), "h_consistency_transform: n, .* at least 2, got 1"),
        (lambda: theory.gamma(0.5, 1, 1), "gamma: n, .* at least 2, got 1"),
        (lambda: theory.gamma_upper(0.5, 1, 0), "gamma_upper: n, .* at least 2, got 0"),
        (lambda: theory.bayes_scores(torch.tensor([0.5, 0.5]), 2), "tau must be below 2, .* got 2"),
        (lambda: theory.min_conditional_risk(torch.tensor([0.5, 0.6]), 1), "sums from 1.1 to 1.1"),
        (lambda: theory.min_conditional_risk(torch.tensor([1.5, -0.5]), 1), "a least entry of -0.5"),
        (lambda: theory.min_conditional_risk(torch.tensor([math.nan, 1.0]), 1), "each row of probabilities"),
        (lambda: theory.bayes_scores(torch.tensor(1.0), 1), r"classes last, \[..., n\], got shape \(\)"),
        (lambda: theory.minimizability_gap_upper(0.1, 0.2, 1), "not below least, got 0.1 and 0.2"),
        (lambda: theory.minimizability_gap_upper(math.inf, 0.2, 1), "must be finite"),
        (lambda: theory.zero_one_bound(0.1, 0.2, 0.05, 1, 3), "must not be negative, got -0.05"),
        *(
            (lambda f=f, tau=tau: f(tau), f"{name}: tau must be finite and not negative, got {tau}")
            for tau, (name, f) in itertools.product(
                (-1, math.nan, math.inf),
                {
                    "phi_tau": lambda tau: theory.phi_tau(0.5, tau),
                    "phi_tau_inv": lambda tau: theory.phi_tau_inv(0.5, tau),
                    "h_consistency_transform": lambda tau: theory.h_consistency_transform(0.5, tau, 3),
                    "gamma": lambda tau: theory.gamma(0.5, tau, 3),
                    "gamma_upper": lambda tau: theory.gamma_upper(0.5, tau, 3),
                    "min_conditional_risk": lambda tau: theory.min_conditional_risk(torch.ones(1), tau),
                    "bayes_scores": lambda tau: theory.bayes_scores(torch.ones(1), tau),
                    "minimizability_gap_upper": lambda tau: theory.minimizability_gap_upper(1.0, 0.5, tau),
                }.items(),
            )
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_probabilities_must_be_a_floating_point_tensor() -> None:
    with pytest.raises(TypeError, match="min_conditional_risk: probabilities must be .* got torch.int64"):
        theory.min_conditional_risk(torch.tensor([1, 0]), 1)
    with pytest.raises(TypeError, match="bayes_scores: probabilities must be .* got list"):
        theory.bayes_scores([1.0, 0.0], 1)  # type: ignore[arg-type]


def test_examples_of_the_docstrings_run() -> None:
    outcome = doctest.testmod(theory, extraglobs={"torch": torch})
    assert outcome.attempted >= 9
    assert outcome.failed == 0
