"""APGD: its schedule, what it finds beside PGD and brute force, and that only what still resists is attacked."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests._numerics import assert_close
from tests.attacks.models import WithoutSlope, linear, normalised, pictures, trained
from zoo.attacks import APGDAttack, PGDAttack, mini_autoattack
from zoo.attacks.apgd import _checkpoints, _Climb
from zoo.attacks.ball import Ball
from zoo.attacks.objectives import ce, is_correct, margin

EPS = {"linf": 0.09, "l2": 0.45}


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor, Tensor]:
    return trained()


def test_checkpoints_are_the_papers() -> None:
    # p_1 = 0.22, then 0.19, 0.16, 0.13, 0.10, 0.07, 0.06 further (section 3.2)
    assert _checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert _checkpoints(10) == [3, 5, 6, 7, 8, 9, 10, 10]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_move_is_three_quarters_step_and_a_quarter_momentum(norm: str) -> None:
    """Algorithm 1, far from the ball's edge: x + 0.75 (z - x) + 0.25 (x - x_before), z = x + size * direction."""
    x, none = torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool)
    gradient = torch.tensor([[3.0, -4.0]])
    ball = Ball(x, 5.0, norm, None, None)
    climb = _Climb(x, torch.zeros(1), gradient, none, 0.5, x, torch.zeros(1, dtype=torch.long), None)
    direction = torch.tensor([[1.0, -1.0]] if norm == "linf" else [[0.6, -0.8]])
    assert_close(climb.ahead(ball, first=True), direction)  # the first step is 2 eps
    climb.move(torch.tensor([[0.4, 0.8]]), torch.ones(1), gradient, none)
    expected = torch.tensor([[0.4, 0.8]]) + 0.75 * direction + 0.25 * torch.tensor([[0.4, 0.8]])
    assert_close(climb.ahead(ball, first=False), expected)


@pytest.mark.parametrize(
    ("rises", "halved", "risen", "halves"),
    [
        (8, False, True, False),  # 8 of 10 are enough for rho = 0.75
        (7, False, True, True),  # condition 1
        (8, False, False, True),  # condition 2: the best is the one of the last checkpoint
        (8, True, False, False),  # but the step was halved there
    ],
)
def test_steps_are_halved_on_the_papers_conditions(rises: int, halved: bool, risen: bool, halves: bool) -> None:
    x, none = torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool)
    climb = _Climb(x, torch.zeros(1), x, none, 0.5, x, torch.zeros(1, dtype=torch.long), None)
    climb.move(x + 1, torch.ones(1), x + 3, none)  # the best
    climb.move(x + 2, torch.full((1,), 0.5), x + 4, none)
    climb.rises, climb.halved = torch.full((1,), float(rises)), torch.tensor([halved])
    if not risen:
        climb.checked_value = climb.best_value
    climb.halve_where(0.75 * 10)
    assert climb.size.item() == (0.5 if halves else 1.0)
    assert climb.point[0, 0] == (1 if halves else 2)
    assert climb.gradient[0, 0] == (3 if halves else 4)
    assert climb.value == (1 if halves else 0.5)
    assert climb.halved.item() == halves
    assert climb.rises == 0
    assert climb.checked_value == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("loss", "more"), [("ce", 0), ("dlr_targeted", 0), ("dlr", 6)])
def test_apgd_fools_as_many_as_pgd_40(network, norm: str, loss: str, more: int) -> None:
    """Of the same 200; sample by sample two heuristics may differ, and the untargeted DLR be a little behind."""
    model, x, y = network
    eps = EPS[norm]
    pgd = PGDAttack(norm, eps=eps, steps=40, objective="margin", bn="eval", keep_best=True)
    resists_pgd = is_correct(model(pgd(model, x, y)), y)
    resists = is_correct(model(APGDAttack(norm, eps, loss=loss)(model, x, y)), y)
    clean = is_correct(model(x), y)
    assert clean.float().mean() > 0.85
    assert 0.1 < resists_pgd.float().mean() < clean.float().mean() - 0.1  # else there is nothing to compare
    assert resists.sum() <= resists_pgd.sum() + more


def test_the_targeted_loss_is_at_least_as_strong_as_the_others(network) -> None:
    model, x, y = network
    left = {
        loss: is_correct(model(APGDAttack("linf", EPS["linf"], loss=loss)(model, x, y)), y).sum()
        for loss in ("ce", "dlr", "dlr_targeted")
    }
    assert left["dlr_targeted"] <= min(left["ce"], left["dlr"])


def test_targeted_apgd_decides_a_linear_model_exactly() -> None:
    """In linf class t beats y within the ball iff z_t - z_y + eps |w_t - w_y|_1 > 0: a brute force over all classes."""
    model = linear(6, 12)
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.rand(300, 12, generator=generator), 0.03
    logits = model(x)
    y = logits.argmax(1)
    distance = (model.weight[y].unsqueeze(1) - model.weight).abs().sum(2)
    reach = logits - logits.gather(1, y.unsqueeze(1)) + eps * distance
    worst = reach.scatter(1, y.unsqueeze(1), -math.inf).amax(1)
    decided = worst.abs() > 1e-3
    assert (worst < 0).sum() > 50
    assert (worst > 0).sum() > 50
    attack = APGDAttack("linf", eps, steps=30, loss="dlr_targeted", bounds=None)
    assert torch.equal(is_correct(model(attack(model, x, y)), y)[decided], (worst < 0)[decided])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sample_that_resists_comes_back_at_its_largest_loss(norm: str) -> None:
    model = linear(2, 8)
    x = torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    eps = 0.01
    direction = (model.weight[0] - model.weight[1]) * (2 * y - 1).unsqueeze(1)
    unit = direction.sign() if norm == "linf" else direction / direction.norm(dim=1, keepdim=True)
    worst = x + eps * unit
    resisting = margin(model(worst), y) < 0
    assert resisting.sum() > 10
    found = APGDAttack(norm, eps, steps=50, bounds=None)(model, x, y)
    assert_close(margin(model(found), y)[resisting], margin(model(worst), y)[resisting], loose=20)


def test_steps_are_halved_where_progress_stops() -> None:
    """On a quadratic whose optimum lies inside the ball fixed steps of 2 eps jump about it; halved ones arrive."""

    class Bowl(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lead = 2 + (x - 0.53).square().sum(1)
            return torch.stack([lead, torch.zeros_like(lead)], 1)

    x = torch.full((4, 5), 0.5)
    found = APGDAttack("linf", 0.1, steps=100)(Bowl(), x, torch.zeros(4, dtype=torch.long))
    assert (found - 0.53).abs().max() < 2e-3
    short = APGDAttack("linf", 0.1, steps=3)(Bowl(), x, torch.zeros(4, dtype=torch.long))
    assert (short - 0.53).abs().max() > 1e-2


def test_only_samples_that_resist_are_attacked_further() -> None:
    sizes: list[int] = []
    model = linear(4, 8)
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    x = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    wrong = torch.arange(50) < 5
    y[wrong] = (y[wrong] + 1) % 4
    sizes.clear()
    x_adv = APGDAttack("linf", 0.1, steps=20, restarts=2, bounds=None)(model, x, y)
    assert torch.equal(x_adv[wrong], x[wrong])
    assert sizes[:2] == [50, 45]
    assert sizes == sorted(sizes, reverse=True)
    left = int(is_correct(model(x_adv), y).sum())
    assert 0 < left < 45
    assert sizes[-2] == left
    everything = APGDAttack("linf", 3.0, steps=20, restarts=5, bounds=None)
    sizes.clear()
    everything(model, x, y)
    assert len(sizes) <= 1 + 6  # the clean scores, the start and the way to the first checkpoint


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attacked_inputs_lie_in_ball_and_bounds(norm: str, dtype: torch.dtype) -> None:
    x, y = pictures(8)
    model, eps = normalised().to(dtype), 0.2 if norm == "linf" else 0.9
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    x_adv = APGDAttack(norm, eps, steps=8, restarts=2)(model, x, y)
    offset = x_adv - x
    assert (offset.abs().max() if norm == "linf" else offset.flatten(1).norm(dim=1).max()) <= eps + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (x_adv.dtype, x_adv.stride()) == (dtype, x.stride())


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_the_model_is_left_as_it_was(bn: str) -> None:
    model, (x, y) = normalised(), pictures()
    before, flags = copy.deepcopy(model.state_dict()), [layer.training for layer in model.modules()]
    with torch.inference_mode():
        APGDAttack(steps=5, bn=bn)(model, x, y)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == [layer.training for layer in model.modules()]


def test_a_generator_alone_decides() -> None:
    model, (x, y) = normalised(), pictures()
    y = model.eval()(x).argmax(1)
    found = []
    for seed, of_the_world in ((1, 1), (1, 2), (2, 2)):
        torch.manual_seed(of_the_world)
        attack = APGDAttack("l2", 0.1, steps=5, generator=torch.Generator().manual_seed(seed))
        found.append(attack(model, x, y))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_nan_scores_of_one_sample_do_not_reach_the_others() -> None:
    class Spoiled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = inner(x)
            # only away from the clean input, so that the sample is attacked at all
            spoiled = (x[:, 0] != first[0]) & ((x[:, 1] - first[1]).abs() < 0.05)
            return torch.where(spoiled.unsqueeze(1), torch.nan, logits)

    inner, x = linear(4, 8), torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    x[1:, 1] += 0.5
    x[0, 1] = 0.2
    first = x[0].clone()
    y = inner(x).argmax(1)
    found = [
        APGDAttack("linf", 0.01, steps=12, generator=torch.Generator().manual_seed(0))(model, x, y)
        for model in (inner, Spoiled())
    ]
    assert found[1].isfinite().all()
    assert not torch.equal(found[0], x)
    assert torch.equal(found[0][1:], found[1][1:])
    assert Spoiled()(found[1])[0].isnan().all()  # a NaN counts as fooled


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sample_of_nan_gradients_is_not_counted_as_fooled(norm: str) -> None:
    model, x = WithoutSlope(), torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) * 0.4
    y = model(x).argmax(1)
    x_adv = APGDAttack(norm, 1e-4, steps=10)(model, x, y)
    assert x_adv.isfinite().all()
    assert is_correct(model(x_adv), y).sum() > 15


def test_a_point_that_fools_is_kept_beside_better_losses() -> None:
    class Deceiving(nn.Module):
        """Wrong in the middle alone, where the cross-entropy is not the largest: steps lead past it to the right."""

        def forward(self, x: Tensor) -> Tensor:
            left, middle, right = (
                torch.tensor(p).log() for p in ([0.9, 0.05, 0.05], [0.48, 0.51, 0.01], [0.4, 0.3, 0.3])
            )
            score = torch.where(x < 0.52, left, torch.where(x < 0.58, middle, right))
            return score - 0.1 * x * torch.tensor([1.0, 0.0, 0.0])

    x = torch.full((60, 1), 0.5)
    found = APGDAttack("linf", 0.1, steps=10)(Deceiving(), x, torch.zeros(60, dtype=torch.long))
    fooled = (found > 0.52) & (found < 0.58)  # where the start was there
    assert 5 < fooled.sum() < 40
    assert_close(found[~fooled], torch.full_like(found[~fooled], 0.6))


def test_the_best_of_the_runs_counts(network) -> None:
    model, x, y = network
    options = {"eps": 0.01, "steps": 3, "bounds": None}
    x, y = x[margin(model(x), y) < -3], y[margin(model(x), y) < -3]
    joint = APGDAttack(**options, restarts=3, generator=torch.Generator().manual_seed(0))(model, x, y)
    generator = torch.Generator().manual_seed(0)
    alone = [APGDAttack(**options, generator=generator)(model, x, y) for _ in range(3)]
    losses = torch.stack([ce(model(x_adv), y) for x_adv in alone])
    assert all(is_correct(model(x_adv), y).all() for x_adv in alone)
    assert len(x) > 50
    assert set(losses.argmax(0).tolist()) == {0, 1, 2}
    assert torch.equal(ce(model(joint), y), losses.amax(0))


def test_empty_balls_and_batches() -> None:
    model, x = linear(4, 8), torch.rand(3, 8)
    y = model(x).argmax(1)
    assert torch.equal(APGDAttack("linf", 0.0)(model, x, y), x)
    assert APGDAttack()(model, x[:0], y[:0]).shape == (0, 8)


def test_target_classes_are_the_most_likely_wrong_ones() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0], [0.0, 4.0, 1.0, 2.0, 3.0]])
    targets = APGDAttack(loss="dlr_targeted", n_target_classes=3)._targets(logits, torch.tensor([0, 1]))
    assert torch.stack(targets).tolist() == [[2, 4], [1, 3], [3, 2]]
    assert len(APGDAttack(loss="dlr_targeted")._targets(logits, torch.tensor([0, 1]))) == 4


def test_the_mini_autoattack_is_apgd_on_two_losses() -> None:
    found = mini_autoattack(0.5, norm="l2", bounds=None)
    assert {
        name: (a.norm, a.eps, a.steps, a.restarts, a.loss, a.n_target_classes, a.bounds) for name, a in found.items()
    } == {
        "apgd-ce": ("l2", 0.5, 100, 1, "ce", 9, None),
        "apgd-t": ("l2", 0.5, 100, 1, "dlr_targeted", 9, None),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"loss": "margin"}, "loss must be one of ce, dlr, dlr_targeted, got 'margin'"),
        ({"eps": -1.0}, "eps must be finite and not negative, got -1.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"n_target_classes": 0}, "n_target_classes must be at least 1, got 0"),
        ({"rho": 1.0}, r"rho must lie in \(0, 1\), got 1.0"),
        ({"bn": "frozen"}, "bn must be one of eval, batch, train, got 'frozen'"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^APGDAttack: {message}"):
        APGDAttack(**arguments)


def test_calls_it_cannot_answer_are_errors() -> None:
    model, x = linear(3, 8), torch.rand(4, 8)
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match="needs at least 4 classes to scale the margin, got 3; use"):
        APGDAttack(loss="dlr_targeted")(model, x, y)
    with pytest.raises(ValueError, match="APGDAttack: needs the classes y, got NoneType"):
        APGDAttack()(model, x, None)
    with pytest.raises(ValueError, match="APGDAttack: x must lie within bounds"):
        APGDAttack()(model, x + 1, y)
