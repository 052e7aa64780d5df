"""Balls around inputs, cut at the range of valid inputs: starting points, directions and projections.

Why a file of its own: PGD and APGD share it. Tensors are [N, ...] in float32 or float64; nothing here waits for a
device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Start = Literal["uniform", "gaussian"]
StepRule = Literal["sign", "normalized", "adam"]

GAUSSIAN_SCALE = 0.001  # TRADES' code
ADAM = (0.9, 0.999, 1e-9)  # Gowal et al.'s code


class Ball:
    """{x' : |x' - x| <= eps} within bounds.

    Args:
        x: [N, ...] centres.
        eps: radius.
        norm: "linf" or "l2".
        bounds: smallest and largest valid value; centres outside by a rounding error stay valid.
        generator: source of random numbers, on any device; None for the global one of the device.
    """

    def __init__(
        self, x: Tensor, eps: float, norm: Norm, bounds: tuple[float, float] | None, generator: torch.Generator | None
    ) -> None:
        self.x, self.eps, self.norm, self.generator = x, eps, norm, generator
        low, high = (-math.inf, math.inf) if bounds is None else bounds
        self.low, self.high = x.clamp_max(low), x.clamp_min(high)
        if norm == "linf":
            self.low, self.high = torch.maximum(self.low, x - eps), torch.minimum(self.high, x + eps)

    def of(self, samples: Tensor) -> Ball:
        """The balls around some of the centres, [M] indices."""
        part = copy.copy(self)
        part.x, part.low, part.high = self.x[samples], self.low[samples], self.high[samples]
        return part

    def project(self, point: Tensor) -> Tensor:
        """The nearest point of the ball, then cut at the bounds, which brings it no farther from the centre."""
        if self.norm == "l2":
            offset = point - self.x
            point = self.x + offset * (self.eps / length(offset).clamp_min(self.eps))
        return point.clamp(self.low, self.high)

    def start(self, how: Start | None) -> Tensor:
        """Uniform in the ball, or a little normal noise away from the centre, or the centre."""
        if how is None:
            return self.x.clone()
        if how == "gaussian":
            return self.project(self.x + GAUSSIAN_SCALE * self.noise())
        if self.norm == "linf":
            return self.project(self.x + self.eps * (2 * self._uniform(self.x.shape) - 1))
        dimensions = max(1, math.prod(self.x.shape[1:]))
        radius = self._uniform((len(self.x), *(1,) * (self.x.ndim - 1))) ** (1 / dimensions)
        return self.project(self.x + self.eps * radius * unit(self.noise()))

    def noise(self) -> Tensor:
        """Standard normal, of the shape of the centres. Its values do not depend on how they lie in memory."""
        device = self.x.device if self.generator is None else self.generator.device
        drawn = torch.randn(self.x.shape, dtype=self.x.dtype, device=device, generator=self.generator)
        return drawn.to(self.x.device)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        device = self.x.device if self.generator is None else self.generator.device
        return torch.rand(shape, dtype=self.x.dtype, device=device, generator=self.generator).to(self.x.device)


class Steps:
    """Ascent from point to point, not yet projected.

    Args:
        rule: "sign", "normalized" or "adam".
        ball: where.
        lengths: of the steps.
    """

    def __init__(self, rule: StepRule, ball: Ball, lengths: Sequence[float]) -> None:
        self.rule, self.lengths, self.done = rule, lengths, 0
        # drawn once a run, whether a gradient is 0 or not: to ask would wait for the device
        self.fallback = unit(ball.noise()) if rule == "normalized" else None
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def __call__(self, point: Tensor, gradient: Tensor) -> Tensor:
        self.done += 1
        if self.rule == "sign":
            direction = gradient.sign()
        elif self.rule == "normalized":
            direction = unit(gradient, self.fallback)
        else:
            first, second, eps = ADAM
            self.mean = first * self.mean + (1 - first) * gradient
            self.square = second * self.square + (1 - second) * gradient.square()
            root = (self.square / (1 - second**self.done)).sqrt()
            direction = self.mean / (1 - first**self.done) / (root + eps)
        return point + self.lengths[self.done - 1] * direction


def check_radius(eps: float, bounds: tuple[float, float] | None, of: str) -> None:
    """Raises:
    ValueError: if eps is negative, NaN or infinite, or the bounds are not in order.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"{of}: eps must be finite and not negative, got {eps}")
    if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
        raise ValueError(f"{of}: bounds must be (smallest, largest) or None, got {bounds}")


def _largest(t: Tensor) -> Tensor:
    """The largest magnitude of each sample, [N, 1, ...]."""
    return t.abs().amax(tuple(range(1, t.ndim)), keepdim=True) if t.ndim > 1 else t.abs()


def length(t: Tensor) -> Tensor:
    """The l2 norm of each sample, [N, 1, ...]."""
    return t.square().sum(tuple(range(1, t.ndim)), keepdim=True).sqrt() if t.ndim > 1 else t.abs()


def unit(t: Tensor, fallback: Tensor | None = None) -> Tensor:
    """Each sample over its l2 norm; the fallback, or 0, where it is 0."""
    largest = _largest(t)
    zero = largest == 0
    # over the largest magnitude first: squares of gradients of 1e-25 are 0 in float32
    scaled = t / torch.where(zero, 1, largest)
    scaled = scaled / torch.where(zero, 1, length(scaled))
    return scaled if fallback is None else torch.where(zero, fallback, scaled)
