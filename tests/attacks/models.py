"""Models that the attacks' tests share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.norms import EvoNorm2d


def linear(classes: int = 4, inputs: int = 8, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Random weights of a seed of their own."""
    model = nn.Linear(inputs, classes, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def normalised() -> nn.Sequential:
    """BatchNorm, EvoNorm-B, a BatchNorm that is frozen, and dropout, in training."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        EvoNorm2d(4, "b0"),
        nn.BatchNorm2d(4).eval(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    )
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(1, 3)
    return model


class WithoutSlope(nn.Module):
    """Finite scores whose gradient in the first input is NaN, as a square root of 0 makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (x[:, :1] * 0).sqrt() * 0


def pictures(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(samples, 2, 5, 5, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


def digits() -> tuple[Tensor, Tensor]:
    """The 8x8 digits in [0, 1]."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that has learned digits a little robustly, and 200 it has not seen."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(200):
        rows = torch.arange(step * 128, step * 128 + 128) % 1500
        noisy = x[rows] + 0.1 * torch.randn(128, 64).sign()
        loss = F.cross_entropy(model(noisy), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x[1500:1700], y[1500:1700]
