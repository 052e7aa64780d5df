"""The ops of the EvoNorm layers, with gradients of any order.

`zoo::evonorm_s` and its backward are kernels of their own. A B layer has to meet the whole batch twice, once for the
variance and once for its gradient, so it is made of four kernels (moments, apply, sums, grad) with a little arithmetic
on [N, C] between them, where `synchronised.py` puts its collectives; `zoo::evonorm_b` and its backward are that
composition. Contracts: `eager.py`; what all ops have in common: `zoo/kernels/ops.py`.
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
from .reference import VARIANTS_B, evonorm_b_reference, evonorm_s_reference


def _channels(x: Tensor, channels_last: bool) -> int:
    return x.shape[2 if channels_last else 1]


def _like_parameters(x: Tensor, weight: Tensor | None, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of dv, dweight and dbias."""
    channels, dtype = _channels(x, channels_last), compute_dtype(x.dtype)
    shape = (x.shape[0], channels) if weight is not None and weight.ndim == 2 else (channels,)
    return x.new_empty(channels, dtype=dtype), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _in_parameter_dtypes(
    gradients: tuple[Tensor, ...], v: Tensor | None, weight: Tensor | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """dv, dweight, dbias as autograd wants them."""
    dv, dweight, dbias = gradients
    return (
        None if v is None else dv.to(v.dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias_dtype is None else dbias.to(bias_dtype),
    )


def _virtual_bias(grad: Tensor, weight: Tensor | None, channels: int) -> Tensor:
    """A bias for the second derivative, which does not depend on its value; its cotangent has this shape."""
    rows = () if weight is None or weight.ndim == 1 else (grad.shape[0],)
    return grad.new_zeros((*rows, channels))


# zoo::evonorm_s


def _s_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, v, weight, bias, _, *ctx.options = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, v, weight, output[1])


def _s_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, v, weight, stats = ctx.saved_tensors
    dx, *others = first_derivative(_s_backward, grad.contiguous(), x, v, weight, stats, *ctx.options)
    return dx, *_in_parameter_dtypes(tuple(others), v, weight, ctx.bias_dtype), *(None,) * 5


def _s_backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, x, v, weight, stats, *ctx.options = inputs
    ctx.groups = stats.shape[2]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, v, weight)


def _s_second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, v, weight = ctx.saved_tensors
    eps, rms, linear, channels_last = ctx.options

    def formula(x: Tensor, v: Tensor | None, weight: Tensor | None, bias: Tensor) -> Tensor:
        arguments = (eager.planes(x, channels_last), v, weight, bias, ctx.groups)
        return eager.planes(evonorm_s_reference(*arguments, eps=eps, rms=rms, linear=linear), channels_last)

    inputs = (x, v, weight, _virtual_bias(grad, weight, _channels(x, channels_last)))
    used = _without_absent(cotangents, (v is None or linear, weight is None))
    if linear:  # v has no part in the formula
        inputs = (x, None, *inputs[2:])
    dgrad, dx, dv, dweight, _ = second_order(formula, grad, inputs, used)
    # stats is a function of x, and differentiated as such: nothing flows to it.
    return dgrad, dx, dv, dweight, *(None,) * 5


def _without_absent(cotangents: tuple[Tensor | None, ...], absent: tuple[bool, bool]) -> list[Tensor | None]:
    """Cotangents of dx, dv, dweight, dbias; the backward computes dv and dweight also where there is no parameter."""
    dx, dv, dweight, dbias = cotangents
    return [dx, None if absent[0] else dv, None if absent[1] else dweight, dbias]


_s = define(
    "evonorm_s(Tensor x, Tensor? v, Tensor? weight, Tensor? bias, int groups, float eps, bool rms, bool linear,"
    " bool channels_last) -> (Tensor, Tensor)",
    eager.evonorm_s_forward,
    cuda.evonorm_s_forward,
    lambda x, v, weight, bias, groups, eps, rms, linear, channels_last: (
        torch.empty_like(x),
        x.new_empty((2, x.shape[0], groups), dtype=compute_dtype(x.dtype)),
    ),
)
_s_backward = define(
    "evonorm_s_backward(Tensor grad, Tensor x, Tensor? v, Tensor? weight, Tensor stats, float eps, bool rms,"
    " bool linear, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)",
    eager.evonorm_s_backward,
    cuda.evonorm_s_backward,
    lambda grad, x, v, weight, stats, eps, rms, linear, channels_last: (
        torch.empty_like(x),
        *_like_parameters(x, weight, channels_last),
    ),
)
register_derivative("evonorm_s", *with_statistics(_s_derivative, _s_save))
register_derivative("evonorm_s_backward", _s_second, _s_backward_save)
fused_evonorm_s = fused(_s, _s_save, _s_derivative)


# The kernels of the B layers, without gradients of their own

moments = define(
    "evonorm_moments(Tensor x, bool channels_last) -> Tensor",
    eager.evonorm_moments,
    cuda.evonorm_moments,
    lambda x, channels_last: x.new_empty((2, x.shape[0], _channels(x, channels_last)), dtype=compute_dtype(x.dtype)),
)
b_apply = define(
    "evonorm_b_apply(Tensor x, Tensor? v, Tensor? weight, Tensor? bias, Tensor moments, Tensor left, float eps,"
    " int variant, bool channels_last) -> Tensor",
    eager.evonorm_b_apply,
    cuda.evonorm_b_apply,
    lambda x, *_: torch.empty_like(x),
)
b_sums = define(
    "evonorm_b_sums(Tensor grad, Tensor x, Tensor? v, Tensor? weight, Tensor moments, Tensor left, float eps,"
    " int variant, bool channels_last) -> Tensor",
    eager.evonorm_b_sums,
    cuda.evonorm_b_sums,
    lambda grad, x, v, weight, moments, *_: moments.new_empty((5, *moments.shape[1:])),
)
b_grad = define(
    "evonorm_b_grad(Tensor grad, Tensor x, Tensor? v, Tensor? weight, Tensor moments, Tensor left, Tensor centre,"
    " Tensor pull, Tensor batch_pull, float eps, int variant, bool channels_last) -> Tensor",
    eager.evonorm_b_grad,
    cuda.evonorm_b_grad,
    lambda grad, x, *_: torch.empty_like(x),
)


# zoo::evonorm_b


def evonorm_b_forward(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    variant: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, moments [2, N, C], batch [2, C]: mean and variance of each channel; with a running variance 0 and that)."""
    of_samples = moments(x, channels_last)
    if running_var is None:
        batch = eager.batch_moments(of_samples)
    else:
        batch = torch.stack([torch.zeros_like(running_var), running_var]).to(of_samples.dtype)
    left = (batch[1] + eps).sqrt()
    return b_apply(x, v, weight, bias, of_samples, left, eps, variant, channels_last), of_samples, batch


def evonorm_b_backward(
    grad: Tensor,
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    of_samples: Tensor,
    batch: Tensor,
    training: bool,
    eps: float,
    variant: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dv, dweight, dbias)."""
    left = (batch[1] + eps).sqrt()
    sums = b_sums(grad, x, v, weight, of_samples, left, eps, variant, channels_last)
    count = x.numel() // max(1, _channels(x, channels_last))
    batch_pull = sums[1].sum(0) / (count * left) if training else torch.zeros_like(left)
    dx = b_input_gradient(grad, x, v, weight, of_samples, batch, sums, batch_pull, eps, variant, channels_last)
    return dx, *b_parameter_gradients(sums, weight)


def b_input_gradient(
    grad: Tensor,
    x: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    of_samples: Tensor,
    batch: Tensor,
    sums: Tensor,
    batch_pull: Tensor,
    eps: float,
    variant: int,
    channels_last: bool,
) -> Tensor:
    """dx once the sums over the batch are known."""
    left = (batch[1] + eps).sqrt()
    length = x.shape[1 if channels_last else 2]
    pull = sums[0] / (length * eager.right_root(of_samples, eps, variant))
    return b_grad(grad, x, v, weight, of_samples, left, batch[0], pull, batch_pull, eps, variant, channels_last)


def b_parameter_gradients(sums: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dv, dweight and dbias from the sums of `evonorm_b_sums`."""
    of_samples = weight is not None and weight.ndim == 2
    dweight, dbias = (part.clone() if of_samples else part.sum(0) for part in sums[3:])
    return sums[2].sum(0), dweight, dbias


def _b_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, v, weight, bias, running_var, *ctx.options = inputs
    ctx.bias_dtype, ctx.training = None if bias is None else bias.dtype, running_var is None
    ctx.save_for_backward(x, v, weight, *output[1:])


def _b_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, v, weight, of_samples, batch = ctx.saved_tensors
    arguments = (grad.contiguous(), x, v, weight, of_samples, batch, ctx.training, *ctx.options)
    dx, *others = first_derivative(_b_backward, *arguments)
    return dx, *_in_parameter_dtypes(tuple(others), v, weight, ctx.bias_dtype), *(None,) * 4


def _b_backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, x, v, weight, _, batch, ctx.training, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, v, weight, batch)


def _b_second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, v, weight, batch = ctx.saved_tensors
    eps, variant, channels_last = ctx.options
    running = None if ctx.training else batch[1]

    def formula(x: Tensor, v: Tensor | None, weight: Tensor | None, bias: Tensor) -> Tensor:
        arguments = (eager.planes(x, channels_last), v, weight, bias, running)
        return eager.planes(evonorm_b_reference(*arguments, eps=eps, variant=VARIANTS_B[variant]), channels_last)

    inputs = (x, v, weight, _virtual_bias(grad, weight, _channels(x, channels_last)))
    used = _without_absent(cotangents, (v is None, weight is None))
    dgrad, dx, dv, dweight, _ = second_order(formula, grad, inputs, used)
    return dgrad, dx, dv, dweight, *(None,) * 6


_b = define(
    "evonorm_b(Tensor x, Tensor? v, Tensor? weight, Tensor? bias, Tensor? running_var, float eps, int variant,"
    " bool channels_last) -> (Tensor, Tensor, Tensor)",
    evonorm_b_forward,
    None,
    lambda x, v, weight, bias, running_var, eps, variant, channels_last: (
        torch.empty_like(x),
        x.new_empty((2, x.shape[0], _channels(x, channels_last)), dtype=compute_dtype(x.dtype)),
        x.new_empty((2, _channels(x, channels_last)), dtype=compute_dtype(x.dtype)),
    ),
)
_b_backward = define(
    "evonorm_b_backward(Tensor grad, Tensor x, Tensor? v, Tensor? weight, Tensor moments, Tensor batch, bool training,"
    " float eps, int variant, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)",
    evonorm_b_backward,
    None,
    lambda grad, x, v, weight, moments, batch, training, eps, variant, channels_last: (
        torch.empty_like(x),
        *_like_parameters(x, weight, channels_last),
    ),
)
register_derivative("evonorm_b", *with_statistics(_b_derivative, _b_save, 1, 2))
register_derivative("evonorm_b_backward", _b_second, _b_backward_save)
fused_evonorm_b = fused(_b, _b_save, _b_derivative, outputs=3)
