"""Where convexes start: one around each point of a cloud."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import convex_init_from_points, regular_points

_FLAT_HARMONIC = 0.28209479177387814  # the harmonic of degree 0, sqrt(1 / (4 pi))


@dataclass(frozen=True)
class Start:
    """Start values of :meth:`ConvexModel.initialise`, which explains them."""

    size: float = 1.2
    opacity: float = 0.1
    delta: float = 0.1
    sigma: float = 9.5e-4
    min_radius: float | None = None
    max_radius: float | None = None
    random_orientation: bool | None = None

    def __post_init__(self) -> None:
        if not 0 < self.opacity < 1:
            raise ValueError(f"initialise: opacity must lie inside (0, 1), got {self.opacity}")
        for name in ("size", "delta", "sigma", "min_radius", "max_radius"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"initialise: {name} must be positive and finite, got {value}")
        if self.min_radius is not None and self.max_radius is not None and self.min_radius > self.max_radius:
            raise ValueError(
                f"initialise: min_radius must not be above max_radius, got {self.min_radius} and {self.max_radius}"
            )

    @property
    def opacity_logit(self) -> float:
        """The raw opacity."""
        return math.log(self.opacity / (1 - self.opacity))

    @torch.no_grad()
    def parameters(
        self, xyz: Tensor, rgb: Tensor, k: int, sh_degree: int, planar: bool, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Raw parameters by name, in float64, of a convex at every point."""
        _check_cloud(xyz, rgb, planar)
        # float64: far from the origin the offsets below would lose their last digits to the coordinates.
        places = xyz.detach().double()
        if planar and places.shape[1] == 2:
            places = torch.cat([places, torch.ones_like(places[:, :1])], 1)
        spheres, measured = convex_init_from_points(places, k, self.size, self.random_orientation, generator)
        radius = measured.clamp(self.min_radius, self.max_radius) if self._is_bounded else measured
        if planar:
            circle = regular_points(k, planar=True).to(places)
            points = places[:, None, :2] + self.size * radius[:, None, None] * circle
        else:
            points = places[:, None] + (spheres - places[:, None]) * (radius / measured)[:, None, None]
        n = len(places)
        return {
            "points": points,
            "log_delta": (self.delta / radius).log(),
            "log_sigma": places.new_full((n,), math.log(self.sigma)),
            "opacity_logit": places.new_full((n,), self.opacity_logit),
            "sh0": (rgb.detach().double()[:, None] - 0.5) / _FLAT_HARMONIC,
            "shN": places.new_zeros(n, (sh_degree + 1) ** 2 - 1, 3),
            "mask": places.new_ones(n),
        }

    @property
    def _is_bounded(self) -> bool:
        return self.min_radius is not None or self.max_radius is not None


def _check_cloud(xyz: Tensor, rgb: Tensor, planar: bool) -> None:
    """Refuse a cloud whose numbers or shapes do not fit."""
    for name, value in (("xyz", xyz), ("rgb", rgb)):
        if not value.is_floating_point():
            scale = " / 255" if name == "rgb" else ""
            raise TypeError(f"initialise: {name} must be floating point, got {value.dtype}; pass {name}.float(){scale}")
    if xyz.ndim != 2 or xyz.shape[1] not in ((2, 3) if planar else (3,)) or not len(xyz):
        what = "[N, 2], or [N, 3] with z = 1," if planar else "[N, 3]"
        raise ValueError(f"initialise: xyz must be {what} with a point or more, got {list(xyz.shape)}")
    if tuple(rgb.shape) != (len(xyz), 3):
        raise ValueError(
            f"initialise: rgb must be {[len(xyz), 3]}, a colour for each point of xyz, got {list(rgb.shape)}"
        )
    if not bool(xyz.isfinite().all()):
        raise ValueError(
            f"initialise: xyz must be finite, got {int((~xyz.isfinite()).any(1).sum())} of {len(xyz)} points that are"
            " not; leave them out"
        )
    if planar and xyz.shape[1] == 3 and not bool((xyz[:, 2] == 1).all()):
        raise ValueError("initialise: points of a planar model must have z = 1, got others; pass x and y alone, [N, 2]")
    if not bool(((rgb >= 0) & (rgb <= 1)).all()):  # nan is outside, too
        raise ValueError(
            f"initialise: rgb must lie in [0, 1], got {float(rgb.min()):g} to {float(rgb.max()):g}; divide bytes by 255"
        )
