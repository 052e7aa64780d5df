"""The picture of the PolyCom family: curves at the start of training, and what PolyNorm does with the scale of a row.

python docs/gallery/polycom_curves.py                # writes docs/_static/polycom_curves.png
python docs/gallery/polycom_curves.py --out x.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from torch import nn

from zoo import PolyNorm, PolyReLU
from zoo.tasks.curves import activation_curve
from zoo.tasks.lm import SquaredReLU

OUT = Path(__file__).resolve().parents[1] / "_static" / "polycom_curves.png"
SCALES = (0.5, 1.0, 2.0, 4.0)
ORDERS = (2, 3, 4)
MARKED = (-2.0, 2.0)


def draw_family(axis: Axes) -> None:
    """The activations over one row of normal quantiles, as they start."""
    greys: list[tuple[str, nn.Module, str]] = [
        ("ReLU", nn.ReLU(), "--"),
        ("GELU", nn.GELU(), "-."),
        ("squared ReLU", SquaredReLU(), ":"),
    ]
    for name, act, style in greys:
        x, y = activation_curve(act)
        axis.plot(x.numpy(), y.numpy(), style, color="0.45", linewidth=1.4, label=name)
    x, y = activation_curve(PolyReLU())
    axis.plot(x.numpy(), y.numpy(), color="tab:orange", linewidth=1.8, label="PolyReLU, order 3")
    blues = matplotlib.colormaps["viridis"]
    for i, order in enumerate(ORDERS):
        x, y = activation_curve(PolyNorm(order))
        axis.plot(x.numpy(), y.numpy(), color=blues(0.1 + 0.33 * i), linewidth=1.8, label=f"PolyNorm, order {order}")
    axis.set(
        title="At the start of training",
        xlabel="x (a row of normal quantiles)",
        ylabel="activation",
        xlim=(-3, 3),
        ylim=(-2, 6),
    )


@torch.no_grad()
def draw_scales(axis: Axes) -> None:
    """The same row times a factor: PolyNorm is a function of x / rms(x) wherever eps is small beside the powers."""
    row, _ = activation_curve(nn.Identity())
    act = PolyNorm()
    colors = matplotlib.colormaps["plasma"]
    for i, scale in enumerate(SCALES):
        x, color = scale * row, colors(0.05 + 0.27 * i)
        y = act(x[None])[0]
        axis.plot(x.numpy(), y.numpy(), color=color, linewidth=1.8, label=f"row of rms {scale:g}")
        for at in MARKED:  # the element nearest to this multiple of the rms: the same height on every curve
            j = int((row - at).abs().argmin())
            axis.plot(x[j].item(), y[j].item(), "o", color=color, markersize=5)
            axis.axhline(y[j].item(), color="0.8", linewidth=0.8, linestyle=":", zorder=0)
    axis.set(title="PolyNorm of one row at four scales; dots at ±2 rms", xlabel="x", xlim=(-8.5, 8.5))


def draw(path: Path) -> None:
    """Both panels into one PNG."""
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        draw_family(left)
        draw_scales(right)
        for axis in (left, right):
            axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, loc="upper left", fontsize=9)
            axis.title.set_fontsize(11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (docs/_static/polycom_curves.png)")
    draw(parser.parse_args().out)
