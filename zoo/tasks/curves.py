"""Pictures of activations as a network uses them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


@torch.no_grad()
def activation_curve(act: nn.Module, points: int = 1024) -> tuple[Tensor, Tensor]:
    """An activation over a row of normal quantiles, so that one which normalises its row sees a typical row.

    Args:
        act: maps [1, points] to [1, points].
        points: length of the row.

    Returns:
        x and y, each [points], float32 on the CPU.
    """
    probability = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    x = torch.special.ndtri(probability).float()
    act = copy.deepcopy(act).cpu().float().eval()
    return x, act(x[None])[0]


def draw_activations(acts: Sequence[nn.Module], path: Path) -> None:
    """One curve a layer, from the first (dark) to the last (light)."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    colors = matplotlib.colormaps["viridis"]
    for i, act in enumerate(acts):
        x, y = activation_curve(act)
        axis.plot(
            x.numpy(), y.numpy(), color=colors(i / max(1, len(acts))), label=f"block {i}" if len(acts) <= 8 else None
        )
    axis.set(title=type(acts[0]).__name__, xlabel="x (a row of normal quantiles)", ylabel="activation")
    axis.axhline(0, color="0.8", zorder=0)
    axis.axvline(0, color="0.8", zorder=0)
    if len(acts) <= 8:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
