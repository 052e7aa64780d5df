"""What the metrics' tests share: a small network, pictures, heatmaps, and every metric with arguments for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo import metrics
from zoo.metrics.average import ImageAverage


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """In training, with batch statistics, a part that is frozen, and dropout."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4).eval(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 42, 3),
    )
    return model.to(dtype)


def pictures(dtype: torch.dtype = torch.float64, samples: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """x [5, 2, 6, 7], heatmaps [5, 6, 7] in [0, 1] with ties, targets [5]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 2, 6, 7, generator=generator, dtype=torch.float64)
    heatmaps = torch.randint(0, 9, (samples, 6, 7), generator=generator).double() / 8
    targets = torch.randint(3, (samples,), generator=generator)
    return x.to(dtype), heatmaps.to(dtype), targets


def boxes(samples: int = 5) -> list[Tensor]:
    return [torch.tensor([[0, 0, 2, 3], [3, 2, 7, 5]])[: 1 + i % 2] for i in range(samples)]


def cells(samples: int = 5) -> Tensor:
    return torch.arange(samples) % 4


RUN_MODEL: dict[type[ImageAverage], Callable[..., Tensor]] = {
    metrics.AverageDrop: metrics.average_drop,
    metrics.IncreaseInConfidence: metrics.increase_in_confidence,
    metrics.DeletionAUC: metrics.deletion_auc,
    metrics.InsertionAUC: metrics.insertion_auc,
    metrics.Road: metrics.road,
}
LOCALISE: dict[type[ImageAverage], Callable[..., Tensor]] = {
    metrics.PointingGame: metrics.pointing_game,
    metrics.EnergyPointingGame: metrics.energy_pointing_game,
    metrics.InstanceRecall: metrics.instance_recall,
    metrics.GridPointingGame: metrics.grid_pointing_game,
}
ALL = {**RUN_MODEL, **LOCALISE, metrics.Stability: metrics.stability}
HIGHER_IS_BETTER = {
    metrics.AverageDrop: False,
    metrics.IncreaseInConfidence: True,
    metrics.DeletionAUC: False,
    metrics.InsertionAUC: True,
    metrics.Road: True,
    metrics.PointingGame: True,
    metrics.EnergyPointingGame: True,
    metrics.InstanceRecall: True,
    metrics.GridPointingGame: True,
    metrics.Stability: False,
}


def arguments(metric: type[ImageAverage], part: slice = slice(None), heatmaps: Tensor | None = None) -> tuple[Any, ...]:
    """What `update` takes, for a part of the pictures."""
    x, own, targets = pictures()
    heatmaps = own if heatmaps is None else heatmaps
    if metric in RUN_MODEL:
        return network(), x[part], heatmaps[part], targets[part]
    if metric is metrics.Stability:
        return heatmaps[part], own.flip(2)[part]
    if metric is metrics.GridPointingGame:
        return torch.cat([heatmaps, heatmaps[:, :, :1]], 2)[part], cells()[part]
    return heatmaps[part], boxes()[part]
