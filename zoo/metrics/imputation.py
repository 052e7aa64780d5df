"""Noisy linear imputation without its noise: removed pixels become the weighted mean of their eight neighbours.

Of its own, as ROAD is about scores and this about a linear system.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_imputation(x: Tensor, removed: Tensor) -> Tensor:
    """Images whose removed pixels are each the weighted mean of their neighbours, removed ones among them.

    Direct neighbours weigh 1/6, diagonal ones 1/12; at the border the weights of those that exist count alone. The
    pixels of an image are unknowns of one system, symmetric and positive definite as long as a pixel is left, which
    conjugate gradients solve for all images and channels at once, each to its own end: results do not hang on what
    else is in the batch. float64 is solved in float64, all else in float32.

    Args:
        x: [B, C, H, W] images.
        removed: [B, H, W] bool, True where pixels are removed; at least one is left in each image.

    Returns:
        [B, C, H, W], shaped and typed like x.

    Source:
        Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", 2022, arXiv:2202.00449,
        section 4; border and weights as in the authors' code.
    """
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    unknown = removed[:, None].to(work)
    known = x.to(work).masked_fill(removed[:, None], 0)
    weight = _neighbours(torch.ones_like(unknown))  # of those that exist, 1 inside the image
    given = _neighbours(known) * unknown

    u, residual = torch.zeros_like(given), given
    # Weights vary at the border alone, and dividing by them is all the preconditioning there is.
    direction = residual / weight
    size = _dot(residual, direction)
    enough = size * (10 * torch.finfo(work).eps) ** 2
    for i in range(x.shape[-2] * x.shape[-1]):
        running = size > enough
        if i % 8 == 0 and not bool(running.any()):  # host sync: every eighth step
            break
        image = (weight * direction - _neighbours(direction)).mul_(unknown)
        step = torch.where(running, size / _dot(direction, image), 0)  # who is there stays there
        u.addcmul_(step, direction)
        residual.addcmul_(-step, image)
        scaled = residual / weight
        size, before = torch.where(running, _dot(residual, scaled), size), size
        direction.mul_(torch.where(running, size / before, 0)).add_(scaled)
    return torch.where(removed[:, None], u.to(x.dtype), x)


def _neighbours(t: Tensor) -> Tensor:
    """Sum of the eight neighbours times their weights, zeros around: [1 2 1] down and across, without the middle."""
    rows = 2 * t
    rows[..., 1:, :] += t[..., :-1, :]
    rows[..., :-1, :] += t[..., 1:, :]
    both = 2 * rows
    both[..., 1:] += rows[..., :-1]
    both[..., :-1] += rows[..., 1:]
    return both.sub_(t, alpha=4).div_(12)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)
