"""The ops `zoo::poly_relu`, `zoo::poly_norm`, `zoo::poly_norm_mul` and their backwards, with gradients of any order.

Three implementations keep one contract, written in `eager.py`: the closed forms there, on every device; the CPU library
(`cuda_kernels/polycom/cpu.cpp`), which registers itself when it is loaded; the kernels of `cuda.py`. The first
derivative is a second op, so that a kernel can serve it; the derivative of that one goes through the reference formula:
rare, so clarity beats speed.

Each op can be called in two ways. `torch.ops.zoo.poly_norm` has its gradient registered with torch.library, which is
what torch.compile wants. `fused_poly_norm` and its kin are the same op behind an autograd.Function: forward and
backward of a small tensor take 120 microseconds that way and 240 the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda, eager
from .reference import compute_dtype, poly_norm_mul_reference, poly_norm_reference, poly_relu_reference

_library = torch.library.Library("zoo", "FRAGMENT")


def _define(
    schema: str, implementation: Callable[..., Any], kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    # The schema is what the CPU library registers against, so it is written out; dispatch costs what @custom_op does.
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"zoo::{name}", fake, lib=_library)
    return getattr(torch.ops.zoo, name).default


def _derivative(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    torch.library.register_autograd(f"zoo::{name}", backward, setup_context=save, lib=_library)


def _first_derivative(op: Callable[..., Any], *arguments: Any) -> Any:
    """A backward op; past its own gradient, which costs as much again, unless somebody will ask for that."""
    if torch.is_grad_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # as torch.library itself does
        return op(*arguments)


def _fused(op: Callable[..., Any], save: Callable[..., None], derivative: Callable[..., Any]) -> Callable[..., Tensor]:
    """The op with the gradient it is registered with, as an autograd.Function that returns the first output."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            save(ctx, inputs, output)
            return output if isinstance(output, Tensor) else output[0]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return derivative(ctx, *grads)

    return Fused.apply


def _second_order(
    formula: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of sum(cotangents * first derivative of the formula) for grad and each input.

    In the compute dtype throughout. With create_graph the result hangs on the tensors it came from, so third
    derivatives follow.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        sources = [None if t is None else _source(t, create_graph) for t in (grad, *inputs)]
        dtype = compute_dtype(grad.dtype)
        cotangent, *arguments = [None if t is None else t.to(dtype) for t in sources]
        given = [t for t in arguments if t is not None]
        first = torch.autograd.grad(formula(*arguments), given, cotangent, create_graph=True)
        slots = iter(first)
        by_input = [None if t is None else next(slots) for t in arguments]
        pairs = [
            (d, c.to(d.dtype)) for d, c in zip(by_input, cotangents, strict=True) if d is not None and c is not None
        ]
        outputs, vectors = [d for d, _ in pairs], [c for _, c in pairs]
        wanted = [t for t in sources if t is not None]
        second = torch.autograd.grad(outputs, wanted, vectors, create_graph=create_graph, allow_unused=True)
    slots = iter(second)
    return tuple(None if t is None else next(slots) for t in sources)


def _source(t: Tensor, create_graph: bool) -> Tensor:
    return t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()


def _like_parameters(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of dweight and dbias."""
    dtype = compute_dtype(x.dtype)
    return x.new_empty(weight.shape, dtype=dtype), x.new_empty((*weight.shape[:-1], 1), dtype=dtype)


def _with_stats(
    derivative: Callable[..., Any], save: Callable[..., None]
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The pair for torch.library, where the row statistics are an output of their own without a gradient."""

    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return (None,) * ctx.inputs if grad is None else derivative(ctx, grad)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    return backward, setup


def _row_stats(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((weight.shape[-1] + 1, x.shape[0]), dtype=compute_dtype(x.dtype))


# zoo::poly_relu


def _poly_relu_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _poly_relu_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _first_derivative(_relu_backward, grad.contiguous(), x, weight)
    return dx, dweight.to(weight.dtype), None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)


def _poly_relu_backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _poly_relu_second(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, x, weight = ctx.saved_tensors
    inputs = (x, weight, weight.new_zeros(1))
    return _second_order(poly_relu_reference, grad, inputs, cotangents)[:3]


_relu = _define(
    "poly_relu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    eager.poly_relu_forward,
    cuda.poly_relu_forward,
    lambda x, weight, bias: torch.empty_like(x),
)
_relu_backward = _define(
    "poly_relu_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    eager.poly_relu_backward,
    cuda.poly_relu_backward,
    lambda grad, x, weight: (torch.empty_like(x), *_like_parameters(x, weight)),
)
_derivative("poly_relu", _poly_relu_derivative, _poly_relu_save)
_derivative("poly_relu_backward", _poly_relu_second, _poly_relu_backward_save)
fused_poly_relu = _fused(_relu, _poly_relu_save, _poly_relu_derivative)


# zoo::poly_norm


def _poly_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, ctx.rms = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output[1])


def _poly_norm_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, stats = ctx.saved_tensors
    arguments = (grad.contiguous(), x, weight, stats, ctx.eps, ctx.rms)
    dx, dweight, dbias = _first_derivative(_norm_backward, *arguments)
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
    return *_second_order(formula, grad, inputs, cotangents)[:3], None, None, None


def _poly_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return eager.poly_norm_backward(grad, x, weight, stats, rms)  # eps is in stats; the second derivative needs it


_norm = _define(
    "poly_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool rms) -> (Tensor, Tensor)",
    eager.poly_norm_forward,
    cuda.poly_norm_forward,
    lambda x, weight, bias, eps, rms: (torch.empty_like(x), _row_stats(x, weight)),
)
_norm_backward = _define(
    "poly_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor stats, float eps, bool rms)"
    " -> (Tensor, Tensor, Tensor)",
    _poly_norm_backward,
    cuda.poly_norm_backward,
    lambda grad, x, weight, stats, eps, rms: (torch.empty_like(x), *_like_parameters(x, weight)),
)
_derivative("poly_norm", *_with_stats(_poly_norm_derivative, _poly_norm_save))
_derivative("poly_norm_backward", _poly_norm_second, _poly_norm_backward_save)
fused_poly_norm = _fused(_norm, _poly_norm_save, _poly_norm_derivative)


# zoo::poly_norm_mul


def _poly_norm_mul_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mul, weight, bias, scores, ctx.eps, ctx.rms, ctx.clamp = inputs
    ctx.save_for_backward(x, mul, weight, bias, scores, output[1])


def _poly_norm_mul_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mul, weight, bias, scores, stats = ctx.saved_tensors
    arguments = (grad.contiguous(), x, mul, weight, bias, scores, stats, ctx.eps, ctx.rms, ctx.clamp)
    dx, dmul, dweight, dbias, dscores = _first_derivative(_norm_mul_backward, *arguments)
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

    return *_second_order(formula, grad, (x, mul, weight, bias, scores), cotangents), None, None, None, None


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


_norm_mul = _define(
    "poly_norm_mul(Tensor x, Tensor mul, Tensor weight, Tensor? bias, Tensor? scores, float eps, bool rms,"
    " float? clamp) -> (Tensor, Tensor)",
    eager.poly_norm_mul_forward,
    cuda.poly_norm_mul_forward,
    lambda x, mul, weight, bias, scores, eps, rms, clamp: (torch.empty_like(x), _row_stats(x, weight)),
)
_norm_mul_backward = _define(
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
_derivative("poly_norm_mul", *_with_stats(_poly_norm_mul_derivative, _poly_norm_mul_save))
_derivative("poly_norm_mul_backward", _poly_norm_mul_second, _poly_norm_mul_backward_save)
fused_poly_norm_mul = _fused(_norm_mul, _poly_norm_mul_save, _poly_norm_mul_derivative)
