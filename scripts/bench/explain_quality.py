"""Where the heat is: Smooth Grad-CAM++, Grad-CAM++, Grad-CAM and torchcam on pictures whose objects are known.

    python -m scripts.bench.explain_quality            # five minutes on one CPU core; needs the extra `demo`
    python -m scripts.bench.explain_quality --quick    # two mosaics, an untrained network of shapes

1. Mosaics of 2 x 2 out of the six demo photos, all 15, under the demo network: the share of the heat of each photo's
   class in its cell, and how often the hottest pixel is there.
2. Mosaics with one photo twice, the second mirrored, beside two others: the share in both cells, and the smaller share
   over the larger.
3. Procedural pictures with two or three objects of one class, under configs/explain/shapes_cnn.yaml: the share in their
   boxes, and how often each box holds half of the largest heat.
4. The six photos: area under the insertion curve, average drop, and how the maps of 8 and 64 copies correlate.

torchcam (0.5.0), where it is installed, runs as it is with the same deviation of the noise; nothing here is tuned.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.bench import _training
from scripts.bench._speed import RESULTS
from scripts.bench._timing import write_results
from zoo.data import Shapes
from zoo.explain import CAMWarning, GradCAM, GradCAMpp, SmoothGradCAMpp
from zoo.explain.demo import PHOTOS, demo_network, demo_photo, normalise
from zoo.metrics import (
    average_drop,
    energy_pointing_game,
    grid_pointing_game,
    insertion_auc,
    instance_recall,
    stability,
)
from zoo.tasks import ImageClassifier

LAYER, SHAPES_LAYER = "blocks.6", "net.features"
SIGMA, COPIES = 0.15, 8
CONFIG = ("explain/shapes_cnn", "_parts/quiet")

Heat = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], targets [B] or [B, T]) -> [B, (T,) H, W]


def methods(model: nn.Module, layer: str, sigma: float = SIGMA) -> dict[str, Heat]:
    """Everything that is compared, ours first."""
    found: dict[str, Heat] = {
        "smooth_grad_cam_pp": SmoothGradCAMpp(model, layer, n_samples=COPIES, sigma=sigma).heatmap,
        "grad_cam_pp": GradCAMpp(model, layer).heatmap,
        "grad_cam": GradCAM(model, layer).heatmap,
    }
    try:
        from torchcam.methods import SmoothGradCAMpp as Theirs
    except ImportError:
        return found

    def theirs(x: Tensor, targets: Tensor) -> Tensor:
        maps = []
        for one, classes in zip(x, targets.reshape(len(x), -1), strict=True):
            spread = float(one.max() - one.min())
            for target in classes.tolist():
                with Theirs(model, layer, num_samples=COPIES, std=sigma * spread) as cam:
                    inputs = one[None].clone().requires_grad_()
                    heat = cam(target, model(inputs))[0].detach()
                size = one.shape[-2:]
                maps.append(F.interpolate(heat.reshape(1, 1, *heat.shape[-2:]), size, mode="bilinear")[0, 0])
        return torch.stack(maps).unflatten(0, targets.shape)

    return {**found, "torchcam": theirs}


def mosaic(photos: list[Tensor]) -> Tensor:
    """2 x 2 of [3, s, s], normalised."""
    return normalise(torch.cat([torch.cat(photos[:2], 2), torch.cat(photos[2:], 2)], 1))


def different(model: nn.Module, count: int | None) -> dict[str, Any]:
    """Part 1: by method, share in the right cell and how often the hottest pixel is in it."""
    photos = {name: demo_photo(name) for name in PHOTOS}
    table: dict[str, Any] = {}
    for name, heat in methods(model, LAYER).items():
        shares, hits = [], []
        torch.manual_seed(0)  # torchcam draws from the global generator
        for chosen in itertools.islice(itertools.combinations(PHOTOS, 4), count):
            x = mosaic([photos[photo] for photo in chosen])[None]
            maps = heat(x, torch.tensor([[PHOTOS[photo] for photo in chosen]]))[0]
            shares.append(grid_pointing_game(maps, torch.arange(4)))
            hottest = maps.flatten(1).argmax(1)
            rows, columns = (
                hottest // maps.shape[-1] * 2 // maps.shape[-2],
                hottest % maps.shape[-1] * 2 // maps.shape[-1],
            )
            hits.append(rows * 2 + columns == torch.arange(4))
        table[name] = {"in_cell": _mean(torch.cat(shares)), "hottest_in_cell": _mean(torch.cat(hits).float())}
    return table


def twice(model: nn.Module, count: int | None) -> dict[str, Any]:
    """Part 2: by method, share in the two cells of the class, and the smaller of their shares over the larger."""
    photos = {name: demo_photo(name) for name in PHOTOS}
    table: dict[str, Any] = {}
    for name, heat in methods(model, LAYER).items():
        shares, balances = [], []
        torch.manual_seed(0)
        for photo in itertools.islice(PHOTOS, count):
            others = [other for other in PHOTOS if other != photo][:2]
            tiles = [photos[photo], photos[others[0]], photos[others[1]], photos[photo].flip(-1)]
            maps = heat(mosaic(tiles)[None], torch.tensor([PHOTOS[photo]]))
            first, second = (float(grid_pointing_game(maps, torch.tensor([cell]))) for cell in (0, 3))
            shares.append(first + second)
            balances.append(min(first, second) / max(first, second))
        table[name] = {"in_cells": _mean(torch.tensor(shares)), "balance": _mean(torch.tensor(balances))}
    return table


def shapes(model: nn.Module, same: int, others: int, sigma: float, count: int) -> dict[str, Any]:
    """Part 3: by method, share in the boxes, and how often every box holds half of the largest heat."""
    data = Shapes(size=64, num_classes=4, multi_label=True, max_objects=3, rotate=False, noise=0.0)
    pictures, classes, boxes = data.repeated(count, same, others)
    x, target = pictures, classes[:, 0]  # the module normalises
    inside = list(boxes[:, :same])
    area = torch.tensor([_area(one, x.shape[-2:]) for one in inside])
    table: dict[str, Any] = {"area_of_boxes": _mean(area)}
    for name, heat in methods(model, SHAPES_LAYER, sigma).items():
        torch.manual_seed(0)
        maps = heat(x, target)
        found = instance_recall(maps, inside)
        table[name] = {
            "in_boxes": _mean(energy_pointing_game(maps, inside)),
            "found": _mean(found),
            "all_found": _mean((found == 1).float()[found.isfinite()]),
        }
    return table


def photos(model: nn.Module, count: int | None) -> dict[str, Any]:
    """Part 4: by method, insertion and average drop; and how much 8 copies differ from 64."""
    names = list(PHOTOS)[:count]
    x = torch.stack([normalise(demo_photo(name)) for name in names])
    targets = torch.tensor([PHOTOS[name] for name in names])
    table: dict[str, Any] = {}
    for name, heat in methods(model, LAYER).items():
        torch.manual_seed(0)
        maps = heat(x, targets)
        table[name] = {
            "insertion_auc": _mean(insertion_auc(model, x, maps, targets)),
            "average_drop": _mean(average_drop(model, x, maps, targets)),
        }
    few, many = (
        SmoothGradCAMpp(model, LAYER, n_samples=n, seed=seed).heatmap(x, targets, size=None)
        for n, seed in ((COPIES, 0), (8 * COPIES, 1))
    )
    table["correlation_of_8_and_64_copies"] = _mean(1 - stability(few, many))
    return table


def trained_shapes(quick: bool) -> nn.Module:
    """The network of the config, trained here."""
    arguments = ["fit", *(word for name in CONFIG for word in ("--config", name))]
    if quick:
        arguments += ["--trainer.max_steps=2"]
    kept: list[nn.Module] = []

    def collect(folder: Path) -> dict[str, Any]:
        kept.append(ImageClassifier.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", map_location="cpu"))
        return {}

    _training.train(arguments, collect)
    return kept[0].eval()


def _area(boxes: Tensor, size: torch.Size) -> float:
    mask = torch.zeros(size)
    for x0, y0, x1, y1 in boxes.tolist():
        mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
    return float(mask.mean())


def _mean(values: Tensor) -> float:
    """Over the valid ones."""
    return round(float(values.float().nanmean()), 4)


def acceptance(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was written down before the run, from a prototype on other selections of the same photos and shapes."""
    mosaics, pairs = results["mosaics"], results["same_class_twice"]
    ours, plain = mosaics["smooth_grad_cam_pp"], mosaics["grad_cam_pp"]
    two, three = results["shapes_two_and_another"], results["shapes_three"]
    claims: list[tuple[str, float | None, float]] = [
        ("mosaics: share of the heat in the right cell", ours["in_cell"], 0.74),
        ("mosaics: hottest pixel in the right cell", ours["hottest_in_cell"], 0.95),
        ("mosaics: share, more than Grad-CAM++ has", round(ours["in_cell"] - plain["in_cell"], 4), 0.0),
        (
            "mosaics: share, more than torchcam has",
            round(ours["in_cell"] - mosaics["torchcam"]["in_cell"], 4) if "torchcam" in mosaics else None,
            0.10,
        ),
        ("one class twice: share in both cells", pairs["smooth_grad_cam_pp"]["in_cells"], 0.85),
        ("one class twice: smaller share over larger", pairs["smooth_grad_cam_pp"]["balance"], 0.90),
        ("two shapes alike and another: share in their boxes", two["smooth_grad_cam_pp"]["in_boxes"], 0.45),
        ("three shapes alike, sigma 0.3: all found", three["smooth_grad_cam_pp"]["all_found"], 0.90),
        ("photos: correlation of 8 copies with 64", results["photos"]["correlation_of_8_and_64_copies"], 0.99),
    ]
    return [
        {"claim": f"{claim}: at least {least:g}", "measured": value, "met": None if value is None else value >= least}
        for claim, value, least in claims
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures, an untrained network of shapes")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/explain_quality.json)")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"explain_quality{'_quick' if args.quick else ''}.json"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CAMWarning)  # an untrained network's maps; copies that count little
    few, many = (1, 4) if args.quick else (None, 200)
    network, drawn = demo_network(), trained_shapes(args.quick)
    results = {
        "mosaics": different(network, few),
        "same_class_twice": twice(network, few),
        "shapes_two_and_another": shapes(drawn, 2, 1, SIGMA, many),
        "shapes_three": shapes(drawn, 3, 0, 2 * SIGMA, many),
        "photos": photos(network, few),
    }
    promises = acceptance(results)
    settings = {"copies": COPIES, "sigma": SIGMA, "layer": LAYER, "shapes_layer": SHAPES_LAYER, "quick": args.quick}
    write_results(out, results, device="cpu", settings=settings, acceptance=promises)
    for part, table in results.items():
        print(part)
        for name, figures in table.items():
            print(f"  {name:32} {figures}")
    for promise in promises:
        said = {True: "met", False: "MISSED", None: "not measured"}[promise["met"]]
        print(f"{said}: {promise['claim']} (measured {promise['measured']})")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
