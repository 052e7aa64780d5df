"""ROAD and its imputation: against one dense system an image, solved by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.metrics.cases import network, pictures
from zoo.metrics import linear_imputation, road

WEIGHTS = {(i, j): 1 / 6 if i == 0 or j == 0 else 1 / 12 for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j}


def _imputed(image: Tensor, removed: Tensor) -> Tensor:
    """Of one image [C, H, W]: every removed pixel is the mean of its neighbours, those of the image."""
    channels, height, width = image.shape
    unknown = {place: i for i, place in enumerate(map(tuple, removed.nonzero().tolist()))}
    matrix, right = np.zeros((len(unknown), len(unknown))), np.zeros((len(unknown), channels))
    for (row, column), i in unknown.items():
        for (down, across), weight in WEIGHTS.items():
            near = (row + down, column + across)
            if not (0 <= near[0] < height and 0 <= near[1] < width):
                continue
            matrix[i, i] += weight
            if near in unknown:
                matrix[i, unknown[near]] -= weight
            else:
                right[i] += weight * image[:, near[0], near[1]].double().numpy()
    out = image.clone()
    if unknown:
        solved = torch.from_numpy(np.linalg.solve(matrix, right))
        for place, i in unknown.items():
            out[:, place[0], place[1]] = solved[i].to(image.dtype)
    return out


def _masks(height: int, width: int) -> Tensor:
    """Nothing, one corner, a half, at random, a block, all but one pixel."""
    masks = torch.zeros(6, height, width, dtype=torch.bool)
    masks[1, 0, 0] = True
    masks[2, : height // 2] = True
    masks[3] = torch.rand(height, width) < 0.6
    masks[4, 1:-1, 1:-1] = True
    masks[5] = True
    masks[5, 2, 1] = False
    return masks


@pytest.mark.parametrize("size", [(6, 7), (3, 2), (1, 9), (23, 31)])
def test_imputation_is_the_dense_solution(size: tuple[int, int]) -> None:
    masks = _masks(*size) if min(size) > 2 else (torch.rand(6, *size) < 0.6).index_fill(2, torch.tensor(0), False)
    x = torch.randn(6, 3, *size, dtype=torch.float64)
    found = linear_imputation(x, masks)
    expected = torch.stack([_imputed(image, mask) for image, mask in zip(x, masks, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    single = linear_imputation(x.float(), masks)
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-4)
    assert linear_imputation(x.bfloat16(), masks).dtype is torch.bfloat16


def test_imputation_continues_what_is_linear() -> None:
    """In the middle of an image, as the weights are symmetric."""
    ramp = torch.arange(12.0, dtype=torch.float64) + 10 * torch.arange(9.0, dtype=torch.float64)[:, None]
    hole = torch.zeros(1, 9, 12, dtype=torch.bool)
    hole[0, 2:7, 3:10] = True
    torch.testing.assert_close(linear_imputation(ramp[None, None], hole)[0, 0], ramp)


def test_imputation_does_not_hang_on_the_batch() -> None:
    x, masks = torch.randn(6, 2, 9, 11), _masks(9, 11)
    x[0] *= 1e6
    x[1] = 0
    whole = linear_imputation(x, masks)
    for i in range(6):
        assert torch.equal(linear_imputation(x[i : i + 1], masks[i : i + 1])[0], whole[i])
    assert torch.equal(whole[0], x[0])
    assert whole[1].count_nonzero() == 0


@pytest.mark.parametrize("percentiles", [(20, 40, 60, 80), (50,), (0.5, 99.9)])
def test_road_is_that_of_a_loop(percentiles: tuple[float, ...]) -> None:
    x, heatmaps, targets = pictures()
    model = network().eval()
    field = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(4)).double() * 0.1
    found = road(model, x, heatmaps, targets, percentiles=percentiles, noise=0.1, seed=4)
    for i, image in enumerate(x):
        order = heatmaps[i].flatten().argsort(descending=True, stable=True)
        changes = []
        for percent in percentiles:
            count = min(round(percent / 100 * 42), 41)
            confidence = []
            for gone in (order[42 - count :], order[:count]):
                mask = torch.zeros(42, dtype=torch.bool)
                mask[gone] = True
                changed = torch.where(mask.view(6, 7), _imputed(image, mask.view(6, 7)) + field, image)
                with torch.no_grad():
                    confidence.append(model(changed[None]).softmax(1)[0, targets[i]].item())
            changes.append(confidence[0] - confidence[1])
        assert found[i].item() == pytest.approx(sum(changes) / len(changes), rel=1e-9, abs=1e-12)


def test_the_map_of_what_a_model_reads_is_the_best() -> None:
    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside = x[:, 0, :4, :4].mean((1, 2))
            return 5 * torch.stack([inside, -inside], 1)

    x = torch.full((1, 1, 8, 8), -1.0)
    x[..., :4, :4] = 1
    right = torch.zeros(1, 8, 8)
    right[:, :4, :4] = 1
    target = torch.tensor([0])
    best, worst = road(Corner(), x, right, target), road(Corner(), x, 1 - right, target)
    assert best > 0.5
    assert worst < -0.5
    torch.testing.assert_close(best, road(Corner(), x, right, target, noise=0.0), rtol=0, atol=0.01)


def test_noise_is_that_of_the_seed() -> None:
    args = network(), *pictures()
    assert torch.equal(road(*args), road(*args, seed=0))
    assert not torch.equal(road(*args), road(*args, seed=1))
    assert torch.equal(road(*args, seed=1, noise=0.0), road(*args, noise=0.0))


def test_large_holes_of_a_large_image_are_filled() -> None:
    """All of 224 x 224 but a frame: the worst conditioned there is among compact holes."""
    x = torch.randn(1, 1, 224, 224, dtype=torch.float64)
    hole = torch.zeros(1, 224, 224, dtype=torch.bool)
    hole[:, 1:-1, 1:-1] = True
    exact = linear_imputation(x, hole)
    means = nn.functional.conv2d(exact, torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]]).double()[None, None] / 12)
    torch.testing.assert_close(exact[..., 1:-1, 1:-1], means, rtol=0, atol=1e-12)
    assert (linear_imputation(x.float(), hole) - exact).abs().max() < 1e-3
