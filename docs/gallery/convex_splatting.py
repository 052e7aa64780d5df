"""The picture of the smooth convexes: what delta and sigma do to one, and a scene fitted by sixty of them.

python docs/gallery/convex_splatting.py                # writes docs/_static/convex_splatting.png
python docs/gallery/convex_splatting.py --out x.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.style
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure, SubFigure  # not pyplot: no global state, no display
from torch import Tensor

from zoo import ConvexModel
from zoo.data import ProceduralScene
from zoo.functional import rasterization_convex
from zoo.splat.cameras import intrinsics

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "_static" / "convex_splatting.png"
CORNERS = [(-0.55, -0.6), (0.35, -0.7), (0.75, -0.1), (0.3, 0.65), (-0.35, 0.55), (-0.8, 0.0)]
SIDE = 72  # pixels of the single convex
DELTAS, SLOPES = (0.004, 0.01, 0.1), (0.003, 0.01, 0.1)  # at a given delta sigma the boundary is as steep
# Those of configs/splat/boxes_cpu.yaml: larger than the paper's, for fifty times fewer steps.
RATES = {"points": 2e-2, "log_delta": 1e-2, "log_sigma": 2e-2, "opacity_logit": 2e-2, "sh0": 2e-2}
STEPS = 600


def single(delta: float, sigma: float) -> Tensor:
    """Alpha [SIDE, SIDE] of one opaque convex in the plane z = 1."""
    points = torch.tensor([[(*corner, 1.0) for corner in CORNERS]])
    numbers = (torch.tensor([value]) for value in (delta, sigma, 1.0))
    K = intrinsics(SIDE / 2, SIDE, SIDE)[None]
    return rasterization_convex(points, *numbers, torch.ones(1, 1), torch.eye(4)[None], K, SIDE, SIDE)[1][0, :, :, 0]


def fitted(data: ProceduralScene) -> ConvexModel:
    """The scene's convexes after a few seconds of Adam on single views."""
    scene = data.scene
    start = {"size": 1.2, "opacity": 0.5, "sigma": 0.1, "min_radius": 0.08, "max_radius": 0.5}
    model = ConvexModel.from_points(scene.points, scene.colors, sh_degree=0, background=scene.background, **start)
    model.fit_reference_focal(scene.Ks[list(scene.train)])
    groups = [{"params": [getattr(model, name)], "lr": rate} for name, rate in RATES.items()]
    adam = torch.optim.Adam(groups, eps=1e-15)
    for step, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        adam.param_groups[0]["lr"] = RATES["points"] * 0.02 ** (step / STEPS)
        loss = F.l1_loss(model(batch["viewmat"], batch["K"], data.size, data.size)["rgb"], batch["image"])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


def draw_single(figure: SubFigure) -> None:
    """A row a delta, a column a product of delta and sigma."""
    pairs = [(delta, slope) for delta in DELTAS for slope in SLOPES]
    for axis, (delta, slope) in zip(figure.subplots(3, 3).flat, pairs, strict=True):
        axis.imshow(single(delta, slope / delta).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        if delta == DELTAS[0]:
            axis.set_title(rf"$\delta\sigma$ = {slope:g}")
        if slope == SLOPES[0]:
            axis.set_ylabel(rf"$\delta$ = {delta:g}")
    figure.suptitle("One convex of six points")


@torch.no_grad()
def draw_scene(figure: SubFigure) -> None:
    """A held-out view: truth, rendering, four times the difference, and depth."""
    data = ProceduralScene(num_points=60, test_views=2, steps_per_epoch=STEPS)
    with torch.enable_grad():
        model = fitted(data)
    scene, view = data.scene, data.scene.test[0]
    seen = model(scene.viewmats[view, None], scene.Ks[view, None], data.size, data.size, render_mode="RGB+ED")
    truth, rgb = scene.images[view].float(), seen["rgb"][0].clamp(0, 1)
    psnr = -10 * (rgb - truth).square().mean().log10()
    depth = seen["depth"][0, :, :, 0].where(seen["alpha"][0, :, :, 0] > 0.5, torch.nan)
    panels = {
        "truth": truth,
        f"{model.num_convexes} convexes, {psnr:.1f} dB": rgb,
        "4 x difference": (4 * (rgb - truth).abs()).clamp(0, 1),
        "depth of their centres": depth,
    }
    for axis, (title, picture) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axis.imshow(picture.numpy(), cmap="viridis_r")
        axis.set(xticks=[], yticks=[])
        axis.set_title(title)
    figure.suptitle("A view that was not trained on")


def draw(path: Path) -> None:
    """Both panels, as a PNG."""
    with matplotlib.style.context({"font.size": 9, "figure.titlesize": 10, "axes.titlesize": 9}):
        figure = Figure(figsize=(9, 4.9), layout="constrained")
        left, right = figure.subfigures(1, 2)
        draw_single(left)
        draw_scene(right)
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
