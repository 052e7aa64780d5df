"""PGD: what it finds on models whose worst case is known, where it stays, and what it leaves behind."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests._numerics import assert_close
from tests.attacks.models import WithoutSlope, linear, normalised, pictures
from zoo.attacks import PGDAttack
from zoo.attacks.ball import Ball
from zoo.attacks.pgd import better
from zoo.warn import warn_once

CLASSES, INPUTS, SAMPLES, EPS = 4, 8, 40, 0.3


def _centres(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(samples, INPUTS, generator=generator), torch.arange(samples) % CLASSES


def _largest_differences(model: nn.Linear, y: Tensor, norm: str) -> Tensor:
    """sup |A delta| over the ball, A_j = w_y - w_j: at a singular vector in l2, at a vertex in linf."""
    leads = [model.weight[k] - model.weight for k in y.tolist()]
    if norm == "l2":
        return torch.stack([EPS * torch.linalg.matrix_norm(a, 2) for a in leads])
    vertices = EPS * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=INPUTS)))
    return torch.stack([(vertices @ a.T).norm(dim=1).max() for a in leads])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_finds_the_largest_score_difference_of_a_linear_model(norm: str) -> None:
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    exact = _largest_differences(model, y, norm)
    thorough = PGDAttack(norm, eps=EPS, steps=40, step_ratio=0.25, restarts=10, bounds=None)
    found = thorough.perturb(model, x, y).objective.sqrt()
    assert (found >= 0.999 * exact).all()
    assert (found <= 1.00001 * exact).all()
    quick = PGDAttack(norm, eps=EPS, bounds=None)
    assert (quick.perturb(model, x, y).objective.sqrt() / exact).mean() >= 0.90


@pytest.mark.parametrize("objective", ["margin", "ce"])
@pytest.mark.parametrize("rule", ["sign", "adam"])
def test_pgd_finds_the_worst_margin_of_two_linear_classes(objective: str, rule: str) -> None:
    model, (x, _) = linear(2, INPUTS), _centres()
    y = torch.arange(SAMPLES) % 2
    attack = PGDAttack(eps=EPS, step_rule=rule, step_size=0.1, objective=objective, bounds=None)
    worst = x - (1 - 2 * y.unsqueeze(1)) * EPS * (model.weight[0] - model.weight[1]).sign()
    assert_close(attack(model, x, y), worst)


ATTACKS = {
    "linf": PGDAttack(eps=0.2),
    "l2": PGDAttack("l2", eps=0.9),
    "gaussian": PGDAttack.trades(eps=0.0005),
    "adam": PGDAttack.gowal_train(eps=0.2),
    "eval": PGDAttack.gowal_eval(eps=0.2, restarts=2, steps=6),
    "fgsm": PGDAttack.fgsm_rs(eps=0.2),
    "l2 sign": PGDAttack("l2", eps=0.9, step_rule="sign"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attacked_inputs_lie_in_ball_and_bounds(attack: PGDAttack, dtype: torch.dtype) -> None:
    x, y = pictures(8)
    x = x.to(dtype).clamp(0.0, 0.9).contiguous(memory_format=torch.channels_last)
    x[0] = 0.0  # at a corner of the bounds
    x_adv = attack(normalised().to(dtype), x, y)
    offset = x_adv - x
    assert offset.abs().amax((1, 2, 3)).min() > 0
    sizes = offset.abs() if attack.norm == "linf" else offset.flatten(1).norm(dim=1)
    assert sizes.max() <= attack.eps + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert x_adv.dtype == dtype
    assert x_adv.stride() == x.stride()
    assert not x_adv.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_uniform_in_the_ball(norm: str) -> None:
    ball = Ball(torch.zeros(20000, 3), 2.0, norm, None, torch.Generator().manual_seed(0))
    point = ball.start("uniform")
    radius = (point.abs().amax(1) if norm == "linf" else point.norm(dim=1)) / 2
    assert radius.max() <= 1 + 1e-6
    # volume within radius r is r^3, in every octant alike
    assert abs(radius.pow(3).mean() - 0.5) < 0.01
    assert abs(radius.pow(3).var() - 1 / 12) < 0.003
    assert (point > 0).float().mean(0).sub(0.5).abs().max() < 0.02


def test_values_at_the_edge_of_the_bounds_stay_where_rounding_put_them() -> None:
    x = torch.tensor([[1 + 5e-7, -5e-7]])
    assert torch.equal(Ball(x, 0.1, "linf", (0.0, 1.0), None).project(x), x)


@pytest.mark.parametrize("bn", ["eval", "batch"])
@pytest.mark.parametrize("freeze", [True, False])
def test_the_model_is_left_as_it_was(bn: str, freeze: bool) -> None:
    model, (x, y) = normalised(), pictures()
    before, flags = copy.deepcopy(model.state_dict()), [layer.training for layer in model.modules()]
    recorded = model[0](x).sum()  # a graph from before
    PGDAttack(bn=bn, freeze=freeze, steps=2).perturb(model, x, y)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == [layer.training for layer in model.modules()]
    assert not x.requires_grad
    recorded.backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("freeze", [True, False])
def test_parameters_are_frozen_within(freeze: bool) -> None:
    class Asking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight.requires_grad)
            return super().forward(x)

    seen: list[bool] = []
    PGDAttack(freeze=freeze, steps=2)(Asking(3, 3), torch.rand(2, 3), torch.tensor([0, 1]))
    assert set(seen) == {not freeze}
    assert len(seen) == 3  # the clean scores once, then one pass a step


def test_the_model_is_restored_after_an_error_inside_it() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("inside")

    model, (x, y) = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(), Failing(), nn.Linear(1, 1)), pictures()
    with pytest.raises(KeyError, match="inside"):
        PGDAttack()(model, x, y)
    assert all(layer.training for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model[0].num_batches_tracked == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_runs_inside_no_grad_and_inference_mode(context) -> None:
    model, (x, y) = normalised(), pictures()
    wanted = PGDAttack(generator=torch.Generator().manual_seed(0)).perturb(model, x, y)
    with context():
        inside = x.clone(), y.clone(), model.eval()(x).clone()  # inference tensors
        model.train()
        model[3].eval()
        assert inside[0].is_inference() == (context is torch.inference_mode)
        attack = PGDAttack(generator=torch.Generator().manual_seed(0))
        found = attack.perturb(model, *inside[:2])
        attack(model, *inside[:2], clean_logits=inside[2])
    assert torch.equal(found.x_adv, wanted.x_adv)
    assert torch.equal(found.objective, wanted.objective)
    assert not found.x_adv.is_inference()


def test_parameters_made_in_inference_mode_are_an_error() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="made in inference mode; build or load the model outside"):
        PGDAttack()(model, torch.rand(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("attack", [PGDAttack(), PGDAttack("l2"), PGDAttack.trades()], ids=["linf", "l2", "gaussian"])
def test_a_generator_alone_decides(attack: PGDAttack) -> None:
    model, (x, y) = normalised(), pictures()
    found = []
    for seed, of_the_world in ((1, 1), (1, 2), (2, 2)):
        torch.manual_seed(of_the_world)
        before = torch.get_rng_state()
        attack.generator = torch.Generator().manual_seed(seed)
        found.append(attack(model, x, y))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_without_a_generator_the_global_stream_decides() -> None:
    model, (x, y) = normalised(), pictures()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(PGDAttack()(model, x, y))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_given_clean_logits_spare_a_pass_and_change_nothing() -> None:
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    without = PGDAttack(generator=torch.Generator().manual_seed(0))(model, x, y)
    assert len(calls) == 11
    clean = model(x)
    given = PGDAttack(generator=torch.Generator().manual_seed(0))(model, x, y, clean_logits=clean)
    assert len(calls) == 22
    assert torch.equal(without, given)


def test_steps_shorten_as_told() -> None:
    lengths = PGDAttack(steps=40, step_size=0.1, step_decay={0.5: 0.1, 0.75: 0.01})._step_lengths()
    assert lengths == pytest.approx([0.1] * 20 + [0.01] * 10 + [1e-4] * 10)
    assert PGDAttack.gowal_eval()._step_lengths() == pytest.approx(lengths)
    assert PGDAttack.gowal_train()._step_lengths() == pytest.approx([0.1] * 5 + [0.01] * 5)
    assert PGDAttack()._step_lengths() == pytest.approx([2 / 255] * 10)


def test_steps_are_taken_at_the_lengths_they_have() -> None:
    model, (x, _) = linear(2, INPUTS), _centres()
    options = {"objective": "margin", "random_start": None, "bounds": None, "eps": 1.0}
    attack = PGDAttack(**options, steps=4, step_size=0.01, step_decay={0.5: 0.1})
    offset = attack(model, x, torch.zeros(SAMPLES, dtype=torch.long)) - x
    assert_close(offset.abs(), torch.full_like(offset, 0.022), loose=10)


def test_of_two_points_the_better_counts_and_nan_is_the_worst() -> None:
    first, second = torch.tensor([1.0, 2.0, 1.0, math.nan, math.nan]), torch.tensor([2.0, 1.0, math.nan, 1.0, math.nan])
    x = torch.zeros(5, 3)
    chosen, logits, values = better((x, x, first), (x + 1, x + 1, second))
    assert chosen[:, 0].tolist() == [1, 0, 0, 1, 0]
    assert torch.equal(chosen, logits)
    assert values[:4].tolist() == [2, 2, 1, 1]


def test_a_ratio_follows_a_ramp_of_eps_and_a_size_does_not() -> None:
    for attack, wanted in ((PGDAttack(step_ratio=0.5), 0.05), (PGDAttack(step_size=0.2), 0.2), (PGDAttack(), 0.025)):
        attack.eps = 0.1
        assert attack._step_lengths()[0] == pytest.approx(wanted)


def test_the_first_adam_step_is_its_whole_length() -> None:
    x, y = _centres()
    attack = PGDAttack.gowal_train(objective="ce", steps=1, step_decay=None, eps=1.0, bounds=None, step_size=0.1)
    attack.random_start = None
    offset = attack(linear(CLASSES, INPUTS), x, y) - x
    assert_close(offset.abs(), torch.full_like(offset, 0.1), loose=10)


def test_a_sample_without_gradient_stays_in_linf_and_moves_in_l2() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    x, y = torch.full((2, 3), 0.5), torch.tensor([0, 1])
    assert torch.equal(PGDAttack(objective="ce", random_start=None)(model, x, y), x)
    moved = PGDAttack("l2", objective="ce", random_start=None, eps=0.1)(model, x, y) - x
    assert_close(moved.norm(dim=1), torch.full((2,), 0.1), loose=10)


def test_tiny_gradients_have_a_direction() -> None:
    model = linear(2, INPUTS)
    with torch.no_grad():
        model.weight.mul_(1e-25)
    x, y = _centres()
    y = y % 2
    moved = PGDAttack("l2", eps=EPS, objective="margin", random_start=None, bounds=None)(model, x, y) - x
    towards = (model.weight[1] - model.weight[0]) * 1e25 * (1 - 2 * y.unsqueeze(1))
    assert_close(moved / EPS, towards / towards.norm(dim=1, keepdim=True), loose=10)


def test_keep_best_is_the_best_of_the_run_and_restarts_the_best_of_runs() -> None:
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    seen: list[Tensor] = []

    def watched(logits: Tensor, y: Tensor, clean: Tensor) -> Tensor:
        values = (logits - clean).mul(30).sin().sum(1)  # many maxima
        seen.append(values.detach())
        return values

    options = {"objective": watched, "eps": EPS, "step_size": 0.1, "bounds": None}
    best = PGDAttack(**options, keep_best=True).perturb(model, x, y)
    assert torch.equal(best.objective, torch.stack(seen).amax(0))
    assert not torch.equal(best.objective, seen[-1])
    assert_close(watched(model(best.x_adv), y, model(x)), best.objective, loose=100)
    assert_close(model(best.x_adv).detach(), best.logits_adv, loose=10)
    seen.clear()
    several = PGDAttack(**options, restarts=3).perturb(model, x, y)
    assert torch.equal(several.objective, torch.stack(seen[10::11]).amax(0))
    seen.clear()
    x_adv = PGDAttack(**options)(model, x, y)
    assert len(seen) == 10  # nothing is scored that nobody asked for
    assert not torch.equal(x_adv, best.x_adv)


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nan_scores_of_one_sample_do_not_reach_the_others(norm: str, keep_best: bool) -> None:
    class Spoiled(nn.Module):
        def __init__(self, spoil: bool) -> None:
            super().__init__()
            self.inner, self.spoil = linear(CLASSES, INPUTS), spoil

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            rows = (torch.arange(len(x)) == 1).unsqueeze(1) & self.spoil
            return logits * torch.where(rows, torch.nan, 1.0)

    x, y = _centres(4)
    found = [
        PGDAttack(norm, keep_best=keep_best, generator=torch.Generator().manual_seed(0))(Spoiled(spoil), x, y)
        for spoil in (False, True)
    ]
    assert torch.equal(found[0][[0, 2, 3]], found[1][[0, 2, 3]])
    assert found[1].isfinite().all()


@pytest.mark.parametrize("rule", ["sign", "normalized", "adam"])
def test_an_input_of_nan_gradients_stays_where_it_started(rule: str) -> None:
    x, y = _centres()
    attack = PGDAttack(eps=0.2, objective="ce", step_rule=rule, random_start=None, bounds=None)
    moved = attack(WithoutSlope(), x, y) - x
    assert (moved[:, 0] == 0).all()
    assert (moved[:, 1:] != 0).all()


@pytest.mark.parametrize("attack", [PGDAttack(eps=0), PGDAttack("l2", eps=0, keep_best=True, restarts=2)])
def test_an_empty_ball_is_the_input_itself(attack: PGDAttack) -> None:
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    x_adv = attack(model, x, y)
    assert torch.equal(x_adv, x)
    assert x_adv.data_ptr() != x.data_ptr()
    found = attack.perturb(model, x, y)
    assert torch.equal(found.x_adv, x)
    assert torch.equal(found.objective, torch.zeros(SAMPLES))
    assert torch.equal(found.logits_adv, model(x))


def test_an_empty_batch_is_empty() -> None:
    model, empty = linear(CLASSES, INPUTS), torch.zeros(0, INPUTS)
    for attack in (PGDAttack(), PGDAttack("l2", keep_best=True)):
        assert attack(model, empty, torch.zeros(0, dtype=torch.long)).shape == (0, INPUTS)
        found = attack.perturb(model, empty, torch.zeros(0, dtype=torch.long))
        assert found.objective.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_any_integers_are_classes(dtype: torch.dtype) -> None:
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    found = [PGDAttack(generator=torch.Generator().manual_seed(0))(model, x, t) for t in (y, y.to(dtype))]
    assert torch.equal(*found)


def test_kl_needs_no_classes() -> None:
    x, _ = _centres()
    attack = PGDAttack.trades(random_start="uniform", bounds=None)
    assert attack.perturb(linear(CLASSES, INPUTS), x).objective.min() > 0


def test_preprocess_comes_before_the_model_and_eps_stays_in_pixels() -> None:
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    inside = nn.Sequential(nn.Flatten(), linear(CLASSES, INPUTS))
    with torch.no_grad():  # the same map with the normalisation folded in
        inside[1].bias.sub_(inside[1].weight.sum(1) * 0.5 / 0.2)
        inside[1].weight.div_(0.2)
    options = {"eps": 0.05, "objective": "margin", "keep_best": True}
    outside = PGDAttack(**options, preprocess=lambda t: (t - 0.5) / 0.2, generator=torch.Generator().manual_seed(0))
    within = PGDAttack(**options, generator=torch.Generator().manual_seed(0))
    assert_close(outside(model, x, y), within(inside, x, y), loose=10)


def test_autocast_is_around_the_model_only_and_its_weights_are_not_remembered() -> None:
    dtypes: list[torch.dtype] = []
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    model.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))

    def objective(logits: Tensor, y: Tensor, clean: Tensor) -> Tensor:
        assert logits.dtype == clean.dtype == (logits @ logits.T).dtype == torch.float32
        return logits.square().sum(1)

    x_adv = PGDAttack(objective=objective, autocast_dtype=torch.bfloat16)(model, x, y)
    assert set(dtypes) == {torch.bfloat16}
    assert x_adv.dtype == torch.float32
    dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's
        for freeze in (True, False):
            PGDAttack(objective=objective, freeze=freeze)(model, x, y)
            assert set(dtypes) == {torch.bfloat16}
            model.zero_grad()
            model(x).sum().backward()  # a cast of the weight from the attack would have no graph
            assert model.weight.grad is not None


def test_half_precision_models_get_half_inputs() -> None:
    model = linear(CLASSES, INPUTS).to(torch.bfloat16)
    x, y = _centres()
    x = x.to(torch.bfloat16)
    found = PGDAttack(eps=0.1).perturb(model, x, y)
    assert found.x_adv.dtype == torch.bfloat16
    assert found.logits_adv.dtype == torch.float32
    assert (found.x_adv - x).abs().max() <= 0.1 + 2**-8


def test_a_gaussian_start_under_autocast_warns() -> None:
    x, y = _centres()
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="mostly rounding; use random_start='uniform'"):
        PGDAttack.trades(autocast_dtype=torch.bfloat16)(linear(CLASSES, INPUTS), x, y)


def test_a_model_of_probabilities_warns() -> None:
    x, y = _centres()
    model = nn.Sequential(linear(CLASSES, INPUTS), nn.Softmax(1))
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="seems to return probabilities; attacks want the scores"):
        PGDAttack()(model, x, y)


def test_attacks_are_copied_and_pickled() -> None:
    attack = PGDAttack.gowal_eval(generator=torch.Generator().manual_seed(4))
    model, (x, y) = linear(CLASSES, INPUTS), _centres()
    copies = [copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))]
    found = attack(model, x, y)
    assert all(torch.equal(other(model, x, y), found) for other in copies)
