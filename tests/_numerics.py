"""How close is close: one table for the whole suite.

Two figures per dtype, both relative. The RMS ratio |actual - expected| / |expected| (Euclidean norms) says whether the
arithmetic is right on average and hardly depends on the tensor's size; the maximum, over the largest expected
magnitude, catches a single wrong element that the average would hide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the RMS ratio and on the relative maximum."""

    rms: float
    maximum: float


# Half types: one rounding of the result costs at most 2^-8 and 2^-11; the RMS of many roundings is 0.4 of that.
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1e-6, 2e-6),
    torch.bfloat16: Tolerance(3.0e-3, 3.95e-3),
    torch.float16: Tolerance(3.8e-4, 4.95e-4),
}


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64; the plain norm of the difference where expected is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return (torch.linalg.vector_norm(actual - expected) / _unless_zero(torch.linalg.vector_norm(expected))).item()


def max_ratio(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    return ((actual - expected).abs().max() / _unless_zero(expected.abs().max())).item()


def _unless_zero(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0)


def assert_close(actual: Tensor, expected: Tensor, *, like: torch.dtype | None = None, loose: float = 1.0) -> None:
    """Same shape, and both figures within the tolerance of a dtype.

    Args:
        actual: the result under test.
        expected: the oracle, usually float64.
        like: dtype whose tolerance applies; that of `actual` by default.
        loose: factor on the tolerance, for chains of several roundings.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    bound = TOLERANCE[like or actual.dtype]
    rms, maximum = rms_ratio(actual, expected), max_ratio(actual, expected)
    allowed = loose * (bound.rms if actual.numel() >= 32 else bound.maximum)  # few elements do not average out
    assert rms <= allowed, f"RMS ratio {rms:.3g}, allowed {allowed:.3g}"
    assert maximum <= loose * bound.maximum, f"maximum {maximum:.3g}, allowed {loose * bound.maximum:.3g}"
