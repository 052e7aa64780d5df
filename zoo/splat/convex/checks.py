"""What the rasterizer is given, checked and brought to one form: [B, N, ...] of scenes and [B, C, N, ...] of views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..sh import MOST_DEGREE

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
NearMode = Literal["cull", "clip"]
Backend = Literal["auto", "torch", "cpp", "cuda"]
NAME = "rasterization_convex"
LARGEST_SIDE = 2**24  # float32 counts pixels up to there


@dataclass(frozen=True)
class Inputs:
    """B scenes with C cameras each, of one dtype and device; `leading` are the batch dimensions that became B."""

    leading: torch.Size
    points: Tensor  # [B, N, K, 3]
    delta: Tensor  # [B, N]
    sigma: Tensor  # [B, N]
    opacities: Tensor  # [B, N]
    colors: Tensor  # [B or B C, N, D], or with coefficients [B or B C, N, S, 3]
    viewmats: Tensor  # [B, C, 4, 4]
    Ks: Tensor  # [B, C, 3, 3]
    backgrounds: Tensor | None  # [B, C, D]

    @property
    def cameras(self) -> int:
        """C."""
        return self.viewmats.shape[1]


def checked(
    points: Tensor,
    delta: Tensor,
    sigma: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    backgrounds: Tensor | None,
    sh_degree: int | None,
) -> Inputs:
    """The inputs in one form; a mistake in shape, dtype or device is refused in one sentence."""
    given = {"points": points, "delta": delta, "sigma": sigma, "opacities": opacities, "colors": colors}
    given |= {"viewmats": viewmats, "Ks": Ks} | ({} if backgrounds is None else {"backgrounds": backgrounds})
    dtype = _common_dtype(given)
    if points.ndim < 3 or points.shape[-1] != 3 or not 3 <= points.shape[-2] <= 8:
        raise ValueError(
            f"{NAME}: points must be [..., N, K, 3] with K from 3 to 8 points a convex, got {tuple(points.shape)}"
        )
    leading, (n, k) = points.shape[:-3], points.shape[-3:-1]
    if viewmats.ndim < 3:
        raise ValueError(f"{NAME}: viewmats must be [..., C, 4, 4], got {tuple(viewmats.shape)}")
    c = viewmats.shape[-3]
    expected = {
        "delta": (*leading, n),
        "sigma": (*leading, n),
        "opacities": (*leading, n),
        "viewmats": (*leading, c, 4, 4),
        "Ks": (*leading, c, 3, 3),
    }
    for name, shape in expected.items():
        if tuple(given[name].shape) != tuple(shape):
            raise ValueError(
                f"{NAME}: {name} must be {list(shape)} beside points {list(points.shape)} and {c} cameras, got"
                f" {list(given[name].shape)}"
            )
    tail = 2 if sh_degree is not None else 1
    heads = ((*leading, n), (*leading, c, n))
    if tuple(colors.shape[:-tail]) not in heads or colors.ndim < tail + 1:
        what = "[..., (C,) N, S, 3] with an sh_degree" if sh_degree is not None else "[..., (C,) N, D]"
        raise ValueError(
            f"{NAME}: colors must be {what}, beside points {list(points.shape)} and {c} cameras, got"
            f" {list(colors.shape)}"
        )
    _check_harmonics(colors, sh_degree)
    channels = colors.shape[-1]
    if backgrounds is not None and tuple(backgrounds.shape) != (*leading, c, channels):
        raise ValueError(
            f"{NAME}: backgrounds must be {[*leading, c, channels]}, one colour a camera, got {list(backgrounds.shape)}"
        )
    if Ks.requires_grad:
        raise ValueError(f"{NAME}: Ks has no gradient; detach it, and learn focal lengths another way")
    b = math.prod(leading)
    cast = {name: t.to(dtype) for name, t in given.items()}
    per_view = tuple(colors.shape[:-tail]) == heads[1]
    return Inputs(
        leading,
        cast["points"].reshape(b, n, k, 3),
        cast["delta"].reshape(b, n),
        cast["sigma"].reshape(b, n),
        cast["opacities"].reshape(b, n),
        cast["colors"].reshape(b * c if per_view else b, n, *colors.shape[-tail:]),
        cast["viewmats"].reshape(b, c, 4, 4),
        cast["Ks"].reshape(b, c, 3, 3),
        None if backgrounds is None else cast["backgrounds"].reshape(b, c, channels),
    )


def _common_dtype(given: dict[str, Tensor]) -> torch.dtype:
    first = given["points"]
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(t).__name__}; make one with torch.as_tensor")
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: {name} must be floating point, got {t.dtype}; convert it, as in {name}.float()")
        if t.device != first.device:
            raise ValueError(f"{NAME}: {name} is on {t.device} and points on {first.device}; move all to one device")
    dtypes = {t.dtype for t in given.values()}
    if torch.float64 in dtypes and len(dtypes) > 1:
        odd = next(name for name, t in given.items() if (t.dtype is torch.float64) != (first.dtype is torch.float64))
        raise TypeError(f"{NAME}: {odd} is {given[odd].dtype} and points {first.dtype}; give all as float64, or none")
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check_harmonics(colors: Tensor, sh_degree: int | None) -> None:
    if sh_degree is None:
        return
    if not 0 <= sh_degree <= MOST_DEGREE:
        raise ValueError(f"{NAME}: sh_degree must lie in [0, {MOST_DEGREE}], got {sh_degree}")
    if colors.shape[-1] != 3 or colors.shape[-2] < (sh_degree + 1) ** 2:
        raise ValueError(
            f"{NAME}: colors must hold {(sh_degree + 1) ** 2} or more coefficients of 3 channels for sh_degree"
            f" {sh_degree}, got {list(colors.shape)}"
        )


def check_options(
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    tile_size: int,
    render_mode: str,
    reference_focal: float | None,
    near_mode: str,
    rasterize_mode: str,
) -> None:
    """Refuse numbers and words out of range."""
    for name, value in (("width", width), ("height", height), ("tile_size", tile_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{NAME}: {name} must be an int, got {value!r}; round it")
    for name, value in (("width", width), ("height", height)):
        if not 1 <= value <= LARGEST_SIDE:
            raise ValueError(f"{NAME}: {name} must be a number of pixels from 1 to {LARGEST_SIDE}, got {value}")
    if not 4 <= tile_size <= 64:
        raise ValueError(f"{NAME}: tile_size must lie in [4, 64] pixels, got {tile_size}")
    if not 0 < near_plane < far_plane:
        raise ValueError(f"{NAME}: expected 0 < near_plane < far_plane, got {near_plane} and {far_plane}")
    if not radius_clip >= 0:
        raise ValueError(f"{NAME}: radius_clip must not be negative, got {radius_clip}")
    if reference_focal is not None and not 0 < reference_focal < math.inf:
        raise ValueError(f"{NAME}: reference_focal must be a positive number of pixels or None, got {reference_focal}")
    for name, value, choices in (
        ("render_mode", render_mode, get_args(RenderMode)),
        ("near_mode", near_mode, get_args(NearMode)),
    ):
        if value not in choices:
            raise ValueError(f"{NAME}: {name} must be one of {', '.join(choices)}, got {value!r}")
    if rasterize_mode != "classic":
        raise NotImplementedError(
            f"{NAME}: rasterize_mode must be 'classic', got {rasterize_mode!r}; no other is there"
        )


def check_values(inputs: Inputs, validate: bool) -> None:
    """Refuse cameras that project nothing and, with `validate`, parameters that are not finite.

    On a GPU looking at values waits for it: there it is done with `validate` only.
    """
    if torch.compiler.is_compiling():
        return
    if validate or inputs.viewmats.device.type == "cpu":
        _check_cameras(inputs.viewmats.detach(), inputs.Ks.detach())
    if not validate:
        return
    for name in ("points", "delta", "sigma", "opacities", "colors"):
        if not getattr(inputs, name).detach().isfinite().all():
            raise ValueError(f"{NAME}: {name} is not finite everywhere; look for NaN or inf in it")


def _check_cameras(viewmats: Tensor, Ks: Tensor) -> None:
    focal = Ks[..., (0, 1), (0, 1)]
    if not bool((focal > 0).all() and Ks.isfinite().all()):
        raise ValueError(
            f"{NAME}: Ks must be finite with focal lengths fx, fy > 0, got {focal.flatten(0, -2).tolist()[:3]}"
        )
    determinant = torch.linalg.det(viewmats[..., :3, :3])
    size = viewmats[..., :3, :3].square().sum((-2, -1)).sqrt()
    if not bool(viewmats.isfinite().all() and (determinant.abs() > 1e-6 * size**3).all()):
        raise ValueError(
            f"{NAME}: viewmats must be finite with an invertible rotation, got determinants"
            f" {determinant.flatten().tolist()[:3]}; give world-to-camera matrices"
        )
