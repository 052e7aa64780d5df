"""The Gaussians that convexes are compared with: their pictures are those of the closed form, and fits learn."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from scripts.bench import _gaussians as baseline
from zoo.data.scenes import PlanarPicture, ProceduralScene, Scene
from zoo.splat.cameras import intrinsics, look_at, project_points

WIDTH, HEIGHT = 24, 16


def _f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _camera() -> tuple[Tensor, Tensor]:
    return look_at(_f64(2.0, -2.5, 1.5)), intrinsics(30.0, WIDTH, HEIGHT, dtype=torch.float64)


def _turned(quat: Tensor) -> Tensor:
    """Rotation of a quaternion: its exponential, not the quadratic form that the projection uses."""
    w, x, y, z = (quat / quat.norm()).tolist()
    length = math.sqrt(x * x + y * y + z * z)
    axis = _f64([0, -z, y], [z, 0, -x], [-y, x, 0]) / length
    return torch.matrix_exp(2 * math.atan2(length, w) * axis)


def _alpha(mean: Tensor, quat: Tensor, scale: Tensor, opacity: Tensor) -> Tensor:
    """Closed form [H, W] of one Gaussian, the Jacobian of the projection by autograd."""
    viewmat, K = _camera()

    def project(point: Tensor) -> Tensor:
        return project_points(point[None], viewmat, K)[0][0]

    centre = project(mean)
    jacobian = torch.autograd.functional.jacobian(project, mean)
    turned = _turned(quat) @ scale.diag()
    blur = 0.3 * torch.eye(2, dtype=torch.float64)
    covar = jacobian @ turned @ turned.mT @ jacobian.mT + blur
    picture = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            off = _f64(column + 0.5, row + 0.5) - centre
            picture[row, column] = opacity * torch.exp(-off @ torch.linalg.solve(covar, off) / 2)
    picture = picture.clamp(max=0.99)
    return torch.where(picture < 1 / 255, 0, picture)


# Two that overlap, the second nearer to the camera, and both partly hidden.
MEANS = _f64([0.0, 0.2, -0.1], [0.3, -0.5, 0.2])
QUATS = _f64([1.0, 0.4, -0.3, 0.2], [0.5, -0.2, 0.6, 0.9])
SCALES = _f64([0.25, 0.5, 0.15], [0.3, 0.1, 0.2])
OPACITIES = _f64(0.8, 0.6)
COLORS = _f64([0.9, 0.2, 0.4], [0.1, 0.7, 0.3])


def _rendered(which: list[int], background: tuple[float, float, float] = baseline.WHITE) -> Tensor:
    parts = (part[which] for part in (MEANS, QUATS, SCALES, OPACITIES, COLORS))
    return baseline.render_gaussians(*parts, *_camera(), WIDTH, HEIGHT, background)


@pytest.mark.parametrize("index", [0, 1])
def test_one_gaussian_is_the_closed_form(index: int):
    alpha = _alpha(MEANS[index], QUATS[index], SCALES[index], OPACITIES[index])[..., None]
    assert 0.1 < float((alpha > 0).double().mean()) < 0.9  # the threshold cuts it off inside the picture
    assert_close(_rendered([index]), alpha * COLORS[index] + 1 - alpha, atol=1e-12, rtol=0)
    background = (0.2, 0.5, 0.9)
    expected = alpha * COLORS[index] + (1 - alpha) * _f64(*background)
    assert_close(_rendered([index], background), expected, atol=1e-12, rtol=0)


def test_the_nearer_of_two_is_in_front_whatever_the_order():
    back, front = (_alpha(*(part[i] for part in (MEANS, QUATS, SCALES, OPACITIES)))[..., None] for i in (0, 1))
    expected = front * COLORS[1] + (1 - front) * (back * COLORS[0] + 1 - back)
    assert float((front * back).max()) > 0.1
    assert_close(_rendered([0, 1]), expected, atol=1e-12, rtol=0)
    assert_close(_rendered([1, 0]), expected, atol=1e-12, rtol=0)


def test_a_list_of_many_is_blended_front_to_back():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(9, 9, generator=generator, dtype=torch.float64)
    means = u[:, :2] * _f64(WIDTH, HEIGHT)
    conics = torch.stack([0.02 + 0.1 * u[:, 2], 0.03 * (u[:, 3] - 0.5), 0.02 + 0.1 * u[:, 4]], -1)
    opacities, colors = 1.1 * u[:, 5], u[:, 6:]  # some of them above the greatest alpha
    expected = torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.float64)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            left = 1.0
            for mean, (xx, xy, yy), opacity, color in zip(means, conics, opacities, colors, strict=True):
                x, y = column + 0.5 - mean[0], row + 0.5 - mean[1]
                alpha = min(0.99, float(opacity * torch.exp(-(xx * x * x + 2 * xy * x * y + yy * y * y) / 2)))
                if alpha >= 1 / 255:
                    expected[row, column] += left * alpha * color
                    left *= 1 - alpha
            expected[row, column] += left
    assert_close(baseline.composite(means, conics, opacities, colors, WIDTH, HEIGHT), expected, atol=1e-12, rtol=0)


def test_alpha_ends_at_099_and_starts_at_one_255th():
    means, conics, black = _f64([0.5, 0.5]), _f64([1e-9, 0, 1e-9]), torch.zeros(1, 3, dtype=torch.float64)
    shown = [float(baseline.composite(means, conics, _f64(opacity), black, 1, 1).mean()) for opacity in (1, 1.01 / 255)]
    assert shown == pytest.approx([0.01, 1 - 1.01 / 255], rel=1e-9)
    assert float(baseline.composite(means, conics, _f64(0.99 / 255), black, 1, 1).mean()) == 1


def test_the_gradient_passes_the_greatest_alpha():
    opacity = _f64(0.995).requires_grad_()
    black = torch.zeros(1, 3, dtype=torch.float64)
    baseline.composite(_f64([0.5, 0.5]), _f64([1.0, 0, 1.0]), opacity, black, 1, 1).mean().backward()
    assert_close(opacity.grad, _f64(-1.0))


def test_gaussians_behind_the_camera_or_outside_change_nothing():
    viewmat, K = _camera()
    eye = -viewmat[:3, 3] @ viewmat[:3, :3]
    extra = torch.stack([2 * eye, _f64(0.0, 0.0, 40.0)])
    parts = [torch.cat([part, part]) for part in (QUATS, SCALES, OPACITIES, COLORS)]
    leaves = [part.requires_grad_() for part in (torch.cat([extra, MEANS]), *parts)]
    picture = baseline.render_gaussians(*leaves, viewmat, K, WIDTH, HEIGHT)
    assert_close(picture, _rendered([0, 1]), atol=1e-12, rtol=0)
    picture.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool((leaf.grad[:2] == 0).all())
        assert bool(leaf.grad[2:].isfinite().all())
    nothing = baseline.render_gaussians(extra, *(part[:2] for part in leaves[1:]), viewmat, K, WIDTH, HEIGHT)
    assert bool((nothing == 1).all())


def test_gradcheck():
    viewmat, K = _camera()
    large = 4 * SCALES  # alpha is above the threshold everywhere: no pixel jumps

    def picture(*inputs: Tensor) -> Tensor:
        means, quats, scales, opacities, colors, viewmat, K = inputs
        return baseline.render_gaussians(means, quats, scales, opacities, colors, viewmat, K, 6, 4)

    K = intrinsics(7.0, 6, 4, dtype=torch.float64)
    inputs = [part.clone().requires_grad_() for part in (MEANS, QUATS, large, OPACITIES, COLORS, viewmat, K)]
    assert gradcheck(picture, inputs)


def test_gradcheck_planar():
    K = intrinsics(3.0, 6, 4, dtype=torch.float64)
    parts = (MEANS[:, :2], _f64(0.4, -1.0), 2 * SCALES[:, :2] + 0.5, OPACITIES, COLORS, K)
    inputs = [part.clone().requires_grad_() for part in parts]
    assert gradcheck(lambda *inputs: baseline.render_planar_gaussians(*inputs, 6, 4), inputs)


def test_planar_gaussians_are_flat_ones_in_the_plane_z_1():
    K = intrinsics(9.0, WIDTH, HEIGHT, dtype=torch.float64)
    K[1, 1], K[0, 2] = 8.0, 13.0
    angles = _f64(0.4, -1.0)
    planar = baseline.render_planar_gaussians(MEANS[:, :2], angles, SCALES[:, :2], OPACITIES, COLORS, K, WIDTH, HEIGHT)
    means = torch.cat([MEANS[:, :2], torch.ones(2, 1, dtype=torch.float64)], 1)
    quats = torch.stack([(angles / 2).cos(), 0 * angles, 0 * angles, (angles / 2).sin()], -1)
    scales = torch.cat([SCALES[:, :2], torch.zeros(2, 1, dtype=torch.float64)], 1)
    eye = torch.eye(4, dtype=torch.float64)
    solid = baseline.render_gaussians(means, quats, scales, OPACITIES, COLORS, eye, K, WIDTH, HEIGHT)
    assert float(planar.min()) < 0.6
    assert_close(planar, solid, atol=1e-12, rtol=0)


def test_the_start_stands_on_the_points():
    points = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0, 0.3, 0], [0, 0, 0.3], [9, 9, 9]])
    start = baseline.start_gaussians(points, torch.rand(5, 3))
    assert torch.equal(start["means"], points)
    assert_close(start["scales"].exp()[0], torch.full((3,), 0.6 * 0.3))
    assert_close(start["scales"].exp()[1], torch.full((3,), 0.6 * math.sqrt((0.09 + 0.18 + 0.18) / 3)))
    assert_close(start["scales"].exp()[4], torch.full((3,), 0.6 * 0.5))  # the clamp
    assert_close(start["opacities"].sigmoid(), torch.full((5,), 0.5))
    assert sum(value.numel() for value in start.values()) == 5 * 14
    small = baseline.start_gaussians(points, torch.rand(5, 3), 0.1)
    assert_close(small["scales"] - start["scales"], torch.full((5, 3), math.log(1 / 6)))
    alone = baseline.start_planar_gaussians(points[:1], torch.ones(1, 3))
    assert_close(alone["scales"].exp(), torch.full((1, 2), 0.3))
    assert sum(value.numel() for value in alone.values()) == 9


@pytest.fixture(scope="module")
def scene() -> Scene:
    return ProceduralScene(size=24, views=5, test_views=2, supersample=1, num_points=8).scene


def test_a_fit_of_3d_gaussians_learns_and_repeats(scene: Scene):
    before, after, again, other = (
        baseline.fit_gaussians(scene, 8, steps, seed=seed) for steps, seed in ((1, 0), (80, 0), (80, 0), (80, 1))
    )
    assert after.psnr > before.psnr + 1
    assert after.psnr == again.psnr
    assert after.psnr != other.psnr
    assert after.num_parameters == 8 * 14
    assert not any(value.requires_grad for value in after.parameters.values())


def test_training_views_are_fitted_and_test_views_judge(scene: Scene):
    results = [baseline.fit_gaussians(replace(scene, test=test), 4, 10) for test in ((5,), (6,), (5, 6))]
    first, second, both = (result.psnr for result in results)
    assert first != second
    assert both == pytest.approx((first + second) / 2)
    for name, value in results[0].parameters.items():
        assert torch.equal(value, results[1].parameters[name])


def test_a_planar_gaussian_fits_a_gaussian():
    scene = PlanarPicture("anisotropic_gaussian", size=24).scene
    result = baseline.fit_planar_gaussians(scene, 1, steps=300)
    assert result.num_parameters == 9
    assert result.psnr > 35


def test_rates_reach_their_parameters_and_the_one_of_the_means_decays():
    still = baseline.Settings(0, 0, 0, 0, 0)
    start = baseline.start_gaussians(MEANS.float(), COLORS.float())
    views = [(*(part.float() for part in _camera()), torch.zeros(HEIGHT, WIDTH, 3))]

    def render(parameters: dict[str, Tensor], viewmat: Tensor, K: Tensor) -> Tensor:
        # Every number has the gradient 1: Adam moves it by the rate of the step.
        return sum(value.sum() for value in parameters.values()) + torch.full((HEIGHT, WIDTH, 3), 1e3)

    for name in start:
        settings = replace(still, **{name: 0.1})
        fitted = baseline.fit(start, render, views, 2, settings, 0)
        moved = 0.1 * (1 + 0.02**0.5) if name == "means" else 0.2
        for other in start:
            expected = start[other] - (moved if other == name else 0)
            assert_close(fitted[other], expected, atol=1e-5, rtol=0)


def test_tuning_goes_from_setting_to_setting_and_puts_the_best_first(scene: Scene):
    asked: list[baseline.Settings] = []

    def fit_scene(scene: Scene, count: int, steps: int, settings: baseline.Settings, seed: int) -> baseline.Fit:
        assert (count, steps) == (4, 20)
        asked.append(settings)
        # The best rate depends on the size, which comes after it: once around is not enough.
        off = abs(settings.means - 0.1 * (settings.size - 0.4)) + 2 * (settings.size - 0.5) ** 2
        return baseline.Fit(seed - off, {})

    grid = {"means": (5e-3, 1e-2), "size": (0.25, 0.5)}
    once = baseline.tune_gaussians([scene], 4, grid, 20, 1, fit_scene)
    assert (once[0]["means"], once[0]["size"]) == (2e-2, 0.5)
    asked.clear()
    rows = baseline.tune_gaussians([scene, scene], 4, grid, 20, 3, fit_scene)
    assert [row["psnr"] for row in rows] == sorted((row["psnr"] for row in rows), reverse=True)
    assert (rows[0]["means"], rows[0]["size"]) == (1e-2, 0.5)
    assert rows[0]["psnrs"] == pytest.approx([0, 1])
    assert rows[0]["psnr"] == pytest.approx(0.5)
    assert {(row["means"], row["size"]) for row in rows} == {(settings.means, settings.size) for settings in asked}
    assert len(asked) == 2 * len(rows)  # each once a scene
    assert {"scales", "rotations", "opacities", "colors", "means_end"} < set(rows[0])


def test_tuning_is_of_the_fit(scene: Scene):
    rows = baseline.tune_gaussians([scene], 4, {"means": (0.0,), "size": (0.3,)}, 20, 1)
    assert len({row["psnr"] for row in rows}) == 3
    best = baseline.Settings(means=rows[0]["means"], size=rows[0]["size"])
    assert rows[0]["psnr"] == baseline.fit_gaussians(scene, 4, 20, best, 0).psnr


@pytest.mark.parametrize("count", [0, 9])
def test_more_gaussians_than_points_are_refused(scene: Scene, count: int):
    for fit in (baseline.fit_gaussians, baseline.fit_planar_gaussians):
        with pytest.raises(ValueError, match=f"count must be 1 to 8, the points of the scene, got {count}; make"):
            fit(scene, count)
