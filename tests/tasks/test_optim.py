"""Parameter groups and schedules."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zoo import PolyNorm
from zoo.norms import ConditionalEvoNorm2d, EvoNorm2d
from zoo.tasks.optim import StepSchedule, WarmupCosine, WarmupMultiStep, configure, decay_groups


def learning_rates(schedule: StepSchedule, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), PolyNorm(), nn.Conv1d(4, 4, 3))
    model[1].requires_grad_(False)
    decayed, plain = decay_groups(model)
    assert [p.ndim for p in decayed["params"]] == [2, 3]
    assert "weight_decay" not in decayed
    assert plain["weight_decay"] == 0.0
    assert {id(p) for p in model[3].parameters()} <= {id(p) for p in plain["params"]}
    assert sum(len(group["params"]) for group in (decayed, plain)) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "s0", "s1", "s2"])
def test_no_parameter_of_an_evonorm_decays(variant: str) -> None:
    conv = nn.Conv2d(3, 4, 3)
    norms = EvoNorm2d(4, variant), ConditionalEvoNorm2d(4, 5, variant)
    decayed, plain = decay_groups(nn.ModuleList([conv, *norms]))
    assert [id(p) for p in decayed["params"]] == [id(conv.weight)]
    assert plain["weight_decay"] == 0.0
    ours = {id(p) for norm in norms for p in norm.parameters()}
    assert {id(p) for p in plain["params"]} == ours | {id(conv.bias)}
    matrices = [name for name, p in norms[1].named_parameters() if p.ndim == 2]
    assert matrices == ["gain.weight", "shift.weight"]  # which decay by their dimensions alone


def test_shared_parameters_are_counted_once() -> None:
    layer = nn.Linear(3, 3, bias=False)
    groups = decay_groups(nn.Sequential(layer, layer))
    assert [len(group["params"]) for group in groups] == [1]


def test_schedule_rises_linearly_and_falls_as_half_a_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, warmup_steps=3, final_ratio=0.1, total_steps=11)
    seen = learning_rates(schedule, optimizer, 13)
    assert seen[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for step in range(3, 12):
        assert seen[step] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 8)) / 2))
    assert seen[11] == seen[12] == pytest.approx(0.2)


def test_state_is_the_position_alone() -> None:
    first = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(first, warmup_steps=2, total_steps=10)
    learning_rates(schedule, first, 5)
    second = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    longer = WarmupCosine(second, warmup_steps=2, total_steps=20)
    longer.load_state_dict(schedule.state_dict())
    assert longer.last_epoch == 5
    assert longer.total_steps == 20
    assert longer.get_lr() == pytest.approx([longer.ratio(5)])


def test_negative_warm_up_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        WarmupCosine(optimizer, warmup_steps=-1)


def multi_step(**options: object) -> tuple[WarmupMultiStep, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    return WarmupMultiStep(optimizer, **options), optimizer  # type: ignore[arg-type]


def test_schedule_rises_from_zero_and_is_cut_at_milestones() -> None:
    schedule, optimizer = multi_step(epoch_steps=4)
    seen = learning_rates(schedule, optimizer, 90 * 4 + 1)
    assert seen[:21] == pytest.approx([0.4 * step / 20 for step in range(21)])
    for epoch, rate in ((5, 0.4), (30, 0.04), (60, 0.004), (80, 0.0004)):
        assert seen[epoch * 4] == pytest.approx(rate)
    for epoch, rate in ((30, 0.4), (60, 0.04), (80, 0.004)):
        assert seen[epoch * 4 - 1] == pytest.approx(rate)
    assert seen[-1] == pytest.approx(0.0004)


def test_schedule_takes_the_steps_of_an_epoch_from_the_run() -> None:
    model = nn.Linear(2, 2)
    model.trainer = SimpleNamespace(num_training_batches=7, accumulate_grad_batches=2)  # type: ignore[assignment]
    make = lambda optimizer: WarmupMultiStep(optimizer, warmup_epochs=2, milestones=[3], gamma=0.5)  # noqa: E731
    found = configure(model, lambda groups: torch.optim.SGD(groups, lr=1.0), make)  # type: ignore[arg-type]
    assert found["lr_scheduler"]["interval"] == "step"
    seen = learning_rates(found["lr_scheduler"]["scheduler"], found["optimizer"], 14)
    assert seen == pytest.approx([*[step / 8 for step in range(8)], 1, 1, 1, 1, 0.5, 0.5])


def test_schedule_outside_a_task_needs_the_steps_of_an_epoch() -> None:
    schedule, optimizer = multi_step()
    optimizer.step()
    with pytest.raises(ValueError, match="epoch_steps is not known outside a task; give it"):
        schedule.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0, got -1"),
        ({"warmup_epochs": 40}, r"milestones must ascend from the end of the warm-up at epoch 40, got \[30, 60, 80\]"),
        ({"milestones": [30, 20]}, r"milestones must ascend .* got \[30, 20\]"),
        ({"epoch_steps": 0}, "epoch_steps must be at least 1, got 0"),
    ],
)
def test_impossible_milestones_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_step(**options)
