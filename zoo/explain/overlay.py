"""Heat maps as pictures: in colour, over the image they explain, and side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..registry import did_you_mean
from .colormaps import COLORMAPS, colormap
from .errors import CAMError

Mode = Literal["blend", "mask", "contour"]
Colormap = str | Callable[..., Any]

_ROUNDING = 1e-5  # by which a resized or normalised map may leave [0, 1]
_SMALLEST_TILE = 128  # pixels; smaller images of a grid are enlarged
_GAP = 4  # pixels between the tiles of a grid


def colorize(map: Tensor | np.ndarray, cmap: Colormap = "turbo") -> Tensor:
    """The colour of each value of a map.

    Args:
        map: any shape, in [0, 1].
        cmap: "turbo", "jet", "inferno", "viridis" or "gray"; the name of any other colour map of matplotlib; or one of
            its objects.

    Returns:
        uint8, the shape of the map and 3.

    Raises:
        CAMError: if a value is NaN or outside [0, 1], or there is no such colour map.
    """
    table = _table(cmap)
    index = (_checked(map) * len(table)).long().clamp(max=len(table) - 1)
    return table[index]


def overlay(
    image: Image.Image | Tensor | np.ndarray,
    map: Tensor | np.ndarray,
    alpha: float = 0.5,
    cmap: Colormap = "turbo",
    mode: Mode = "blend",
    threshold: float | None = None,
) -> Image.Image:
    """An image and its heat map in one: out = (1 - alpha) image + alpha top, where top is what `mode` lays over it.

    `alpha` is the opacity of what is laid over. Other libraries call the opacity of the image so, and scale the sum
    by its maximum.

    Args:
        image: a PIL image; uint8 [H, W], [H, W, C] or [C, H, W]; or floating point of these shapes in [0, 1]. C is 1, 3
            or 4, red, green, blue and opacity. What is transparent becomes white. An array that could have its channels
            at either end has them last if it is uint8 and first if not.
        map: [h, w] of any size, in [0, 1]; resized to the image, bilinearly, with `align_corners=False`.
        alpha: opacity in [0, 1].
        cmap: as for :func:`colorize`.
        mode: "blend" lays the colours of the map over the image; "mask" the image times the map, so that alpha = 1
            shows nothing but what is hot; "contour" a line around what is hot, in the colour of its threshold.
        threshold: of the resized map. "blend" leaves the image as it is below it, "mask" takes the map for 1 from there
            on and for 0 below it. None for neither, and for 1/2 in "contour".

    Returns:
        RGB, of the size of the image.

    Raises:
        CAMError: if the image is none of these, the map no [h, w] in [0, 1], or an argument out of range.
    """
    if not 0 <= alpha <= 1:
        raise CAMError(f"overlay: alpha is an opacity in [0, 1], got {alpha}")
    if mode not in get_args(Mode):
        raise CAMError(f"overlay: mode is blend, mask or contour, got {mode!r}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise CAMError(f"overlay: threshold must lie in [0, 1] as the map does, got {threshold}")
    picture = _picture(image)  # [H, W, 3], 0 to 255
    heat = _resized(_checked(map), picture.shape[:2])
    hot = heat >= (0.5 if threshold is None else threshold)
    where = torch.ones_like(hot)
    if mode == "blend":
        top = colorize(heat, cmap).float()
        if threshold is not None:
            where = hot
    elif mode == "mask":
        top = picture * (heat if threshold is None else hot)[..., None]
    else:
        top = colorize(torch.tensor(0.5 if threshold is None else threshold), cmap).float()
        where = _edge(hot)
    mixed = (1 - alpha) * picture + alpha * top
    return _pil(torch.where(where[..., None], mixed, picture).round().byte())


def grid(
    images: Sequence[Any] | Tensor,
    maps: Sequence[Any] | Tensor | None = None,
    titles: Sequence[str] | None = None,
    cols: int | None = None,
    *,
    alpha: float = 0.5,
    cmap: Colormap = "turbo",
    mode: Mode = "blend",
    threshold: float | None = None,
) -> Image.Image:
    """Images, and behind each its overlays, side by side.

    Args:
        images: N images as :func:`overlay` takes them. One with a side below 128 pixels is enlarged by a whole factor.
        maps: for each image a map [h, w] or T of them: one a method, a layer, a class or a feature map. None for the
            images alone, which may be overlays.
        titles: one for each of the N (1 + T) tiles, in reading order; or 1 + T that stand over every image's tiles.
        cols: tiles a row; None for 1 + T, an image a row, and for a square of images without maps.
        alpha, cmap, mode, threshold: as for :func:`overlay`.

    Raises:
        CAMError: as :func:`overlay`, and if there is no image, the numbers of images, maps and titles do not fit, or
            `cols` is below 1.
    """
    if not len(images):
        raise CAMError("grid: give at least one image")
    if maps is not None and len(maps) != len(images):
        raise CAMError(f"grid: give the maps of each image, got {len(images)} image(s) and {len(maps)} entries of maps")
    if cols is not None and cols < 1:
        raise CAMError(f"grid: cols must be at least 1, got {cols}")
    rows = []
    for i, image in enumerate(images):
        picture = _enlarged(_pil(_picture(image).byte()))
        beside = [] if maps is None else _listed(maps[i])
        rows.append([picture, *(overlay(picture, one, alpha, cmap, mode, threshold) for one in beside)])
    if len({len(row) for row in rows}) > 1:
        raise CAMError(f"grid: give every image the same number of maps, got {[len(row) - 1 for row in rows]}")
    tiles, each = [tile for row in rows for tile in row], len(rows[0])
    if titles is not None and len(titles) not in (each, len(tiles)):
        raise CAMError(f"grid: give {len(tiles)} titles, one a tile, or {each} for every image, got {len(titles)}")
    if cols is None:
        cols = each if maps is not None else math.ceil(math.sqrt(len(tiles)))
    return _arranged(tiles, list(titles or []), min(cols, len(tiles)))


def denormalize(x: Tensor, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> Tensor:
    """x * std + mean in 256 levels: what a network sees, as a picture again.

    Args:
        x: [..., C, H, W], (picture - mean) / std of a picture in [0, 1].
        mean, std: of each channel or of all; timm's models have theirs in `pretrained_cfg`.

    Returns:
        uint8 [..., C, H, W], clipped.
    """
    x = x.detach().float()
    of_channels = [torch.as_tensor(t, dtype=torch.float32, device=x.device) for t in (mean, std)]
    mean, std = (t if t.ndim == 0 else t.view(-1, 1, 1) for t in of_channels)
    return ((x * std + mean).clamp(0, 1) * 255).round().byte()


def _table(cmap: Colormap) -> Tensor:
    """uint8 [N, 3]."""
    if isinstance(cmap, str):
        if cmap in COLORMAPS:
            return colormap(cmap)
        from matplotlib import colormaps

        if cmap not in colormaps:
            raise CAMError(
                f"neither we nor matplotlib have a colour map {cmap!r}.{did_you_mean(cmap, [*COLORMAPS, *colormaps])}"
                f" Ours are {', '.join(COLORMAPS)}."
            )
        cmap = colormaps[cmap]
    if not hasattr(cmap, "N"):
        raise CAMError(f"cmap is a name or a colour map of matplotlib, got {type(cmap).__name__}")
    return torch.from_numpy(cmap(np.arange(cmap.N), bytes=True)[:, :3].copy())


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().cpu()
    return torch.from_numpy(np.array(array, order="C"))  # a copy: neither read-only nor of negative strides


def _checked(map: Any) -> Tensor:
    """The map as float32 in [0, 1] exactly."""
    values = _tensor(map).float()
    if values.isnan().any():
        raise CAMError("the map has NaN; look at what it was made from, a map without any evidence is all zero")
    if values.numel() and not (values.min() >= -_ROUNDING and values.max() <= 1 + _ROUNDING):
        raise CAMError(
            f"the map must lie in [0, 1], got {values.min():.4g} to {values.max():.4g}; divide it by its maximum, or"
            " take the heatmap of a result"
        )
    return values.clamp(0, 1)


def _resized(heat: Tensor, size: Sequence[int]) -> Tensor:
    if heat.ndim != 2 or not heat.numel():
        raise CAMError(f"overlay: the map must be [h, w], got {tuple(heat.shape)}")
    return F.interpolate(heat[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)


def _edge(hot: Tensor) -> Tensor:
    """The outermost pixels of what is hot, thicker in a larger picture; none along the picture's own border."""
    width = max(1, min(hot.shape) // 100)
    near_cold = F.max_pool2d((~hot).float()[None, None], 2 * width + 1, 1, width)[0, 0] > 0
    return hot & near_cold


def _picture(image: Any) -> Tensor:
    """float32 [H, W, 3] from 0 to 255, on white."""
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise CAMError(f"an image of mode {image.mode} has no fixed range; convert it to 8 bits a channel")
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        levels = _tensor(image).float()
    else:
        levels = _levels(_tensor(image))
    colour, opacity = levels[..., :3], levels[..., 3:] / 255
    if opacity.numel():
        colour = (opacity * colour + (1 - opacity) * 255).round()
    return colour.expand(-1, -1, 3)


def _levels(values: Tensor) -> Tensor:
    """float32 [H, W, 1, 3 or 4] from 0 to 255, of an array in any of the layouts that `overlay` names."""
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3:
        first, last = values.shape[0] in (1, 3, 4), values.shape[2] in (1, 3, 4)
        if first and not (last and values.dtype == torch.uint8):
            values = values.permute(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or not values.numel():
        raise CAMError(f"an image is [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got {tuple(values.shape)}")
    if values.dtype == torch.uint8:
        return values.float()
    if not values.is_floating_point():
        raise CAMError(f"an image is uint8, or floating point in [0, 1], got {values.dtype}")
    values = values.float()
    if not (values.min() >= -_ROUNDING and values.max() <= 1 + _ROUNDING):  # NaN too
        raise CAMError(
            f"an image in floating point lies in [0, 1], got {values.min():.4g} to {values.max():.4g}; call denormalize"
            " on what a network sees"
        )
    return (values.clamp(0, 1) * 255).round()


def _pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.numpy())


def _listed(maps: Any) -> list[Any]:
    """One map or several, as a list."""
    return [maps] if getattr(maps, "ndim", None) == 2 else list(maps)


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = -(-_SMALLEST_TILE // min(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.NEAREST)


def _arranged(tiles: list[Image.Image], titles: list[str], cols: int) -> Image.Image:
    """Tiles in rows on white; titles go round if there are fewer."""
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    font = ImageFont.load_default(max(11, min(width, height) // 18))
    strip = math.ceil(font.getbbox("Ág")[3]) + _GAP if titles else 0
    rows = -(-len(tiles) // cols)
    size = (cols * (width + _GAP) + _GAP, rows * (height + strip + _GAP) + _GAP)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for i, tile in enumerate(tiles):
        x = _GAP + i % cols * (width + _GAP)
        y = _GAP + i // cols * (height + strip + _GAP)
        if titles:
            pen.text((x, y), _shortened(titles[i % len(titles)], font, width), fill="black", font=font)
        canvas.paste(tile, (x + (width - tile.width) // 2, y + strip + (height - tile.height) // 2))
    return canvas


def _shortened(title: str, font: Any, width: int) -> str:
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(f"{title}..") > width:
        title = title[:-1]
    return f"{title}.."
