"""Ops called directly with tensors that do not belong together: an error, never memory that is not theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zoo.kernels import use_cpu_library
from zoo.splat import rasterization_convex
from zoo.splat.convex import ops

SIZE = (32, 32, 16)


@pytest.fixture
def chain() -> tuple[list[Tensor], tuple[Tensor, ...], list[Tensor], tuple[Tensor, ...]]:
    """Footprint, intersections, the tensors of the raster, and what it gives."""
    if not use_cpu_library():
        pytest.skip("no CPU library: needs a C++ compiler, and ZOO_KERNELS other than off")
    points = torch.tensor([0.0, 0, 4]) + 0.5 * torch.randn(1, 3, 6, 3, generator=torch.Generator().manual_seed(0))
    ones, K = torch.ones(1, 3), torch.tensor([[[30.0, 0, 16], [0, 30, 16], [0, 0, 1]]])
    scene = (points, ones, ones, 0.5 * ones, torch.eye(4)[None], K)
    means2d, depths, _, lines, sharpness, limits, hull_size, boxes, _ = ops.convex_project(
        *scene, 32, 32, 0.01, 100.0, 0.0, 0.0, False, True
    )
    footprint = [means2d, depths, lines, limits, hull_size, boxes]
    met = ops.convex_isect(*footprint, *SIZE)
    tensors = [means2d, lines, sharpness, 0.5 * ones, torch.rand(1, 3, 3), None, None, limits, hull_size, boxes]
    rendered = ops.convex_raster(*tensors, *met[1:], *SIZE, True)
    return footprint, met, tensors, rendered


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (5, lambda t: torch.tensor([0, 10000, 0, 10000], dtype=torch.int32).expand_as(t).contiguous(), "hull_size and"),
        (5, lambda t: t - 100, "hull_size and boxes must come from convex_project"),
        (4, lambda t: t * 0 + 1000, "hull_size and boxes must come from convex_project"),
        (4, lambda t: t * 0 - 1, "hull_size and boxes must come from convex_project"),
        (0, lambda t: t[:, :2].contiguous(), "means2d does not have the shape"),
        (2, lambda t: t.double(), "means2d does not have the shape and type"),
    ],
)
def test_intersections(chain: tuple, index: int, change: Callable[[Tensor], Tensor], message: str) -> None:
    footprint = list(chain[0])
    footprint[index] = change(footprint[index])
    with pytest.raises(RuntimeError, match=message):
        ops.convex_isect(*footprint, *SIZE)


@pytest.mark.parametrize("size", [(32, 32, 2**32), (2**32 + 32, 32, 16), (32, 0, 16), (32, 32, -16), (32, 32, 65)])
def test_sizes(chain: tuple, size: tuple[int, int, int]) -> None:
    footprint, met, tensors, _ = chain
    with pytest.raises(RuntimeError, match="must lie in"):
        ops.convex_isect(*footprint, *size)
    with pytest.raises(RuntimeError, match="must lie in"):
        ops.convex_raster(*tensors, *met[1:], *size, True)


def test_lists_of_tiles(chain: tuple) -> None:
    _, (_, offsets, ids), tensors, rendered = chain
    grads = (torch.ones_like(rendered[0]), None)
    for bad in (offsets * 0 + len(ids), offsets + 1, offsets - 1):
        with pytest.raises(RuntimeError, match="isect_offsets and flatten_ids must come from convex_isect"):
            ops.convex_raster(*tensors, bad, ids, *SIZE, True)
        with pytest.raises(RuntimeError, match="isect_offsets and flatten_ids must come from convex_isect"):
            ops.convex_raster_bwd(*grads, *tensors, bad, ids, *rendered[1:], *SIZE)
    with pytest.raises(RuntimeError, match="isect_offsets and flatten_ids must come from convex_isect"):
        ops.convex_raster(*tensors, offsets, ids + 3, *SIZE, True)


@pytest.mark.parametrize("seen", [50, 10**9, -1])
def test_entries_seen(chain: tuple, seen: int) -> None:
    _, met, tensors, (colors, transmittances, last_ids) = chain
    with pytest.raises(RuntimeError, match="last_ids must come from convex_raster with the same isect_offsets"):
        ops.convex_raster_bwd(
            torch.ones_like(colors), None, *tensors, *met[1:], transmittances, last_ids * 0 + seen, *SIZE
        )


def test_two_opaque_convexes_end_alike_everywhere() -> None:
    """0.01 squared is the threshold: one rounding more or less decides whether the second one is seen."""
    square = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], dtype=torch.float64)
    points = torch.stack([square * z for z in (4.0, 5.0, 6.0)])
    hard, ones = torch.full((3,), 10.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    K = torch.tensor([[[8.0, 0, 8], [0, 8, 8], [0, 0, 1]]], dtype=torch.float64)
    camera = (torch.eye(4, dtype=torch.float64)[None], K, 16, 16)
    pictures = [
        rasterization_convex(points, hard, hard, ones, torch.eye(3, dtype=torch.float64), *camera, backend=backend)[0]
        for backend in ("auto", "torch")
    ]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-12)
    torch.testing.assert_close(pictures[0][0, 8, 8], torch.tensor([0.99, 0.0099, 0.0], dtype=torch.float64))
