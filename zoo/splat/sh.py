"""Real spherical harmonics, the colours of splats that change with the direction they are seen from.

The polynomials stand twice, here and in `cuda_kernels/convex/sh.h`; a test compares both with a third.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.ops import define, first_derivative, prefers_formula, prepare, recording, register_derivative

MOST_DEGREE = 4


def spherical_harmonics(degrees_to_use: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None = None) -> Tensor:
    """Sum of coefficients times the real spherical harmonics at a direction.

    Args:
        degrees_to_use: highest degree, 0 to 4; of the coefficients the first (degree + 1)^2 are used.
        dirs: [..., 3] directions, of any length; 0 for none, where only degree 0 counts.
        coeffs: [..., S, D] coefficients, S >= (degree + 1)^2, in the order of 3D Gaussian splatting; D = 3 for colours.
        masks: bool [...]; False gives 0 and no gradient. None for True everywhere.

    Returns:
        [..., D], without the 0.5 and the clamp that make a colour of it.

    Raises:
        ValueError: if the degree or a shape does not fit.
        TypeError: if the types do not fit.

    Example:
        >>> spherical_harmonics(1, torch.tensor([0.0, 0.0, 2.0]), torch.eye(4)[:, [0, 2]])  # up: of degree 0 and z
        tensor([0.2821, 0.4886])

    Source:
        Ramamoorthi and Hanrahan, An Efficient Representation for Irradiance Environment Maps, 2001, eq. 3, in the order
        and with the signs of Kerbl et al., 2023, arXiv:2308.04079; interface of gsplat's function of that name.
    """
    if not 0 <= degrees_to_use <= MOST_DEGREE:
        raise ValueError(f"spherical_harmonics: degrees_to_use must lie in [0, {MOST_DEGREE}], got {degrees_to_use}")
    if dirs.shape[-1:] != (3,) or coeffs.ndim < 2 or coeffs.shape[:-2] != dirs.shape[:-1]:
        raise ValueError(
            "spherical_harmonics: expected dirs [..., 3] and coeffs [..., S, D] with the same first axes, got"
            f" {tuple(dirs.shape)} and {tuple(coeffs.shape)}"
        )
    least = (degrees_to_use + 1) ** 2
    if coeffs.shape[-2] < least:
        raise ValueError(
            f"spherical_harmonics: degree {degrees_to_use} needs {least} coefficients, got {coeffs.shape[-2]}; give"
            " more, or a lower degree"
        )
    if masks is not None and masks.shape != dirs.shape[:-1]:
        raise ValueError(
            f"spherical_harmonics: masks must be shaped {tuple(dirs.shape[:-1])} as dirs, got {tuple(masks.shape)}"
        )
    if (
        not dirs.is_floating_point()
        or coeffs.dtype is not dirs.dtype
        or (masks is not None and masks.dtype != torch.bool)
    ):
        raise TypeError(
            "spherical_harmonics: expected dirs and coeffs of one floating-point type and masks of bool, got"
            f" {dirs.dtype}, {coeffs.dtype} and {None if masks is None else masks.dtype}; convert them"
        )
    leading = dirs.shape[:-1]
    flat, sets = dirs.reshape(1, -1, 3), coeffs.reshape(1, -1, *coeffs.shape[-2:])
    seen = torch.ones(flat.shape[:2], dtype=torch.bool, device=dirs.device) if masks is None else masks.reshape(1, -1)
    return sh_of_views(flat, sets, seen, degrees_to_use).reshape(*leading, coeffs.shape[-1])


def sh_of_views(dirs: Tensor, coeffs: Tensor, visible: Tensor, degree: int) -> Tensor:
    """The same for views that share coefficients.

    Args:
        dirs: [I, N, 3].
        coeffs: [J, N, S, D]; I is a multiple of J, and direction i goes with coefficients i // (I / J).
        visible: bool [I, N].
        degree: as above.

    Returns:
        [I, N, D].
    """
    if prefers_formula("spherical_harmonics", "auto", dirs.device.type) or dirs.dtype not in (
        torch.float32,
        torch.float64,
    ):
        return sh_formula(dirs, coeffs, visible, degree)
    prepare(dirs)
    return sh_eval(dirs.contiguous(), coeffs.contiguous(), visible.contiguous(), degree)


def sh_formula(dirs: Tensor, coeffs: Tensor, visible: Tensor, degree: int) -> Tensor:
    """:func:`sh_of_views` in PyTorch."""
    hidden = ~visible[..., None]
    dirs = dirs.masked_fill(hidden, 0.0)
    square = dirs.square().sum(-1, keepdim=True)
    is_zero = square == 0
    unit = dirs * torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).rsqrt())
    functions = torch.stack(basis(degree, *unit.unbind(-1)), -1)  # [I, N, S]
    used = coeffs[:, :, : functions.shape[-1]].repeat_interleave(len(dirs) // max(1, len(coeffs)), 0)
    return torch.einsum("ins,insd->ind", functions, used).masked_fill(hidden, 0.0)


def basis(degree: int, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """The (degree + 1)^2 functions at unit vectors."""

    def scaled(number: float) -> float:
        return math.sqrt(number / math.pi)

    xx, yy, zz = x * x, y * y, z * z
    found = [torch.full_like(x, scaled(1 / 4))]
    if degree >= 1:
        c = scaled(3 / 4)
        found += [-c * y, c * z, -c * x]
    if degree >= 2:
        a, b = scaled(15 / 4), scaled(5 / 16)
        found += [a * x * y, -a * y * z, b * (2 * zz - xx - yy), -a * x * z, a / 2 * (xx - yy)]
    if degree >= 3:
        a, b, c, d = scaled(35 / 32), scaled(105 / 4), scaled(21 / 32), scaled(7 / 16)
        found += [-a * y * (3 * xx - yy), b * x * y * z, -c * y * (4 * zz - xx - yy)]
        found += [d * z * (2 * zz - 3 * xx - 3 * yy), -c * x * (4 * zz - xx - yy), b / 2 * z * (xx - yy)]
        found += [-a * x * (xx - 3 * yy)]
    if degree >= 4:
        a, b, c, d = scaled(315 / 16), scaled(315 / 32), scaled(45 / 16), scaled(45 / 32)
        one = xx + yy + zz  # but 0 where there is no direction
        found += [a * x * y * (xx - yy), -b * y * z * (3 * xx - yy), c * x * y * (7 * zz - 1)]
        found += [-d * y * z * (7 * zz - 3), scaled(9 / 256) * (35 * zz * zz - 30 * zz + 3 * one)]
        found += [-d * x * z * (7 * zz - 3)]
        found += [c / 2 * (xx - yy) * (7 * zz - 1), -b * x * z * (xx - 3 * yy)]
        found += [a / 4 * (xx * (xx - 3 * yy) - yy * (3 * xx - yy))]
    return found


def _formula_gradients(
    grad: Tensor, dirs: Tensor, coeffs: Tensor, visible: Tensor, degree: int
) -> tuple[Tensor, Tensor]:
    with recording():
        inputs = dirs.detach().requires_grad_(), coeffs.detach().requires_grad_()
        value = sh_formula(*inputs, visible, degree)  # of degree 0 has no use for directions
        dirs_grad, coeffs_grad = torch.autograd.grad(value, inputs, grad, allow_unused=True, materialize_grads=True)
        return dirs_grad, coeffs_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.degree = inputs
    ctx.save_for_backward(*tensors)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # rare: somebody wants to differentiate this again, which the formula can
        dirs, coeffs, visible = ctx.saved_tensors
        value = sh_formula(dirs, coeffs, visible, ctx.degree)
        wanted = [t for t in (dirs, coeffs) if t.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True, allow_unused=True))
        return (*(next(found) if t.requires_grad else None for t in (dirs, coeffs)), None, None)
    return (*first_derivative(_backward, grad.contiguous(), *ctx.saved_tensors, ctx.degree), None, None)


sh_eval = define(
    "sh_eval(Tensor dirs, Tensor coeffs, Tensor visible, int degree) -> Tensor",
    sh_formula,
    None,
    lambda dirs, coeffs, visible, degree: dirs.new_empty(*dirs.shape[:2], coeffs.shape[-1]),
)
_backward = define(
    "sh_eval_bwd(Tensor grad, Tensor dirs, Tensor coeffs, Tensor visible, int degree) -> (Tensor, Tensor)",
    _formula_gradients,
    None,
    lambda grad, dirs, coeffs, visible, degree: (torch.empty_like(dirs), torch.empty_like(coeffs)),
)
register_derivative("sh_eval", _derivative, _save)
