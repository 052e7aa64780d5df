"""The ops of the comp-sum losses in PyTorch: the contract that the CPU library and the CUDA kernels keep as well.

Scores are [B, C, S], contiguous: C classes, S = 1 where the classes lie last. For each of the B S rows, with y its
target, the sums over j != y:

    m = max z_j      E = sum exp(z_j - m)      s = (m - z_y) + log E      c = softplus(s) = -log p_y
    loss = c where tau = 1, else expm1((1 - tau) c) / (1 - tau)
    log w = (1 - tau) c + log sigmoid(s)                     w = dloss/ds = p_y ** (tau - 1) (1 - p_y)
    dz_j = g exp((z_j - m) - (log E - log w))                dz_y = -g w

- One shift a row and one exponential an entry; log w is inside the exponent because w * exp(...) would be inf * 0.
- statistics [2, B, S] hold m and log E. E is 0 and log E is -inf where every other score is -inf, and for C = 1.
- cap: (1 - tau) c beyond it goes on linearly in the loss, (expm1(cap) + exp(cap) ((1 - tau) c - cap)) / (1 - tau), and
  is the cap in log w. It only matters for tau < 1.
- A row whose target is ignore_index: loss, m, log E and gradient are 0. Rows with g = 0 or w = 0 have gradient 0.
- What the statistics of a NaN row hold is left open.
- A NaN among the scores of a row, or +inf at j != y, makes its loss NaN, and nothing else.
- taus, if given, is [B, S] in the compute dtype and takes the place of tau. loss, statistics and g have the compute
  dtype: float64 for float64, else float32. The gradient has the dtype of the scores, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.ops import compute_dtype
from .reference import phi_of_nll

_CHUNK_BYTES = 2 * 2**20  # of scores in the compute dtype: what stays in a core's cache between the passes


def _chunks(input: Tensor) -> Iterator[slice]:
    batch, classes, inner = input.shape
    per_sample = classes * inner * compute_dtype(input.dtype).itemsize
    step = max(1, _CHUNK_BYTES * torch.get_num_threads() // max(1, per_sample))
    return (slice(first, first + step) for first in range(0, batch, step))


def _kept(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    kept = target != ignore_index
    return kept, torch.where(kept, target, 0).unsqueeze(1)


def comp_sum_forward(
    input: Tensor, target: Tensor, taus: Tensor | None, tau: float, cap: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss [B, S] and statistics [2, B, S]."""
    batch, _, inner = input.shape
    dtype = compute_dtype(input.dtype)
    kept, index = _kept(target, ignore_index)
    statistics = torch.empty(2, batch, inner, dtype=dtype, device=input.device)
    mine = input.gather(1, index).squeeze(1).to(dtype)
    for rows in _chunks(input):
        others = input[rows].to(dtype, copy=True).scatter_(1, index[rows], -math.inf)
        top = others.amax(1, keepdim=True)
        total = others.sub_(top.masked_fill(top == -math.inf, 0)).exp_().sum(1)
        statistics[0, rows], statistics[1, rows] = top.squeeze(1), total.log_()
    loss = phi_of_nll(_softplus(_odds(statistics, mine)), tau if taus is None else taus, cap)
    statistics.masked_fill_(~kept, 0)
    return loss.masked_fill_(~kept, 0), statistics


def comp_sum_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    statistics: Tensor,
    taus: Tensor | None,
    tau: float,
    cap: float,
    ignore_index: int,
) -> Tensor:
    """Gradient of sum(grad * loss) for the scores, [B, C, S]."""
    dtype = compute_dtype(input.dtype)
    kept, index = _kept(target, ignore_index)
    mine = input.gather(1, index).squeeze(1).to(dtype)
    log_weight = _log_weight(_odds(statistics, mine), tau if taus is None else taus, cap)
    silent = (~kept | (grad == 0) | (log_weight == -math.inf)).unsqueeze(1)
    # finite, so that a score of -inf is none at all also where w is infinite
    shift = (statistics[1] - log_weight).clamp_(min=torch.finfo(dtype).min).unsqueeze(1)
    at_target = (-grad * log_weight.exp()).unsqueeze(1)
    top, grad = statistics[0].unsqueeze(1), grad.unsqueeze(1)
    result = torch.empty_like(input, memory_format=torch.contiguous_format)
    for rows in _chunks(input):
        slope = (input[rows].to(dtype) - top[rows]).sub_(shift[rows]).exp_().mul_(grad[rows])
        slope.scatter_(1, index[rows], at_target[rows])
        result[rows] = slope.masked_fill_(silent[rows], 0)
    return result


def tau_gradient(grad: Tensor, input: Tensor, target: Tensor, statistics: Tensor, taus: Tensor, cap: float) -> Tensor:
    """Gradient of sum(grad * loss) for taus, [B, S]; targets are in [0, C), and grad is 0 where they were ignored."""
    index = target.clamp(0, input.shape[1] - 1).unsqueeze(1)  # out of range on CUDA the statistics are NaN
    mine = input.gather(1, index).squeeze(1).to(taus.dtype)
    c = _softplus(_odds(statistics, mine))
    with torch.enable_grad():
        taus = taus.detach().requires_grad_()
        loss = phi_of_nll(torch.where(grad == 0, 0, c), taus, cap)
    return torch.autograd.grad(loss, taus, grad)[0]


def _odds(statistics: Tensor, mine: Tensor) -> Tensor:
    """s; (m - z_y) first: log E would be lost beside a large m."""
    return (statistics[0] - mine) + statistics[1]


def _log_weight(s: Tensor, tau: float | Tensor, cap: float) -> Tensor:
    log_off = F.logsigmoid(s)
    if not isinstance(tau, Tensor) and tau == 1:
        return log_off
    exponent = (1 - tau) * _softplus(s)
    if isinstance(tau, Tensor):
        exponent = torch.where(tau == 1, 0, exponent)  # 0 * inf
    return exponent.clamp(max=cap) + log_off


def _softplus(s: Tensor) -> Tensor:
    return -F.logsigmoid(-s)  # F.softplus drops exp(-s) from s = 20 on
