"""The native ops of the rasterizer by themselves: exact hulls, lists that lose no pixel, threads, memory, refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.splat.scenes import F64, HEIGHT, LEAVES, WIDTH, Scene, assert_within, converted, crowd, gradients, native
from zoo.kernels import use_cpu_library
from zoo.splat.convex import eager, ops

SIZE = (WIDTH, HEIGHT)


@pytest.fixture(autouse=True)
def _library() -> None:
    if not use_cpu_library():
        pytest.skip("no CPU library: needs a C++ compiler, and ZOO_KERNELS other than off")


def _project(
    scene: Scene, op: Any = ops.convex_project, *, clip: bool = False, near: float = 0.01
) -> tuple[Tensor, ...]:
    """Of one scene without leading axes."""
    cameras, n = len(scene["viewmats"]), scene["points"].shape[0]
    sigmas, opacities = (scene[name].expand(cameras, n).contiguous() for name in ("sigma", "opacities"))
    given = (scene["points"][None], scene["delta"][None], sigmas, opacities, scene["viewmats"], scene["Ks"])
    return op(*given, *SIZE, near, 1e10, 0.0, 0.0, clip, True)


# Hulls


def _edges(points: Tensor) -> Tensor:
    """Whether i -> j is an edge of the hull of each set, [n, K, K], by all triples: integers [n, K, 2]."""
    n, k = points.shape[:2]
    arm = points[:, None] - points[:, :, None]  # [n, i, j, 2] from i to j
    turn = arm[:, :, :, None, 0] * arm[:, :, None, :, 1] - arm[:, :, :, None, 1] * arm[:, :, None, :, 0]  # of i, j, q
    along = (arm[:, :, :, None] * arm[:, :, None]).sum(-1)
    beyond = (turn == 0) & ((along < 0) | (along > arm.square().sum(-1)[..., None]))
    edge = ((turn >= 0) & ~beyond).all(-1) & (arm != 0).any(-1)
    first = torch.ones(n, k, dtype=torch.bool)  # of equal points
    for j in range(1, k):
        first[:, j] = (points[:, :j] != points[:, j : j + 1]).any(-1).all(-1)
    return edge & first[:, :, None] & first[:, None]


@pytest.mark.parametrize("k", range(3, 9))
@pytest.mark.parametrize("side", [3, 7, 2**20], ids=["lattice_3", "lattice_7", "generic"])
def test_hulls_are_those_of_all_triples(side: int, k: int) -> None:
    sets = 8000
    g = torch.Generator().manual_seed(10 * k)
    corners = k * torch.randint(-(side // 2), side - side // 2, (sets, k, 2), generator=g)  # whole numbers have a mean
    places = corners.double() * 2.0 ** (-16 if side > 7 else 0)  # exact, and about as large as the picture
    scene = {
        "points": torch.cat([places, torch.ones(sets, k, 1)], -1),
        "delta": torch.ones(sets, dtype=F64),
        "sigma": torch.ones(sets, dtype=F64),
        "opacities": torch.ones(sets, dtype=F64),
        "viewmats": torch.eye(4, dtype=F64)[None],
        "Ks": torch.tensor([[[1.0, 0, WIDTH / 2], [0, 1, HEIGHT / 2], [0, 0, 1]]], dtype=F64),
    }
    projected, closed = _project(scene), _project(scene, eager.convex_project)
    for found, wanted in zip(projected[3:7:3], closed[3:7:3], strict=True):  # the order of lines, which ties decide
        assert torch.equal(found, wanted)
    means2d, _, _, lines, _, _, hull_size, boxes, _ = (t[0] for t in projected)
    edges = _edges(corners)
    arm = places[:, None] - places[:, :, None]
    # What all triples find, as lines (n, c) that turn around the polygon: no two have one direction.
    start = places - (means2d[:, None] - torch.tensor(SIZE) / 2)
    n_u, n_v = arm[..., 1], 0.0 - arm[..., 0]
    c = -(n_u * start[:, :, None, 0] + n_v * start[:, :, None, 1])
    wanted = torch.stack((n_u, n_v, c), -1).flatten(1, 2)
    counts = edges.sum((1, 2))
    flat = counts <= 2  # a segment has two edges, a point none
    # A polygon may be seen nowhere in the picture: then it is left out, but not otherwise.
    there = hull_size > 0
    assert not (there & flat).any()
    in_picture = places.abs().amax((1, 2)) < 10
    assert (there | flat | ~in_picture).all()
    assert there.sum() > sets // 2
    assert torch.equal(hull_size[there], counts[there].int())
    assert (boxes[there][:, (1, 3)] > boxes[there][:, (0, 2)]).all()
    for n in there.nonzero()[:400, 0].tolist():
        found = lines[n, : hull_size[n]]
        expected = wanted[n][edges[n].flatten()]
        order = [t[torch.atan2(t[:, 1], t[:, 0]).argsort()] for t in (found, expected)]
        assert_within(order[0], order[1], 1e-13)
        turned = torch.atan2(found[:, 1], found[:, 0])
        steps = (turned.roll(-1) - turned) % (2 * torch.pi)
        assert ((steps > 0) & (steps < torch.pi + 1e-9)).all()  # positively oriented, edge after edge


@pytest.mark.parametrize("clip", [False, True])
def test_projections_are_those_of_the_closed_form(clip: bool) -> None:
    for k in (3, 5, 8):
        scene = crowd(2000, k, cameras=1, nearest=0.3, arm=0.2, seed=k)
        scene["opacities"][::7] = 1.01 / 255
        found, wanted = (_project(scene, op, clip=clip, near=0.4) for op in (ops.convex_project, eager.convex_project))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype is b.dtype
            assert torch.equal(a, b) if not a.is_floating_point() else assert_within(a, b, 1e-11) is None
        assert 500 < found[6].count_nonzero() < 1950
        lists = [op(*(found[i] for i in (0, 1, 3, 5, 6, 7)), *SIZE, 7) for op in (ops.convex_isect, eager.convex_isect)]
        for a, b in zip(*lists, strict=True):
            assert torch.equal(a, b)


# Lists


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("tile_size", [4, 16])
def test_lists_and_boxes_lose_no_pixel(tile_size: int, dtype: torch.dtype) -> None:
    scene = crowd(150, 5, cameras=2, arm=0.12, seed=3)
    scene["sigma"] *= torch.logspace(-1, 2, 150, dtype=F64)
    scene["opacities"] = torch.logspace(-2.4, -0.1, 150, dtype=F64)[torch.randperm(150)]
    scene = converted(scene, dtype)
    projected = _project(scene)
    means2d, depths, _, lines, sharpness, limits, hull_size, boxes, _ = projected
    values = scene["colors"].expand(2, -1, -1).contiguous()
    opacities = scene["opacities"].expand(2, -1).contiguous()

    def render(limits: Tensor, boxes: Tensor, offsets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        footprint = (means2d, lines, sharpness, opacities, values, None, None, limits, hull_size, boxes)
        return ops.convex_raster(*footprint, offsets, ids, *SIZE, tile_size, False)[:2]

    counts, offsets, ids = ops.convex_isect(means2d, depths, lines, limits, hull_size, boxes, *SIZE, tile_size)
    found = render(limits, boxes, offsets, ids)
    # The same with every convex in every list, for all of its pixels.
    whole = torch.tensor([0, WIDTH, 0, HEIGHT], dtype=torch.int32).expand(2, 150, 4).contiguous()
    tiles = offsets[0].numel()
    every, starts, total = [], [], 0
    for image in range(2):
        order = depths[image].float().argsort(stable=True)
        order = order[hull_size[image, order] > 0] + 150 * image
        every += [order] * tiles
        starts += range(total, total + tiles * len(order), len(order))
        total += tiles * len(order)
    everywhere = torch.tensor(starts, dtype=torch.int32).reshape(offsets.shape)
    unlimited = torch.full_like(limits, torch.inf)
    wanted = render(unlimited, whole, everywhere, torch.cat(every).int())
    assert len(ids) < total / 3
    assert counts.sum() == len(ids)
    for a, b in zip(found, wanted, strict=True):
        assert_within(a, b, 1e-15 if dtype is F64 else 1e-6)


# Threads


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("degree", [None, 2])
def test_results_are_the_same_to_the_last_bit_for_any_number_of_threads(degree: int | None, dtype: torch.dtype) -> None:
    n = 30_000 if degree is not None and dtype is torch.float32 else 3000  # so many that a sum of torch is divided, too
    scene = converted(crowd(n, cameras=2, degree=degree, arm=0.04), dtype)

    def render(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return native(**arguments, width=150, height=90, sh_degree=degree, render_mode="RGB+ED", near_mode="clip")

    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        results.append(gradients(render, scene))
    assert results[0][1].std() > 0.1
    for (picture, alpha, grads), (again, alpha_again, others) in itertools.pairwise(results):
        assert torch.equal(picture, again)
        assert torch.equal(alpha, alpha_again)
        for name in LEAVES:
            assert torch.equal(grads[name], others[name]), name


# Memory

_PEAK = """
import resource, sys, torch
from tests.splat.scenes import converted, crowd, gradients, native

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
small = converted(crowd(50, cameras=1, degree=3), torch.float32)
gradients(native, small, width=64, height=64, sh_degree=3)
scene = converted(crowd(int(sys.argv[1]), cameras=1, degree=3, arm=0.03, size=(256, 256)), torch.float32)
before = peak()
gradients(native, scene, width=256, height=256, sh_degree=3)
extra = peak() - before
with torch.no_grad():
    pairs = native(**scene, width=256, height=256, sh_degree=3)[2]["flatten_ids"].shape[0]
inputs = sum(t.numel() * t.element_size() for t in scene.values())
print(inputs, pairs, extra)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_memory_is_that_of_inputs_and_pairs() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK, "20000"], capture_output=True, text=True, check=True)
    inputs, pairs, extra = (int(word) for word in done.stdout.split())
    assert pairs > 30_000
    record = 4 * (3 * 6 + 2 + 3)  # bytes a pair in the backward pass
    pictures = 256 * 256 * 4 * 10
    # Leaves and their gradients are twice the inputs already.
    assert extra <= 3 * inputs + pairs * record + pictures, (inputs, pairs, extra)


# Refusals of the ops: what does not fit would be read from somewhere else


def _raster_arguments() -> dict[str, Any]:
    scene = crowd(6, cameras=2)
    means2d, depths, _, lines, sharpness, limits, hull_size, boxes, _ = _project(scene)
    _, offsets, ids = ops.convex_isect(means2d, depths, lines, limits, hull_size, boxes, *SIZE, 16)
    return {
        "means2d": means2d,
        "lines": lines,
        "sharpness": sharpness,
        "opacities": scene["opacities"].expand(2, -1).contiguous(),
        "colors": scene["colors"].expand(2, -1, -1).contiguous(),
        "backgrounds": scene["backgrounds"],
        "absgrad": None,
        "limits": limits,
        "hull_size": hull_size,
        "boxes": boxes,
        "isect_offsets": offsets,
        "flatten_ids": ids,
    }


WRONG: dict[str, tuple[str, Any, str]] = {
    "shape": ("sharpness", lambda t: t[:1], "sharpness does not have the shape and type"),
    "dtype": ("limits", lambda t: t.float(), "limits does not have the shape and type"),
    "strided": ("colors", lambda t: t.mT.contiguous().mT, "colors"),
    "backgrounds": ("backgrounds", lambda t: t[:, :2], "backgrounds"),
    "beyond": ("flatten_ids", lambda t: t + 12, "must come from convex_"),
    "negative": ("flatten_ids", lambda t: t - 12, "must come from convex_"),
    "descending": ("isect_offsets", lambda t: t.flip(-1), "must come from convex_"),
    "too_long": ("isect_offsets", lambda t: t + 1000, "must come from convex_"),
    "hull_size": ("hull_size", lambda t: t + 5, "must come from convex_"),
    "tiles": ("isect_offsets", lambda t: t[:, :1].contiguous(), "isect_offsets does not have the shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_ops_refuse_what_they_did_not_make(case: str) -> None:
    name, change, message = WRONG[case]
    arguments = _raster_arguments()
    ops.convex_raster(*arguments.values(), *SIZE, 16, True)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        ops.convex_raster(*arguments.values(), *SIZE, 16, True)


def test_projection_refuses_sizes_that_do_not_go_together() -> None:
    scene = crowd(6, cameras=2)
    with pytest.raises(RuntimeError, match="a convex has 3 to 8 points, got 9"):
        _project(scene | {"points": torch.zeros(6, 9, 3, dtype=F64)})
    with pytest.raises(RuntimeError, match="delta does not have the shape and type"):
        _project(scene | {"delta": scene["delta"][:5].contiguous()})
    with pytest.raises(RuntimeError, match="expected float32 or float64"):
        _project(converted(scene, torch.float16))
