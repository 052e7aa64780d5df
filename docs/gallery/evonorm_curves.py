"""The picture of the EvoNorm layers: what each does to a normal map, and which batch sizes it trains at.

python docs/gallery/evonorm_curves.py                # writes docs/_static/evonorm_curves.png
python docs/gallery/evonorm_curves.py --out x.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, no display

from zoo import EvoNorm1d

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "_static" / "evonorm_curves.png"
RESULT = ROOT / "scripts" / "bench" / "results" / "evonorm_batch.json"
REDS, BLUES = ("tab:red", "tab:orange", "tab:brown"), ("tab:blue", "tab:cyan", "tab:purple")
COLOURS = {f"{kind}{i}": shade for kind, shades in (("b", REDS), ("s", BLUES)) for i, shade in enumerate(shades)}
LAYERS = {
    "bn_relu": ("BN-ReLU", "0.45", "--"),
    "gn_relu": ("GN-ReLU", "0.45", ":"),
    "evonorm_s0": ("EvoNorm-S0", COLOURS["s0"], "-"),
    "evonorm_b0": ("EvoNorm-B0", COLOURS["b0"], "-"),
}


@torch.no_grad()
def draw_layers(axis: Axes) -> None:
    """One channel of normal quantiles with mean 1/2, so that the variance and the mean square differ."""
    x = torch.distributions.Normal(0.5, 1.0).icdf(torch.linspace(0.001, 0.999, 999))
    for variant, colour in COLOURS.items():
        style = "-" if variant.endswith("0") else "--"
        y = EvoNorm1d(1, variant)(x.view(1, 1, -1)).flatten()
        axis.plot(x, y, style, color=colour, linewidth=1.8, label=f"EvoNorm-{variant.upper()}")
    axis.plot(x, torch.relu(x - 0.5), ":", color="0.45", linewidth=1.4, label="BatchNorm, ReLU")
    axis.set(title="At the start of training", xlabel="x (normal, mean 1/2)", ylabel="output", xlim=(-2.5, 3.5))


def draw_batches(axis: Axes) -> None:
    """Accuracy against the batch size, the mean of the seeds and each of them."""
    rows = [row for row in json.loads(RESULT.read_text())["results"] if "val_acc" in row]
    batches = sorted({row["batch"] for row in rows})
    for layer, (label, colour, style) in LAYERS.items():
        mine: dict[int, list[float]] = {batch: [] for batch in batches}
        for row in rows:
            if row["layer"] == layer:
                mine[row["batch"]].append(100 * row["val_acc"])
        means = [sum(values) / len(values) for values in mine.values()]
        axis.plot(batches, means, style, color=colour, linewidth=1.8, label=label)
        for batch, values in mine.items():
            axis.plot([batch] * len(values), values, "o", color=colour, markersize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.set(title="Trained on shapes", xlabel="batch size", ylabel="validation accuracy, %")


def draw(path: Path) -> None:
    """Both panels, as a PNG."""
    with matplotlib.style.context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_layers(left)
        draw_batches(right)
        for axis in (left, right):
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
