"""PGD as it is built and called: presets, configs, and every mistake with its sentence."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.models import linear
from zoo.attacks import PGDAttack, make_attack
from zoo.errors import ComponentArgumentError

CLASSES, INPUTS, SAMPLES = 4, 8, 40


def _centres() -> tuple[Tensor, Tensor]:
    return torch.rand(SAMPLES, INPUTS), torch.arange(SAMPLES) % CLASSES


MISTAKES = {
    "norm": ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
    "eps": ({"eps": -0.1}, "eps must be finite and not negative, got -0.1"),
    "nan": ({"eps": math.nan}, "eps must be finite and not negative, got nan"),
    "bounds": ({"bounds": (1.0, 0.0)}, r"bounds must be \(smallest, largest\) or None, got \(1.0, 0.0\)"),
    "steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "restarts": ({"restarts": 0}, "restarts must be at least 1, got 0"),
    "size": ({"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
    "ratio": ({"step_ratio": math.inf}, "step_ratio must be positive and finite, got inf"),
    "both": ({"step_size": 0.1, "step_ratio": 0.5}, "give step_size or step_ratio, not both, got 0.1 and 0.5"),
    "rule": ({"step_rule": "sgd"}, "step_rule must be one of sign, normalized, adam, None, got 'sgd'"),
    "decay": (
        {"step_decay": {20: 0.1}},
        r"step_decay maps shares of the steps in \(0, 1\) to positive factors, got 20",
    ),
    "start": ({"random_start": "zero"}, "random_start must be one of uniform, gaussian, None, got 'zero'"),
    "objective": (
        {"objective": "mse"},
        "objective must be one of score_difference, ce, kl, margin, dlr, or a function",
    ),
    "bn": ({"bn": "frozen"}, "bn must be one of eval, batch, train, got 'frozen'"),
    "no start": ({"random_start": None}, "'score_difference' has no gradient at x itself; expected random_start"),
    "no start kl": ({"random_start": None, "objective": "kl"}, "'kl' has no gradient at x itself"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_arguments_out_of_range_are_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^PGDAttack: .*{message}"):
        PGDAttack(**arguments)


def test_attributes_set_later_are_checked_when_called() -> None:
    attack, (x, y) = PGDAttack(), _centres()
    attack.eps = -1.0
    with pytest.raises(ValueError, match="eps must be finite and not negative, got -1.0"):
        attack(linear(CLASSES, INPUTS), x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x - 0.5, y), "within bounds (0.0, 1.0), got values from -0.4"),
        (lambda x, y: (x * torch.nan, y), "got values from nan to nan; a normalised input? put the normalisation"),
        (lambda x, y: ((x * 255).to(torch.uint8), y), "x must be floating point, [N, ...], got torch.uint8"),
        (lambda x, y: (x, None), "the objective 'score_difference' needs the classes y, got None"),
        (lambda x, y: (x, y[:3]), "y must be classes, [40] of integers, got torch.int64 of shape (3,)"),
        (lambda x, y: (x, y.float()), "y must be classes, [40] of integers, got torch.float32 of shape (40,)"),
    ],
    ids=["normalised", "nan", "integers", "no classes", "few classes", "soft classes"],
)
def test_inputs_that_cannot_be_attacked_are_errors(change, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PGDAttack()(linear(CLASSES, INPUTS), *change(*_centres()))


def test_models_that_return_no_scores_are_errors() -> None:
    (x, y), model = _centres(), linear(CLASSES, INPUTS)
    with pytest.raises(ValueError, match=r"scores must be a tensor \[40, C\], got shape \(40, 1, 8\)"):
        PGDAttack()(nn.Unflatten(1, (1, INPUTS)), x, y)
    with pytest.raises(ValueError, match=r"scores must be a tensor \[40, C\], got tuple"):
        PGDAttack()(nn.LSTM(INPUTS, 3), x, y)
    with pytest.raises(ValueError, match=r"got shape \(3, 4\)"):
        PGDAttack()(model, x, y, clean_logits=model(x)[:3])
    with pytest.raises(TypeError, match="the model must be a torch.nn.Module, got function"):
        PGDAttack()(lambda t: t, x, y)
    with pytest.raises(ValueError, match=r"one number a sample, \[40\], got shape \(\); do not average"):
        PGDAttack(objective=lambda logits, y, clean: logits.mean())(model, x, y)


def test_presets_are_the_published_ones() -> None:
    shown = {name: repr(getattr(PGDAttack, name)()) for name in ("adv_comp_sum", "trades", "madry", "fgsm_rs", "l2")}
    assert shown == {
        "adv_comp_sum": "PGDAttack('linf', eps=0.03137, steps=10)",
        "trades": "PGDAttack('linf', eps=0.03137, steps=10, step_size=0.003, random_start='gaussian', objective='kl',"
        " bn='eval')",
        "madry": "PGDAttack('linf', eps=0.03137, steps=10, step_size=0.007843, objective='ce')",
        "fgsm_rs": "PGDAttack('linf', eps=0.03137, steps=1, step_ratio=1.25, objective='ce')",
        "l2": "PGDAttack('l2', eps=0.502, steps=10, step_size=0.05882)",
    }
    train, evaluation = PGDAttack.gowal_train(), PGDAttack.gowal_eval()
    assert (train.steps, train.step_rule, train.objective, train.bn) == (10, "adam", "kl", "batch")
    assert (evaluation.steps, evaluation.objective, evaluation.bn, evaluation.keep_best) == (40, "margin", "eval", True)


def test_presets_take_other_arguments_and_either_kind_of_step() -> None:
    attack = PGDAttack.trades(eps=0.1, steps=5, step_ratio=1 / 3)
    assert (attack.eps, attack.steps, attack.step_size, attack.step_ratio) == (0.1, 5, None, 1 / 3)
    assert PGDAttack.fgsm_rs(step_size=0.1).step_ratio is None
    with pytest.raises(
        ComponentArgumentError, match=r"PGDAttack.trades: PGDAttack has no argument 'epss'. Did you mean"
    ):
        PGDAttack.trades(epss=0.1)


def test_make_attack_reads_what_a_config_gives() -> None:
    default = PGDAttack.trades()
    assert make_attack(None, default) == default
    assert make_attack(None, default) is not default
    given = PGDAttack()
    assert make_attack(given, default) is given
    assert make_attack({"eps": 0.1, "bounds": [0, 2]}, default) == PGDAttack.trades(eps=0.1, bounds=(0, 2))
    assert make_attack({"step_ratio": 0.3}, default) == PGDAttack.trades(step_ratio=0.3)
    assert make_attack({"preset": "madry", "eps": 0.1, "steps": 5}, default) == PGDAttack.madry(eps=0.1, steps=5)
    with pytest.raises(ComponentArgumentError, match="preset must be one of adv_comp_sum, .*, l2, got 'perturb'"):
        make_attack({"preset": "perturb"}, default)
    with pytest.raises(ComponentArgumentError, match="make_attack: PGDAttack has no argument 'stepsize'. Did you mean"):
        make_attack({"stepsize": 0.1}, default)
    with pytest.raises(TypeError, match="expected a PGDAttack, a mapping of its arguments or None, got str"):
        make_attack("trades", default)
