"""The oracle of the rasterizer against scalar arithmetic, ray tracing and identities."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close
from tests.splat.soft_scene import Scene, random_rotation, render, soft_scene
from zoo.splat.convex.reference import (
    Camera,
    clipped,
    field,
    footprint,
    harmonics,
    line_forms,
    seen_color,
    support_box,
)

F64 = torch.float64


def _square(depth: float = 1.0, half: float = 2.0) -> Tensor:
    """[4, 3]: seen head on in front of the camera of `_head_on` as 2 `half` pixels around the middle."""
    corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], dtype=F64)
    return corners * half * depth + torch.tensor([0.0, 0.0, depth], dtype=F64)


def _head_on(points: Tensor, opacities: list[float], colors: list[list[float]], background: list[float]) -> Scene:
    """Hard edges, focal length 1, 8 x 8 pixels."""
    n = len(points)
    return {
        "points": points,
        "delta": torch.full((n,), 50.0, dtype=F64),
        "sigma": torch.full((n,), 50.0, dtype=F64),
        "opacities": torch.tensor(opacities, dtype=F64),
        "colors": torch.tensor(colors, dtype=F64),
        "viewmats": torch.eye(4, dtype=F64)[None],
        "Ks": torch.tensor([[[1.0, 0, 4], [0, 1, 4], [0, 0, 1]]], dtype=F64),
        "backgrounds": torch.tensor([background], dtype=F64),
    }


# Values.


def _by_hand(scene: Scene, column: int, row: int) -> tuple[list[float], float]:
    """Section 3 of the paper at one pixel of the first camera with plain numbers: the hull by angle, the sum by exp."""
    (r, t), K = (scene["viewmats"][0, :3, :3], scene["viewmats"][0, :3, 3]), scene["Ks"][0].tolist()
    q = column + 0.5, row + 0.5
    layers = []
    for n in range(len(scene["points"])):
        camera = [(r @ p + t).tolist() for p in scene["points"][n]]
        screen = [(K[0][0] * x / z + K[0][2], K[1][1] * y / z + K[1][2]) for x, y, z in camera]
        edges = [
            (a, b)
            for a in screen
            for b in screen
            if a != b and all((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) > -1e-9 for p in screen)
        ]
        d = sum(z for _, _, z in camera) / len(camera)
        lines = [(b[1] - a[1]) * (q[0] - a[0]) - (b[0] - a[0]) * (q[1] - a[1]) for a, b in edges]
        phi = math.log(sum(math.exp(d * scene["delta"][n].item() * line) for line in lines))
        indicator = 1 / (1 + math.exp(d * scene["sigma"][n].item() * phi))
        layers.append((d, scene["opacities"][n].item() * indicator, scene["colors"][n].tolist()))
    color, transmittance = [0.0, 0.0, 0.0], 1.0
    for _, alpha, value in sorted(layers):
        alpha = min(0.99, alpha)
        if alpha < 1 / 255:
            continue
        if transmittance * (1 - alpha) < 1e-4:
            break
        color = [c + transmittance * alpha * v for c, v in zip(color, value, strict=True)]
        transmittance *= 1 - alpha
    return [c + transmittance * b for c, b in zip(color, scene["backgrounds"][0].tolist(), strict=True)], transmittance


@pytest.mark.parametrize("k", range(3, 9))
def test_picture_is_the_formula_at_every_pixel(k: int):
    scene = soft_scene(k, n=5, k=k)
    picture, alpha, _ = render(scene)
    by_hand = [[_by_hand(scene, u, v) for u in range(14)] for v in range(12)]
    assert_close(picture[0], torch.tensor([[c for c, _ in row] for row in by_hand], dtype=F64), loose=10)
    assert_close(alpha[0, ..., 0], torch.tensor([[1 - t for _, t in row] for row in by_hand], dtype=F64), loose=10)


def test_one_opaque_convex_stops_at_the_clamp():
    scene = _head_on(_square()[None], [1.0], [[0.2, 0.4, 0.6]], [1.0, 0.0, 0.5])
    picture, alpha, meta = render(scene, 8, 8)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    assert_close(alpha[0, ..., 0], 0.99 * inside.to(F64))
    assert_close(picture[0, 3, 3], torch.tensor([0.198 + 0.01, 0.396, 0.594 + 0.005], dtype=F64))
    assert picture[0][~inside].equal(scene["backgrounds"].expand(48, 3))
    assert meta["hull_size"].tolist() == [[4]]
    assert meta["means2d"].tolist() == [[[4.0, 4.0]]]
    assert meta["depths"].tolist() == [[1.0]]


def test_the_clamp_is_straight_through():
    scene = _head_on(_square()[None], [1.0], [[1.0, 1, 1]], [0.0, 0, 0])
    scene["opacities"].requires_grad_()
    render(scene, 8, 8)[1].sum().backward()
    assert_close(scene["opacities"].grad, torch.tensor([16.0], dtype=F64))  # of 16 pixels, each I = 1


def test_points_that_are_no_corners_do_not_matter():
    square = _square()
    middles = (square + square.roll(-1, 0)) / 2
    for more in (middles, square, square / 2 + torch.tensor([0, 0, 0.5], dtype=F64)):
        scene = _head_on(torch.cat([square, more])[None], [0.8], [[1.0, 1, 1]], [0.0, 0, 0])
        scene |= {"delta": torch.tensor([0.3], dtype=F64), "sigma": torch.tensor([0.2], dtype=F64)}
        fewer = render(scene | {"points": square[None]}, 8, 8)
        found = render(scene, 8, 8)
        assert_close(found[0], fewer[0])
        assert found[2]["hull_size"].tolist() == [[4]]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_nearer_of_two_half_transparent_convexes_counts_twice(order: list[int]):
    points = torch.stack([_square(1.0), _square(2.0)])[order]
    colors = [[[1.0, 0, 0], [0.0, 1, 0]][i] for i in order]
    picture, alpha, _ = render(_head_on(points, [0.5, 0.5], colors, [0.0, 0, 1]), 8, 8)
    assert_close(picture[0, 4, 4], torch.tensor([0.5, 0.25, 0.25], dtype=F64))
    assert_close(alpha[0, 4, 4], torch.tensor([0.75], dtype=F64))


def test_equal_depths_keep_the_order_of_the_index():
    # Apart by less than float32 can tell, the farther one first.
    points = torch.stack([_square(1 + 1e-9), _square(1.0)])
    picture, _, _ = render(_head_on(points, [0.5, 0.5], [[1.0, 0, 0], [0.0, 1, 0]], [0.0, 0, 0]), 8, 8)
    assert_close(picture[0, 4, 4], torch.tensor([0.5, 0.25, 0.0], dtype=F64))


def test_a_pixel_stops_before_it_is_too_dark():
    depths = (1.0, 2.0, 3.0, 4.0)
    points = torch.stack([_square(d) for d in depths])
    colors = torch.eye(4, dtype=F64).tolist()
    picture, alpha, _ = render(_head_on(points, [0.98, 0.98, 0.98, 0.5], colors, [0.0] * 4), 8, 8)
    # 0.02^3 < 1e-4, so the third is not added, nor the fourth, for which there would be room.
    assert_close(picture[0, 4, 4], torch.tensor([0.98, 0.0196, 0.0, 0.0], dtype=F64))
    assert_close(alpha[0, 4, 4], torch.tensor([1 - 4e-4], dtype=F64))


def test_alpha_below_one_in_255_is_skipped():
    scene = soft_scene(1, n=1)
    _, alpha, _ = render(scene)
    seen = footprint(*(scene[name][0] for name in ("points", "delta", "sigma", "opacities")), _camera(scene))
    assert seen is not None
    v, u = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(14) + 0.5, indexing="ij")
    phi = field(seen.lines, torch.stack([u, v], -1).to(F64) - seen.centre)
    unskipped = scene["opacities"][0] / (1 + (seen.sharpness * phi).exp())
    skipped = unskipped < 1 / 255
    assert 0 < skipped.sum() < skipped.numel()
    assert_close(alpha[0, ..., 0], unskipped.masked_fill(skipped, 0.0), loose=10)


def _camera(scene: Scene, **options: Any) -> Camera:
    return Camera(scene["viewmats"][0], scene["Ks"][0], 14, 12, **options)


def test_lines_are_edge_length_times_distance():
    square = torch.tensor([[0.0, 0], [2, 0], [2, 2], [0, 2]], dtype=F64)
    q = torch.tensor([0.5, 1.0, 1.0], dtype=F64)
    assert (line_forms(square) @ q).tolist() == [-2.0, -3.0, -2.0, -1.0]


def test_box_is_that_of_the_moved_lines():
    square = line_forms(torch.tensor([[0.0, 0], [2, 0], [2, 2], [0, 2]], dtype=F64)).tolist()
    assert support_box(square, 0.5) == (-0.25, 2.25, -0.25, 2.25)
    assert support_box(square, -4.0) is None


@pytest.mark.parametrize("seed", range(4))
def test_box_holds_all_pixels_that_count_and_no_more(seed: int):
    scene = soft_scene(seed, n=1)
    scene["Ks"][:, :2] *= 40.0  # fine pixels, so that the box is touched
    scene["Ks"][:, 1, 2] += 100.0
    width, height = 560, 680
    _, alpha, meta = render(scene, width, height)
    at = (alpha[0, ..., 0] > 0).nonzero()
    assert (at.amin(0) > 0).all()
    assert (at.amax(0) < torch.tensor([height - 1, width - 1])).all()
    half = (at.amax(0) - at.amin(0)).flip(0) / 2
    radii = meta["radii"][0, 0]
    assert (radii >= half).all()
    assert (radii <= 1.1 * half + 2).all()  # log-sum-exp rounds corners, the box has them


# Harmonics.


def test_harmonics_are_orthonormal():
    nodes, steps = 12, 24
    # Gauss-Legendre in z by the eigenvalues of the Jacobi matrix, equal steps around.
    beta = torch.arange(1, nodes, dtype=F64)
    beta = beta / (4 * beta.square() - 1).sqrt()
    z, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    weights = 2 * vectors[0].square() * 2 * math.pi / steps
    angle = 2 * math.pi * torch.arange(steps, dtype=F64) / steps
    total = torch.zeros(25, 25, dtype=F64)
    for zi, wi in zip(z, weights, strict=True):
        for a in angle:
            y = harmonics(torch.stack([(1 - zi**2).sqrt() * a.cos(), (1 - zi**2).sqrt() * a.sin(), zi]), 4)
            total += wi * y.outer(y)
    assert_close(total, torch.eye(25, dtype=F64), loose=100)


def test_harmonics_have_the_signs_of_gaussian_splatting():
    x, y, z = direction = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.7], dtype=F64), dim=0)
    expected = [torch.tensor(0.28209479177387814, dtype=F64), *(0.4886025119029199 * s for s in (-y, z, -x))]
    expected += [1.0925484305920792 * x * y, -1.0925484305920792 * y * z]
    assert_close(harmonics(direction, 4)[:6], torch.stack(expected))
    assert_close(harmonics(direction, 2), harmonics(direction, 4)[:9])


def test_harmonics_are_those_of_gsplat():
    peer = pytest.importorskip("gsplat.cuda._torch_impl")
    directions = torch.nn.functional.normalize(torch.randn(6, 3, dtype=F64), dim=-1)
    coefficients = torch.randn(6, 25, 3, dtype=F64)
    expected = peer._spherical_harmonics(4, directions, coefficients)
    assert_close(torch.stack([harmonics(d, 4) @ c for d, c in zip(directions, coefficients, strict=True)]), expected)


def test_color_is_seen_from_the_camera_and_not_negative():
    scene = soft_scene(coefficients=4)
    points, camera = scene["points"][0], _camera(scene)
    position = torch.linalg.inv(scene["viewmats"][0])[:3, 3]
    _, y, z = torch.nn.functional.normalize(points.mean(0) - position, dim=0).tolist()
    coefficients = torch.tensor([[0.1, 0.2, -9], [1, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=F64)
    expected = [0.5 + 0.28209479177387814 * 0.1 - 0.4886025119029199 * y]
    expected += [0.5 + 0.28209479177387814 * 0.2 + 2 * 0.4886025119029199 * z, 0.0]
    assert_close(seen_color(coefficients, points, camera, 1), torch.tensor(expected, dtype=F64).clamp(min=0))


# Near plane.


def _faces(points: Tensor) -> list[tuple[Tensor, float]]:
    """Half spaces n . p <= offset of the hull of [K, 3]: planes through three points that have all on one side."""
    found = []
    for a, b, c in combinations(points, 3):
        normal = torch.linalg.cross(b - a, c - a)
        sides = (points - a) @ normal
        if (sides < 1e-9).all():
            found.append((normal, (normal @ a).item()))
        elif (sides > -1e-9).all():
            found.append((-normal, -(normal @ a).item()))
    return found


def _is_hit(faces: list[tuple[Tensor, float]], near: float, ray: Tensor) -> bool:
    """Whether a ray from the camera with z = 1 meets the polytope before the plane z = near."""
    first, last = near, math.inf
    for normal, offset in faces:
        slope = (normal @ ray).item()
        if slope > 0:
            last = min(last, offset / slope)
        elif slope < 0:
            first = max(first, offset / slope)
        elif offset < 0:
            return False
    return first <= last


@pytest.mark.parametrize("k", [4, 6, 8])
@pytest.mark.parametrize("near_mode", ["cull", "clip"])
def test_silhouette_is_that_of_the_polytope(k: int, near_mode: str):
    scene = soft_scene(20 + k, n=1, k=k)
    camera = scene["points"][0] @ scene["viewmats"][0, :3, :3].T + scene["viewmats"][0, :3, 3]
    least, centre = camera[:, 2].min().item(), camera.mean(0)
    near = (least + 2 * centre[2].item()) / 3 if near_mode == "clip" else least / 2
    K = scene["Ks"][0]
    K[0, 0] = K[1, 1] = 50.0
    K[:2, 2] = torch.tensor([7.0, 6.0]) - 50 * centre[:2] / centre[2]
    scene |= {"delta": torch.tensor([1e5], dtype=F64), "sigma": torch.tensor([1e5], dtype=F64)}
    scene["opacities"][:] = 1.0
    _, alpha, _ = render(scene, near_plane=near, near_mode=near_mode)
    faces = _faces(camera)
    back = torch.linalg.inv(K)
    hits = torch.tensor(
        [
            [_is_hit(faces, near, back @ torch.tensor([u + 0.5, v + 0.5, 1.0], dtype=F64)) for u in range(14)]
            for v in range(12)
        ]
    )
    assert 5 < hits.sum() < 160
    assert ((alpha[0, ..., 0] > 0.495) == hits).all()


def test_clipping_what_is_in_front_changes_nothing():
    scene = soft_scene(9)
    for found, expected in zip(render(scene, near_mode="clip")[:2], render(scene)[:2], strict=True):
        assert found.equal(expected)


def test_points_that_are_cut_off_have_no_place_on_the_screen():
    scene = soft_scene(24, n=1)
    camera = scene["points"][0] @ scene["viewmats"][0, :3, :3].T + scene["viewmats"][0, :3, 3]
    depths, order = camera[:, 2].sort()
    scene["points"] = scene["points"][:, order]  # the first is cut off
    near = (depths[0] + depths[1]).item() / 2
    cut = torch.arange(6) == 0
    found = render(scene, near_plane=near, near_mode="clip")[2]["points2d"][0, 0]
    assert (found[cut] == 0).all()
    assert found[~cut].equal(render(scene)[2]["points2d"][0, 0, ~cut])


def test_clipped_points_are_in_order():
    points = torch.tensor([[0.0, 0, 3], [1, 0, 0], [0, 1, 2], [2, 2, -1]], dtype=F64)
    expected = [[0.0, 0, 3], [0, 1, 2], [2 / 3, 0, 1], [1, 1, 1], [0.5, 0.5, 1], [2 / 3, 4 / 3, 1]]
    assert_close(clipped(points, 1.0), torch.tensor(expected, dtype=F64))


# Invariances.


def test_order_of_points_and_convexes_does_not_matter():
    scene = soft_scene(10)
    picture, alpha, _ = render(scene)
    for order in ([5, 0, 3, 1, 4, 2], [2, 4, 1, 5, 0, 3]):
        again = render(scene | {"points": scene["points"][:, order]})
        assert_close(again[0], picture, loose=10)
        assert_close(again[1], alpha, loose=10)
    order = [3, 0, 2, 1]
    shuffled = {n: scene[n][order] for n in ("points", "delta", "sigma", "opacities", "colors")}
    assert render(scene | shuffled)[0].equal(picture)


def test_moving_world_and_camera_together_changes_nothing():
    g = torch.Generator().manual_seed(11)
    scene = soft_scene(11, cameras=2)
    rotation, shift = random_rotation(g, 1, angle=2.0)[0], torch.randn(3, generator=g, dtype=F64)
    move = torch.eye(4, dtype=F64)
    move[:3, :3], move[:3, 3] = rotation, shift
    moved = {"points": scene["points"] @ rotation.T + shift, "viewmats": scene["viewmats"] @ torch.linalg.inv(move)}
    for mode in ("RGB", "ED"):
        assert_close(render(scene | moved, render_mode=mode)[0], render(scene, render_mode=mode)[0], loose=100)


def test_moving_the_principal_point_moves_the_picture():
    scene = soft_scene(12)
    Ks = scene["Ks"].clone()
    Ks[:, 0, 2] += 2
    Ks[:, 1, 2] += 1
    assert_close(render(scene | {"Ks": Ks}, 16, 13)[0][:, 1:, 2:], render(scene)[0], loose=10)


def test_reference_focal_makes_resolution_irrelevant():
    scene = soft_scene(13)
    Ks = scene["Ks"].clone()
    Ks[:, :2] *= 3
    coarse, _, _ = render(scene, reference_focal=14.0)
    fine, _, _ = render(scene | {"Ks": Ks}, 42, 36, reference_focal=14.0)
    assert_close(fine[:, 1::3, 1::3], coarse, loose=100)  # the same rays
    published, _, _ = render(scene | {"Ks": Ks}, 42, 36)
    assert (published[:, 1::3, 1::3] - render(scene)[0]).abs().max() > 1e-2
    equal = soft_scene(13)
    equal["Ks"][:, 1, 1] = 14.0
    assert_close(render(equal, reference_focal=14.0)[0], render(equal)[0])


# Shapes, channels, modes.


@pytest.mark.parametrize("per_view", [False, True])
@pytest.mark.parametrize("coefficients", [0, 9])
def test_scenes_and_cameras_are_independent(per_view: bool, coefficients: int):
    options: dict[str, Any] = {"sh_degree": 2} if coefficients else {}
    scenes = [soft_scene(seed, cameras=3, coefficients=coefficients) for seed in (14, 15)]
    if per_view:
        for scene in scenes:
            scene["colors"] = torch.stack([scene["colors"] * f for f in (1.0, 0.5, 0.25)])
    batch = {name: torch.stack([s[name] for s in scenes])[None] for name in scenes[0]}
    picture, alpha, meta = render(batch, **options)
    assert picture.shape == (1, 2, 3, 12, 14, 3)
    assert alpha.shape == (1, 2, 3, 12, 14, 1)
    assert meta["points2d"].shape == (1, 2, 3, 4, 6, 2)
    assert meta["hull_size"].dtype == meta["radii"].dtype == torch.int32
    for b, scene in enumerate(scenes):
        for c in range(3):
            alone = {n: scene[n][c : c + 1] for n in ("viewmats", "Ks", "backgrounds")}
            alone |= {"colors": scene["colors"][c]} if per_view else {}
            expected = render(scene | alone, **options)
            assert picture[0, b, c].equal(expected[0][0])
            assert alpha[0, b, c].equal(expected[1][0])
            assert meta["depths"][0, b, c].equal(expected[2]["depths"][0])


def test_any_number_of_channels():
    scene = soft_scene(16)
    ones = torch.ones(4, 1, dtype=F64)
    features = {"colors": torch.cat([scene["colors"], ones], -1), "backgrounds": torch.zeros(1, 4, dtype=F64)}
    picture, alpha, _ = render(scene | features)
    assert_close(picture[..., 3:], alpha)
    rgb, _, _ = render(scene | {"backgrounds": torch.zeros(1, 3, dtype=F64)})
    assert picture[..., :3].equal(rgb)


def test_depth_modes():
    scene = soft_scene(17)
    scene["sigma"] *= 20
    rgb, alpha, meta = render(scene)
    as_color = {"colors": meta["depths"][0, :, None], "backgrounds": torch.zeros(1, 1, dtype=F64)}
    depth, _, _ = render(scene | as_color)
    expected = depth / alpha.clamp(min=1e-10)
    assert (alpha == 0).any()
    for mode, parts in {
        "D": [depth],
        "ED": [expected],
        "RGB+D": [rgb, depth],
        "RGB+ED": [rgb, expected],
    }.items():
        assert_close(render(scene, render_mode=mode)[0], torch.cat(parts, -1))


def test_only_classic():
    with pytest.raises(NotImplementedError, match="classic"):
        render(soft_scene(), rasterize_mode="antialiased")
