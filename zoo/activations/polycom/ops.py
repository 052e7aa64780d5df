"""The ops `zoo::poly_relu`, `zoo::poly_norm`, `zoo::poly_norm_mul` and their backwards, with gradients of any order.

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
from .reference import poly_norm_mul_reference, poly_norm_reference, poly_relu_reference


def _like_parameters(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of dweight and dbias."""
    dtype = compute_dtype(x.dtype)
    return x.new_empty(weight.shape, dtype=dtype), x.new_empty((*weight.shape[:-1], 1), dtype=dtype)


def _row_stats(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((weight.shape[-1] + 1, x.shape[0]), dtype=compute_dtype(x.dtype))


# zoo::poly_relu


def _poly_relu_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _poly_relu_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = first_derivative(_relu_backward, grad.contiguous(), x, weight)
    return dx, dweight.to(weight.dtype), None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)


def _poly_relu_backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _poly_relu_second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, weight = ctx.saved_tensors
    inputs = (x, weight, weight.new_zeros(1))
    return second_order(poly_relu_reference, grad, inputs, cotangents)[:3]


_relu = define(
    "poly_relu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    eager.poly_relu_forward,
    cuda.poly_relu_forward,
    lambda x, weight, bias: torch.empty_like(x),
)
_relu_backward = define(
    "poly_relu_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    eager.poly_relu_backward,
    cuda.poly_relu_backward,
    lambda grad, x, weight: (torch.empty_like(x), *_like_parameters(x, weight)),
)
register_derivative("poly_relu", _poly_relu_derivative, _poly_relu_save)
register_derivative("poly_relu_backward", _poly_relu_second, _poly_relu_backward_save)
fused_poly_relu = fused(_relu, _poly_relu_save, _poly_relu_derivative)


# zoo::poly_norm


def _poly_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, ctx.rms = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output[1])


def _poly_norm_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, stats = ctx.saved_tensors
    arguments = (grad.contiguous(), x, weight, stats, ctx.eps, ctx.rms)
    dx, dweight, dbias = first_derivative(_norm_backward, *arguments)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dx, dweight.to(weight.dtype), dbias, None, None


def _poly_norm_backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, x, weight, _, ctx.eps, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, weight)


def _poly_norm_second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, weight = ctx.saved_tensors

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return poly_norm_reference(x, weight, bias, eps=ctx.eps, rms=ctx.rms)

    inputs = (x, weight, weight.new_zeros((*weight.shape[:-1], 1)))
    # stats is a function of x, and differentiated as such: nothing flows to it.
    return *second_order(formula, grad, inputs, cotangents)[:3], None, None, None


def _poly_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return eager.poly_norm_backward(grad, x, weight, stats, rms)  # eps is in stats; the second derivative needs it


_norm = define(
    "poly_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool rms) -> (Tensor, Tensor)",
    eager.poly_norm_forward,
    cuda.poly_norm_forward,
    lambda x, weight, bias, eps, rms: (torch.empty_like(x), _row_stats(x, weight)),
)
_norm_backward = define(
    "poly_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor stats, float eps, bool rms)"
    " -> (Tensor, Tensor, Tensor)",
    _poly_norm_backward,
    cuda.poly_norm_backward,
    lambda grad, x, weight, stats, eps, rms: (torch.empty_like(x), *_like_parameters(x, weight)),
)
register_derivative("poly_norm", *with_statistics(_poly_norm_derivative, _poly_norm_save))
register_derivative("poly_norm_backward", _poly_norm_second, _poly_norm_backward_save)
fused_poly_norm = fused(_norm, _poly_norm_save, _poly_norm_derivative)


# zoo::poly_norm_mul


def _poly_norm_mul_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mul, weight, bias, scores, ctx.eps, ctx.rms, ctx.clamp = inputs
    ctx.save_for_backward(x, mul, weight, bias, scores, output[1])


def _poly_norm_mul_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mul, weight, bias, scores, stats = ctx.saved_tensors
    arguments = (grad.contiguous(), x, mul, weight, bias, scores, stats, ctx.eps, ctx.rms, ctx.clamp)
    dx, dmul, dweight, dbias, dscores = first_derivative(_norm_mul_backward, *arguments)
    dbias = None if bias is None else dbias.to(bias.dtype)
    dscores = None if scores is None else dscores.to(scores.dtype)
    return dx, dmul, dweight.to(weight.dtype), dbias, dscores, None, None, None


def _poly_norm_mul_backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.eps, ctx.rms, ctx.clamp = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _poly_norm_mul_second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, mul, weight, bias, scores = ctx.saved_tensors

    def formula(x: Tensor, mul: Tensor, weight: Tensor, bias: Tensor | None, scores: Tensor | None) -> Tensor:
        return poly_norm_mul_reference(x, mul, weight, bias, scores, eps=ctx.eps, rms=ctx.rms, clamp=ctx.clamp)

    return *second_order(formula, grad, (x, mul, weight, bias, scores), cotangents), None, None, None, None


def _poly_norm_mul_backward(
    grad: Tensor,
    x: Tensor,
    mul: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    stats: Tensor,
    eps: float,
    rms: bool,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return eager.poly_norm_mul_backward(grad, x, mul, weight, bias, scores, stats, rms, clamp)


_norm_mul = define(
    "poly_norm_mul(Tensor x, Tensor mul, Tensor weight, Tensor? bias, Tensor? scores, float eps, bool rms,"
    " float? clamp) -> (Tensor, Tensor)",
    eager.poly_norm_mul_forward,
    cuda.poly_norm_mul_forward,
    lambda x, mul, weight, bias, scores, eps, rms, clamp: (torch.empty_like(x), _row_stats(x, weight)),
)
_norm_mul_backward = define(
    "poly_norm_mul_backward(Tensor grad, Tensor x, Tensor mul, Tensor weight, Tensor? bias, Tensor? scores,"
    " Tensor stats, float eps, bool rms, float? clamp) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _poly_norm_mul_backward,
    cuda.poly_norm_mul_backward,
    lambda grad, x, mul, weight, bias, scores, stats, eps, rms, clamp: (
        torch.empty_like(x),
        torch.empty_like(mul),
        *_like_parameters(x, weight),
        x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype)),
    ),
)
register_derivative("poly_norm_mul", *with_statistics(_poly_norm_mul_derivative, _poly_norm_mul_save))
register_derivative("poly_norm_mul_backward", _poly_norm_mul_second, _poly_norm_mul_backward_save)
fused_poly_norm_mul = fused(_norm_mul, _poly_norm_mul_save, _poly_norm_mul_derivative)
