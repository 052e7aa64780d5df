"""comp_sum_loss against decimal arithmetic, `F.cross_entropy` and the textbook forms of its members."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.implementations import running_on
from tests.losses.decimal_oracle import as_float, comp_sum
from zoo.losses import comp_sum_from_nll, comp_sum_loss, tau_from_q

TAUS = (0.0, 0.25, 0.5, 0.9, 1 - 1e-9, 1.0, 1 + 1e-9, 1.1, 1.5, 1.7, 2.0, 2.5, 3.0)
ROWS = (
    (0.0, 0.0, 0.0),  # ties
    (1.0, 1.0, 1.0, -2.0),
    (0.3, -1.2, 2.1, 0.7),
    (38.0, 0.0, 0.0),  # confident: 4.7e-17 is left of the loss, and nothing of 1 - p in float32
    (40.0, 0.0, 1.0, -3.0),
    (-40.0, 0.0, 1.0, -3.0),
    (700.0, 0.0, -5.0),
    (-700.0, 0.0, -5.0),
)
_OF_DTYPE = {torch.float64: (1e-13, 1e-12), torch.float32: (4e-6, 4e-5)}


@pytest.fixture(params=["formula", "closed_form", "native"])
def implementation(request: pytest.FixtureRequest, kernel_folder: Path) -> Iterator[str]:
    with running_on(request.param, kernel_folder):
        yield request.param


def _graded(loss: Tensor, scores: Tensor) -> Tensor:
    return torch.autograd.grad(loss, scores)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tau", TAUS)
def test_value_and_gradient_are_those_of_60_digits(implementation: str, tau: float, dtype: torch.dtype) -> None:
    of_value, of_gradient = _OF_DTYPE[dtype]
    largest = torch.finfo(dtype).max
    for row in ROWS:
        scores = torch.tensor([row], dtype=dtype, requires_grad=True)
        loss = comp_sum_loss(scores, torch.tensor([0]), tau, reduction="sum")
        exact, exact_gradient = comp_sum(scores[0].tolist(), 0, tau)
        expected = as_float(exact)
        if expected > largest:
            assert loss.item() == math.inf
        else:
            assert loss.item() == pytest.approx(expected, rel=of_value, abs=torch.finfo(dtype).tiny)
        gradient = _graded(loss, scores)[0]
        assert not gradient.isnan().any()
        for got, wanted in zip(gradient.tolist(), map(as_float, exact_gradient), strict=True):
            if abs(wanted) < largest and expected < largest:
                assert got == pytest.approx(wanted, rel=of_gradient, abs=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("shape", [(7,), (6, 7), (3, 7, 4, 5)])
@pytest.mark.parametrize("kind", ["classes", "weights"])
def test_tau_one_is_cross_entropy(implementation: str, shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).requires_grad_()
    axis = 0 if len(shape) == 1 else 1
    rows = shape[:axis] + shape[axis + 1 :]
    factors = torch.rand(7, generator=generator, dtype=torch.float64)
    if kind == "classes":
        target, ignored = torch.randint(7, rows, generator=generator), [-100, 2]
    else:
        target, ignored = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(axis), [-100]
    for weight, smoothing, ignore_index, reduction in itertools.product(
        (None, factors), (0.0, 0.1, 1.0), ignored, ("mean", "sum", "none")
    ):
        options = {"weight": weight, "label_smoothing": smoothing, "ignore_index": ignore_index, "reduction": reduction}
        ours, theirs = comp_sum_loss(scores, target, **options), F.cross_entropy(scores, target, **options)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, equal_nan=True)
        if not theirs.isnan().any():  # the mean of one ignored row
            grad = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
            (got,) = torch.autograd.grad(ours, scores, grad)
            (wanted,) = torch.autograd.grad(theirs, scores, grad)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tau_one_is_cross_entropy_in_float32(implementation: str, reduction: str) -> None:
    scores, target = torch.randn(50, 30), torch.randint(30, (50,))
    ours = comp_sum_loss(scores, target, reduction=reduction)
    torch.testing.assert_close(ours, F.cross_entropy(scores, target, reduction=reduction), rtol=2e-6, atol=0)


def test_members_are_the_textbook_losses(implementation: str) -> None:
    scores, target = torch.randn(40, 6, dtype=torch.float64), torch.randint(6, (40,))
    p = scores.softmax(1).gather(1, target[:, None])[:, 0]
    differences = scores - scores.gather(1, target[:, None])
    for tau, expected in (
        (0.0, differences.exp().sum(1) - 1),
        (0.5, 2 * (p**-0.5 - 1)),
        (tau_from_q(0.7), (1 - p**0.7) / 0.7),
        (2.0, 1 - p),
        (3.0, (1 - p**2) / 2),
    ):
        ours = comp_sum_loss(scores, target, tau, reduction="none")
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.3, 2.0, 3.0])
def test_gradient_is_that_of_cross_entropy_times_a_power_of_p(implementation: str, tau: float) -> None:
    scores, target = torch.randn(20, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (20,))
    ours = _graded(comp_sum_loss(scores, target, tau, reduction="sum"), scores)
    theirs = _graded(F.cross_entropy(scores, target, reduction="sum"), scores)
    p = scores.detach().softmax(1).gather(1, target[:, None])
    torch.testing.assert_close(ours, p ** (tau - 1) * theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 2.0, 3.0])
def test_derivatives_of_both_orders(implementation: str, tau: float) -> None:
    scores = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (4, 2))
    target[1, 1] = -100

    def function(scores: Tensor) -> Tensor:
        return comp_sum_loss(scores, target, tau, reduction="none")

    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.7])
def test_derivatives_for_tau_itself(implementation: str, tau: float) -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    taus = torch.full((4,), tau, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, -100, 1])

    def function(scores: Tensor, taus: Tensor) -> Tensor:
        return comp_sum_loss(scores, target, taus, reduction="none")

    assert torch.autograd.gradcheck(function, (scores, taus))
    assert torch.autograd.gradgradcheck(function, (scores, taus))
    assert _graded(function(scores, taus).sum(), taus)[2] == 0


def test_mixed_second_derivatives_of_scores_and_tau(implementation: str) -> None:
    """gradgradcheck passes over a first derivative that has no graph; here that would raise."""
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    taus = torch.tensor([0.5, 1.0, 1.7, 2.0], dtype=torch.float64, requires_grad=True)
    loss = comp_sum_loss(scores, torch.tensor([0, 2, 1, 1]), taus, reduction="sum")
    of_scores, of_taus = torch.autograd.grad(loss, (scores, taus), create_graph=True)
    direction = torch.randn_like(scores)
    one_way = torch.autograd.grad((of_scores * direction).sum(), taus, retain_graph=True)[0]
    for row in range(4):
        other_way = torch.autograd.grad(of_taus[row], scores, retain_graph=True)[0]
        torch.testing.assert_close((other_way * direction).sum(), one_way[row], rtol=1e-11, atol=1e-13)
    assert (one_way.abs() > 1e-3).all()


def test_a_large_common_score_costs_nothing(implementation: str) -> None:
    scores = torch.randint(-200, 200, (20, 7)) / 64  # exact in float32, also beside 8192
    target = torch.randint(7, (20,))
    for tau in (0.5, 1.0, 1.7):
        assert torch.equal(
            comp_sum_loss(scores + 8192, target, tau, reduction="none"),
            comp_sum_loss(scores, target, tau, reduction="none"),
        )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7])
def test_derivatives_for_weights_as_targets(tau: float) -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)

    def function(scores: Tensor, weights: Tensor) -> Tensor:
        return comp_sum_loss(scores, weights, tau, reduction="none")

    assert torch.autograd.gradcheck(function, (scores, weights))
    assert torch.autograd.gradgradcheck(function, (scores, weights))


@pytest.mark.parametrize("aux", ["rho_logistic", "rho_margin"])
@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7])
def test_other_auxiliary_functions(aux: str, tau: float) -> None:
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target, rho = torch.randint(4, (6,)), 0.7
    u = torch.zeros(6, dtype=torch.float64)
    for i, j in itertools.product(range(6), range(4)):
        if j != target[i]:
            t = (scores[i, target[i]] - scores[i, j]).item()
            u[i] += math.log2(1 + math.exp(-t / rho)) if aux == "rho_logistic" else min(max(0.0, 1 - t / rho), 1.0)
    expected = torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)

    def function(scores: Tensor) -> Tensor:
        return comp_sum_loss(scores, target, tau, aux=aux, rho=rho, reduction="none")

    torch.testing.assert_close(function(scores), expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(function, scores)
    if aux == "rho_logistic":
        assert torch.autograd.gradgradcheck(function, scores)


def test_rho_logistic_keeps_its_tail_and_is_1_at_0() -> None:
    losses = comp_sum_loss(
        torch.tensor([[60.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]), 0.0, aux="rho_logistic", reduction="none"
    )
    assert losses[0].item() == pytest.approx(math.exp(-60) / math.log(2), rel=1e-5)
    assert losses[1].item() == pytest.approx(1)


def test_rho_of_the_exponential_divides_the_scores(implementation: str) -> None:
    scores, target = torch.randn(5, 4, dtype=torch.float64), torch.randint(4, (5,))
    ours = comp_sum_loss(scores, target, 0.5, rho=0.3)
    torch.testing.assert_close(ours, comp_sum_loss(scores / 0.3, target, 0.5), rtol=1e-14, atol=0)


def test_scores_without_a_number_stay_in_their_row(implementation: str) -> None:
    inf, nan = math.inf, math.nan
    scores = torch.tensor(
        [
            [-inf, 0.0, 1.0],  # the target is impossible
            [0.0, -inf, 1.0],  # another class is
            [0.0, -inf, -inf],  # all others are
            [0.0, nan, 1.0],
            [0.0, inf, 1.0],
            [inf, 0.0, 1.0],
            [-inf, -inf, -inf],
            [0.5, 0.0, 1.0],
        ],
        requires_grad=True,
    )
    target = torch.zeros(8, dtype=torch.long)
    for tau, impossible in ((0.0, inf), (1.0, inf), (1.5, 2.0), (3.0, 0.5)):
        loss = comp_sum_loss(scores, target, tau, reduction="none")
        alone = comp_sum_loss(scores[7:, :], target[:1], tau)
        without = comp_sum_loss(scores[1:2, ::2], target[:1], tau)
        expected = torch.tensor([impossible, without.item(), 0.0, nan, nan, 0.0, nan, alone.item()])
        torch.testing.assert_close(loss, expected, equal_nan=True)
        gradient = _graded(loss.sum(), scores)
        assert gradient.isnan().any(1).tolist() == [False, False, False, True, True, False, True, False]
        assert gradient[1, 1] == 0
        assert torch.equal(gradient[2], torch.zeros(3))
        if tau > 1:
            assert torch.equal(gradient[0], torch.zeros(3))


def test_one_class_has_no_loss(implementation: str) -> None:
    scores = torch.randn(3, 1, requires_grad=True)
    for tau in (0.0, 1.0, 2.0):
        loss = comp_sum_loss(scores, torch.zeros(3, dtype=torch.long), tau, reduction="none")
        assert torch.equal(loss, torch.zeros(3))
        assert torch.equal(_graded(loss.sum(), scores), torch.zeros(3, 1))


def test_the_bound_on_the_weight_continues_the_loss_linearly(implementation: str) -> None:
    bound, tau = 20.0, 0.25
    corner = math.log(bound) / (1 - tau)  # -log p at which p^(tau - 1) is the bound
    margins = torch.tensor([corner - 0.5, corner - 1e-6, corner + 1e-6, corner + 3, 500.0], dtype=torch.float64)
    others = torch.tensor([0.0, 0.5], dtype=torch.float64)
    mine = torch.log(others.exp().sum()) - torch.log(torch.expm1(margins))  # so that -log p is the margin
    scores = torch.cat([mine[:, None], others.expand(5, 2)], 1).requires_grad_()
    loss = comp_sum_loss(scores, torch.zeros(5, dtype=torch.long), tau, max_weight=bound, reduction="none")
    start = (bound - 1) / (1 - tau)
    expected = torch.where(
        margins <= corner, torch.expm1((1 - tau) * margins) / (1 - tau), start + bound * (margins - corner)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    weight = torch.exp((1 - tau) * margins).clamp(max=bound)
    p = torch.exp(-margins)
    torch.testing.assert_close(_graded(loss.sum(), scores)[:, 0], -weight * (1 - p), rtol=1e-10, atol=0)


def test_an_infinite_loss_has_a_gradient_without_nan(implementation: str) -> None:
    scores = torch.tensor([[0.0, 100.0, -50.0], [0.0, 1.0, 2.0]], requires_grad=True)
    loss = comp_sum_loss(scores, torch.tensor([0, 0]), 0.0, reduction="none")
    assert loss[0] == math.inf
    assert not _graded(loss.sum(), scores).isnan().any()
    held = comp_sum_loss(scores, torch.tensor([0, 0]), 0.0, max_weight=1e3, reduction="none")
    assert held.isfinite().all()
    assert _graded(held.sum(), scores).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8], ids=str)
def test_targets_of_every_integer_type(dtype: torch.dtype) -> None:
    scores = torch.randn(3, 4)
    assert torch.equal(
        comp_sum_loss(scores, torch.tensor([3, 0, 1], dtype=dtype)), comp_sum_loss(scores, torch.tensor([3, 0, 1]))
    )


def test_nothing_and_everything_ignored(implementation: str) -> None:
    none, ignored = torch.zeros(0, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    for scores, target in ((none, torch.zeros(0, dtype=torch.long)), (ignored, torch.tensor([-100, -100]))):
        assert comp_sum_loss(scores, target).isnan()
        assert comp_sum_loss(scores, target, reduction="sum") == 0
        loss = comp_sum_loss(scores, target, zero_if_empty=True)
        assert loss == 0
        assert torch.equal(_graded(loss, scores), torch.zeros_like(scores))
    weights = torch.zeros(0, 4)
    assert comp_sum_loss(none, weights).isnan()
    assert comp_sum_loss(none, weights, zero_if_empty=True) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gives_a_float32_loss_and_its_own_gradient(implementation: str, dtype: torch.dtype) -> None:
    scores, target = torch.randn(9, 33).to(dtype).requires_grad_(), torch.randint(33, (9,))
    loss = comp_sum_loss(scores, target, 1.3)
    assert loss.dtype is torch.float32
    exact = comp_sum_loss(scores.double(), target, 1.3)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    gradient = _graded(loss, scores)
    assert gradient.dtype is dtype
    torch.testing.assert_close(
        gradient.double(), _graded(exact, scores).double(), rtol=torch.finfo(dtype).eps, atol=1e-7
    )


def test_layouts_give_the_same_loss_and_gradients_in_their_layout(implementation: str) -> None:
    target = torch.randint(5, (2, 3, 4))
    dense = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    strided = torch.randn(2, 5, 3, 8, dtype=torch.float64)[..., ::2]
    expected = comp_sum_loss(dense, target, 1.5, reduction="none")
    last = dense.detach().to(memory_format=torch.channels_last).requires_grad_()
    loss = comp_sum_loss(last, target, 1.5, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    gradient = _graded(loss.sum(), last)
    if implementation != "formula":
        assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, _graded(expected.sum(), dense), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        comp_sum_loss(strided, target, 1.5), comp_sum_loss(strided.contiguous(), target, 1.5), rtol=1e-13, atol=0
    )
    tokens = torch.randn(2, 6, 5, dtype=torch.float64)  # [B, T, V], as language models have them
    classes = torch.randint(5, (2, 6))
    torch.testing.assert_close(
        comp_sum_loss(tokens.transpose(1, 2), classes, 0.5),
        comp_sum_loss(tokens.reshape(12, 5), classes.reshape(12), 0.5),
        rtol=1e-13,
        atol=0,
    )
    columns = torch.randn(5, 6, dtype=torch.float64).t().requires_grad_()
    if implementation != "formula":
        assert _graded(comp_sum_loss(columns, classes[0], 0.5), columns).t().is_contiguous()
    torch.testing.assert_close(
        comp_sum_loss(columns, classes[0], 0.5),
        comp_sum_loss(columns.contiguous(), classes[0], 0.5),
        rtol=1e-13,
        atol=0,
    )


def test_a_tau_for_each_row(implementation: str) -> None:
    scores, target = torch.randn(3, 4, 2, dtype=torch.float64), torch.randint(4, (3, 2))
    taus = torch.tensor([[0.0], [1.0], [2.5]], dtype=torch.float64)
    loss = comp_sum_loss(scores, target, taus, reduction="none")
    for row, tau in enumerate(taus[:, 0].tolist()):
        expected = comp_sum_loss(scores[row : row + 1], target[row : row + 1], tau, reduction="none")
        torch.testing.assert_close(loss[row : row + 1], expected, rtol=1e-13, atol=0)
    weights = scores.softmax(1)
    mixed = comp_sum_loss(scores, weights, taus, reduction="none")
    torch.testing.assert_close(mixed[2:], comp_sum_loss(scores[2:], weights[2:], 2.5, reduction="none"))


def test_weights_are_a_sum_over_labels_and_need_not_sum_to_one() -> None:
    scores = torch.randn(3, 4, dtype=torch.float64)
    weights = torch.tensor([[0.0, 1, 0, 0], [0.5, 0, 2, 0], [0, 0, 0, 0]], dtype=torch.float64)
    expected = sum(weights[:, k] * comp_sum_loss(scores, torch.full((3,), k), 0.5, reduction="none") for k in range(4))
    torch.testing.assert_close(comp_sum_loss(scores, weights, 0.5, reduction="none"), expected)


def test_a_label_without_weight_may_be_impossible() -> None:
    scores = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    loss = comp_sum_loss(scores, torch.tensor([[0.5, 0.5, 0.0]]), 0.5)
    assert loss.isfinite()
    assert _graded(loss, scores).isfinite().all()


def test_loss_of_a_known_cross_entropy(implementation: str) -> None:
    scores, target = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    for tau in (0.0, 1.0, 1.4):
        ours = comp_sum_from_nll(F.cross_entropy(scores, target, reduction="none"), tau)
        expected = comp_sum_loss(scores, target, tau, reduction="none")
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(_graded(ours.sum(), scores), _graded(expected.sum(), scores), rtol=0, atol=1e-13)


def test_near_one_the_slope_in_tau_is_minus_half_the_square() -> None:
    c = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    for step in (1e-9, -1e-9):
        moved = comp_sum_from_nll(c, 1 + step)
        torch.testing.assert_close(moved, c, rtol=1e-6, atol=0)
        torch.testing.assert_close((moved - c) / step, -c.square() / 2, rtol=1e-4, atol=1e-6)


def test_graph_can_be_walked_twice_and_gradient_comes_row_by_row(implementation: str) -> None:
    scores, target = torch.randn(5, 4, requires_grad=True), torch.randint(4, (5,))
    loss = comp_sum_loss(scores, target, 1.5, reduction="none")
    grad = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    kept = grad.clone()
    first = torch.autograd.grad(loss, scores, grad, retain_graph=True)[0]
    again = torch.autograd.grad(loss, scores, grad)[0]
    assert torch.equal(first, again)
    assert torch.equal(grad, kept)
    for row in range(5):
        alone = comp_sum_loss(scores[row : row + 1], target[row : row + 1], 1.5) * grad[row]
        torch.testing.assert_close(first[row], _graded(alone, scores)[row])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, when forward mode first runs
def test_function_transforms_and_forward_mode() -> None:
    scores, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 3, 1])

    def function(scores: Tensor, target: Tensor) -> Tensor:
        return comp_sum_loss(scores, target, 1.3)

    gradient = torch.func.grad(function)(scores, target)
    by_row = torch.func.vmap(torch.func.grad(function))(scores[:, None], target[:, None])
    torch.testing.assert_close(by_row[:, 0] / 3, gradient)
    direction = torch.randn_like(scores)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scores, direction)
        slope = torch.autograd.forward_ad.unpack_dual(function(dual, target)).tangent
    torch.testing.assert_close(slope, (gradient * direction).sum())


def test_smoothing_below_tau_one_warns_once() -> None:
    from zoo.warn import warn_once

    warn_once.cache_clear()
    scores, target = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="label smoothing with tau < 1"):
        comp_sum_loss(scores, target, 0.5, label_smoothing=0.1)
    comp_sum_loss(scores, target, 0.5, label_smoothing=0.1)  # a second warning would be an error


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tau": -0.1}, ValueError, "tau must be finite and not negative, got -0.1"),
        ({"tau": math.nan}, ValueError, "tau must be finite"),
        (
            {"tau": torch.tensor([1.0, -1.0])},
            ValueError,
            r"every tau must be finite and not negative, got \[1.0, -1.0\]",
        ),
        ({"tau": torch.ones(3)}, ValueError, r"tau \(3,\) does not broadcast"),
        ({"rho": 0.0}, ValueError, "rho must be positive"),
        ({"max_weight": 0.5}, ValueError, "max_weight must be at least 1"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
        ({"reduction": "avg"}, ValueError, "reduction must be"),
        ({"aux": "hinge"}, ValueError, "aux must be"),
        ({"backend": "triton"}, ValueError, "backend must be"),
        ({"weight": torch.ones(2)}, ValueError, "weight must hold one factor a class, 3"),
        ({"aux": "rho_margin", "label_smoothing": 0.1}, ValueError, "takes classes for targets"),
        ({"target": torch.tensor([1, 7])}, IndexError, r"target\[1\] is 7, but there are 3 classes"),
        ({"target": torch.tensor([-1, 0])}, IndexError, r"target\[0\] is -1"),
        ({"target": torch.tensor([True, False])}, TypeError, "target must be integer classes"),
        ({"target": torch.zeros(2, dtype=torch.complex64)}, TypeError, "target must be integer classes"),
        ({"target": torch.zeros(2)}, ValueError, r"needs weights like input of shape \(2, 3\), got \(2,\)"),
        ({"target": torch.zeros(3, dtype=torch.long)}, ValueError, r"needs classes of shape \(2,\), got \(3,\)"),
        ({"input": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "input must be floating-point"),
        ({"input": torch.zeros(2, 0)}, ValueError, "at least one class"),
        ({"input": torch.zeros(())}, ValueError, "got a scalar"),
    ],
)
def test_mistakes_are_named(arguments: dict, error: type[Exception], words: str) -> None:
    given = {"input": torch.zeros(2, 3), "target": torch.tensor([0, 2]), **arguments}
    with pytest.raises(error, match=words):
        comp_sum_loss(**given)


def test_mistakes_of_the_small_functions_are_named() -> None:
    with pytest.raises(ValueError, match="q must lie in"):
        tau_from_q(0.0)
    with pytest.raises(ValueError, match="comp_sum_from_nll: tau"):
        comp_sum_from_nll(torch.ones(2), -1.0)
    with pytest.raises(TypeError, match="nll must be floating point"):
        comp_sum_from_nll(torch.ones(2, dtype=torch.long), 1.0)
