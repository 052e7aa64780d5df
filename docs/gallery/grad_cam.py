"""The pictures of the class activation maps: three methods on three photos, and parts of a layer.

python docs/gallery/grad_cam.py                # writes docs/_static/grad_cam.png; needs the extra `demo`
python docs/gallery/grad_cam.py --out x.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.explain import FeatureMaps, GradCAM, GradCAMpp, Neurons, SmoothGradCAMpp, grid, overlay
from zoo.explain.demo import PHOTOS, demo_network, demo_photo, normalise

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "_static" / "grad_cam.png"
TILE = 150
COLOURS = 160  # of the palette: photos make large files


def mosaic(names: list[str], size: int = 224) -> Tensor:
    """2 x 2 photos, [3, 2 size, 2 size]; a name that comes again is a mirror image."""
    photos = [demo_photo(name, size) for name in names]
    photos = [
        photo.flip(-1) if name in names[:i] else photo
        for i, (name, photo) in enumerate(zip(names, photos, strict=True))
    ]
    return torch.cat([torch.cat(photos[:2], 2), torch.cat(photos[2:], 2)], 1)


def small(picture: Tensor) -> Tensor:
    """[3, TILE, TILE]."""
    return F.interpolate(picture[None], (TILE, TILE), mode="bilinear", antialias=True)[0].clamp(0, 1)


def draw(path: Path) -> None:
    """A row a photo, a column a method; then a row of parts of the cat's layer."""
    model = demo_network()
    methods = {"Grad-CAM": GradCAM, "Grad-CAM++": GradCAMpp, "Smooth Grad-CAM++": SmoothGradCAMpp}
    explainers = {name: method(model, "blocks.6") for name, method in methods.items()}
    two_cats = mosaic(["chelsea", "coffee", "rocket", "chelsea"])
    rows = {
        "tiger cat": (demo_photo("chelsea"), PHOTOS["chelsea"]),
        "espresso": (demo_photo("coffee"), PHOTOS["coffee"]),
        "tiger cat, twice": (two_cats, PHOTOS["chelsea"]),
    }
    tiles, titles = [], []
    for label, (photo, target) in rows.items():
        tiles.append(small(photo))
        titles.append(label)
        for name, explainer in explainers.items():
            tiles.append(overlay(small(photo), explainer.heatmap(normalise(photo)[None], target)[0]))
            titles.append(name)
    cat = demo_photo("chelsea")
    smooth = explainers["Smooth Grad-CAM++"]
    first, second = smooth.feature_maps(normalise(cat)[None], PHOTOS["chelsea"], top_k=2)
    parts = {
        f"feature map {first.index}": FeatureMaps([first.index]),
        f"feature map {second.index}": FeatureMaps([second.index]),
        "the 9 strongest": FeatureMaps(top=9),
        "neurons of an eye": Neurons(box=(60, 130, 110, 190), space="input"),
    }
    for name, part in parts.items():
        heat = smooth.heatmap(normalise(cat)[None], PHOTOS["chelsea"], select=part)[0]
        tiles.append(overlay(small(cat), heat))
        titles.append(name)
    picture = grid(tiles, titles=titles, cols=4)
    picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
