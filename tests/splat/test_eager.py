"""The PyTorch form of the ops of the convex rasterizer: against the formulas as written, and its bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from tests.splat.eager_scene import (
    F64,
    HEIGHT,
    NEAR,
    WIDTH,
    Projected,
    Scene,
    assert_near,
    expected_by_formulas,
    intersections,
    project,
    random_scene,
    raster_arguments,
    render,
)
from zoo.errors import KernelError
from zoo.splat.convex import compositing, eager, reference


def _loss(picture: Tensor, light: Tensor) -> Tensor:
    """Weighs every number of the result differently."""
    weights = torch.linspace(0.1, 1, picture.numel(), dtype=picture.dtype).reshape(picture.shape)
    return (weights * picture).sum() + (weights[..., 0].square() * light).sum()


def _levels(seen: Projected, image: int, n: int, u: Tensor, v: Tensor) -> Tensor:
    """max_j s_j of a convex at pixels of any shape: at most its limit where it can be seen."""
    lines = seen.lines[image, n, : int(seen.hull_size[image, n])]
    q = torch.stack((u - seen.means2d[image, n, 0], v - seen.means2d[image, n, 1], torch.ones_like(u)), -1)
    return (q @ lines.T).amax(-1)


CASES = [
    pytest.param(3, False, 4.0, 0.0, id="triangles"),
    pytest.param(6, False, 4.0, 31.0, id="six_points"),
    pytest.param(8, False, 4.0, 0.0, id="eight_points"),
    pytest.param(4, True, 0.8, 0.0, id="clipped_tetrahedra"),
    pytest.param(6, True, 0.8, 17.0, id="clipped_six_points"),
    pytest.param(8, True, 0.8, 0.0, id="clipped_eight_points"),
]


@pytest.mark.parametrize(("k", "clip", "distance", "reference_focal"), CASES)
def test_projection_is_that_of_the_formulas(k: int, clip: bool, distance: float, reference_focal: float) -> None:
    torch.manual_seed(k)
    scene = random_scene(12, k, 2, 2, distance=distance)
    seen = project(scene, clip=clip, reference_focal=reference_focal)
    _, _, meta = expected_by_formulas(scene, clip=clip, reference_focal=reference_focal)
    assert torch.equal(seen.hull_size, meta["hull_size"])
    assert torch.equal(seen.radii, meta["radii"])
    assert (seen.hull_size > 0).sum() > 8
    if clip:
        assert seen.hull_size.max() > 3
        assert not torch.equal(seen.hull_size, project(scene).hull_size)
    for name in ("means2d", "depths", "points2d"):
        assert_near(getattr(seen, name), meta[name], 1e-12)
    kind = {"near_plane": NEAR, "near_mode": "clip" if clip else "cull", "reference_focal": reference_focal or None}
    for image, n in (seen.hull_size > 0).nonzero().tolist():
        camera = reference.Camera(scene.viewmats[image], scene.Ks[image], WIDTH, HEIGHT, **kind)
        own = (
            scene.points[image // 2, n],
            scene.delta[image // 2, n],
            scene.sigmas[image, n],
            scene.opacities[image, n],
        )
        found = reference.footprint(*own, camera)
        assert found is not None
        size = len(found.lines)
        assert_near(seen.lines[image, n, :size], found.lines, 1e-12)
        assert not seen.lines[image, n, size:].any()
        assert_near(seen.sharpness[image, n], found.sharpness, 1e-12)
        exact = math.log(255 * own[3].item() - 1) / found.sharpness.item()
        assert 0 <= seen.limits[image, n].item() - exact <= 1e-13 * (1 + abs(exact)) / found.sharpness.item()


@pytest.mark.parametrize("tile_size", [5, 16])
@pytest.mark.parametrize(("k", "clip", "distance", "reference_focal"), [CASES[1], CASES[4]])
def test_pictures_and_gradients_are_those_of_the_formulas(
    k: int, clip: bool, distance: float, reference_focal: float, tile_size: int
) -> None:
    torch.manual_seed(10 + tile_size)
    scene = random_scene(14, k, 2, 1, distance=distance)
    ours, theirs = scene.leaves(), scene.leaves()
    picture, light, _ = render(ours, tile_size, clip=clip)
    expected, alpha, _ = expected_by_formulas(theirs, clip=clip)
    assert_near(picture, expected, 1e-12)
    assert_near(light, 1 - alpha, 1e-12)
    assert light.min() < 0.3
    _loss(picture, light).backward()
    _loss(expected, 1 - alpha).backward()
    for name in set(Scene._fields) - {"Ks"}:
        assert getattr(theirs, name).grad.abs().max() > 1e-3, name
        assert_near(getattr(ours, name).grad, getattr(theirs, name).grad, 1e-10)


def test_tiles_of_any_size_give_the_same() -> None:
    torch.manual_seed(2)
    scene = random_scene(30, 5, 1, 2)
    first, *rest = (render(scene, tile_size)[:2] for tile_size in (4, 7, 16, 64))
    for other in rest:
        for a, b in zip(first, other, strict=True):
            assert_near(a, b, 1e-14)


def test_images_of_a_batch_are_single_images() -> None:
    torch.manual_seed(3)
    scene = random_scene(10, 6, 2, 2)
    together = render(scene)
    for image in range(4):
        own = Scene(*(t[image // 2, None] if i < 2 else t[image, None] for i, t in enumerate(scene)))
        for whole, alone in zip(together, render(own), strict=True):
            assert torch.equal(whole[image], alone[0])


# Derivatives


def _check_projection(scene: Scene, *, clip: bool, depth_grad: bool = True) -> None:
    """Lines through their values at fixed places of the picture: their reference point moves, and is no variable."""
    places = torch.tensor([[3.0, 4.0], [15.0, 9.0], [8.0, 16.0]], dtype=F64)

    def outputs(points: Tensor, delta: Tensor, sigmas: Tensor, viewmats: Tensor) -> tuple[Tensor, ...]:
        moved = scene._replace(points=points, delta=delta, sigmas=sigmas, viewmats=viewmats)
        seen = project(moved, clip=clip, depth_grad=depth_grad)
        q = places - seen.means2d.detach()[:, :, None]
        q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
        return seen.means2d, seen.depths, seen.points2d, q @ seen.lines.mT, seen.sharpness

    moving = [t.clone().requires_grad_() for t in (scene.points, scene.delta, scene.sigmas, scene.viewmats)]
    assert gradcheck(outputs, moving, fast_mode=False)


@pytest.mark.parametrize("k", [3, 6])
def test_projection_passes_gradcheck(k: int) -> None:
    torch.manual_seed(4)
    scene = random_scene(3, k, 1, 2, size=0.3)
    assert (project(scene).hull_size > 0).all()
    _check_projection(scene, clip=False)


def test_clipped_projection_passes_gradcheck() -> None:
    torch.manual_seed(5)
    scene = random_scene(4, 5, distance=0.8)
    sizes = project(scene, clip=True).hull_size
    assert (sizes > 0).sum() > 2
    assert not torch.equal(sizes, project(scene).hull_size)
    _check_projection(scene, clip=True)


def test_without_depth_grad_depth_is_a_constant_of_both_scales() -> None:
    torch.manual_seed(6)
    scene = random_scene(3)
    for depth_grad in (True, False):
        leaves = scene.leaves()
        seen = project(leaves, depth_grad=depth_grad)
        (to_points,) = torch.autograd.grad(
            seen.sharpness.sum(), leaves.points, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        assert bool(to_points.any()) is depth_grad
        (to_points,) = torch.autograd.grad(seen.depths.sum(), leaves.points)
        assert to_points.any()


def _check_raster(check: Callable[..., bool], scene: Scene, **options: float) -> None:
    seen = project(scene)
    constants = raster_arguments(scene, seen, scene.backgrounds)
    weights = torch.randn(5, 4 * len(scene.viewmats) * WIDTH * HEIGHT, dtype=F64)

    def outputs(lines: Tensor, sharpness: Tensor, opacities: Tensor, colors: Tensor, behind: Tensor) -> Tensor:
        moved = (constants[0], lines, sharpness, opacities, colors, behind, *constants[6:])
        picture, light, _ = eager.convex_raster(*moved, WIDTH, HEIGHT, 8, True)
        return weights @ torch.cat([picture.flatten(), light.flatten()])

    moving = [t.clone().requires_grad_() for t in constants[1:6] if t is not None]
    assert check(outputs, moving, **options)


def test_raster_passes_gradcheck() -> None:
    torch.manual_seed(7)
    # Pixels at which alpha is about 1/255 would step over it.
    _check_raster(gradcheck, random_scene(4, 4, 1, 2, opacity=(0.4, 0.9)), eps=1e-7, atol=1e-6)


def test_raster_can_be_differentiated_twice() -> None:
    torch.manual_seed(8)
    _check_raster(gradgradcheck, random_scene(2, 3, opacity=(0.4, 0.9)), eps=1e-7, atol=1e-5)


def test_the_clamp_of_alpha_lets_the_gradient_of_opacity_through() -> None:
    torch.manual_seed(9)
    scene = random_scene(1, size=1.0, opacity=(1.0, 1.0))
    scene = scene._replace(sigmas=torch.full_like(scene.sigmas, 50.0)).leaves()
    _, light, _ = render(scene)
    opaque = light < 0.0101
    assert opaque.sum() > 10
    assert_close(light[opaque], torch.full_like(light[opaque], 0.01), rtol=0, atol=1e-16)
    light[opaque].sum().backward()
    assert_close(scene.opacities.grad, torch.full_like(scene.opacities, -float(opaque.sum())), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [False, True])
def test_backward_ops_agree_with_autograd(clip: bool) -> None:
    torch.manual_seed(11)
    scene = random_scene(10, 6, 2, 2, distance=0.8 if clip else 4.0).leaves()
    probe = torch.zeros_like(scene.sigmas, requires_grad=True)
    seen = Projected(*(t.requires_grad_(False) if not t.is_floating_point() else t for t in project(scene, clip=clip)))
    arguments = raster_arguments(scene, seen, scene.backgrounds, probe)
    picture, light, last = eager.convex_raster(*arguments, WIDTH, HEIGHT, 8, True)
    to_picture, to_light = torch.randn_like(picture), torch.randn_like(light)
    variables = (seen.lines, seen.sharpness, scene.opacities, scene.colors, scene.backgrounds, probe)
    expected = torch.autograd.grad((picture, light), variables, (to_picture, to_light), retain_graph=True)
    saved = [None if t is None else t.detach() for t in arguments]
    # As the dispatcher calls an implementation: with autograd left out.
    with torch._C._AutoDispatchBelowAutograd():
        found = eager.convex_raster_bwd(to_picture, to_light, *saved, light.detach(), last, WIDTH, HEIGHT, 8)
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        assert_near(a, b, 1e-13)

    grads = [torch.randn_like(t) for t in seen[:5]]
    moving = (scene.points, scene.delta, scene.sigmas, scene.viewmats)
    for given in ((0, 1, 2, 3, 4), (1,), (3,), (2, 4)):
        pairs = [(seen[i], grads[i]) for i in given]
        outputs, arriving = zip(*pairs, strict=True)
        expected = torch.autograd.grad(
            outputs, moving, arriving, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        arriving = [grads[i] if i in given else None for i in range(5)]
        inputs = [t.detach() for t in (*moving, scene.Ks, seen.lines)]
        for cameras in (True, False):
            with torch._C._AutoDispatchBelowAutograd():
                found = eager.convex_project_bwd(*arriving, *inputs, seen.hull_size, NEAR, 0.0, clip, True, cameras)
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert_near(a, b if cameras or i < 3 else torch.zeros_like(b), 1e-13)


def test_backward_of_the_picture_alone_takes_no_gradient_for_the_light() -> None:
    torch.manual_seed(12)
    scene = random_scene(6)
    arguments = raster_arguments(scene, project(scene), scene.backgrounds)
    picture, light, last = eager.convex_raster(*arguments, WIDTH, HEIGHT, 8, True)
    ones, size = torch.ones_like(picture), (WIDTH, HEIGHT, 8)
    found = eager.convex_raster_bwd(ones, None, *arguments, light, last, *size)
    zeros = eager.convex_raster_bwd(ones, torch.zeros_like(light), *arguments, light, last, *size)
    only_light = eager.convex_raster_bwd(None, torch.ones_like(light), *arguments, light, last, *size)
    for a, b in zip(found, zeros, strict=True):
        assert torch.equal(a, b)
    assert found[5].shape == (0,)
    assert only_light[2].any()
    assert not only_light[3].any()
    assert not only_light[4].any()


def test_absgrad_adds_up_the_lengths_of_shifts_pixel_by_pixel() -> None:
    torch.manual_seed(13)
    scene = random_scene(5, 5)
    probe = torch.zeros_like(scene.sigmas, requires_grad=True)
    seen = project(scene)
    lines = seen.lines.requires_grad_()
    arguments = raster_arguments(scene, seen, None, probe)
    picture, light, _ = eager.convex_raster(*arguments, WIDTH, HEIGHT, 8, True)
    weights = torch.rand_like(picture)
    (found,) = torch.autograd.grad((weights * picture).sum() + light.sum(), probe, retain_graph=True)
    expected = torch.zeros_like(found)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            at = (0, row, column)
            value = (weights[at] * picture[at]).sum() + light[at]
            (own,) = torch.autograd.grad(value, lines, retain_graph=True)
            by_line = own[..., 2:]  # d value / d s_j, as s_j = l_j (u, v, 1)
            expected += (by_line * lines.detach()[..., :2]).sum(-2).norm(dim=-1)
    assert expected.min() > 0
    assert_near(found, expected, 1e-12)


# Bounds


def test_boxes_hold_the_level_set_and_touch_it() -> None:
    torch.manual_seed(14)
    scene = random_scene(40, 6, opacity=(0.01, 1.0))
    # Dense samples of a level set that is inside of the picture.
    scene = scene._replace(sigmas=scene.sigmas * 20, points=scene.points * 0.3)
    seen = project(scene)
    fine = 16
    v, u = torch.meshgrid(
        (torch.arange(HEIGHT * fine, dtype=F64) + 0.5) / fine,
        (torch.arange(WIDTH * fine, dtype=F64) + 0.5) / fine,
        indexing="ij",
    )
    checked = 0
    for n in (seen.hull_size[0] > 0).nonzero()[:, 0].tolist():
        inside = _levels(seen, 0, n, u, v) <= seen.limits[0, n]
        if not inside.any():
            continue
        x0, x1, y0, y1 = seen.boxes[0, n].tolist()
        for coordinate, low, high, most, radius in ((u, x0, x1, WIDTH, 0), (v, y0, y1, HEIGHT, 1)):
            least, largest = coordinate[inside].min().item(), coordinate[inside].max().item()
            # Every pixel centre between them is in the range, and the range ends within a pixel of them.
            assert low <= math.ceil(least - 0.5)
            assert high > math.floor(largest - 0.5)
            assert low == 0 or low + 0.5 >= least - 1 - 2 / fine
            assert high == most or high - 0.5 <= largest + 1 + 2 / fine
            if low > 0 and high < most:
                exact = (largest - least) / 2
                assert exact <= seen.radii[0, n, radius] <= exact + 1 + 2 / fine
                checked += 1
    assert checked > 20


def test_a_sliver_has_a_box_that_is_capped() -> None:
    scene = random_scene(1, 3)
    points = torch.tensor([[-1.0, 0, 0], [1, 1e-7, 0], [3, 0, 0]], dtype=F64)
    scene = scene._replace(points=points[None, None], sigmas=torch.full_like(scene.sigmas, 0.01))
    seen = project(scene)
    assert seen.hull_size.item() == 3
    assert seen.radii.max() == math.ceil(2 * math.hypot(WIDTH, HEIGHT))
    assert seen.boxes.tolist() == [[[0, WIDTH, 0, HEIGHT]]]


def _clip(polygon: list[tuple[float, float]], a: float, b: float, c: float) -> list[tuple[float, float]]:
    """The part of a convex polygon where a u + b v + c <= 0."""
    found = []
    for (u, v), (next_u, next_v) in zip(polygon, [*polygon[1:], *polygon[:1]], strict=True):
        here, there = a * u + b * v + c, a * next_u + b * next_v + c
        if here <= 0:
            found.append((u, v))
        if here * there < 0:
            share = here / (here - there)
            found.append((u + share * (next_u - u), v + share * (next_v - v)))
    return found


def _meets(seen: Projected, image: int, n: int, low: tuple[float, float], high: tuple[float, float]) -> bool:
    """Whether {s_j <= limit} and a rectangle have a point in common."""
    (u0, v0), (u1, v1) = (
        (u - seen.means2d[image, n, 0].item(), v - seen.means2d[image, n, 1].item()) for u, v in (low, high)
    )
    polygon = [(u0, v0), (u1, v0), (u1, v1), (u0, v1)]
    for a, b, c in seen.lines[image, n, : int(seen.hull_size[image, n])].tolist():
        polygon = _clip(polygon, a, b, c - seen.limits[image, n].item())
    return bool(polygon)


def test_lists_have_every_tile_that_sees_a_convex_and_none_without_its_polygon() -> None:
    torch.manual_seed(15)
    scene = random_scene(60, 5, 1, 2, size=0.25, opacity=(0.004, 1.0))
    scene = scene._replace(sigmas=scene.sigmas * 5)
    seen, tile_size = project(scene), 4
    counts, offsets, ids = intersections(seen, tile_size)
    tiles, across = offsets[0].numel(), offsets.shape[2]
    bounds = [*offsets.flatten().tolist(), len(ids)]
    lists = [ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
    v, u = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    tile_of = (v // tile_size * across + u // tile_size).flatten()
    pixels = torch.stack((u, v), -1).reshape(-1, 2).to(F64) + 0.5
    every = (seen.means2d, seen.limits, seen.hull_size, seen.lines, seen.sharpness, scene.opacities, scene.colors)
    for image, n in torch.cartesian_prod(torch.arange(2), torch.arange(60)).tolist():
        listed = {tile for tile in range(tiles) if image * 60 + n in lists[image * tiles + tile]}
        assert len(listed) == counts[image, n]
        if seen.hull_size[image, n] == 0:
            assert not listed
            continue
        entry = compositing.Entries(*(t[image, n, None] for t in every), torch.zeros(1, 0))
        assert set(tile_of[compositing._alphas(entry, pixels)[0] > 0].tolist()) <= listed
        for tile in listed:
            row, column = divmod(tile, across)
            margin = 1 / 64 + 1e-9  # of boxes
            low = (column * tile_size + 0.5 - margin, row * tile_size + 0.5 - margin)
            high = (min(WIDTH, low[0] + margin + 3.5) - 0.5 + margin, min(HEIGHT, low[1] + margin + 3.5) - 0.5 + margin)
            assert _meets(seen, image, n, low, high)
    assert counts.sum() > 200
    assert (counts == 0).any()


def test_lists_are_in_order_of_depth_and_then_of_the_index() -> None:
    torch.manual_seed(16)
    scene = random_scene(9, 4, size=1.0)
    scene = scene._replace(points=scene.points[:, (0, 1, 0, 2, 1, 0, 3, 2, 0)])  # equal ones have equal depths
    seen = project(scene)
    # Of two depths that float32 cannot tell apart the first in the list comes first.
    seen.depths[0, 6] = seen.depths[0, 3] * (1 - 1e-12)
    _, offsets, ids = intersections(seen, 64)
    keys = seen.depths[0].float()[ids.long()].tolist()
    assert offsets.tolist() == [[[0]]]
    assert len(ids) > 5
    assert sorted(zip(keys, ids.tolist(), strict=True)) == list(zip(keys, ids.tolist(), strict=True))


def test_too_many_intersections_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(17)
    seen = project(random_scene(9))
    monkeypatch.setattr(eager, "_MOST_INTERSECTIONS", 10)
    with pytest.raises(KernelError, match="at most 10 intersections"):
        intersections(seen)


# Compositing


def test_long_lists_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(19)
    scene = random_scene(150, 5, size=0.9, opacity=(0.1, 0.5))
    whole, in_chunks = scene.leaves(), scene.leaves()
    expected = render(whole)
    _loss(*expected[:2]).backward()
    monkeypatch.setattr(compositing, "BLOCK_BYTES", 7 * 4 * 8 * 64)  # seven entries of a tile of 8 x 8
    found = render(in_chunks)
    _loss(*found[:2]).backward()
    assert expected[2].max() > 70
    # Some pixels are finished, and stay so in the chunks that come after.
    stopped = expected[1] < 2e-4
    assert stopped.sum() > 20
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-14) if a.is_floating_point() else torch.equal(a, b)
    for name in set(Scene._fields) - {"Ks"}:
        assert_near(getattr(in_chunks, name).grad, getattr(whole, name).grad, 1e-13)


def test_last_ids_count_entries_up_to_the_last_one_that_contributes() -> None:
    torch.manual_seed(20)
    scene = random_scene(40, 4, size=0.6, opacity=(0.3, 1.0))
    seen = project(scene)
    arguments = raster_arguments(scene, seen, None)
    offsets, ids = arguments[-2:]
    _, light, last = eager.convex_raster(*arguments, WIDTH, HEIGHT, 8, True)
    bounds = [*offsets.flatten().tolist(), len(ids)]
    for row in range(0, HEIGHT, 3):
        for column in range(0, WIDTH, 3):
            tile = row // 8 * offsets.shape[2] + column // 8
            through, contributing = 1.0, 0
            for place, n in enumerate(ids[bounds[tile] : bounds[tile + 1]].tolist(), 1):
                lines = seen.lines[0, n, : int(seen.hull_size[0, n])]
                q = torch.tensor([column + 0.5, row + 0.5, 1.0], dtype=F64)
                q[:2] -= seen.means2d[0, n]
                t = (seen.sharpness[0, n] * (lines @ q).logsumexp(0)).item()
                alpha = min(0.99, scene.opacities[0, n].item() / (1 + math.exp(min(t, 700))))
                if alpha < 1 / 255:
                    continue
                if through * (1 - alpha) < 1e-4:
                    break
                through, contributing = through * (1 - alpha), place
            assert last[0, row, column] == contributing
            assert abs(light[0, row, column].item() - through) < 1e-13
    assert light.min() < 1e-3
    assert eager.convex_raster(*arguments, WIDTH, HEIGHT, 8, False)[2].shape == (0,)


# What is left out


def _spoiled(scene: Scene) -> tuple[Scene, list[int]]:
    """Convexes in front of which anything is wrong, and which ones."""
    points, delta, sigmas, opacities = (t.clone() for t in scene[:4])
    points[0, 0, 1] = torch.nan
    points[0, 1, 2, 0] = torch.inf
    points[0, 2] *= 1e200
    points[0, 3, :, 2] = -9.0  # behind the camera
    points[0, 4] = points[0, 4, :1]  # one point
    points[0, 5, :, 1:] = 0  # a segment
    points[0, 6, :, 0] += 1e4  # beside the picture
    points[0, 7, 0] = scene.viewmats.new_tensor([0.1, 0.2, -4.0])  # in the plane of the camera
    delta[0, 8], delta[0, 9] = torch.nan, torch.inf
    delta[0, 15] = 1e308  # lines overflow
    sigmas[0, 10], sigmas[0, 11] = torch.nan, torch.inf
    opacities[0, 12], opacities[0, 13], opacities[0, 14] = torch.nan, 1 / 255, 0.0
    return scene._replace(points=points, delta=delta, sigmas=sigmas, opacities=opacities), list(range(16))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_what_cannot_be_seen_is_zeros_and_has_zero_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(21)
    scene, wrong = _spoiled(random_scene(20))
    scene = scene._replace(viewmats=scene.viewmats.clone())
    scene.viewmats[0, :3, :3] = torch.eye(3)
    ours = scene.to(dtype).leaves()
    seen = project(ours)
    for t in seen:
        assert not t[0, wrong].any()
        assert t.isfinite().all()
    assert (seen.hull_size[0, 16:] > 0).all()
    picture, light, _ = render(ours)
    (_loss(picture, light) + sum(t.sum() for t in seen[:5])).backward()
    for name in set(Scene._fields) - {"Ks"}:
        assert getattr(ours, name).grad.isfinite().all(), name
    for name in ("points", "delta", "sigmas", "opacities", "colors"):
        assert not getattr(ours, name).grad[0, wrong].any(), name
        assert getattr(ours, name).grad[0, 16:].any(), name
    rest = Scene(*(t[:, 16:] if i in (0, 1, 2, 3, 6) else t for i, t in enumerate(scene.to(dtype))))
    assert_close((picture, light), render(rest)[:2], rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-14)


def test_a_convex_across_the_plane_of_the_camera_is_clipped_without_nan() -> None:
    torch.manual_seed(22)
    scene = random_scene(6, 5, size=1.0)
    scene.viewmats[0, :3, :3] = torch.eye(3)
    scene.points[0, :, 0, 2] = -4.0  # z is 0 there
    ours = scene.leaves()
    seen = project(ours, clip=True)
    assert (seen.hull_size > 0).sum() > 3
    assert not project(ours).hull_size.any()
    assert not seen.points2d[0, :, 0].any()
    (_loss(*render(ours, clip=True)[:2]) + seen.points2d.sum()).backward()
    for name in set(Scene._fields) - {"Ks"}:
        assert getattr(ours, name).grad.isfinite().all(), name
        assert getattr(ours, name).grad.any(), name


def test_scales_of_zero_are_clamped_and_stay() -> None:
    torch.manual_seed(23)
    scene = random_scene(2)
    ours = scene._replace(delta=scene.delta * 0, sigmas=scene.sigmas * 0).leaves()
    seen = project(ours)
    assert seen.hull_size.all()
    assert (seen.sharpness == 1e-12).all()
    assert seen.lines.any()
    _loss(*render(ours)[:2]).backward()
    for name in ("points", "delta", "sigmas"):
        assert getattr(ours, name).grad.isfinite().all()
    assert not ours.delta.grad.any()
    assert not ours.sigmas.grad.any()


def test_values_that_overflow_beyond_the_limit_leave_gradients_finite() -> None:
    torch.manual_seed(24)
    scene = random_scene(6, size=0.02).to(torch.float32)
    scene = scene._replace(delta=scene.delta * 1e38, sigmas=scene.sigmas * 1e-37).leaves()
    seen = project(scene)
    # The pixel farthest from the centres is in the same tile, and s is beyond what float32 holds there.
    far = (seen.lines[..., :2].abs().double().sum(-1) * 30).amax(-1)[seen.hull_size > 0]
    assert (far > 4e38).sum() > 3
    picture, light, _ = render(scene, 64)
    _loss(picture, light).backward()
    assert picture.isfinite().all()
    for name in set(Scene._fields) - {"Ks"}:
        assert getattr(scene, name).grad.isfinite().all(), name


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_see_is_the_background(n: int) -> None:
    torch.manual_seed(25)
    scene = random_scene(n, 6, 2, 1)
    scene = scene._replace(points=scene.points - 1e3).leaves()
    picture, light, last = render(scene)
    assert torch.equal(picture, scene.backgrounds[:, None, None].expand_as(picture))
    assert (light == 1).all()
    assert not last.any()
    picture.sum().backward()
    assert_close(scene.backgrounds.grad, torch.full((2, 3), float(WIDTH * HEIGHT), dtype=F64))
    for name in ("points", "delta", "sigmas", "opacities", "colors"):
        grad = getattr(scene, name).grad
        assert grad is not None
        assert not grad.any()
        assert grad.shape == getattr(scene, name).shape


def test_no_images_are_no_pictures() -> None:
    scene = Scene(*(t[:0] for t in random_scene(3)))
    picture, light, last = render(scene)
    assert picture.shape == (0, HEIGHT, WIDTH, 3)
    assert light.shape == last.shape == (0, HEIGHT, WIDTH)


def test_float32_keeps_lines_far_from_the_middle_of_the_picture() -> None:
    torch.manual_seed(26)
    scene = random_scene(8, size=0.02)
    scene.viewmats[0, :3, :3] = torch.eye(3)
    scene = scene._replace(points=scene.points - scene.points.mean(-2, keepdim=True) + torch.tensor([6.0, 3.0, 0.0]))
    scene.Ks[0, :2, :2] *= 100
    scene.Ks[0, :2, 2] = torch.tensor([11.0 - 3000, 8.0 - 1575])  # convexes are in the picture, which is far from there
    scene = scene.to(torch.float32)
    exact = project(scene.to(F64))
    seen = project(scene)
    checked = exact.hull_size == seen.hull_size
    assert checked.any()
    assert exact.hull_size.any()
    for a, b in zip(seen.lines[checked], exact.lines[checked], strict=True):
        assert_close(a.to(F64), b, rtol=0, atol=2e-5 * b.abs().max().item())
