"""The baseline of convex splatting: as many Gaussians, fitted on a CPU to the same pictures with the same budget.

gsplat's own rasterizer needs CUDA. Its projection in torch runs anywhere and is used here; compositing is a matrix of
every Gaussian against every pixel, which is fast enough for some dozens of Gaussians on small pictures. Planar
Gaussians live in the plane z = 1, for the fits to flat pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci
from torch import Tensor

from zoo.data.scenes import RADIUS_RANGE, Scene, ViewBatches

WHITE = (1.0, 1.0, 1.0)
MAX_ALPHA, LEAST_ALPHA = 0.99, 1 / 255  # of 3D Gaussian splatting
EPS2D = 0.3  # px^2 added to projected covariances, as there: no Gaussian falls between pixel centres

_OPACITY = 0.5  # first opacity, the one of the convexes

Parameters = dict[str, Tensor]
Render = Callable[[Parameters, Tensor, Tensor], Tensor]  # of a viewmat [4, 4] and a K [3, 3], to [H, W, 3]
Views = Sequence[tuple[Tensor, Tensor, Tensor]]  # viewmat [4, 4], K [3, 3] and image [H, W, 3] each


@dataclass(frozen=True)
class Settings:
    """What a fit can be tuned by: learning rates of Adam, and the size of the first Gaussians.

    The rate of the means falls log-linearly to `means_end` of itself, others are constant; `rotations` is that of the
    quaternions, or of the angles of planar Gaussians. `size` is the first deviation over the distance of the
    neighbours.
    """

    means: float = 2e-2
    scales: float = 1e-2
    rotations: float = 1e-2
    opacities: float = 2e-2
    colors: float = 2e-2
    means_end: float = 0.02
    size: float = 0.6


@dataclass(frozen=True)
class Fit:
    """What came out of a fit.

    Attributes:
        psnr: mean over the test views, dB.
        parameters: as they are stored, see :func:`start_gaussians` and :func:`start_planar_gaussians`.
    """

    psnr: float
    parameters: Parameters

    @property
    def num_parameters(self) -> int:
        """Numbers that were fitted: 14 a Gaussian, 9 a planar one."""
        return sum(value.numel() for value in self.parameters.values())


def composite(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    width: int,
    height: int,
    background: Sequence[float] = WHITE,
) -> Tensor:
    """Blend Gaussians in the order of the list, the first in front.

    alpha = min(0.99, o exp(-power)) is left out below 1/255; the gradient passes the minimum as if it were not there,
    as in 3D Gaussian splatting and for our convexes. Pixels are not stopped early.

    Args:
        means2d: [N, 2] pixels, across and down; pixel centres lie at halves.
        conics: [N, 3] inverse covariances (xx, xy, yy), px^-2.
        opacities: [N] in [0, 1].
        colors: [N, 3].
        width, height: size of the picture in pixels.
        background: colour behind all of them.

    Returns:
        [H, W, 3].
    """
    dx = torch.arange(width).to(means2d) + 0.5 - means2d[:, :1]  # [N, W]
    dy = torch.arange(height).to(means2d) + 0.5 - means2d[:, 1:]  # [N, H]
    xx, xy, yy = (part[:, None] for part in conics.unbind(-1))
    power = (xy * dx)[:, None] * dy[:, :, None] + (xx / 2 * dx.square())[:, None] + (yy / 2 * dy.square())[:, :, None]
    alpha = (opacities[:, None, None] * torch.exp(-power)).flatten(1)  # [N, P]
    alpha = alpha - (alpha.detach() - MAX_ALPHA).clamp(min=0)
    alpha = torch.where(alpha < LEAST_ALPHA, 0, alpha)
    # Transmittance [N + 1, P] before each and behind all: the product of 1 - alpha over those in front. Its logarithm
    # is a matrix product with a triangle of ones, and so is the backward, which costs less than that of cumprod.
    front = torch.ones(len(alpha) + 1, len(alpha)).to(alpha).tril(-1)
    left = torch.exp(front @ torch.log1p(-alpha))
    image = (alpha * left[:-1]).mT @ colors + left[-1][:, None] * colors.new_tensor(list(background))
    return image.view(height, width, 3)


def render_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    background: Sequence[float] = WHITE,
    eps2d: float = EPS2D,
) -> Tensor:
    """Picture of 3D Gaussians, differentiable in all of them and in the camera.

    Args:
        means: [N, 3] world coordinates.
        quats: [N, 4] rotations, w first, of any length but 0.
        scales: [N, 3] standard deviations along the rotated axes, world units.
        opacities: [N] in [0, 1].
        colors: [N, 3].
        viewmat: [4, 4] world to camera, OpenCV axes.
        K: [3, 3] pixels.
        width, height: size of the picture in pixels.
        background: colour behind all of them.
        eps2d: px^2 added to the diagonal of the projected covariances.

    Returns:
        [H, W, 3].
    """
    covars, _ = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    assert covars is not None
    radii, means2d, depths, conics, _ = _fully_fused_projection(
        means, covars, viewmat[None], K[None], width, height, eps2d=eps2d
    )
    # Radius 0 marks those behind the near plane or wholly outside: their projection means nothing.
    seen = (radii[0] > 0).all(-1).nonzero()[:, 0]
    order = seen[depths[0, seen].argsort(stable=True)]
    return composite(means2d[0, order], conics[0, order], opacities[order], colors[order], width, height, background)


def render_planar_gaussians(
    means: Tensor,
    angles: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    K: Tensor,
    width: int,
    height: int,
    background: Sequence[float] = WHITE,
    eps2d: float = EPS2D,
) -> Tensor:
    """Picture of Gaussians in the plane z = 1 from the origin, the first in front.

    Args:
        means: [N, 2] places in the plane, x to the right and y down.
        angles: [N] radians from x towards y.
        scales: [N, 2] standard deviations along the rotated axes.
        opacities, colors, K, width, height, background, eps2d: as for :func:`render_gaussians`.

    Returns:
        [H, W, 3].
    """
    focal = torch.diagonal(K)[:2]
    cos, sin = angles.cos(), angles.sin()
    axes = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2) * scales[:, None] * focal[:, None]  # pixels
    covars = axes @ axes.mT + eps2d * torch.eye(2).to(axes)
    inverse = torch.linalg.inv(covars)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)
    return composite(means * focal + K[:2, 2], conics, opacities, colors, width, height, background)


def start_gaussians(points: Tensor, colors: Tensor, size: float = 0.6) -> Parameters:
    """Round Gaussians on points: opacity 0.5, the colour of the point, a deviation by the distance of its neighbours.

    Args:
        points: [N, 3] world coordinates.
        colors: [N, 3] in [0, 1].
        size: deviation over that distance.

    Returns:
        means [N, 3], rotations [N, 4] (quaternions), scales [N, 3] (logarithms), opacities [N] (logits) and colors
        [N, 3] (as they are): 14 numbers a Gaussian.
    """
    turned = points.new_tensor([1.0, 0, 0, 0]).repeat(len(points), 1)
    return _start(points, turned, colors, size)


def start_planar_gaussians(points: Tensor, colors: Tensor, size: float = 0.6) -> Parameters:
    """The same in the plane z = 1.

    Args:
        points: [N, 3] in the plane.
        colors: [N, 3] in [0, 1].
        size: deviation over the distance of the neighbours.

    Returns:
        means [N, 2], rotations [N] (radians), scales [N, 2] (logarithms), opacities [N] (logits) and colors [N, 3]:
        9 numbers a Gaussian.
    """
    return _start(points[:, :2], torch.zeros_like(points[:, 0]), colors, size)


def _start(means: Tensor, rotations: Tensor, colors: Tensor, size: float) -> Parameters:
    scale = torch.log(size * _neighbour_distance(means))
    return {
        "means": means.clone(),
        "rotations": rotations,
        "scales": scale[:, None].repeat(1, means.shape[1]),
        "opacities": torch.full_like(means[:, 0], math.log(_OPACITY / (1 - _OPACITY))),
        "colors": colors.clone(),
    }


def _neighbour_distance(points: Tensor) -> Tensor:
    """Root mean square distance [N] to the three nearest others, clamped to what the scenes prescribe."""
    squares = (points[:, None] - points).square().sum(-1).fill_diagonal_(math.inf)
    near = min(3, len(points) - 1)
    nearest = squares.topk(near, largest=False).values
    distance = nearest.mean(1).sqrt() if near else points.new_full((1,), RADIUS_RANGE[1])
    return distance.clamp(*RADIUS_RANGE)


def fit(start: Parameters, render: Render, views: Views, steps: int, settings: Settings, seed: int) -> Parameters:
    """Adam on the mean absolute error of one view a step, views in the order of the scene data modules.

    Args:
        start: stored parameters to begin with; they stay as they are.
        render: picture [H, W, 3] of stored parameters, a viewmat and a K.
        views: pictures to fit and their cameras.
        steps: optimiser steps.
        settings: learning rates; the size is that of `start`.
        seed: of the order of the views.

    Returns:
        Parameters after the last step.
    """
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [{"params": [value], "lr": getattr(settings, name), "name": name} for name, value in parameters.items()]
    optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True)
    (means,) = (group for group in optimizer.param_groups if group["name"] == "means")
    for step, (index,) in enumerate(ViewBatches(len(views), steps, 1, seed)):
        means["lr"] = settings.means * settings.means_end ** (step / steps)
        viewmat, K, image = views[index]
        loss = (render(parameters, viewmat, K) - image).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in parameters.items()}


def mean_psnr(parameters: Parameters, render: Render, views: Views) -> float:
    """Mean over views of -10 log10 of the mean square error, pictures clipped to [0, 1] but not rounded; dB."""
    with torch.no_grad():
        errors = [(render(parameters, viewmat, K).clamp(0, 1) - image).square().mean() for viewmat, K, image in views]
    return float(-10 * torch.stack(errors).log10().mean())


def scene_views(scene: Scene, indexes: Sequence[int]) -> Views:
    """Cameras and pictures of some views of a scene."""
    found = [scene.view(index) for index in indexes]
    return [(view["viewmat"], view["K"], view["image"]) for view in found]


def fit_gaussians(
    scene: Scene, count: int, steps: int = 1200, settings: Settings | None = None, seed: int = 0, eps2d: float = EPS2D
) -> Fit:
    """Fit 3D Gaussians to the training views of a scene; the figure is that of its test views.

    Args:
        scene: pictures of one size; Gaussians start on its first `count` points.
        count: number of Gaussians; it stays the same.
        steps: optimiser steps of one view each.
        settings: rates and first size; None takes the defaults.
        seed: of the order of the views.
        eps2d: see :func:`render_gaussians`.

    Raises:
        ValueError: if the scene has fewer points.
    """
    settings = settings or Settings()
    start = start_gaussians(*_first_points(scene, count), settings.size)
    height, width = scene.size(0)
    background = scene.background or WHITE

    def render(parameters: Parameters, viewmat: Tensor, K: Tensor) -> Tensor:
        shape = _shape(parameters)
        return render_gaussians(*shape, viewmat, K, width, height, background=background, eps2d=eps2d)

    return _fit_scene(scene, start, render, steps, settings, seed)


def fit_planar_gaussians(
    scene: Scene, count: int, steps: int = 1200, settings: Settings | None = None, seed: int = 0, eps2d: float = EPS2D
) -> Fit:
    """Fit planar Gaussians to a flat picture, a scene of :class:`zoo.data.scenes.PlanarPicture`.

    Args:
        scene, count, steps, settings, seed, eps2d: as for :func:`fit_gaussians`.

    Raises:
        ValueError: if the scene has fewer points.
    """
    settings = settings or Settings()
    start = start_planar_gaussians(*_first_points(scene, count), settings.size)
    height, width = scene.size(0)
    background = scene.background or WHITE

    def render(parameters: Parameters, viewmat: Tensor, K: Tensor) -> Tensor:
        shape = _shape(parameters)
        return render_planar_gaussians(*shape, K, width, height, background=background, eps2d=eps2d)

    return _fit_scene(scene, start, render, steps, settings, seed)


def tune_gaussians(
    scenes: Sequence[Scene],
    count: int,
    grid: Mapping[str, Sequence[float]],
    steps: int = 1200,
    passes: int = 2,
    fit_scene: Callable[..., Fit] = fit_gaussians,
) -> list[dict[str, Any]]:
    """Try one setting after the other, keep the best value of each, and go around again while that changes something.

    The best is chosen by the test views: the baseline may peek.

    Args:
        scenes: what every combination is fitted to; the order of the views differs from scene to scene, too.
        count: number of Gaussians.
        grid: values to try by field of :class:`Settings`, in the order of the search, which starts at the defaults.
        steps: optimiser steps.
        passes: times around at most.
        fit_scene: :func:`fit_gaussians` or :func:`fit_planar_gaussians`.

    Returns:
        A row for each combination that was tried, the best first: its settings, psnr (mean over the scenes) and psnrs
        (each).
    """
    tried: dict[Settings, list[float]] = {}

    def score(settings: Settings) -> float:
        if settings not in tried:
            tried[settings] = [fit_scene(scene, count, steps, settings, seed).psnr for seed, scene in enumerate(scenes)]
        return mean(tried[settings])

    best = Settings()
    for _ in range(passes):
        before = best
        for name, values in grid.items():
            best = max([best, *(replace(best, **{name: value}) for value in values)], key=score)
        if best == before:
            break
    rows = [{**asdict(settings), "psnr": mean(psnrs), "psnrs": psnrs} for settings, psnrs in tried.items()]
    return sorted(rows, key=lambda row: -row["psnr"])


def _first_points(scene: Scene, count: int) -> tuple[Tensor, Tensor]:
    if not 1 <= count <= len(scene.points):
        raise ValueError(
            f"count must be 1 to {len(scene.points)}, the points of the scene, got {count}; make it with more points"
        )
    return scene.points[:count], scene.colors[:count]


def _shape(parameters: Parameters) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means, rotations, scales, opacities and colours as they are rendered."""
    scales, opacities = parameters["scales"].exp(), parameters["opacities"].sigmoid()
    return parameters["means"], parameters["rotations"], scales, opacities, parameters["colors"]


def _fit_scene(scene: Scene, start: Parameters, render: Render, steps: int, settings: Settings, seed: int) -> Fit:
    fitted = fit(start, render, scene_views(scene, scene.train), steps, settings, seed)
    return Fit(mean_psnr(fitted, render, scene_views(scene, scene.test)), fitted)
