"""The picture of the comp-sum losses: the family, and how hard each member pulls at a sample.

python docs/gallery/comp_sum_curves.py                # writes docs/_static/comp_sum_curves.png
python docs/gallery/comp_sum_curves.py --out x.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from torch import Tensor

from zoo.losses import comp_sum_loss

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "_static" / "comp_sum_curves.png"
MEMBERS = {
    0.0: ("0, sum-exponential", "tab:red"),
    0.5: ("0.5", "tab:orange"),
    1.0: ("1, cross-entropy", "black"),
    1.5: ("1.5, GCE with q = 0.5", "tab:cyan"),
    2.0: ("2, mean absolute error", "tab:blue"),
}
STARTS = (10, 1000)  # numbers of classes


def losses(odds: Tensor, tau: float) -> Tensor:
    """Of two classes whose scores are this far apart; more classes give the same, their odds being summed."""
    scores = torch.stack([odds, torch.zeros_like(odds)], 1)
    return comp_sum_loss(scores, torch.zeros(len(odds), dtype=torch.long), tau, reduction="none")


def pulls(odds: Tensor, tau: float) -> Tensor:
    """Minus the derivative of the loss in the log-odds."""
    odds = odds.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(odds, tau).sum(), odds)
    return -gradient


def draw_losses(axis: Axes) -> None:
    """Loss against the log-odds of the label."""
    odds = torch.linspace(-4, 4, 401, dtype=torch.float64)
    for tau, (label, colour) in MEMBERS.items():
        axis.plot(odds, losses(odds, tau), color=colour, linewidth=1.8, label=label)
    axis.set(
        title="The family", xlabel="log-odds of the label, log p/(1 - p)", ylabel="loss", xlim=(-4, 4), ylim=(0, 6)
    )
    axis.legend(title="tau", frameon=False, fontsize=8, title_fontsize=8)


def draw_pulls(axis: Axes) -> None:
    """Pull against the log-odds, and where a model of so many classes starts."""
    odds = torch.linspace(-9, 5, 561, dtype=torch.float64)
    for tau, (_, colour) in MEMBERS.items():
        axis.plot(odds, pulls(odds, tau), color=colour, linewidth=1.8)
        above = 1.35 * pulls(odds[odds < -7.4], tau).max().item()
        axis.text(-8.9, above, f"tau = {tau:g}", color=colour, fontsize=8)
    for classes in STARTS:
        start = -math.log(classes - 1)
        axis.axvline(start, color="0.6", linestyle=":", linewidth=1.2)
        axis.text(start + 0.1, 1.3e-5, f"all equal,\n{classes} classes", color="0.35", fontsize=8)
    axis.set_yscale("log")
    axis.set(
        title="How hard a sample pulls", xlabel="log-odds of the label, log p/(1 - p)", xlim=(-9, 5), ylim=(1e-5, 5e4)
    )
    axis.set_ylabel(r"size of the gradient, $p^{\tau - 1}(1 - p)$")


def draw(path: Path) -> None:
    """Both panels, as a PNG."""
    with matplotlib.style.context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_losses(left)
        draw_pulls(right)
        for axis in (left, right):
            axis.grid(alpha=0.25)
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
