"""Parameter groups and the warm-up cosine schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo import PolyNorm
from zoo.tasks.optim import WarmupCosine, decay_groups


def learning_rates(schedule: WarmupCosine, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
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
