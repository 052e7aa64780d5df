"""Metrics that compare heat with boxes, masks and other heat: by hand, and against loops over pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.metrics import (
    EnergyPointingGame,
    GridPointingGame,
    InstanceRecall,
    PointingGame,
    Stability,
    energy_pointing_game,
    grid_pointing_game,
    instance_recall,
    pointing_game,
    stability,
)

BOXES = [
    torch.tensor([[0, 0, 3, 2], [2, 1, 6, 4]]),  # overlapping
    torch.tensor([[5, 4, 6, 5]]),  # one pixel, the last
    torch.tensor([[0.6, 0.4, 2.5, 3.5], [0.0, 0.0, 6.0, 0.4], [4.0, 3.0, 6.0, 5.0]]),  # the second holds no pixel
]


def _heat() -> Tensor:
    return torch.randint(0, 9, (3, 5, 6), generator=torch.Generator().manual_seed(3)).double()


def _inside(box: list[float], row: int, column: int) -> bool:
    return box[0] <= column + 0.5 < box[2] and box[1] <= row + 0.5 < box[3]


def _masks(boxes: Tensor, height: int, width: int) -> Tensor:
    return torch.tensor(
        [[[_inside(box, r, c) for c in range(width)] for r in range(height)] for box in boxes.tolist()],
        dtype=torch.bool,
    ).view(-1, height, width)


@pytest.mark.parametrize("kind", ["boxes", "masks", "integers"])
def test_games_are_those_of_a_loop(kind: str) -> None:
    heat, masks = _heat(), [_masks(boxes, 5, 6) for boxes in BOXES]
    objects = {"boxes": BOXES, "masks": masks, "integers": [3 * m.byte() for m in masks]}[kind]
    for tolerance in (0, 1, 1.5, 2):
        expected = []
        for h, m in zip(heat, masks, strict=True):
            best = max(((r, c) for r in range(5) for c in range(6)), key=lambda at, h=h: float(h[at]))
            near = [(r - best[0]) ** 2 + (c - best[1]) ** 2 <= tolerance**2 for r, c in m.any(0).nonzero().tolist()]
            expected.append(float(any(near)))
        assert pointing_game(heat, objects, tolerance=tolerance).tolist() == expected
    shares, recalls = [], []
    for h, m in zip(heat, masks, strict=True):
        inside = sum(float(h[r, c]) for r in range(5) for c in range(6) if m[:, r, c].any())
        shares.append(inside / float(h.sum()))
        seen = [one for one in m if one.any()]
        recalls.append(sum(bool((h[one] >= 0.75 * h.max()).any()) for one in seen) / len(seen))
    assert energy_pointing_game(heat, objects).tolist() == pytest.approx(shares, rel=1e-12)
    assert instance_recall(heat, objects, threshold=0.75).tolist() == pytest.approx(recalls, rel=1e-12)
    assert len(set(shares)) == 3


def test_perfect_and_uniform_maps() -> None:
    boxes = [torch.tensor([[1, 1, 4, 3]])]
    perfect = _masks(boxes[0], 5, 6).float()
    uniform = torch.full((1, 5, 6), 0.3)
    assert energy_pointing_game(perfect, boxes).item() == 1
    assert instance_recall(perfect, boxes, threshold=1).item() == 1
    assert pointing_game(perfect, boxes).item() == 1
    assert energy_pointing_game(uniform, boxes).item() == pytest.approx(6 / 30, rel=1e-6)
    assert pointing_game(uniform, boxes).item() == 0  # the first of all pixels is not in the box
    assert grid_pointing_game(uniform.repeat(1, 2, 1), torch.tensor([2])).item() == pytest.approx(1 / 4, rel=1e-6)


def test_one_mask_an_image_is_a_tensor() -> None:
    heat = _heat()
    masks = torch.stack([_masks(boxes, 5, 6).any(0) for boxes in BOXES])
    assert torch.equal(energy_pointing_game(heat, masks), energy_pointing_game(heat, BOXES))
    assert torch.equal(pointing_game(heat, masks), pointing_game(heat, BOXES))


def test_recall_counts_instances_or_images() -> None:
    heat = torch.zeros(2, 4, 4)
    heat[0, 0, 0], heat[0, 3, 3] = 1.0, 0.5
    heat[1, 0, 0] = 1.0
    corners = torch.tensor([[0, 0, 1, 1], [3, 3, 4, 4]])
    shares, images = InstanceRecall(), InstanceRecall(all_found=True)
    for metric in (shares, images):
        metric.update(heat, [corners, corners])
    assert shares.compute() == 0.75
    assert images.compute() == 0.5
    assert instance_recall(heat, [corners, corners], threshold=0.51).tolist() == [0.5, 0.5]


def test_an_image_without_an_object_has_no_value() -> None:
    heat = _heat()
    nothing = [BOXES[0], torch.zeros(0, 4), torch.tensor([[2, 2, 2, 4]])]
    for function in (pointing_game, energy_pointing_game, instance_recall):
        assert function(heat, nothing).isnan().tolist() == [False, True, True]
        assert torch.equal(function(heat, nothing)[0], function(heat, BOXES)[0])
    games = PointingGame(), EnergyPointingGame(), InstanceRecall()
    for game in games:
        game.update(heat, nothing)
        assert game.n_invalid == 2


def test_grid_is_that_of_a_loop() -> None:
    heat, cells = torch.rand(9, 6, 9, dtype=torch.float64), torch.arange(9)
    found = grid_pointing_game(heat, cells, grid=3)
    for i, h in enumerate(heat):
        row, column = divmod(i, 3)
        assert found[i].item() == pytest.approx(float(h[2 * row :, 3 * column :][:2, :3].sum() / h.sum()), rel=1e-12)
    whole = GridPointingGame(grid=1)
    whole.update(heat, cells * 0)
    assert whole.compute() == 1


def test_pointing_takes_signed_heat_and_the_first_of_equals() -> None:
    heat = torch.full((1, 2, 2), -1.0)
    assert pointing_game(heat, [torch.tensor([[0, 0, 1, 1]])]).item() == 1
    assert pointing_game(heat, [torch.tensor([[1, 1, 2, 2]])]).item() == 0
    assert pointing_game(heat, [torch.tensor([[1, 1, 2, 2]])], tolerance=1.42).item() == 1  # along the diagonal


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e37])
def test_scale_makes_no_difference(scale: float) -> None:
    """Raw maps come at any scale; sums and squares of these are beyond float32."""
    heat = _heat().float()
    for function in (pointing_game, energy_pointing_game, instance_recall):
        torch.testing.assert_close(function(heat * scale, BOXES), function(heat, BOXES))
    torch.testing.assert_close(
        grid_pointing_game(heat[:, :4] * scale, torch.arange(3)), grid_pointing_game(heat[:, :4], torch.arange(3))
    )
    torch.testing.assert_close(stability(heat * scale, heat.flip(1) / scale), stability(heat, heat.flip(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    heat = _heat()  # small whole numbers, exact in any of these
    for function in (pointing_game, energy_pointing_game, instance_recall):
        found = function(heat.to(dtype), BOXES)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, function(heat, BOXES).float())


def test_stability_is_one_less_the_correlation() -> None:
    a, b = torch.rand(4, 5, 6, dtype=torch.float64), torch.rand(4, 5, 6, dtype=torch.float64)
    pairs = torch.stack([a.flatten(1), b.flatten(1)], 1)
    expected = 1 - torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
    torch.testing.assert_close(stability(a, b), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(stability(a, a), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(stability(a, 3 - a), torch.full((4,), 2.0, dtype=torch.float64))
    flat = torch.full((1, 5, 6), 0.1)
    assert stability(flat, a[:1].float()).isnan()
    assert stability(flat, flat).isnan()


def test_stability_of_maps_almost_alike_keeps_its_digits() -> None:
    """1 - r in float32 would be 0 or 6e-8."""
    a = torch.rand(1, 20, 20, dtype=torch.float64)
    b = a + 1e-5 * torch.rand(1, 20, 20, dtype=torch.float64)
    exact = stability(a, b)
    assert exact < 1e-9
    torch.testing.assert_close(stability(a.float(), b.float()), exact.float(), rtol=0.05, atol=0)


def test_stability_asks_a_function_of_the_seed() -> None:
    asked: list[int] = []

    def maps(seed: int) -> Tensor:
        asked.append(seed)
        return torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed))

    metric = Stability(seeds=(3, 5))
    metric.update(maps)
    assert asked == [3, 5]
    both = Stability()
    both.update(maps(3), maps(5))
    assert torch.equal(metric.compute(), both.compute())


HEAT = _heat()
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: pointing_game(HEAT, torch.zeros(3, 4)),
        ValueError,
        "masks must be [B, H, W], one an image, got shape [3, 4",
    ),
    (
        lambda: pointing_game(HEAT, BOXES[:2]),
        ValueError,
        "objects must be listed for each of 3 heatmaps, got 2 entries",
    ),
    (
        lambda: pointing_game(HEAT, {"boxes": 1}),
        TypeError,
        "must be a list of tensors, [n, 4] boxes or [n, H, W] masks",
    ),
    (lambda: pointing_game(HEAT, [[[0, 0, 1, 1]]] * 3), TypeError, "must be a list of tensors"),
    (
        lambda: pointing_game(HEAT, [torch.ones(1, 3)] * 3),
        ValueError,
        "boxes must be [n, 4], (x0, y0, x1, y1), got sha",
    ),
    (
        lambda: pointing_game(HEAT, [torch.ones(1, 5, 5) > 0] * 3),
        ValueError,
        "masks must be [n, 5, 6], as the heatmaps",
    ),
    (
        lambda: pointing_game(HEAT, [torch.ones(4)] * 3),
        ValueError,
        "masks must be [n, 5, 6], as the heatmaps are, got s",
    ),
    (lambda: pointing_game(HEAT, torch.ones(3, 5, 6)), TypeError, "masks must be bool, or integers that are 0 outside"),
    (
        lambda: pointing_game(HEAT, [torch.tensor([[3, 3, 2, 4]])] * 3),
        ValueError,
        "boxes must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got [[3.0, 3.0, 2.0, 4.0]]; convert those of width",
    ),
    (
        lambda: pointing_game(HEAT, [torch.full((1, 4), torch.nan)] * 3),
        ValueError,
        "with x0 <= x1 and y0 <= y1, got [[n",
    ),
    (
        lambda: energy_pointing_game(HEAT, [torch.tensor([[0, 0, 7, 5]])] * 3),
        ValueError,
        "boxes must lie on the heatmap of 5 rows and 6 columns, got [[0.0, 0.0, 7.0, 5.0]]; enlarge the heatmaps to th",
    ),
    (lambda: energy_pointing_game(HEAT - 1, BOXES), ValueError, "heat must be at least 0, got -1; a share of signed"),
    (lambda: instance_recall(HEAT - 1, BOXES), ValueError, "instance_recall: heat must be at least 0, got -1"),
    (lambda: grid_pointing_game(HEAT - 1, torch.arange(3)), ValueError, "grid_pointing_game: heat must be at least 0"),
    (lambda: grid_pointing_game(HEAT, torch.arange(3)), ValueError, "heatmaps of 5 x 6 do not divide into 2 x 2 cells"),
    (lambda: grid_pointing_game(HEAT[:, 1:], [0, 1, 2]), TypeError, "cells must be a tensor of integers, one an image"),
    (
        lambda: grid_pointing_game(HEAT[:, 1:], torch.ones(3)),
        TypeError,
        "cells must be a tensor of integers, one an ima",
    ),
    (lambda: grid_pointing_game(HEAT[:, 1:], torch.arange(2)), ValueError, "cells must be [3], one an image, got [2]"),
    (lambda: grid_pointing_game(HEAT[:, 1:], torch.arange(3) + 2), ValueError, "cells must be 0 to 3, got [2, 3, 4]"),
    (lambda: PointingGame(tolerance=-1), ValueError, "tolerance must be at least 0 pixels, got -1"),
    (lambda: InstanceRecall(threshold=0), ValueError, "threshold must be above 0 and 1 at most, got 0"),
    (
        lambda: instance_recall(HEAT, BOXES, threshold=1.5),
        ValueError,
        "threshold must be above 0 and 1 at most, got 1.5",
    ),
    (lambda: GridPointingGame(grid=0), ValueError, "grid must be a whole number of at least 1, got 0"),
    (lambda: stability(HEAT, HEAT[:, 1:]), ValueError, "both maps must be of one shape, got [3, 5, 6] and [3, 4, 6]"),
    (
        lambda: stability(HEAT, HEAT > 0),
        TypeError,
        "stability: heatmaps must be a floating-point tensor, got torch.bool",
    ),
    (lambda: Stability(seeds=(1, 1)), ValueError, "seeds must be two different ones, got (1, 1)"),
    (lambda: Stability().update(HEAT), TypeError, "give maps of two seeds, or a function of the seed alone"),
    (
        lambda: Stability().update(lambda _: HEAT, HEAT),
        TypeError,
        "give maps of two seeds, or a function of the seed al",
    ),
]


@pytest.mark.parametrize(("mistake", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_mistake_is_said(mistake: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        mistake()
