"""The ops `zoo::comp_sum` and `zoo::comp_sum_backward`, with gradients of any order.

The contract is written in `eager.py`; what all ops have in common stands in `zoo/kernels/ops.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.ops import (
    compute_dtype,
    define,
    first_derivative,
    fused,
    register_derivative,
    second_order,
    with_statistics,
)
from . import cuda, eager
from .reference import comp_sum_reference


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, taus, ctx.tau, ctx.cap, ctx.ignore_index = inputs
    ctx.save_for_backward(input, target, taus, output[1])


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, target, taus, statistics = ctx.saved_tensors
    dinput = dtaus = None
    if ctx.needs_input_grad[0]:
        arguments = (grad.contiguous(), input, target, statistics, taus, ctx.tau, ctx.cap, ctx.ignore_index)
        dinput = first_derivative(_backward, *arguments)
    if taus is not None and ctx.needs_input_grad[2]:
        dtaus = _tau_derivative(grad, input, target, taus, statistics, ctx.cap, ctx.ignore_index)
    return dinput, None, dtaus, None, None, None


def _tau_derivative(
    grad: Tensor, input: Tensor, target: Tensor, taus: Tensor, statistics: Tensor, cap: float, ignore_index: int
) -> Tensor:
    if torch.is_grad_enabled():  # the statistics are no function of the scores to autograd, the formula is
        loss = comp_sum_reference(input, target, taus, cap, ignore_index)
        return torch.autograd.grad(loss, taus, grad, create_graph=True)[0]
    kept = target != ignore_index
    return eager.tau_gradient(torch.where(kept, grad, 0), input, torch.where(kept, target, 0), statistics, taus, cap)


def _backward_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, input, target, _, taus, ctx.tau, ctx.cap, ctx.ignore_index = inputs
    ctx.save_for_backward(grad, input, target, taus)


def _second(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, input, target, taus = ctx.saved_tensors

    def formula(input: Tensor, taus: Tensor | None) -> Tensor:
        return comp_sum_reference(input, target, ctx.tau if taus is None else taus, ctx.cap, ctx.ignore_index)

    dgrad, dinput, dtaus = second_order(formula, grad, (input, taus), (cotangent, None))
    # statistics is a function of the scores, and differentiated as such: nothing flows to it.
    return dgrad, dinput, None, None, dtaus, None, None, None


def _fake(
    input: Tensor, target: Tensor, taus: Tensor | None, tau: float, cap: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(input.dtype)
    return input.new_empty(target.shape, dtype=dtype), input.new_empty((2, *target.shape), dtype=dtype)


_forward = define(
    "comp_sum(Tensor input, Tensor target, Tensor? taus, float tau, float cap, int ignore_index) -> (Tensor, Tensor)",
    eager.comp_sum_forward,
    cuda.comp_sum_forward,
    _fake,
)
_backward = define(
    "comp_sum_backward(Tensor grad, Tensor input, Tensor target, Tensor statistics, Tensor? taus, float tau, float cap,"
    " int ignore_index) -> Tensor",
    eager.comp_sum_backward,
    cuda.comp_sum_backward,
    lambda grad, input, target, statistics, taus, tau, cap, ignore_index: torch.empty_like(input),
)
register_derivative("comp_sum", *with_statistics(_derivative, _save))
register_derivative("comp_sum_backward", _second, _backward_save)
fused_comp_sum = fused(_forward, _save, _derivative)
comp_sum_forward, comp_sum_backward = _forward, _backward
