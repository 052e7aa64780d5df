"""The ops of the convex rasterizer, with their gradients: `zoo::convex_project`, `convex_isect` and `convex_raster`.

What they promise is written in `eager.py`; what all ops have in common stands in `zoo/kernels/ops.py`. I images of C
cameras for each of I / C scenes; a convex of K points has at most M lines, see :func:`.eager.most_lines`.

There is no double backward: the backward ops have no gradient registered, and asking for one raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ...kernels.ops import define, first_derivative, register_derivative
from . import eager

_NO_SECOND = (
    "rasterization_convex has no double backward: its gradient cannot be differentiated again; take the first"
    " derivative without create_graph, or use backend='torch'"
)


# Projection


def _project_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    points, delta, sigmas, _, viewmats, Ks, _, _, ctx.near, _, _, ctx.reference_focal, ctx.clip, ctx.depth_grad = inputs
    _, _, _, lines, _, limits, hull_size, boxes, radii = output
    ctx.mark_non_differentiable(limits, hull_size, boxes, radii)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(points, delta, sigmas, viewmats, Ks, lines, hull_size)


def _project_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    given = [None if grad is None else grad.contiguous() for grad in grads[:5]]
    if all(grad is None for grad in given):
        return (None,) * 14
    cameras = ctx.needs_input_grad[4]
    arguments = (*given, *ctx.saved_tensors, ctx.near, ctx.reference_focal, ctx.clip, ctx.depth_grad, cameras)
    points, delta, sigmas, viewmats = first_derivative(_project_backward, *arguments)
    return (points, delta, sigmas, None, viewmats if cameras else None, *(None,) * 9)


def _project_fake(
    points: Tensor,
    delta: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near: float,
    far: float,
    radius_clip: float,
    reference_focal: float,
    clip: bool,
    depth_grad: bool,
) -> tuple[Tensor, ...]:
    images, count = sigmas.shape
    k = points.shape[2]
    return (
        points.new_empty(images, count, 2),
        points.new_empty(images, count),
        points.new_empty(images, count, k, 2),
        points.new_empty(images, count, eager.most_lines(k, clip), 3),
        points.new_empty(images, count),
        points.new_empty(images, count),
        points.new_empty(images, count, dtype=torch.int32),
        points.new_empty(images, count, 4, dtype=torch.int32),
        points.new_empty(images, count, 2, dtype=torch.int32),
    )


convex_project = define(
    "convex_project(Tensor points, Tensor delta, Tensor sigmas, Tensor opacities, Tensor viewmats, Tensor Ks,"
    " int width, int height, float near, float far, float radius_clip, float reference_focal, bool clip,"
    " bool depth_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    eager.convex_project,
    None,
    _project_fake,
)
_project_backward = define(
    "convex_project_bwd(Tensor? grad_means2d, Tensor? grad_depths, Tensor? grad_points2d, Tensor? grad_lines,"
    " Tensor? grad_sharpness, Tensor points, Tensor delta, Tensor sigmas, Tensor viewmats, Tensor Ks, Tensor lines,"
    " Tensor hull_size, float near, float reference_focal, bool clip, bool depth_grad, bool camera_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    eager.convex_project_bwd,
    None,
    lambda _a, _b, _c, _d, _e, points, delta, sigmas, viewmats, *_: tuple(
        torch.empty_like(t) for t in (points, delta, sigmas, viewmats)
    ),
)
register_derivative("convex_project", _project_derivative, _project_save)


# Intersections with tiles


def tile_counts(width: int, height: int, tile_size: int) -> tuple[int, int]:
    """Rows and columns of tiles."""
    return -(-height // tile_size), -(-width // tile_size)


def _isect_fake(
    means2d: Tensor,
    depths: Tensor,
    lines: Tensor,
    limits: Tensor,
    hull_size: Tensor,
    boxes: Tensor,
    width: int,
    height: int,
    tile_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    images, count = depths.shape
    found = torch.library.get_ctx().new_dynamic_size()
    rows, columns = tile_counts(width, height, tile_size)
    return (
        depths.new_empty(images, count, dtype=torch.int32),
        depths.new_empty(images, rows, columns, dtype=torch.int32),
        depths.new_empty(found, dtype=torch.int32),
    )


convex_isect = define(
    "convex_isect(Tensor means2d, Tensor depths, Tensor lines, Tensor limits, Tensor hull_size, Tensor boxes,"
    " int width, int height, int tile_size) -> (Tensor, Tensor, Tensor)",
    eager.convex_isect,
    None,
    _isect_fake,
)


# Compositing


def _raster_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.width, ctx.height, ctx.tile_size, ctx.keep = inputs
    _, transmittances, last_ids = output
    ctx.mark_non_differentiable(last_ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, transmittances, last_ids)


def _raster_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    given = [None if grad is None else grad.contiguous() for grad in grads[:2]]
    if all(grad is None for grad in given):
        return (None,) * 16
    if not ctx.keep:
        raise KernelError("zoo::convex_raster was called with keep=False, so that it has no gradient; pass keep=True")
    arguments = (*given, *ctx.saved_tensors, ctx.width, ctx.height, ctx.tile_size)
    lines, sharpness, opacities, colors, backgrounds, absgrad = first_derivative(_raster_backward, *arguments)
    wants_background, wants_absgrad = ctx.needs_input_grad[5], ctx.needs_input_grad[6]
    return (
        *(None, lines, sharpness, opacities, colors),
        *(backgrounds if wants_background else None, absgrad if wants_absgrad else None),
        *(None,) * 9,
    )


def _raster_fake(
    means2d: Tensor,
    lines: Tensor,
    sharpness: Tensor,
    opacities: Tensor,
    colors: Tensor,
    backgrounds: Tensor | None,
    absgrad: Tensor | None,
    limits: Tensor,
    hull_size: Tensor,
    boxes: Tensor,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
    width: int,
    height: int,
    tile_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    images = means2d.shape[0]
    pixels = (images, height, width)
    return (
        colors.new_empty(*pixels, colors.shape[-1]),
        colors.new_empty(pixels),
        colors.new_empty(pixels if keep else (0,), dtype=torch.int32),
    )


_RASTER_TENSORS = (
    "Tensor means2d, Tensor lines, Tensor sharpness, Tensor opacities, Tensor colors, Tensor? backgrounds,"
    " Tensor? absgrad, Tensor limits, Tensor hull_size, Tensor boxes, Tensor isect_offsets, Tensor flatten_ids"
)
convex_raster = define(
    f"convex_raster({_RASTER_TENSORS}, int width, int height, int tile_size, bool keep) -> (Tensor, Tensor, Tensor)",
    eager.convex_raster,
    None,
    _raster_fake,
)


def _raster_backward_fake(_a: Any, _b: Any, *inputs: Any) -> tuple[Tensor, ...]:
    _, lines, sharpness, opacities, colors, backgrounds, absgrad, *_ = inputs
    optional = (lines.new_empty(0) if t is None else torch.empty_like(t) for t in (backgrounds, absgrad))
    return (*(torch.empty_like(t) for t in (lines, sharpness, opacities, colors)), *optional)


_raster_backward = define(
    f"convex_raster_bwd(Tensor? grad_colors, Tensor? grad_transmittances, {_RASTER_TENSORS}, Tensor transmittances,"
    " Tensor last_ids, int width, int height, int tile_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    eager.convex_raster_bwd,
    None,
    _raster_backward_fake,
)
register_derivative("convex_raster", _raster_derivative, _raster_save)


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise KernelError(_NO_SECOND)


for _name in ("convex_project_bwd", "convex_raster_bwd"):
    register_derivative(_name, _refuse, lambda ctx, inputs, output: None)
convex_project_bwd, convex_raster_bwd = _project_backward, _raster_backward
