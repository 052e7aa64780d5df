"""Metrics that run the model on changed images: by hand, and against loops over images, steps and pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.metrics.cases import network, pictures
from zoo.metrics import average_drop, deletion_auc, increase_in_confidence, insertion_auc
from zoo.metrics.baseline import blurred


class Pixel(nn.Module):
    """Scores (a, 0) where a is one pixel."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.row, self.column = row, column

    def forward(self, x: Tensor) -> Tensor:
        a = x[:, 0, self.row, self.column]
        return torch.stack([a, torch.zeros_like(a)], 1)


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))


def _probability(model: nn.Module, x: Tensor, target: int) -> float:
    """Of one image [C, H, W], without batch."""
    with torch.no_grad():
        scores = model.eval()(x[None])[0].exp()
    return float(scores[target] / scores.sum())


def _order(heatmap: Tensor) -> list[tuple[int, int]]:
    heat = heatmap.tolist()
    places = [(r, c) for r in range(len(heat)) for c in range(len(heat[0]))]
    return sorted(places, key=lambda place: -heat[place[0]][place[1]])  # stable


def _curve_area(model: nn.Module, start: Tensor, end: Tensor, heatmap: Tensor, target: int, steps: int) -> float:
    now, order = start.clone(), _order(heatmap)
    steps = min(steps, len(order))
    known, changed = [(0.0, _probability(model, now, target))], 0
    for step in range(1, steps + 1):
        for row, column in order[changed : step * len(order) // steps]:
            now[:, row, column] = end[:, row, column]
        changed = step * len(order) // steps
        known.append((changed / len(order), _probability(model, now, target)))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(known))


def _blurred(x: Tensor, kernel: int, sigma: float) -> Tensor:
    """Pixel by pixel, the border repeated."""
    _, height, width = x.shape
    half = kernel // 2
    out = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            total = 0.0
            for i in range(-half, half + 1):
                for j in range(-half, half + 1):
                    weight = math.exp(-(i * i + j * j) / (2 * sigma**2))
                    total += weight
                    near = x[:, min(max(row + i, 0), height - 1), min(max(column + j, 0), width - 1)]
                    out[:, row, column] += weight * near
            out[:, row, column] /= total
    return out


def test_average_drop_by_hand() -> None:
    x = torch.tensor([2.0, -1.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2).double()
    heatmaps = torch.tensor([[[0.5, 1], [1, 1]], [[0.5, 1], [1, 1]], [[1, 0], [0, 0]]]).double()
    drop = average_drop(Pixel(0, 0), x, heatmaps, torch.tensor([0, 0, 1]))
    assert drop[0].item() == pytest.approx(100 * (_sigmoid(2) - _sigmoid(1)) / _sigmoid(2), rel=1e-12)
    assert drop[1:].tolist() == [0, 0]  # -1 becomes -0.5, which is more; the third keeps its pixel
    more = increase_in_confidence(Pixel(0, 0), x, heatmaps, torch.tensor([0, 0, 1]))
    assert more.tolist() == [0, 100, 0]


def test_drop_of_a_probability_beyond_the_dtype() -> None:
    """exp(-200) is 0 in float32, and 0 / 0 would be NaN."""
    x, heatmap = torch.full((1, 1, 1, 2), -200.0), torch.tensor([[[1.0, 0.5]]])
    assert average_drop(Pixel(0, 0), x, heatmap, torch.tensor([0])).item() == 0
    assert average_drop(Pixel(0, 1), -x, heatmap, torch.tensor([1])).item() == 0
    lost = average_drop(Pixel(0, 1), -x, heatmap, torch.tensor([0])).item()
    assert lost == pytest.approx(100 * (1 - _sigmoid(100) / _sigmoid(200)), abs=1e-30)
    assert increase_in_confidence(Pixel(0, 1), x, heatmap, torch.tensor([0])).item() == 100


@pytest.mark.parametrize("pixels", [False, True])
def test_drop_and_increase_are_those_of_a_loop(pixels: bool) -> None:
    x, heatmaps, targets = pictures()
    model, mean, std = network(), (0.4, 0.5), (0.25, 0.2)
    options = {"space": "pixels", "mean": mean, "std": std} if pixels else {}
    drops, more = [], []
    for image, heatmap, target in zip(x, heatmaps, targets.tolist(), strict=True):
        if pixels:
            m, s = (torch.tensor(t, dtype=torch.float64).view(2, 1, 1) for t in (mean, std))
            masked = ((image * s + m) * heatmap - m) / s
        else:
            masked = image * heatmap
        y, o = _probability(model, image, target), _probability(model, masked, target)
        drops.append(100 * max(0, y - o) / y)
        more.append(100.0 * (o > y))
    expected = torch.tensor(drops, dtype=torch.float64)
    assert expected.count_nonzero() in range(1, 5)
    torch.testing.assert_close(average_drop(model, x, heatmaps, targets, **options), expected, rtol=1e-10, atol=1e-10)
    assert increase_in_confidence(model, x, heatmaps, targets, **options).tolist() == more


@pytest.mark.parametrize("steps", [1, 5, 42, 56])
@pytest.mark.parametrize("baseline", ["zero", "blur"])
@pytest.mark.parametrize("metric", [deletion_auc, insertion_auc])
def test_areas_are_those_of_a_loop(metric: Callable[..., Tensor], baseline: str, steps: int) -> None:
    x, heatmaps, targets = pictures(samples=3)
    model = network()
    found = metric(model, x, heatmaps, targets, steps=steps, baseline=baseline, kernel=5, blur_sigma=1.5)
    for i, image in enumerate(x):
        base = _blurred(image, 5, 1.5) if baseline == "blur" else torch.zeros_like(image)
        ends = (image, base) if metric is deletion_auc else (base, image)
        expected = _curve_area(model, *ends, heatmaps[i], int(targets[i]), steps)
        assert found[i].item() == pytest.approx(expected, rel=1e-10)


def test_deletion_of_a_model_that_reads_one_pixel() -> None:
    """The confidence falls when that pixel goes: the better its place, the smaller the area."""
    x = torch.full((1, 1, 4, 4), 3.0, dtype=torch.float64)
    base, full = 0.5, _sigmoid(3)
    for place in range(16):
        heatmap = torch.linspace(1, 0.1, 16, dtype=torch.float64)[None].view(1, 4, 4)
        model = Pixel(place // 4, place % 4)
        area = deletion_auc(model, x, heatmap, torch.tensor([0]), steps=16).item()
        assert area == pytest.approx((full * (place + 0.5) + base * (15.5 - place)) / 16, rel=1e-12)
        area = insertion_auc(model, x, heatmap, torch.tensor([0]), steps=16, baseline="zero").item()
        assert area == pytest.approx((base * (place + 0.5) + full * (15.5 - place)) / 16, rel=1e-12)


def test_insertion_starts_from_an_image_without_edges() -> None:
    flat = torch.full((1, 3, 8, 9), 0.7, dtype=torch.float64)
    torch.testing.assert_close(blurred(flat, 11, 5.0), flat)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(blurred(x, 11, 5.0), torch.stack([_blurred(t, 11, 5.0) for t in x]))
    torch.testing.assert_close(blurred(x, 1, 5.0), x)


def test_deletion_of_pixels_ends_in_black() -> None:
    """Where black is -mean / std of the input."""
    seen: list[Tensor] = []

    class Seeing(Pixel):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    x, heatmaps = torch.randn(1, 2, 4, 4), torch.rand(1, 4, 4)
    deletion_auc(Seeing(0, 0), x, heatmaps, torch.tensor([0]), space="pixels", mean=(0.4, 0.5), std=0.25)
    last = torch.cat(seen)[-1]
    torch.testing.assert_close(last, torch.tensor([-1.6, -2.0]).view(2, 1, 1).expand(2, 4, 4))
    assert torch.equal(torch.cat(seen)[0], x[0])


def test_small_maps_are_enlarged_bilinearly() -> None:
    x, _, targets = pictures()
    small = torch.rand(5, 3, 2, dtype=torch.float64)
    large = nn.functional.interpolate(small[:, None], (6, 7), mode="bilinear", align_corners=False)[:, 0]
    for metric in (average_drop, deletion_auc):
        torch.testing.assert_close(
            metric(network(), x, small, targets), metric(network(), x, large, targets), rtol=1e-12, atol=1e-12
        )
    thinned = torch.zeros(5, 18, 21, dtype=torch.float64)  # of which the image's size keeps the middle of each 3 x 3
    thinned[:, 0, 0] = 1
    thinned[0, 1, 1] = 1
    assert average_drop(network(), x, thinned, targets).isnan().tolist() == [False, True, True, True, True]


def test_only_the_order_of_heat_counts_for_areas() -> None:
    x, heatmaps, targets = pictures()
    for metric in (deletion_auc, insertion_auc):
        a, b = metric(network(), x, heatmaps, targets), metric(network(), x, 1e30 * (heatmaps - 3), targets)
        assert torch.equal(a, b)


def test_sigmoid_is_for_labels_of_their_own() -> None:
    x, heatmaps, targets = pictures()
    model = network().eval()
    with torch.no_grad():
        y, o = (model(t).sigmoid()[torch.arange(5), targets] for t in (x, x * heatmaps[:, None]))
    drop = average_drop(model, x, heatmaps, targets, scores="sigmoid")
    torch.testing.assert_close(drop, 100 * (y - o).clamp(min=0) / y)
    head = nn.Sequential(nn.Flatten(), nn.Linear(84, 1)).double()
    with pytest.raises(ValueError, match="single score is always 1; for a model of one class say scores='sigmoid'"):
        average_drop(head, x, heatmaps, targets * 0)
    assert average_drop(head, x, heatmaps, targets * 0, scores="sigmoid").isfinite().all()
