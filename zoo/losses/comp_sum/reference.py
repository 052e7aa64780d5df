"""The comp-sum family as differentiable formulas: any float dtype, any device, any number of derivatives.

The oracle of the closed forms in `eager.py`, the path of torch.export and functorch, and the graph behind second
derivatives. Float64 stays float64, everything narrower is computed in float32.

Off-target form: with lse the log-sum-exp of all scores but the target's, s = lse - z_y and c = softplus(s), which is
-log softmax(z)_y. No probability is ever formed: 1 - p loses everything where p is near 1, and p ** q has an infinite
derivative at 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.ops import compute_dtype

# exp of this is the largest finite number but a few; beyond it a derivative would be inf * 0.
_LARGEST_EXPONENT = {torch.float64: 709.78, torch.float32: 88.72}
_SMALL = 1e-2  # of the exponent, below which the quotient's derivative in tau cancels and its series is exact


def phi_of_nll(c: Tensor, tau: float | Tensor, cap: float = math.inf) -> Tensor:
    """The family as a function of c = -log p: c for tau = 1, else expm1((1 - tau) c) / (1 - tau).

    Args:
        c: any shape, >= 0, float32 or float64.
        tau: >= 0; a tensor is broadcast against c and may require a gradient, also at 1.
        cap: where (1 - tau) c exceeds it the loss goes on linearly in c, with the slope exp(cap) it has there.
    """
    cap = min(cap, _LARGEST_EXPONENT[c.dtype])
    if not isinstance(tau, Tensor):
        a = 1 - tau
        if a == 0:
            return c
        exponent = a * c
        return (_expm1(exponent) if a < 0 else _capped_expm1(exponent, cap)) / a
    a = 1 - tau.to(c.dtype)
    exponent = a * torch.where((a == 0) & (c == math.inf), 0, c)  # 0 * inf
    small = exponent.abs() < _SMALL
    t = torch.where(small, exponent, 0)
    series = torch.zeros_like(t)
    for k in range(8, 0, -1):  # 1 + t/2 + t^2/6 + ...: the remainder is below 1e-20
        series = 1 + t / (k + 1) * series
    away = torch.where(small, 1, exponent)
    quotient = _capped_expm1(away, cap) / torch.where(small, 1, a)
    return torch.where(small, torch.where(small, c, 0) * series, quotient)


def _capped_expm1(exponent: Tensor, cap: float) -> Tensor:
    """expm1, continued along its tangent beyond the cap."""
    return _expm1(exponent.clamp(max=cap)) + math.exp(cap) * (exponent - cap).relu()


def _expm1(exponent: Tensor) -> Tensor:
    """expm1 with the derivative exp: autograd's own is expm1 + 1, of which nothing is left far below 0."""
    low = exponent < -0.5
    return torch.where(low, exponent.clamp(max=-0.5).exp() - 1, torch.expm1(exponent.clamp(min=-0.5)))


def off_target(input: Tensor, target: Tensor) -> Tensor:
    """s = log sum_{j != y} exp(z_j) - z_y.

    Args:
        input: [N, C, ...] scores, float32 or float64.
        target: int64 [N, ...], each in [0, C).

    Returns:
        [N, ...]; -inf where no other class has a finite score.
    """
    classes = torch.arange(input.shape[1], device=input.device).view(-1, *[1] * (input.ndim - 2))
    here = classes == target.unsqueeze(1)
    others = input.masked_fill(here, -math.inf)
    top = others.amax(1, keepdim=True).detach()  # s does not depend on it
    alone = top == -math.inf
    total = (others - torch.where(alone, 0, top)).exp().sum(1)
    alone, top = alone.squeeze(1), top.squeeze(1)
    mine = input.gather(1, target.unsqueeze(1)).squeeze(1)
    return (top - mine) + torch.where(alone, 1, total).log()


def comp_sum_reference(
    input: Tensor,
    target: Tensor,
    tau: float | Tensor = 1.0,
    cap: float = math.inf,
    ignore_index: int = -100,
) -> Tensor:
    """Loss of each row, 0 where the target is ignored.

    Args:
        input: [N, C, ...] scores.
        target: int64 [N, ...], in [0, C) or ignore_index.
        tau, cap: see :func:`phi_of_nll`; a tensor tau is broadcast against target.
        ignore_index: target of the rows to leave out.

    Returns:
        [N, ...], float64 for a float64 input, else float32.
    """
    kept = target != ignore_index
    input = input.to(compute_dtype(input.dtype))
    s = off_target(input, torch.where(kept, target, 0))
    return torch.where(kept, phi_of_nll(-F.logsigmoid(-s), tau, cap), 0)


def soft_comp_sum_reference(input: Tensor, weights: Tensor, tau: float | Tensor, cap: float = math.inf) -> Tensor:
    """sum_k q_k l_tau(z, k), over the labels k that carry weight.

    Args:
        input: [N, C, ...] scores.
        weights: q, same shape, >= 0; they need not sum to 1.
        tau, cap: see :func:`phi_of_nll`; a tensor tau is broadcast against [N, ...].

    Returns:
        [N, ...], float64 for a float64 input, else float32.
    """
    dtype = compute_dtype(input.dtype)
    nll = -F.log_softmax(input, 1, dtype=dtype)
    weights = weights.to(dtype)
    nll = torch.where(weights == 0, 0, nll)  # 0 * inf where a class without weight has score -inf
    return (weights * phi_of_nll(nll, tau.unsqueeze(1) if isinstance(tau, Tensor) else tau, cap)).sum(1)
