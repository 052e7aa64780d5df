"""Losses of adversarial training: the formulas on scores, and what the modules do to a model meanwhile."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.attacks import PGDAttack
from zoo.losses import (
    AdvCompSumLoss,
    PGDATLoss,
    PSALLoss,
    SmoothAdversarialCompSumLoss,
    TradesLoss,
    comp_sum_loss,
    score_difference_norm,
    smooth_adversarial_comp_sum_loss,
)

ALL = (SmoothAdversarialCompSumLoss, AdvCompSumLoss, PSALLoss, TradesLoss, PGDATLoss)
SMOOTH = ALL[:3]


def _scores(rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    clean, attacked = (torch.randn(rows, classes, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return clean, attacked, torch.randint(classes, (rows,))


class Counted(nn.Module):
    """A small network with batch statistics that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.detach().clone())
        return self.net(x)


def _batch(rows: int = 7) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, 1, 4, 4), torch.randint(4, (rows,))


def _attack(seed: int = 1, **more: Any) -> PGDAttack:
    given = {"eps": 0.1, "steps": 3, "generator": torch.Generator().manual_seed(seed), **more}
    return PGDAttack(**given)


# Functions


def test_the_norm_is_over_differences_to_the_target() -> None:
    clean, attacked, target = _scores()
    moved = []
    for row, y in enumerate(target.tolist()):
        differences = [
            (attacked[row, y] - attacked[row, j]).item() - (clean[row, y] - clean[row, j]).item()
            for j in range(5)
            if j != y
        ]
        moved.append(sum(d * d for d in differences))
    square = torch.tensor(moved, dtype=torch.float64)
    torch.testing.assert_close(score_difference_norm(attacked, clean, target, squared=True), square)
    torch.testing.assert_close(score_difference_norm(attacked, clean, target), square.sqrt())


def test_the_norm_of_maps_is_that_of_each_place() -> None:
    clean, attacked = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    target = torch.randint(3, (2, 2, 4))
    flat = score_difference_norm(
        attacked.movedim(1, -1).reshape(16, 3), clean.movedim(1, -1).reshape(16, 3), target.reshape(16)
    )
    torch.testing.assert_close(score_difference_norm(attacked, clean, target), flat.reshape(2, 2, 4))


@pytest.mark.parametrize("squared", [False, True])
def test_derivatives_of_both_orders_for_both_scores(squared: bool) -> None:
    clean, attacked, target = _scores()

    def function(clean: Tensor, attacked: Tensor) -> Tensor:
        return smooth_adversarial_comp_sum_loss(
            clean, attacked, target, tau=0.7, rho=0.5, nu=0.8, squared=squared, reduction="none"
        )

    assert torch.autograd.gradcheck(function, (clean, attacked))
    assert torch.autograd.gradgradcheck(function, (clean, attacked))


@pytest.mark.parametrize("squared", [False, True])
def test_equal_scores_have_no_penalty_and_no_gradient_of_it(squared: bool) -> None:
    clean, _, target = _scores()
    same = clean.detach().clone().requires_grad_()
    penalty = score_difference_norm(same, clean, target, squared=squared)
    assert torch.equal(penalty, torch.zeros(6, dtype=torch.float64))
    for gradient in torch.autograd.grad(penalty.sum(), (same, clean)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_shift_of_all_scores_changes_nothing() -> None:
    clean, attacked, target = _scores()
    expected = smooth_adversarial_comp_sum_loss(clean, attacked, target, nu=2.0)
    for shifted in ((clean + 3, attacked), (clean, attacked - 5)):
        torch.testing.assert_close(smooth_adversarial_comp_sum_loss(*shifted, target, nu=2.0), expected)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("aux", ["exp", "rho_logistic"])
def test_only_the_strength_matters(aux: str, squared: bool) -> None:
    clean, attacked, target = _scores()
    rho, nu = 0.3, 6.0
    options = {"tau": 0.5, "aux": aux, "squared": squared}
    ours = smooth_adversarial_comp_sum_loss(clean, attacked, target, rho=rho, nu=nu, **options)
    strength = nu * rho**2 if squared else nu * rho
    scaled = smooth_adversarial_comp_sum_loss(clean / rho, attacked / rho, target, nu=strength, **options)
    torch.testing.assert_close(ours, scaled, rtol=1e-12, atol=0)


def test_without_penalty_it_is_cross_entropy() -> None:
    clean, attacked, target = _scores()
    ours = smooth_adversarial_comp_sum_loss(clean, attacked, target, nu=0.0)
    torch.testing.assert_close(ours, F.cross_entropy(clean, target), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("aux", ["exp", "rho_logistic"])
def test_with_nu_large_enough_it_bounds_the_adversarial_loss(aux: str, tau: float) -> None:
    rho, classes = 0.6, 5
    clean, attacked = (2 * torch.randn(500, classes, dtype=torch.float64) for _ in range(2))
    target = torch.randint(classes, (500,))
    adversarial = comp_sum_loss(attacked, target, tau, aux="rho_margin", rho=rho, reduction="none")

    def bound(nu: float) -> Tensor:
        return smooth_adversarial_comp_sum_loss(
            clean, attacked, target, tau=tau, rho=rho, nu=nu, aux=aux, reduction="none"
        )

    assert (bound((classes - 1) ** 0.5 / rho) >= adversarial).all()
    assert not (bound(0.0) >= adversarial).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nu": -1.0}, "nu must be finite and not negative, got -1.0"),
        ({"tau": -1.0}, "tau must be finite"),
        ({"rho": 0.0}, "rho must be positive"),
        ({"reduction": "avg"}, "reduction must be"),
        ({"input_adv": torch.zeros(2, 4)}, r"both scores must be \[N, C, ...\]"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "needs classes of shape"),
    ],
)
def test_mistakes_are_named(arguments: dict, words: str) -> None:
    given = {"input": torch.zeros(2, 3), "input_adv": torch.zeros(2, 3), "target": torch.tensor([0, 2]), **arguments}
    with pytest.raises(ValueError, match=words):
        smooth_adversarial_comp_sum_loss(**given)


# Modules


@pytest.mark.parametrize("cls", ALL)
def test_the_loss_is_the_formula_at_what_the_attack_found(cls: type[Any]) -> None:
    model, (x, y) = Counted().eval(), _batch()
    made = cls(_attack())
    with torch.no_grad():
        made_nu = 0.4
        if hasattr(made, "nu"):
            made.nu = made_nu
    out = made(model, x, y)
    assert (out.x_adv - x).abs().max() <= 0.1 + 1e-6
    assert not torch.equal(out.x_adv, x)
    z, z_adv = model(x), model(out.x_adv)
    torch.testing.assert_close(out.logits_adv, z_adv)
    if cls is PGDATLoss:
        torch.testing.assert_close(out.loss, F.cross_entropy(z_adv, y))
        assert out.logits is None
        return
    assert out.logits is not None
    torch.testing.assert_close(out.logits, z)
    if cls is TradesLoss:
        p, q = z.softmax(1), z_adv.softmax(1)
        expected = F.cross_entropy(z, y) + 6 * (p * (p.log() - q.log())).sum(1).mean()
    else:
        aux, squared = ("rho_logistic" if cls is PSALLoss else "exp"), cls is not SmoothAdversarialCompSumLoss
        tau = 0.0 if cls is PSALLoss else 1.0
        expected = smooth_adversarial_comp_sum_loss(z, z_adv, y, tau=tau, nu=made_nu, aux=aux, squared=squared)
    torch.testing.assert_close(out.loss, expected)
    weight = out.loss.new_tensor(6.0 if cls is TradesLoss else made_nu)
    torch.testing.assert_close(out.clean_loss + weight * out.penalty, out.loss)


@pytest.mark.parametrize("cls", ALL)
def test_the_attack_leaves_no_gradient_and_the_loss_reaches_every_parameter(cls: type[Any]) -> None:
    model, (x, y) = Counted(), _batch()
    out = cls(_attack())(model, x, y)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_calls_of_the_model_are_the_steps_and_two() -> None:
    x, y = _batch()
    for cls, objective, expected in (
        (AdvCompSumLoss, "score_difference", 3 + 2),
        (PGDATLoss, "ce", 3 + 1),
        (TradesLoss, "kl", 3 + 2),
    ):
        model = Counted()
        cls(_attack(objective=objective))(model, x, y)
        assert len(model.calls) == expected, cls
    model = Counted()
    clean = model(x)
    AdvCompSumLoss(_attack())(model, x, y, clean_logits=clean)
    assert len(model.calls) == 1 + 3 + 1
    model = Counted()  # likewise the clean scores of an attack on the running statistics
    AdvCompSumLoss(_attack(bn="eval"))(model, x, y)
    assert len(model.calls) == 1 + 1 + 3 + 1
    model = Counted()  # TRADES' own attack sees the running statistics, so that its clean scores are others
    TradesLoss(_attack(bn="eval", objective="kl"))(model, x, y)
    assert len(model.calls) == 1 + 3 + 2


@pytest.mark.parametrize("statistics", ["adversarial", "clean", "both"])
def test_running_statistics_follow_the_pass_that_was_chosen(statistics: str) -> None:
    model, (x, y) = Counted(), _batch()
    twin = copy.deepcopy(model)
    out = AdvCompSumLoss(_attack(), statistics=statistics)(model, x, y)
    passes = {"adversarial": [out.x_adv], "clean": [x], "both": [x, out.x_adv]}[statistics]
    for seen in passes:
        twin(seen)
    for (name, buffer), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_trades_updates_with_both_passes_and_pgd_at_with_its_one() -> None:
    x, y = _batch()
    for cls, passes in ((TradesLoss, 2), (PGDATLoss, 1)):
        model = Counted()
        cls(_attack(bn="eval"))(model, x, y)
        assert model.net[2].num_batches_tracked == passes


def test_trades_attacks_with_the_statistics_from_before_the_step() -> None:
    model, (x, y) = Counted(), _batch()
    model.net[2].running_mean.fill_(0.3)
    before = copy.deepcopy(model)
    out = TradesLoss(_attack(bn="eval", objective="kl"))(model, x, y)
    expected = _attack(bn="eval", objective="kl")(before, x, y)
    assert torch.equal(out.x_adv, expected)


def test_a_ball_of_radius_0_gives_no_penalty_and_finite_gradients() -> None:
    model, (x, y) = Counted().eval(), _batch()
    out = SmoothAdversarialCompSumLoss(_attack(eps=0.0))(model, x, y)
    assert out.penalty == 0
    out.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: str) -> None:
    model, (x, y) = Counted().eval(), _batch()
    out = AdvCompSumLoss(_attack(), reduction=reduction)(model, x, y)
    every = AdvCompSumLoss(_attack(), reduction="none")(model, x, y)
    assert every.loss.shape == (7,)
    for got, terms in zip(out[:3], every[:3], strict=True):
        expected = {"mean": terms.mean(), "sum": terms.sum(), "none": terms}[reduction]
        torch.testing.assert_close(got, expected)


def test_tau_nu_beta_and_the_radius_can_be_set_while_in_use() -> None:
    model, (x, y) = Counted().eval(), _batch()
    loss = AdvCompSumLoss(_attack(), nu=0.0)
    loss.tau = 2.0
    torch.testing.assert_close(loss(model, x, y).loss, comp_sum_loss(model(x), y, 2.0))
    loss.nu, loss.attack.eps = 1.0, 0.0
    assert loss(model, x, y).penalty == 0
    trades = TradesLoss(_attack())
    trades.beta = 0.0
    torch.testing.assert_close(trades(model, x, y).loss, F.cross_entropy(model(x), y))


def test_tau_travels_through_checkpoints_and_keeps_its_precision() -> None:
    for made, fresh in (
        (zoo.CompSumLoss(0.7), zoo.CompSumLoss()),
        (AdvCompSumLoss(tau=0.7), AdvCompSumLoss()),
    ):
        fresh.load_state_dict(made.state_dict())
        assert fresh.tau == 0.7
        assert fresh.half().tau == 0.7
        assert fresh.tau_state.dtype is torch.float64
        assert float(fresh.tau_state) == 0.7


@pytest.mark.parametrize("cls", ALL)
def test_modules_copy_and_pickle(cls: type[Any]) -> None:
    made = cls({"eps": 0.1, "steps": 2})
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(twin) == repr(made)
        twin.attack.eps = 0.3
        assert made.attack.eps == 0.1


def test_an_attack_by_default_by_arguments_and_by_preset() -> None:
    assert TradesLoss().attack == PGDAttack.trades()
    assert PGDATLoss().attack == PGDAttack.madry()
    assert AdvCompSumLoss().attack == PGDAttack.adv_comp_sum()
    assert TradesLoss({"eps": 0.1, "steps": 2}).attack == PGDAttack.trades(eps=0.1, steps=2)
    assert PSALLoss({"preset": "madry", "steps": 2}).attack == PGDAttack.madry(steps=2)


@pytest.mark.parametrize("name", zoo.list("loss", tag="adversarial"))
def test_every_name_builds_and_refuses_misspellings(name: str) -> None:
    made = zoo.create("loss", name)
    assert isinstance(made, ALL)
    assert repr(made).startswith(f"{type(made).__name__}(PGDAttack")
    with pytest.raises(zoo.ComponentArgumentError, match="no argument 'no_such_thing'"):
        zoo.create("loss", name, no_such_thing=1)
    with pytest.raises(zoo.ComponentArgumentError, match="stpes"):
        zoo.create("loss", name, attack={"stpes": 3})


def test_modules_refuse_what_cannot_be() -> None:
    for cls in SMOOTH:
        with pytest.raises(ValueError, match=f"{cls.__name__}: nu must be finite"):
            cls(nu=-1.0)
        with pytest.raises(ValueError, match=f"{cls.__name__}: statistics must be"):
            cls(statistics="batch")
    with pytest.raises(ValueError, match="beta must be finite"):
        TradesLoss(beta=-1.0)
    model, (x, y) = Counted(), _batch()
    with pytest.raises(ValueError, match="bounds"):
        AdvCompSumLoss(_attack())(model, 3 * x, y)
