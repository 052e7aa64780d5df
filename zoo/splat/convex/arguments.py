"""Arguments of a convex model, checked."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from torch import Tensor

from ..sh import MOST_DEGREE


def focal_length(focal: float | None) -> float | None:
    """The number as float32 has it, which is what a file gives back: a resumed run is then the same run."""
    if focal is None:
        return None
    try:
        rounded = struct.unpack("f", struct.pack("f", focal))[0]
    except OverflowError:  # beyond float32
        rounded = math.inf
    if not 0 < rounded < math.inf:
        raise ValueError(f"ConvexModel: reference_focal must be a positive number of pixels or None, got {focal}")
    return rounded


def check_arguments(n: int, k: int, sh_degree: int, background: Sequence[float] | None, planar: bool) -> None:
    """Refuse what the constructor cannot build."""
    if n < 0:
        raise ValueError(f"ConvexModel: num_convexes must not be negative, got {n}; 0 is a model to be filled")
    if not 3 <= k <= 8:
        raise ValueError(f"ConvexModel: k must lie in [3, 8], got {k}; the paper takes 6")
    if not 0 <= sh_degree <= MOST_DEGREE:
        raise ValueError(f"ConvexModel: sh_degree must lie in [0, {MOST_DEGREE}], got {sh_degree}; the paper takes 3")
    if planar and sh_degree:
        raise ValueError(f"ConvexModel: planar convexes have one colour, got sh_degree {sh_degree}; pass sh_degree=0")
    if background is not None and (len(background) != 3 or not all(math.isfinite(c) for c in background)):
        raise ValueError(f"ConvexModel: background must be 3 finite numbers, RGB, or None, got {background}")


def mean_focal_length(Ks: Tensor) -> float:
    """Geometric mean of sqrt(fx fy) of cameras [V, 3, 3] in pixels."""
    if Ks.ndim != 3 or Ks.shape[1:] != (3, 3) or not len(Ks):
        raise ValueError(f"fit_reference_focal: Ks must be [V, 3, 3] with a camera or more, got {list(Ks.shape)}")
    focal = Ks.detach().double()[:, (0, 1), (0, 1)]
    if not bool(((focal > 0) & focal.isfinite()).all()):
        raise ValueError(
            f"fit_reference_focal: focal lengths in Ks must be positive and finite, got {focal.flatten().tolist()[:4]};"
            " give them in pixels"
        )
    return float(focal.log().mean().exp())
