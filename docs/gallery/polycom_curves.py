"""The picture of the PolyCom page: what the activations look like when training starts.

python docs/gallery/polycom_curves.py [file]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from zoo import PolyNorm, PolyReLU
from zoo.tasks.curves import activation_curve

OUT = Path(__file__).resolve().parents[1] / "_static" / "polycom_curves.png"


def draw(path: Path) -> None:
    """Left: the activations over a row of normal quantiles. Right: PolyNorm does not see the scale of its row."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {"PolyReLU": PolyReLU(), "PolyNorm": PolyNorm(), "PolyNorm, order 2": PolyNorm(2), "GELU": nn.GELU()}
    for name, act in curves.items():
        x, y = activation_curve(act)
        left.plot(x.numpy(), y.numpy(), label=name, linestyle="--" if name == "GELU" else "-")
    left.set(title="at the start of training", xlabel="x (a row of normal quantiles)", xlim=(-3, 3), ylim=(-2.5, 8))
    x, _ = activation_curve(nn.Identity())
    for scale, width in ((0.3, 5), (1.0, 3), (30.0, 1)):
        y = PolyNorm()(scale * x[None])[0].detach()
        right.plot(x.numpy(), y.numpy(), label=f"row times {scale:g}", linewidth=width)
        right.plot(x.numpy(), torch.nn.functional.gelu(scale * x).numpy(), "k:", alpha=0.4)
    right.set(title="PolyNorm of rows of three scales (dotted: GELU)", xlabel="x", xlim=(-3, 3), ylim=(-2.5, 8))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
