"""The ops of the convex rasterizer in plain PyTorch: on every device, and differentiable when called directly.

Contract, which native kernels keep too. Shapes: B scenes, I images of C = I / B cameras (image i shows scene i // C), N
convexes of K points with at most M = most_lines(K, clip) lines, TH x TW tiles of an image, D channels.

    convex_project(points [B, N, K, 3], delta [B, N], sigmas [I, N], opacities [I, N], viewmats [I, 4, 4], Ks [I, 3, 3])
        means2d [I, N, 2]      projected centre, the mean of the points in space; pixels
        depths [I, N]          its z in camera space, d
        points2d [I, N, K, 2]  the points in pixels; 0 where z <= near
        lines [I, N, M, 3]     A (n_u, n_v, c) for each edge of the hull, in its order; zeros from hull_size on. An edge
                               from a to b has n = (b.v - a.v, a.u - b.u), c = b.u a.v - a.u b.v: not normalised,
                               negative inside. Relative to the projected centre, a constant for differentiation
        sharpness [I, N]       B = max(d sigma, 1e-12); likewise A = max(d delta kappa, 1e-12), with kappa =
                               reference_focal^2 / (fx fy), or 1 where that is 0. d is a constant in A and B without
                               depth_grad
        limits [I, N]          max_j s_j above which alpha < 1/255, see `support.py`
        hull_size int32 [I, N] corners of the hull, 0 where culled
        boxes int32 [I, N, 4]  x0, x1, y0, y1: half-open ranges of the pixels that may see it, within the image
        radii int32 [I, N, 2]  half extents of the box before the image cuts it, at most twice the image's diagonal
      The hull is that of the points, strictly convex, positively oriented, from the lowest (u, v) on, ties by index.
      With clip it is that of the points with z > near, by index, and of where the segments from each of them to each of
      the others meet the plane z = near. Culled, all nine outputs and all gradients being zeros: a point
      with z <= near (with clip: all points); d <= near or d >= far; anything not finite; 255 o <= 1; no hull with an
      area; no pixel of the image in the box; both radii <= radius_clip.
    convex_isect(means2d, depths, lines, limits, hull_size, boxes)
        tiles_per_convex int32 [I, N], isect_offsets int32 [I, TH, TW] where each tile's list begins,
        flatten_ids int32 [n]  i N + n, the lists of all tiles one after the other, each in order of depth as float32,
                               ties by index
      A convex is in a tile's list if the tile meets its box and no line leaves all of the tile beyond the limit.
    convex_raster(means2d, lines, sharpness, opacities [I, N], colors [I, N, D], backgrounds [I, D] or None, absgrad
      [I, N] or None, limits, hull_size, boxes, isect_offsets, flatten_ids)
        colors [I, H, W, D] with the background, transmittances [I, H, W] what is left of the light,
        last_ids int32 [I, H, W] entries of the tile's list up to the last one that contributed; [0] without `keep`
      Differentiable in lines, sharpness, opacities, colors and backgrounds. The values of absgrad do not matter; its
      gradient is, by definition, the sum over pixels of the length of the gradient of a common shift on the screen.
    convex_project_bwd, convex_raster_bwd
        gradients, zeros where culled; [0] for a tensor that was None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import KernelError
from ...kernels.ops import recording, transformed
from .compositing import Entries, Tiling, composite
from .projection import Given, Options, kept, most_lines, rows_in_block, rows_of, see
from .support import BLOCK_BYTES, meet

__all__ = [
    "convex_isect",
    "convex_project",
    "convex_project_bwd",
    "convex_raster",
    "convex_raster_bwd",
    "most_lines",
]

_MOST_INTERSECTIONS = 2**31 - 1


# Projection


def convex_project(
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
    """(means2d, depths, points2d, lines, sharpness, limits, hull_size, boxes, radii), see the contract above."""
    images, count = sigmas.shape
    options = Options(near, far, reference_focal, clip, depth_grad)
    sources = (points, delta, sigmas, viewmats, Ks.detach())
    constants = [t.detach() for t in sources]
    parts = []
    with torch.no_grad():
        every = torch.arange(images * count, device=points.device)
        for flat in every.split(rows_in_block(points.shape[2], clip, points.element_size())):
            given = rows_of(flat, images, points.shape[0], count).take(*constants)
            own = opacities.detach().flatten()[flat]
            parts.append(kept(see(given, options), given, own, flat, width, height, radius_clip))
        visible, *results = (torch.cat(t) for t in zip(*parts, strict=True))
    if transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in sources)):
        # Once more, of what is visible only: zeros times the infinite derivatives of the others would be NaN.
        results[:5] = see(rows_of(visible, images, points.shape[0], count).take(*sources), options)[:5]
    return tuple(_spread(t, visible, images, count) for t in results)


def _spread(t: Tensor, flat: Tensor, images: int, count: int) -> Tensor:
    """Rows [L, ...] in their places of [I, N, ...], zeros elsewhere."""
    everywhere = t.new_zeros(images * count, *t.shape[1:]).index_copy(0, flat, t)
    return everywhere.reshape(images, count, *t.shape[1:])


def convex_project_bwd(
    grad_means2d: Tensor | None,
    grad_depths: Tensor | None,
    grad_points2d: Tensor | None,
    grad_lines: Tensor | None,
    grad_sharpness: Tensor | None,
    points: Tensor,
    delta: Tensor,
    sigmas: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    lines: Tensor,
    hull_size: Tensor,
    near: float,
    reference_focal: float,
    clip: bool,
    depth_grad: bool,
    camera_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of points, delta, sigmas and viewmats; zeros for the last without `camera_grad`."""
    images, count = sigmas.shape
    options = Options(near, torch.inf, reference_focal, clip, depth_grad)
    grads = (grad_means2d, grad_depths, grad_points2d, grad_lines, grad_sharpness)
    arriving = [(i, t.flatten(0, 1)) for i, t in enumerate(grads) if t is not None]
    to_points, to_delta, to_sigmas = (torch.zeros_like(t).flatten(0, 1) for t in (points, delta, sigmas))
    # One sum over all convexes: in float32 it would lose digits.
    to_cameras = torch.zeros_like(viewmats, dtype=torch.float64)
    for flat in hull_size.flatten().nonzero()[:, 0].split(rows_in_block(points.shape[2], clip, points.element_size())):
        rows = rows_of(flat, images, points.shape[0], count)
        with recording():
            given = Given(*(t.detach() for t in rows.take(points, delta, sigmas, viewmats, Ks)))
            leaves = [t.requires_grad_() for t in (given[:4] if camera_grad else given[:3])]
            seen = see(given, options)
            found = _gradients([(seen[i], t[flat]) for i, t in arriving], leaves)
        to_points.index_add_(0, rows.of_scenes, found[0])
        to_delta.index_add_(0, rows.of_scenes, found[1])
        to_sigmas.index_copy_(0, flat, found[2])
        if camera_grad:
            to_cameras.index_add_(0, rows.images, found[3].double())
    return (
        to_points.reshape(points.shape),
        to_delta.reshape(delta.shape),
        to_sigmas.reshape(sigmas.shape),
        to_cameras.to(viewmats.dtype),
    )


def _gradients(outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of sum(output * its gradient) with respect to the inputs, zeros where they do not matter."""
    values, grads = zip(*outputs, strict=True)
    return torch.autograd.grad(values, inputs, grads, allow_unused=True, materialize_grads=True)


# Intersections with tiles


def convex_isect(
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
    """(tiles_per_convex, isect_offsets, flatten_ids), see the contract above.

    Raises:
        KernelError: if there are too many intersections for int32.
    """
    images, count = depths.shape
    down, across = -(-height // tile_size), -(-width // tile_size)
    flat_boxes = boxes.reshape(-1, 4).long()
    # Nearest first within each image: lists that are filled in this order are sorted.
    order = depths.detach().float().sort(dim=-1, stable=True).indices
    order = (order + torch.arange(images, device=order.device)[:, None] * count).flatten()
    order = order[hull_size.flatten()[order] > 0]
    x0, x1, y0, y1 = flat_boxes[order].unbind(-1)
    first = torch.stack((x0 // tile_size, y0 // tile_size), -1)
    wide, tall = (x1 - 1) // tile_size + 1 - first[:, 0], (y1 - 1) // tile_size + 1 - first[:, 1]
    cells = wide * tall
    ids, keys, found = [], [], 0
    for part in _blocks(cells, BLOCK_BYTES // (16 * lines.element_size())):
        entry = torch.arange(part.start, part.stop, device=order.device).repeat_interleave(cells[part])
        step = torch.arange(entry.shape[0], device=order.device)
        step -= (cells[part].cumsum(0) - cells[part]).repeat_interleave(cells[part])
        column, row = first[entry, 0] + step % wide[entry], first[entry, 1] + step // wide[entry]
        at = order[entry]
        centre_u, centre_v = means2d.reshape(-1, 2)[at].unbind(-1)
        met = meet(
            lines.flatten(0, 1)[at],
            hull_size.flatten()[at],
            limits.flatten()[at],
            *_centres(column, tile_size, width, centre_u),
            *_centres(row, tile_size, height, centre_v),
        )
        ids.append(at[met].to(torch.int32))
        keys.append((at // count * (down * across) + row * across + column)[met])
        found += ids[-1].shape[0]
        if found > _MOST_INTERSECTIONS:
            raise KernelError(
                f"convex_isect: expected at most {_MOST_INTERSECTIONS} intersections of convexes with tiles, found"
                " more; render fewer or smaller pictures at a time, or take larger tiles"
            )
    key = torch.cat(keys) if keys else order.new_zeros(0)
    flat_ids = torch.cat(ids) if ids else order.new_zeros(0, dtype=torch.int32)
    key, by_tile = key.sort(stable=True)
    lengths = key.bincount(minlength=images * down * across)
    offsets = (lengths.cumsum(0) - lengths).to(torch.int32).reshape(images, down, across)
    per_convex = flat_ids.bincount(minlength=images * count).to(torch.int32).reshape(images, count)
    return per_convex, offsets, flat_ids[by_tile]


def _blocks(sizes: Tensor, most: int) -> Iterator[slice]:
    """Ranges of entries whose sizes sum up to about `most`."""
    block = sizes.cumsum(0) // most
    start = 0
    for length in block.unique_consecutive(return_counts=True)[1].tolist():
        yield slice(start, start + length)
        start += length


def _centres(tile: Tensor, tile_size: int, size: int, centre: Tensor) -> tuple[Tensor, Tensor]:
    """First and last pixel centre of tiles along one axis, relative to projected centres."""
    low = (tile * tile_size).to(centre.dtype) + 0.5
    high = (tile * tile_size + tile_size).clamp(max=size).to(centre.dtype) - 0.5
    return low - centre, high - centre


# Compositing


def convex_raster(
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
    """(colors, transmittances, last_ids), see the contract above."""
    convexes = _entries(means2d, lines, sharpness, opacities, colors, absgrad, limits, hull_size)
    tiling = Tiling(isect_offsets, flatten_ids.shape[0], width, height, tile_size, lines.shape[2] * lines.itemsize)
    pairs = zip(tiling.busy, tiling.lists(convexes, flatten_ids), strict=True)
    parts = [composite(chunks, tiling.pixels(tile, lines.dtype)) for tile, chunks in pairs]
    picture = tiling.picture([color for color, _, _ in parts], colors.new_zeros(colors.shape[-1]))
    light = tiling.picture([light[:, None] for _, light, _ in parts], colors.new_ones(1))
    if backgrounds is not None:
        picture = picture + light * backgrounds[:, None, None]
    last = colors.new_zeros(1, dtype=torch.int32)
    last = tiling.picture([last[:, None] for _, _, last in parts], last)[..., 0] if keep else last[:0]
    return picture, light[..., 0], last


def convex_raster_bwd(
    grad_colors: Tensor | None,
    grad_transmittances: Tensor | None,
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
    transmittances: Tensor,
    last_ids: Tensor,
    width: int,
    height: int,
    tile_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of lines, sharpness, opacities, colors, backgrounds or [0], absgrad or [0]."""
    to_picture = torch.zeros_like(transmittances)[..., None].expand(-1, -1, -1, colors.shape[-1])
    to_picture = to_picture if grad_colors is None else grad_colors
    to_light = torch.zeros_like(transmittances) if grad_transmittances is None else grad_transmittances
    to_backgrounds = colors.new_zeros(0)
    if backgrounds is not None:
        to_light = to_light + (to_picture * backgrounds[:, None, None]).sum(-1)
        to_backgrounds = (to_picture * transmittances[..., None]).sum((1, 2))

    convexes = _entries(means2d, lines, sharpness, opacities, colors, absgrad, limits, hull_size)
    tiling = Tiling(isect_offsets, flatten_ids.shape[0], width, height, tile_size, lines.shape[2] * lines.itemsize)
    color_tiles, light_tiles = tiling.tiles(to_picture), tiling.tiles(to_light[..., None])[..., 0]
    by_tile: list[list[Tensor]] = [[] for _ in convexes.sources]
    for tile, chunks in zip(tiling.busy, tiling.lists(convexes, flatten_ids), strict=True):
        with recording():
            leaves = [entries.leaves() for entries in chunks]
            color, light, _ = composite(leaves, tiling.pixels(tile, lines.dtype))
            wanted = [t for entries in leaves for t in entries.sources]
            found = _gradients([(color, color_tiles[tile]), (light, light_tiles[tile])], wanted)
        for i, grad in enumerate(found):
            by_tile[i % len(by_tile)].append(grad)
    to_lines, to_sharpness, to_opacities, to_colors, to_absgrad = (
        _summed(parts, flatten_ids, like) for parts, like in zip(by_tile, convexes.sources, strict=True)
    )
    if absgrad is None:
        to_absgrad = colors.new_zeros(0)
    return to_lines, to_sharpness, to_opacities, to_colors, to_backgrounds, to_absgrad


def _entries(
    means2d: Tensor,
    lines: Tensor,
    sharpness: Tensor,
    opacities: Tensor,
    colors: Tensor,
    absgrad: Tensor | None,
    limits: Tensor,
    hull_size: Tensor,
) -> Entries:
    constants = (means2d.detach(), limits.detach(), hull_size)
    probe = lines.new_zeros(*sharpness.shape, 0) if absgrad is None else absgrad
    return Entries(*constants, lines, sharpness, opacities, colors, probe)


def _summed(parts: list[Tensor], flatten_ids: Tensor, like: Tensor) -> Tensor:
    """Gradients of all entries of all lists, added up by convex: [n, ...] in parts to [I, N, ...]."""
    total = torch.zeros_like(like).flatten(0, 1)
    if parts:
        total.index_add_(0, flatten_ids.long(), torch.cat(parts))
    return total.reshape(like.shape)
