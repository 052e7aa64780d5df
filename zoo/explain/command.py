"""`zoo explain`: class activation maps of photos, as pictures, arrays or JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from .. import settings
from ..errors import RunError
from ..registry import did_you_mean, factory
from .errors import CAMError, CAMWarning, DisconnectedTarget, NonFinite, ZeroGradient
from .networks import Network, load_network
from .overlay import colorize, denormalize, grid, overlay
from .result import CAMResult
from .select import FeatureMaps, Neurons, Select
from .targets import Targets, TopK

_SHOWN = 5  # classes printed for a photo
_LISTED = 8  # class names an ambiguous word is answered with


def run(options: argparse.Namespace) -> int:
    """Explain photos; 0 on success, 1 if a network has nothing that can be explained."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CAMWarning)
        warnings.showwarning = partial(_show, warnings.showwarning)
        try:
            _explain(options)
        except (NonFinite, ZeroGradient, DisconnectedTarget) as error:  # of the network, not of what was asked
            if settings.debug():
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _show(others: Callable[..., None], message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
    """Ours without file and line."""
    if issubclass(category, CAMWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        others(message, category, *where, **more)


def _explain(options: argparse.Namespace) -> None:
    _check_files(options)
    select, device = _selection(options), _device(options.device)
    photos = [_photo(Path(path)) for path in options.images]
    network = load_network(options.model, options.weights, options.checkpoint, options.seed or 0)
    if network.weights == "random":
        print("note: the weights are random; give --weights or --checkpoint for a trained model", file=sys.stderr)
    targets = _targets(options.target, network, len(photos))
    explainer = _explainer(options, network.model.to(device))
    x = torch.stack([network.prepare(photo) for photo in photos]).to(device)
    started = time.perf_counter()
    result = explainer(x, targets, select=select, fuse=options.fuse)
    seconds = time.perf_counter() - started
    shares = (result.logits.sigmoid() if network.several else result.logits.softmax(1)).cpu()
    out = options.out
    if out is None and not (options.json or options.npz):
        out = f"{Path(options.images[0]).stem}_cam.png"
    if out is not None:
        pictures = denormalize(x, network.mean, network.std).cpu()
        _written(Path(out), _picture(options, network, pictures, shares, result).save)
    if options.npz is not None:
        _written(Path(options.npz), result.save)
    record = {
        "model": options.model or type(network.model).__name__,
        "weights": network.weights,
        "method": options.method,
        "layers": {name: list(maps.shape[2:]) for name, maps in result.maps.items()},
        "n_samples": getattr(explainer, "n_samples", None),
        "sigma": getattr(explainer, "sigma", None),
        "linear_tail": result.linear_tail,
        "n_forwards": result.n_forwards,
        "seconds": round(seconds, 3),
        "images": [_of_photo(i, path, network, shares[i], result) for i, path in enumerate(options.images)],
        "out": out,
        "npz": options.npz,
    }
    print(json.dumps(record, indent=2) if options.json else "\n".join(_described(record)))


# What was asked


def _check_files(options: argparse.Namespace) -> None:
    """Before anything is computed."""
    if options.out is not None and Path(options.out).suffix.lower() not in Image.registered_extensions():
        raise RunError(f"--out: {options.out} has no suffix of a picture, as .png has")
    if options.npz is not None and Path(options.npz).suffix != ".npz":
        raise RunError(f"--npz: give a name that ends in .npz, got {options.npz}")


def _photo(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            photo = ImageOps.exif_transpose(file)
    except OSError as error:  # also of a file that is no picture
        raise RunError(f"cannot read {path}: {error.strerror or 'it is not a picture'}") from None
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def _device(word: str) -> torch.device:
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=word).device
    except (RuntimeError, AssertionError):  # unknown, or not here
        raise RunError(f"--device: there is no {word!r} here; take cpu or auto") from None


def _explainer(options: argparse.Namespace, model: nn.Module) -> Any:
    given = {"n_samples": options.samples, "sigma": options.sigma, "seed": options.seed}
    method = {"name": options.method, **{name: value for name, value in given.items() if value is not None}}
    layers = "last" if options.layers == ["last"] else options.layers
    make = factory("explainer", method)
    try:
        return make(model, layers)
    except CAMError:
        raise
    except ValueError as error:  # an argument out of range
        raise RunError(str(error)) from None


def _targets(word: str, network: Network, photos: int) -> Targets:
    """Of the word after --target: the k best, or a class by number or by name for all photos."""
    if word.startswith("top") and (count := word[3:].lstrip(":")).isdecimal() and int(count):
        return TopK(int(count))
    return torch.full((photos, 1), int(word) if word.lstrip("-").isdecimal() else _named(word, network))


def _named(word: str, network: Network) -> int:
    if not network.names:
        raise RunError(f"--target: the classes of this model have no names; give a number or top:3, got {word!r}")
    asked = word.lower()
    inside = [i for i, name in enumerate(network.names) if asked in name.lower()]
    exact = [i for i in inside if asked in _names(network.names[i])]
    found = exact if len(exact) == 1 else inside
    if not found:
        single = [name for names in network.names for name in _names(names)]
        raise RunError(f"--target: no class is called {word!r}.{did_you_mean(asked, single)}")
    if len(found) > 1:
        some = ", ".join(f"{i} {_short(network.names[i])}" for i in found[:_LISTED])
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise RunError(f"--target: {len(found)} classes are called {word!r}: {some}{more}; give the number of one")
    return found[0]


def _names(names: str) -> list[str]:
    """A class's names: ImageNet's have several, after commas."""
    return [name.strip() for name in names.lower().split(",")]


def _selection(options: argparse.Namespace) -> Select | None:
    maps = neurons = None
    if (word := options.feature_maps) is not None:
        top, colon, count = word.partition(":")
        numbers = _integers(count if colon else word)
        if not numbers or (colon and (top != "top" or len(numbers) != 1)):
            raise RunError(f"--feature-maps: give numbers as 3,17, or top:9, got {word!r}")
        maps = FeatureMaps(top=numbers[0]) if colon else FeatureMaps(indices=numbers)
    if (word := options.neurons) is not None:
        if len(box := _integers(word)) != 4:
            raise RunError(f"--neurons: give top,left,bottom,right as 0,0,3,4, got {word!r}")
        neurons = Neurons(box=box, space=options.space)
    return None if maps is None and neurons is None else Select(maps, neurons)


def _integers(text: str) -> list[int]:
    words = text.split(",")
    return [int(word) for word in words] if all(word.strip().isdecimal() for word in words) else []


# What is answered


def _of_photo(i: int, path: str, network: Network, shares: Tensor, result: CAMResult) -> dict[str, Any]:
    """What the network says of a photo, and what of it was explained.

    Args:
        i: number of the photo.
        path: its file.
        network: that was asked.
        shares: [classes] probabilities.
        result: of all photos.
    """
    best = shares.topk(min(_SHOWN, len(shares))).indices.tolist()
    explained = [
        {
            **_class_record(c, shares, network),
            "score": round(float(result.scores[i, t]), 6),
            "effective_samples": round(float(result.effective_samples[i, t]), 3),
            "valid": bool(result.valid[i, t]),
        }
        for t, c in enumerate(_classes(result)[i])
    ]
    return {"path": path, "top": [_class_record(c, shares, network) for c in best], "explained": explained}


def _classes(result: CAMResult) -> list[list[int]]:
    """That were explained, of each photo."""
    assert result.targets is not None
    return result.targets.tolist()


def _class_record(number: int, shares: Tensor, network: Network) -> dict[str, Any]:
    name = None if network.names is None else _short(network.names[number])
    return {"class": number, "name": name, "probability": round(float(shares[number]), 6)}


def _short(names: str) -> str:
    return names.split(",")[0]


def _described(record: dict[str, Any]) -> list[str]:
    """The record for people."""
    lines = []
    for photo in record["images"]:
        lines.append(photo["path"])
        lines += [f"  {c['probability']:.3f}  {_titled(c)}" for c in photo["top"]]
        lines.append(f"  explained: {', '.join(_titled(c) for c in photo['explained'])}")
    layers = ", ".join(f"{name} ({' x '.join(map(str, size))})" for name, size in record["layers"].items())
    lines.append(f"layer     {layers}")
    noise = "" if not record["sigma"] else f", {record['n_samples']} samples, sigma {record['sigma']:g}"
    lines.append(f"method    {record['method']}{noise}")
    linear = [name for name, is_linear in record["linear_tail"].items() if is_linear]
    if record["linear_tail"]:
        lines.append(f"tail      {'linear behind ' + ', '.join(linear) if linear else 'not linear'}")
    lines.append(f"cost      {record['n_forwards']} forward passes a picture, {record['seconds']:.2f} s")
    lines += [f"written   {path}" for path in (record["out"], record["npz"]) if path is not None]
    return lines


def _titled(c: dict[str, Any]) -> str:
    return str(c["class"]) if c["name"] is None else f"{c['name']} ({c['class']})"


def _picture(
    options: argparse.Namespace, network: Network, pictures: Tensor, shares: Tensor, result: CAMResult
) -> Image.Image:
    """The photos as the network sees them, a row each, with the maps of their layers and targets."""
    layers: Sequence[str | None] = [None] if result.fused is not None else list(result.maps)
    heat = torch.cat([result.heatmap(layer) for layer in layers], 1).cpu()  # [B, layers T, H, W]
    if options.mode == "grid":
        titles = []
        for path, classes, of_photo in zip(options.images, _classes(result), shares, strict=True):
            titles.append(Path(path).name)
            for layer in layers:
                where = f", {layer}" if len(layers) > 1 else ""
                for known in (_class_record(c, of_photo, network) for c in classes):
                    titles.append(f"{known['name'] or known['class']} {known['probability']:.2f}{where}")
        return grid(list(pictures), list(heat), titles)
    if options.mode == "heat":
        tiles = [Image.fromarray(colorize(one).numpy()) for one in heat.flatten(0, 1)]
    else:
        tiles = [overlay(pictures[i], one) for i, maps in enumerate(heat) for one in maps]
    return tiles[0] if len(tiles) == 1 else grid(tiles, cols=heat.shape[1])


def _written(path: Path, write: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror or error}); give another name") from None
