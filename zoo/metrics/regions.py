"""Where objects are, as boxes or masks, on the grid of a heatmap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Regions = Tensor | Sequence[Tensor]


def regions_on(heat: Tensor, boxes_or_masks: Regions, of: str) -> list[Tensor]:
    """The objects of each image as masks [n, H, W], bool, on the device of the heat; those without a pixel are no more.

    Args:
        heat: [B, H, W].
        boxes_or_masks: for each image [n, 4] boxes (x0, y0, x1, y1), or [n, H, W] masks, bool or integers that are 0
            outside; or one [B, H, W] with a mask an image.
        of: who asks, for messages.

    Raises:
        TypeError: if it is neither, or masks are of floating point.
        ValueError: if shapes do not fit, or boxes are inside out or leave the map.
    """
    if isinstance(boxes_or_masks, Tensor):
        if boxes_or_masks.ndim != 3:
            raise ValueError(
                f"{of}: a tensor of masks must be [B, H, W], one an image, got shape {list(boxes_or_masks.shape)};"
                " boxes, or several masks an image, come in a list"
            )
        boxes_or_masks = list(boxes_or_masks[:, None])
    if not isinstance(boxes_or_masks, (list, tuple)) or not all(isinstance(t, Tensor) for t in boxes_or_masks):
        raise TypeError(
            f"{of}: objects must be a list of tensors, [n, 4] boxes or [n, H, W] masks, or a tensor [B, H, W], got"
            f" {type(boxes_or_masks).__name__}"
        )
    if len(boxes_or_masks) != len(heat):
        raise ValueError(
            f"{of}: objects must be listed for each of {len(heat)} heatmaps, got {len(boxes_or_masks)} entries"
        )
    found = []
    for regions in boxes_or_masks:
        masks = _inside(regions, heat, of) if regions.ndim == 2 else _masks(regions, heat, of)
        found.append(masks[masks.flatten(1).any(1)])
    return found


def _inside(boxes: Tensor, heat: Tensor, of: str) -> Tensor:
    """[n, H, W]: pixels whose centre lies in a box; with whole numbers, x0 <= column < x1."""
    height, width = heat.shape[1:]
    if boxes.shape[1] != 4:
        raise ValueError(
            f"{of}: boxes must be [n, 4], (x0, y0, x1, y1), got shape {list(boxes.shape)}; masks are [n, H, W]"
        )
    boxes = boxes.to(heat.device, torch.float64 if boxes.dtype is torch.float64 else torch.float32)
    x0, y0, x1, y1 = (side[:, None] for side in boxes.unbind(1))
    if not bool(((x0 <= x1) & (y0 <= y1)).all()):  # host sync: once an image; NaN, too
        raise ValueError(
            f"{of}: boxes must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got {boxes.tolist()}; convert those of"
            " width and height (torchvision.ops.box_convert)"
        )
    if not bool(((x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height)).all()):
        raise ValueError(
            f"{of}: boxes must lie on the heatmap of {height} rows and {width} columns, got {boxes.tolist()}; enlarge"
            " the heatmaps to the image the boxes are of, or clip the boxes"
        )
    columns, rows = (torch.arange(n, device=heat.device) + 0.5 for n in (width, height))
    across = (columns >= x0) & (columns < x1)
    down = (rows >= y0) & (rows < y1)
    return down[:, :, None] & across[:, None]


def _masks(masks: Tensor, heat: Tensor, of: str) -> Tensor:
    if masks.ndim != 3 or masks.shape[1:] != heat.shape[1:]:
        raise ValueError(
            f"{of}: masks must be [n, {heat.shape[1]}, {heat.shape[2]}], as the heatmaps are, got shape"
            f" {list(masks.shape)}; resize one or the other"
        )
    if masks.is_floating_point() or masks.is_complex():
        raise TypeError(f"{of}: masks must be bool, or integers that are 0 outside, got {masks.dtype}; say masks > 0.5")
    return (masks != 0).to(heat.device)
