"""Whether the heat is where the object is: pointing games and the recall of instances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .average import ImageAverage
from .heatmaps import checked_heatmaps
from .regions import Regions, regions_on


def pointing_game(heatmaps: Tensor, boxes_or_masks: Regions, *, tolerance: float = 0.0) -> Tensor:
    """1 where the hottest pixel lies on an object, or within `tolerance` pixels of one, else 0; higher is better.

    Of pixels equally hot, the first in memory is the hottest.

    Args:
        heatmaps: [B, H, W] of any scale and sign.
        boxes_or_masks: the objects of each image: a list with [n, 4] boxes (x0, y0, x1, y1) in pixels of the heatmaps,
            x1 and y1 outside, or with [n, H, W] masks; or masks [B, H, W], one an image. A pixel is in a box if its
            centre is. Objects without a pixel are left out.
        tolerance: distance from the nearest pixel of an object that is still a hit, pixels (the paper: 15).

    Returns:
        [B] of 1 and 0; NaN for a map with NaN in it or of zeros alone, and for an image without an object.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Source:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2016, arXiv:1608.00507, section 4.1.

    Example:
        >>> heatmap = torch.tensor([[[0.0, 0.2], [0.1, 0.9]]])
        >>> pointing_game(heatmap, [torch.tensor([[1, 0, 2, 2]])])  # the right column
        tensor([1.])
    """
    _check_tolerance(tolerance)
    heat, valid = checked_heatmaps(heatmaps, "pointing_game")
    rows, columns = (torch.arange(n, device=heat.device) for n in heat.shape[1:])
    hits = heat.new_full((len(heat),), torch.nan)
    for i, masks in enumerate(regions_on(heat, boxes_or_masks, "pointing_game")):
        if len(masks):
            point = heat[i].argmax()
            row, column = point // heat.shape[2], point % heat.shape[2]
            near = (rows[:, None] - row) ** 2 + (columns - column) ** 2 <= tolerance**2
            hits[i] = (masks.any(0) & near).any()
    return hits.masked_fill(~valid, torch.nan)


def energy_pointing_game(heatmaps: Tensor, boxes_or_masks: Regions) -> Tensor:
    """Heat on the objects over all heat, in [0, 1]; higher is better.

    Args:
        heatmaps: [B, H, W] at least 0, of any scale.
        boxes_or_masks: see :func:`pointing_game`; where objects overlap heat counts once.

    Returns:
        [B] shares; NaN for a map with NaN in it or of zeros alone, and for an image without an object.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Source:
        Wang et al., "Score-CAM", 2020, arXiv:1910.01279, section 4.3.

    Example:
        >>> heatmap = torch.tensor([[[0.0, 0.2], [0.2, 0.6]]])
        >>> energy_pointing_game(heatmap, [torch.tensor([[1, 0, 2, 2]])])  # the right column
        tensor([0.8000])
    """
    heat, valid = checked_heatmaps(heatmaps, "energy_pointing_game", positive=True)
    objects = regions_on(heat, boxes_or_masks, "energy_pointing_game")
    on = [masks.any(0) for masks in objects]
    inside = torch.stack(on) if on else torch.empty_like(heat, dtype=torch.bool)
    valid = valid & inside.flatten(1).any(1)
    return _share(heat, inside).masked_fill(~valid, torch.nan)


def instance_recall(heatmaps: Tensor, boxes_or_masks: Regions, *, threshold: float = 0.5) -> Tensor:
    """Share of an image's objects that hold heat of at least threshold times the hottest; higher is better.

    Args:
        heatmaps: [B, H, W] at least 0, of any scale.
        boxes_or_masks: see :func:`pointing_game`; the instances of the class that was explained.
        threshold: above 0, 1 at most.

    Returns:
        [B] shares; NaN for a map with NaN in it or of zeros alone, and for an image without an object.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Example:
        >>> heatmap = torch.tensor([[[0.4, 0.0], [0.0, 0.9]]])
        >>> instance_recall(heatmap, [torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2]])])
        tensor([0.5000])
    """
    _check_threshold(threshold)
    heat, valid = checked_heatmaps(heatmaps, "instance_recall", positive=True)
    shares = heat.new_full((len(heat),), torch.nan)
    for i, masks in enumerate(regions_on(heat, boxes_or_masks, "instance_recall")):
        if len(masks):
            hottest = heat[i].masked_fill(~masks, 0).flatten(1).amax(1)
            shares[i] = (hottest >= threshold * heat[i].max()).to(heat).mean()
    return shares.masked_fill(~valid, torch.nan)


def grid_pointing_game(heatmaps: Tensor, cells: Tensor, *, grid: int = 2) -> Tensor:
    """Share of a mosaic's heat that lies in the cell of the class that was explained; higher is better.

    Args:
        heatmaps: [B, H, W] of mosaics of grid x grid images of different classes, at least 0; H and W are multiples of
            the grid.
        cells: [B] which cell, counted along the rows.
        grid: images a side.

    Returns:
        [B] shares in [0, 1], NaN for a map with NaN in it or of zeros alone.

    Raises:
        TypeError, ValueError: if an argument is not as described.

    Source:
        Boehle et al., "Convolutional Dynamic Alignment Networks", 2021, arXiv:2104.00032, section 4.2 (localisation).

    Example:
        >>> heatmap = torch.tensor([[[0.0, 0.2], [0.2, 0.6]]])
        >>> grid_pointing_game(heatmap, torch.tensor([3]))
        tensor([0.6000])
    """
    _check_grid(grid)
    heat, valid = checked_heatmaps(heatmaps, "grid_pointing_game", positive=True)
    height, width = heat.shape[1:]
    if height % grid or width % grid:
        raise ValueError(
            f"grid_pointing_game: heatmaps of {height} x {width} do not divide into {grid} x {grid} cells; enlarge them"
            " to the mosaic"
        )
    if not isinstance(cells, Tensor) or cells.is_floating_point() or cells.dtype is torch.bool:
        got = cells.dtype if isinstance(cells, Tensor) else type(cells).__name__
        raise TypeError(f"grid_pointing_game: cells must be a tensor of integers, one an image, got {got}")
    if cells.shape != heat.shape[:1]:
        raise ValueError(f"grid_pointing_game: cells must be [{len(heat)}], one an image, got {list(cells.shape)}")
    if not bool(((cells >= 0) & (cells < grid**2)).all()):
        raise ValueError(f"grid_pointing_game: cells must be 0 to {grid**2 - 1}, got {cells.tolist()}")
    rows = torch.arange(height, device=heat.device) // (height // grid)
    columns = torch.arange(width, device=heat.device) // (width // grid)
    inside = (rows[:, None] * grid + columns) == cells.to(heat.device)[:, None, None]
    return _share(heat, inside).masked_fill(~valid, torch.nan)


def _share(heat: Tensor, inside: Tensor) -> Tensor:
    # of the hottest first: the sum of raw maps may be beyond the dtype
    heat = heat / heat.amax((1, 2), keepdim=True)
    return (heat * inside).sum((1, 2)) / heat.sum((1, 2))


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be at least 0 pixels, got {tolerance}")


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and 1 at most, got {threshold}")


def _check_grid(grid: int) -> None:
    if not isinstance(grid, int) or grid < 1:
        raise ValueError(f"grid must be a whole number of at least 1, got {grid!r}")


class PointingGame(ImageAverage):
    """Share of images whose hottest pixel lies on an object: :func:`pointing_game`, averaged; higher is better.

    Args:
        tolerance: distance from an object that is still a hit, pixels (the paper: 15).
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: maps with NaN in them or of zeros alone, no object.

    Shape:
        heatmaps [B, H, W] and, of each image, boxes [n, 4] or masks [n, H, W] -> scalar in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.

    Source:
        Zhang, Lin, Brandt, Shen, Sclaroff, "Top-down Neural Attention by Excitation Backprop", ECCV 2016,
        arXiv:1608.00507, section 4.1.

    Example:
        >>> game = PointingGame(tolerance=1)
        >>> game.update(torch.eye(4)[None], [torch.tensor([[1, 1, 3, 3]])])
        >>> game.compute()  # one pixel to the side of the box, and one above
        tensor(0.)
    """

    higher_is_better = True

    def __init__(self, tolerance: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        _check_tolerance(tolerance)
        self.tolerance = tolerance

    def update(self, heatmaps: Tensor, boxes_or_masks: Regions) -> None:
        """Add a batch; see :func:`pointing_game`."""
        self._add(pointing_game(heatmaps, boxes_or_masks, tolerance=self.tolerance))


class EnergyPointingGame(ImageAverage):
    """Share of the heat that lies on objects: :func:`energy_pointing_game`, averaged over images; higher is better.

    Args:
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: maps with NaN in them or of zeros alone, no object.

    Shape:
        heatmaps [B, H, W] and, of each image, boxes [n, 4] or masks [n, H, W] -> scalar in [0, 1].

    Raises:
        ValueError: if an option is none of torchmetrics'.

    Source:
        Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks", CVPR Workshops
        2020, arXiv:1910.01279, section 4.3.

    Example:
        >>> game = EnergyPointingGame()
        >>> game.update(torch.tensor([[[0.0, 0.2], [0.2, 0.6]]]), [torch.tensor([[1, 0, 2, 2]])])  # the right column
        >>> game.compute()
        tensor(0.8000)
    """

    higher_is_better = True

    def update(self, heatmaps: Tensor, boxes_or_masks: Regions) -> None:
        """Add a batch; see :func:`energy_pointing_game`."""
        self._add(energy_pointing_game(heatmaps, boxes_or_masks))


class InstanceRecall(ImageAverage):
    """Share of an image's objects that are found: :func:`instance_recall`, averaged over images; higher is better.

    Args:
        threshold: share of the hottest that an object must hold to be found, above 0, 1 at most.
        all_found: give the share of images in which every object is found instead.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: images left out so far, in this process: maps with NaN in them or of zeros alone, no object.

    Shape:
        heatmaps [B, H, W] and, of each image, boxes [n, 4] or masks [n, H, W] -> scalar in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.

    Example:
        >>> heatmap, boxes = torch.tensor([[[0.4, 0.0], [0.0, 0.9]]]), [torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2]])]
        >>> InstanceRecall()(heatmap, boxes), InstanceRecall(all_found=True)(heatmap, boxes)
        (tensor(0.5000), tensor(0.))
    """

    higher_is_better = True

    def __init__(self, threshold: float = 0.5, all_found: bool = False, **options: Any) -> None:
        super().__init__(**options)
        _check_threshold(threshold)
        self.threshold, self.all_found = threshold, all_found

    def update(self, heatmaps: Tensor, boxes_or_masks: Regions) -> None:
        """Add a batch; see :func:`instance_recall`."""
        shares = instance_recall(heatmaps, boxes_or_masks, threshold=self.threshold)
        self._add(shares.floor() if self.all_found else shares)


class GridPointingGame(ImageAverage):
    """Share of a mosaic's heat in the right cell: :func:`grid_pointing_game`, averaged over mosaics; higher is better.

    Args:
        grid: images a side.
        options: of :class:`torchmetrics.Metric`.

    Attributes:
        n_invalid: mosaics left out so far, in this process: their maps have NaN in them or nothing but zeros.

    Shape:
        heatmaps [B, H, W] and cells [B] -> scalar in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or an option none of torchmetrics'.

    Source:
        Boehle, Fritz, Schiele, "Convolutional Dynamic Alignment Networks for Interpretable Classifications", CVPR 2021,
        arXiv:2104.00032, section 4.2 (localisation).

    Example:
        >>> game = GridPointingGame()
        >>> game.update(torch.tensor([[[0.0, 0.2], [0.2, 0.6]]]), torch.tensor([3]))  # the last cell
        >>> game.compute()
        tensor(0.6000)
    """

    higher_is_better = True

    def __init__(self, grid: int = 2, **options: Any) -> None:
        super().__init__(**options)
        _check_grid(grid)
        self.grid = grid

    def update(self, heatmaps: Tensor, cells: Tensor) -> None:
        """Add a batch; see :func:`grid_pointing_game`."""
        self._add(grid_pointing_game(heatmaps, cells, grid=self.grid))
