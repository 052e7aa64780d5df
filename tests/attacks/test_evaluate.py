"""Accuracy under attacks in turn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.models import linear, normalised, pictures
from zoo.attacks import PGDAttack, evaluate_robustness, robust_accuracy


class Moving:
    """Fools the samples whose x[0] is below a limit, and notes how many it was given."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.given: list[int] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.given.append(len(x))
        assert not model.training
        assert bool((model(x).argmax(1) == y).all())
        return torch.where(x[:, :1] < self.limit, -x, 1.5 * x)


class ByLastFeature(nn.Module):
    """Class 1 where the last feature is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.stack([-x[:, -1], x[:, -1]], 1)


def _loader(samples: int = 10, batch_size: int = 4) -> list[tuple[Tensor, Tensor, str]]:
    x = torch.stack([torch.arange(samples) / samples, torch.ones(samples)], 1)
    y = torch.ones(samples, dtype=torch.long)
    y[-1] = 0  # wrong as it is
    return [(*part, "more") for part in zip(x.split(batch_size), y.split(batch_size), strict=True)]


def test_each_attack_gets_what_those_before_left() -> None:
    first, second, third = Moving(0.25), Moving(0.55), Moving(0.1)
    found = evaluate_robustness(ByLastFeature(), _loader(), {"a": first, "b": second, "c": third})
    # x[0] is 0.0 ... 0.9, the last is wrong: 9 are right, 6 of them are not below 0.25, 3 not below 0.55
    assert found == {"clean": 0.9, "a": 0.6, "b": 0.3, "c": 0.3, "worst_case": 0.3, "samples": 10}
    assert first.given == [4, 4, 1]
    assert second.given == [1, 4, 1]
    assert third.given == [2, 1]  # of the first batch nothing was left


@pytest.mark.parametrize(("most", "samples", "clean"), [(3, 3, 1.0), (4, 4, 1.0), (6, 6, 1.0), (50, 10, 0.9)])
def test_only_the_first_samples_count(most: int, samples: int, clean: float) -> None:
    attack = Moving(0.25)
    taken: list[int] = []

    def loader():
        for batch in _loader():
            taken.append(len(batch[0]))
            yield batch

    found = evaluate_robustness(ByLastFeature(), loader(), {"a": attack}, max_samples=most)
    assert found["samples"] == samples
    assert found["clean"] == clean
    assert sum(attack.given) == round(clean * samples)
    assert sum(taken) - taken[-1] < most  # no batch is read that nobody wants


def test_the_model_is_evaluated_in_evaluation_and_left_as_it_was() -> None:
    model, (x, y) = normalised(), pictures()
    flags = [layer.training for layer in model.modules()]
    expected = (normalised().eval()(x).shape, [layer.training for layer in model.modules()])
    with torch.inference_mode():
        found = evaluate_robustness(model, [(x, y)], {"pgd": PGDAttack.gowal_eval(steps=3)})
    assert flags == expected[1]
    assert model[1].num_batches_tracked == 0
    right = (model.eval()(x).argmax(1) == y).float().mean()
    assert found["clean"] == pytest.approx(right.item())


def test_robust_accuracy_is_the_share_of_a_batch() -> None:
    model = ByLastFeature()
    x, y = (torch.cat(parts) for parts in zip(*(batch[:2] for batch in _loader()), strict=True))
    assert robust_accuracy(model, x, y) == 0.9
    assert robust_accuracy(model, x, y, Moving(0.25)) == 0.6


def test_robust_accuracy_is_exact_on_two_linear_classes() -> None:
    model = linear(2, 8)
    x = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    eps = 0.4
    scores = model(x)
    lead = (scores[:, 0] - scores[:, 1]).abs()
    robust = lead > eps * (model.weight[0] - model.weight[1]).abs().sum()
    assert 0.2 < robust.float().mean() < 0.8
    attack = PGDAttack(eps=eps, objective="margin", bounds=None)
    assert robust_accuracy(model, x, y, attack) == pytest.approx(robust.float().mean().item())


def test_preprocess_is_the_attacks() -> None:
    model = ByLastFeature()
    x, y = torch.tensor([[0.1, 0.2], [0.1, 0.8]]), torch.tensor([1, 1])
    assert robust_accuracy(model, x, y, preprocess=lambda t: t - 0.5) == 0.5


def test_of_nothing_there_is_no_accuracy() -> None:
    found = evaluate_robustness(ByLastFeature(), [], {"a": Moving(1.0)})
    assert found["samples"] == 0
    assert all(math.isnan(found[name]) for name in ("clean", "a", "worst_case"))


def test_models_without_parameters_are_evaluated_where_the_data_is() -> None:
    x = torch.tensor([[0.0, 0.7], [0.7, 0.0]])
    assert robust_accuracy(nn.Identity(), x, torch.tensor([1, 1])) == 0.5


@pytest.mark.parametrize("name", ["clean", "worst_case", "samples"])
def test_names_of_results_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} names a result already; give the attack another name"):
        evaluate_robustness(ByLastFeature(), _loader(), {name: Moving(0.1)})


def test_max_samples_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_samples must be at least 1 or None, got 0"):
        evaluate_robustness(ByLastFeature(), _loader(), {}, max_samples=0)
