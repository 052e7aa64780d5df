"""Grad-CAM, Grad-CAM++ and Smooth Grad-CAM++ as formulas: tensors in, tensors out, no model.

For an image and a score S, A_k is feature map k of a layer, [h, w] or any other number of axes, and g = dS/dA. With
Y = exp(S) and a tail that is piecewise linear, the p-th derivative of Y for one neuron is D_p = e^S g^p. Of n noisy
copies of the image, whose scores are S_m, the derivatives are averaged, each order by itself:

    D_p   = 1/n sum_m e^(S_m) g_m^p
    alpha = D_2 / (2 D_2 + (sum A_k) D_3)        for each neuron; sum A_k runs over the map, not over a product
    w_k   = sum alpha relu(D_1)                  over the neurons of map k
    L     = relu(sum_k w_k A_k)                  A is the clean image's

n = 1 without noise is Grad-CAM++, in which e^S cancels. Nothing here ever takes exp(S): derivatives are kept relative
to e^M, M the largest score so far, and gradients relative to the largest of the clean image, so that neither cubes nor
exponentials leave the range of float32. alpha does not notice: (g, A) -> (g / s, s A) leaves it as it is.

Shapes: B images, T targets each, K maps, neurons of any number of axes behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Numerator = Literal["second", "first"]
Denominator = Literal["positive", "signed"]
Normalize = Literal["max", "minmax", "none"]


def neurons(t: Tensor) -> tuple[int, ...]:
    """The axes of the neurons of [B, T, K, ...]."""
    return tuple(range(3, t.ndim))


def grad_cam_weights(first: Tensor) -> Tensor:
    """[B, T, K] from gradients [B, T, K, ...]: their mean over each map."""
    return first.mean(neurons(first))


def pixel_weights(
    first: Tensor,
    second: Tensor,
    third: Tensor,
    total: Tensor,
    numerator: Numerator = "second",
    denominator: Denominator = "positive",
    eps: Tensor | float = 0.0,
) -> Tensor:
    """alpha of each neuron, [B, T, K, ...].

    Args:
        first, second, third: D_1, D_2 and D_3, [B, T, K, ...].
        total: sum A_k, [B, 1 or T, K].
        numerator: "second", D_2; "first", D_1 as the paper prints it, which does not reduce to Grad-CAM++.
        denominator: "positive": alpha is 0 where the denominator is not positive, as it may be once derivatives are
            averaged or activations signed; "signed": whatever comes out, 0 only where it is 0.
        eps: added to the denominator; 0 is right, others have 1e-6 or so.
    """
    total = total.view(*total.shape, *(1,) * (first.ndim - total.ndim))
    below = 2 * second + total * third + eps
    usable = below > 0 if denominator == "positive" else below != 0
    above = second if numerator == "second" else first
    return torch.where(usable, above / torch.where(usable, below, 1), 0)


def map_weights(alpha: Tensor, first: Tensor, mask: Tensor | None = None) -> Tensor:
    """w_k, [B, T, K]: the sum of alpha relu(D_1) over each map, or over the neurons of a 0/1 mask [K or 1, ...]."""
    each = alpha * first.relu()
    return (each if mask is None else each * mask).sum(neurons(first))


def combine(weights: Tensor, activation: Tensor) -> Tensor:
    """sum_k w_k A_k, [B, T, ...], from weights [B, T, K] and activations [B, K, ...]; the relu is the caller's."""
    flat = weights @ activation.flatten(2)
    return flat.view(*weights.shape[:2], *activation.shape[2:])


def normalised(maps: Tensor, how: Normalize, axes: int) -> Tensor:
    """Maps in [0, 1] over their last `axes` axes: over the largest value, or from the smallest to the largest.

    A map without a positive value, or for "minmax" a constant one, becomes 0.
    """
    if how == "none":
        return maps
    over = tuple(range(maps.ndim - axes, maps.ndim))
    high = maps.amax(over, keepdim=True)
    if how == "minmax":
        low = maps.amin(over, keepdim=True)
        maps, high = maps - low, high - low
    return torch.where(high > 0, maps / torch.where(high > 0, high, 1), 0)


class Averages:
    """D_1, D_2 and D_3 of every layer, averaged over the noisy copies of each image.

    Args:
        shapes: by layer, the shape of its maps, (K, ...).
        images, targets: how many.
        weighted: by e^(S_m - M), M the largest score so far, image by image and target by target; else all copies count
            the same.
        dtype, device: of the sums.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        images: int,
        targets: int,
        weighted: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weighted, self.count = weighted, [0] * images
        like = {"dtype": dtype, "device": device}
        self.sums = {name: torch.zeros(3, images, targets, *shape, **like) for name, shape in shapes.items()}
        self.top = torch.full((images, targets), -torch.inf if weighted else 0.0, **like)
        self.weight, self.square = torch.zeros(2, images, targets, **like)

    def add(self, image: int, score: Tensor, derivatives: Mapping[str, Sequence[Tensor]]) -> None:
        """One more copy of an image.

        Args:
            image: which.
            score: [T] of the copy.
            derivatives: by layer, D_1, D_2 and D_3 without the factor e^S, [T, K, ...] each.
        """
        self.count[image] += 1
        if self.weighted:
            top = torch.maximum(self.top[image], score)
            before, new = (self.top[image] - top).exp(), (score - top).exp()
            self.top[image] = top
            self.weight[image] = self.weight[image] * before + new
            self.square[image] = self.square[image] * before.square() + new.square()
        else:
            before = new = torch.ones_like(self.top[image])
            self.weight[image] += 1
            self.square[image] += 1
        for name, orders in derivatives.items():
            aligned = (-1, *(1,) * (orders[0].ndim - 1))
            for total, one in zip(self.sums[name][:, image], orders, strict=True):
                total.mul_(before.view(aligned)).add_(one * new.view(aligned))

    def means(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """D_1, D_2 and D_3 of a layer, [B, T, K, ...], relative to e^M."""
        sums = self.sums[name]
        counts = torch.tensor(self.count, dtype=sums.dtype, device=sums.device)
        first, second, third = sums / counts.view(-1, *(1,) * (sums.ndim - 2))
        return first, second, third

    @property
    def effective(self) -> Tensor:
        """How many copies count, (sum v)^2 / sum v^2, [B, T]."""
        return self.weight.square() / self.square
