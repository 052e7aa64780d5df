"""rasterization_convex: checks, channels and modes around the three ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import settings
from ...errors import KernelError
from ...kernels.cpu import use_cpu_library
from ...kernels.ops import full_precision, prepare, transformed
from ..sh import sh_formula, sh_of_views
from . import eager, ops
from .checks import NAME, Backend, Inputs, NearMode, RenderMode, check_options, check_values, checked

# A camera's depth channel is divided by the alpha of the picture, which may be 0.
_LEAST_ALPHA = 1e-10


def rasterization_convex(
    points: Tensor,
    delta: Tensor,
    sigma: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    sh_degree: int | None = None,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: RenderMode = "RGB",
    reference_focal: float | None = None,
    depth_grad: bool = True,
    near_mode: NearMode = "cull",
    rasterize_mode: str = "classic",
    absgrad: bool = False,
    backend: Backend = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Render smooth convexes: each is the hull of K points, with a soft boundary, composited front to back.

    alpha(q) = min(0.99, o sigmoid(-d sigma log sum_j exp(d delta L_j(q)))), with L_j the lines of the hull of the
    projected points and d the depth of their mean. Conventions are gsplat's: x right, y down, z forward; the centre of
    the pixel in row i, column j is (j + 0.5, i + 0.5).

    Args:
        points: [..., N, K, 3] world coordinates, K from 3 to 8; the leading axes are independent scenes.
        delta: [..., N] smoothness > 0, how sharp corners are.
        sigma: [..., N] sharpness > 0, how hard the boundary is.
        opacities: [..., N] in [0, 1].
        colors: [..., (C,) N, D] features of any number of channels; with `sh_degree` spherical harmonics
            [..., (C,) N, S, 3].
        viewmats: [..., C, 4, 4] world to camera.
        Ks: [..., C, 3, 3] intrinsics in pixels; fx, fy, cx and cy are used. No gradient.
        width, height: of the pictures, pixels.
        near_plane, far_plane: depths that a convex must lie between.
        radius_clip: convexes whose box has no larger half side, in pixels, are left out.
        sh_degree: 0 to 4 degrees of the harmonics that are used; None for plain colors.
        tile_size: pixels a side of the tiles that work is divided into; changes no result.
        backgrounds: [..., C, D] colour behind everything; None for 0.
        render_mode: "RGB", depth "D" (sum of weights times depth) or "ED" (divided by alpha), or both with depth as the
            last channel, "RGB+D", "RGB+ED". Depth is that of a convex's centre.
        reference_focal: focal length in pixels at which the parameters were learned: pictures of another size are then
            as sharp. None reproduces the published form, whose sharpness grows with the square of the resolution.
        depth_grad: whether the depth that scales delta and sigma is differentiated; False reproduces the authors' code.
        near_mode: "cull" leaves out a convex with any point before `near_plane`; "clip" cuts it there.
        rasterize_mode: "classic".
        absgrad: collect in meta["vertex_absgrad"].grad, [..., C, N], the sum over pixels of the length of the gradient
            of a shift on the screen. Not under torch.compile.
        backend: "auto" takes kernels where there are any; "cpp" and "cuda" insist on them; "torch" is the formula in
            PyTorch, which can be differentiated twice.
        validate: whether to refuse parameters that are not finite, and on a GPU cameras that are singular; otherwise
            such convexes are left out. Waits for the GPU.

    Returns:
        Colors [..., C, H, W, D], or with the depth channel of the mode; alphas [..., C, H, W, 1]; and what was found on
        the way: means2d [..., C, N, 2], depths [..., C, N], points2d [..., C, N, K, 2], radii int32 [..., C, N, 2],
        hull_size int32 [..., C, N] (0 where left out), opacities and sigmas [..., C, N] (a gradient may be retained),
        tiles_per_convex int32 [..., C, N], isect_offsets int32 [..., C, rows, columns], flatten_ids int32 [n], and
        width, height, tile_size, n_cameras, n_batches.

    Raises:
        ValueError, TypeError: if an argument does not fit, or a camera is singular.
        NotImplementedError: for another `rasterize_mode`.
        KernelError: if `backend` insists on kernels that are not there; in a second derivative of theirs.

    Example:
        >>> points = torch.tensor([[[-1.0, -1, 4], [1, -1, 4], [1, 1, 4], [-1, 1, 4]]])
        >>> ones = torch.ones(1)
        >>> K = torch.tensor([[[8.0, 0, 8], [0, 8, 8], [0, 0, 1]]])
        >>> picture, alpha, meta = rasterization_convex(
        ...     points, ones, 10 * ones, ones, torch.ones(1, 3), torch.eye(4)[None], K, 16, 16
        ... )
        >>> picture.shape, int((alpha > 0.5).sum())
        (torch.Size([1, 16, 16, 3]), 16)

    Source:
        Held et al., 3D Convex Splatting, 2025, arXiv:2411.14974, section 3 and the supplement (scaling by depth). The
        lines are not normalised, as in the authors' code: their hyper-parameters belong to this form.
    """
    check_options(
        width,
        height,
        near_plane,
        far_plane,
        radius_clip,
        tile_size,
        render_mode,
        reference_focal,
        near_mode,
        rasterize_mode,
    )
    if absgrad and torch.compiler.is_compiling():  # which makes no leaves
        raise ValueError(f"{NAME}: absgrad=True is not for torch.compile; call the function outside of it")
    inputs = checked(points, delta, sigma, opacities, colors, viewmats, Ks, backgrounds, sh_degree)
    check_values(inputs, validate)
    formula = _uses_formula(backend, inputs.points)
    run: Any = eager if formula else ops
    size = (width, height)
    planes = (near_plane, far_plane, radius_clip, reference_focal or 0.0, near_mode == "clip", depth_grad)
    with full_precision(inputs.points.device.type):  # a product of matrices in half precision would move the cameras
        views = _project(run, inputs, size, planes)
        meta = _meta(run, inputs, views, size, tile_size)
        seen = (meta["hull_size"] > 0).flatten(0, -2)
        values, behind = _channels(inputs, views[1], seen, sh_degree, render_mode, formula)
        if absgrad:
            meta["vertex_absgrad"] = torch.zeros_like(meta["sigmas"], requires_grad=True)
        return _composite(run, inputs, views, values, behind, meta, render_mode)


def _project(run: Any, inputs: Inputs, size: tuple[int, int], planes: tuple[float | bool, ...]) -> tuple[Tensor, ...]:
    """What the op gives, and the sigmas and opacities of views, [..., C, N]."""
    images, n = inputs.delta.shape[0] * inputs.cameras, inputs.delta.shape[1]
    sigmas, opacities = _of_views(inputs.sigma, inputs), _of_views(inputs.opacities, inputs)
    projected = run.convex_project(
        inputs.points.contiguous(),
        inputs.delta.contiguous(),
        sigmas.reshape(images, n),
        opacities.detach().reshape(images, n),
        inputs.viewmats.reshape(images, 4, 4).contiguous(),
        inputs.Ks.reshape(images, 3, 3).contiguous(),
        *size,
        *planes,
    )
    return (*projected, sigmas, opacities)


def _meta(
    run: Any, inputs: Inputs, projected: tuple[Tensor, ...], size: tuple[int, int], tile_size: int
) -> dict[str, Any]:
    """Everything found on the way, in the shape the caller gets it."""
    means2d, depths, points2d, lines, _, limits, hull_size, boxes, radii, sigmas, opacities = projected
    footprint = [t.detach() for t in (means2d, depths, lines, limits)]
    with torch.no_grad():
        counts, isect_offsets, flatten_ids = run.convex_isect(*footprint, hull_size, boxes, *size, tile_size)
    views = (*inputs.leading, inputs.cameras)
    n, k = inputs.points.shape[1:3]
    return {
        "means2d": means2d.reshape(*views, n, 2),
        "depths": depths.reshape(*views, n),
        "points2d": points2d.reshape(*views, n, k, 2),
        "radii": radii.reshape(*views, n, 2),
        "hull_size": hull_size.reshape(*views, n),
        "opacities": opacities,
        "sigmas": sigmas,
        "tiles_per_convex": counts.reshape(*views, n),
        "isect_offsets": isect_offsets.reshape(*views, *isect_offsets.shape[1:]),
        "flatten_ids": flatten_ids,
        "width": size[0],
        "height": size[1],
        "tile_size": tile_size,
        "n_cameras": inputs.cameras,
        "n_batches": inputs.delta.shape[0],
    }


def _composite(
    run: Any,
    inputs: Inputs,
    projected: tuple[Tensor, ...],
    values: Tensor,
    behind: Tensor | None,
    meta: dict[str, Any],
    render_mode: str,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Pictures, alphas and what was found on the way."""
    means2d, _, _, lines, sharpness, limits, hull_size, boxes, _, _, opacities = projected
    probe = meta.get("vertex_absgrad")
    offsets = meta["isect_offsets"]
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (lines, sharpness, opacities, values, behind, probe)
    )
    rendered, transmittances, _ = run.convex_raster(
        means2d,
        lines,
        sharpness,
        opacities.reshape(hull_size.shape),
        values,
        behind,
        None if probe is None else probe.reshape(hull_size.shape),
        limits,
        hull_size,
        boxes,
        offsets.reshape(len(hull_size), *offsets.shape[-2:]),
        meta["flatten_ids"],
        meta["width"],
        meta["height"],
        meta["tile_size"],
        keep,
    )
    alphas = 1 - transmittances[..., None]
    if render_mode.endswith("ED"):
        expected = rendered[..., -1:] / alphas.clamp(min=_LEAST_ALPHA)
        rendered = torch.cat([rendered[..., :-1], expected], -1)
    views = (*inputs.leading, inputs.cameras)
    return rendered.reshape(*views, *rendered.shape[1:]), alphas.reshape(*views, *alphas.shape[1:]), meta


def _of_views(t: Tensor, inputs: Inputs) -> Tensor:
    """[B, N] as [..., C, N]: a tensor of its own, so that a gradient can be retained for each view."""
    n = t.shape[-1]
    views = t.reshape(*inputs.leading, 1, n).expand(*inputs.leading, inputs.cameras, n)
    return views.clone(memory_format=torch.contiguous_format)


def _channels(
    inputs: Inputs, depths: Tensor, visible: Tensor, sh_degree: int | None, render_mode: str, formula: bool
) -> tuple[Tensor, Tensor | None]:
    """What is composited, [I, N, D], and what is behind it, [I, D] or None."""
    b, c = inputs.viewmats.shape[:2]
    n = inputs.delta.shape[1]
    depth = depths[..., None]
    if render_mode in ("D", "ED"):
        return depth.contiguous(), None
    if sh_degree is not None:
        values = _seen_colors(inputs, visible, sh_degree, formula)
    elif len(inputs.colors) == b * c:
        values = inputs.colors
    else:
        values = inputs.colors[:, None].expand(b, c, n, -1).flatten(0, 1)
    behind = None if inputs.backgrounds is None else inputs.backgrounds.flatten(0, 1)
    if render_mode != "RGB":
        values = torch.cat([values, depth], -1)
        if behind is not None:  # nothing is behind the depth
            behind = torch.cat([behind, behind.new_zeros(b * c, 1)], -1)
    return values.contiguous(), None if behind is None else behind.contiguous()


def _seen_colors(inputs: Inputs, visible: Tensor, sh_degree: int, formula: bool) -> Tensor:
    """max(0, 0.5 + harmonics) in the direction from the camera to the centre, -R^T t being where the camera is."""
    rotation, translation = inputs.viewmats[..., :3, :3], inputs.viewmats[..., :3, 3:]
    positions = -(rotation.transpose(-1, -2) @ translation).squeeze(-1)  # [B, C, 3]
    dirs = inputs.points.mean(-2)[:, None] - positions[:, :, None]  # [B, C, N, 3]
    evaluate = sh_formula if formula else sh_of_views
    return (evaluate(dirs.flatten(0, 1), inputs.colors, visible, sh_degree) + 0.5).clamp(min=0.0)


def _uses_formula(backend: str, points: Tensor) -> bool:
    """Whether the formula runs in PyTorch instead of the ops.

    Raises:
        ValueError: if there is no such backend.
        KernelError: if its kernels are not there.
    """
    if backend not in ("auto", "torch", "cpp", "cuda"):
        raise ValueError(f"{NAME}: backend must be one of auto, torch, cpp, cuda, got {backend!r}")
    if backend == "torch" or transformed():
        return True
    if backend == "cuda":
        raise KernelError(f"{NAME}: there are no CUDA kernels yet; use backend='auto', which runs PyTorch there")
    if backend == "cpp":
        if points.device.type != "cpu":
            raise KernelError(f"{NAME}: backend='cpp' is for CPU tensors, got {points.device}; use backend='auto'")
        if not use_cpu_library():
            why = "ZOO_KERNELS=off" if settings.kernel_mode() == "off" else "it could not be built"
            raise KernelError(f"{NAME}: backend='cpp' needs the CPU library, but {why}; use backend='auto'")
    prepare(points)
    return False
