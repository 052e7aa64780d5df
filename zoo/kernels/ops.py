"""What ops of every family share: how one is defined, its gradients of any order, and when a formula runs instead.

An op has one contract and three implementations that keep it: a closed form in PyTorch, on every device; the CPU
library, which registers itself when it is loaded; the host code of the CUDA kernels. The first derivative is a second
op, so that a kernel can serve it; the derivative of that one goes through the family's formula: rare, so clarity beats
speed.

An op can be called in two ways. `torch.ops.zoo.<name>` has its gradient registered with torch.library, which is what
torch.compile wants. What :func:`fused` makes is the same op behind an autograd.Function: forward and backward of a
small tensor take 120 microseconds that way and 240 the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import settings
from .cpu import use_cpu_library

_library = torch.library.Library("zoo", "FRAGMENT")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic for inputs of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def define(
    schema: str, implementation: Callable[..., Any], kernel: Callable[..., Any] | None, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define an op of the namespace `zoo`.

    Args:
        schema: the CPU library registers against it, so it is written out; dispatch costs what @custom_op does.
        implementation: on every device that has no other.
        kernel: on CUDA; None for an op composed of others.
        fake: shapes and dtypes of the results.

    Returns:
        The op, to be called.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    if kernel is not None:
        _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"zoo::{name}", fake, lib=_library)
    return getattr(torch.ops.zoo, name).default


def register_derivative(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Give `zoo::<name>` its gradient: what `torch.library.register_autograd` takes."""
    torch.library.register_autograd(f"zoo::{name}", backward, setup_context=save, lib=_library)


def first_derivative(op: Callable[..., Any], *arguments: Any) -> Any:
    """Call a backward op; past its own gradient, which costs as much again, unless somebody will ask for that."""
    if torch.is_grad_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # as torch.library itself does
        return op(*arguments)


def fused(
    op: Callable[..., Any], save: Callable[..., None], derivative: Callable[..., Any], outputs: int = 1
) -> Callable[..., Any]:
    """The op with the gradient it is registered with, as an autograd.Function.

    Args:
        op: what :func:`define` returned.
        save: `(ctx, inputs, output)`.
        derivative: `(ctx, grad of the first output)`.
        outputs: how many of the op's outputs to return; those after the first have no gradient.
    """

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            save(ctx, inputs, output)
            if isinstance(output, Tensor):
                return output
            if outputs == 1:
                return output[0]
            ctx.mark_non_differentiable(*output[1:outputs])
            return tuple(output[:outputs])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return derivative(ctx, grads[0])

    return Fused.apply


def with_statistics(
    derivative: Callable[..., Any], save: Callable[..., None], *more: int
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The pair for :func:`register_derivative` where outputs after the first are statistics without a gradient.

    Args:
        derivative: as for :func:`fused`.
        save: as for :func:`fused`.
        more: which outputs are statistics; by default the second.
    """

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return (None,) * ctx.inputs if grad is None else derivative(ctx, grad)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(*(output[i] for i in more or (1,)))
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    return backward, setup


def second_order(
    formula: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of sum(cotangents * first derivative of the formula) for grad and each input.

    In the compute dtype throughout. With create_graph the result hangs on the tensors it came from, so third
    derivatives follow.

    Args:
        formula: differentiable function of the inputs.
        grad: the incoming gradient of the first derivative.
        inputs: None where the formula takes None.
        cotangents: one an input, None where nothing comes in.
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


def prefers_formula(op: str, backend: str, device: str) -> bool:
    """Whether the differentiable formula runs instead of the op.

    functorch can batch and differentiate it in every mode, torch.export gets operators of PyTorch alone, and inductor
    fuses it where there is no kernel of ours to call.

    Raises:
        ValueError: if there is no such backend.
    """
    if backend not in ("auto", "eager"):
        raise ValueError(f"{op}: backend must be 'auto' or 'eager', got {backend!r}")
    if backend == "eager":
        return True
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or not _compiled_code_calls_kernels(device)
    return transformed()


def transformed() -> bool:
    """Whether a function transform or forward-mode differentiation is going on."""
    # neither has a public question of this kind; autograd.Function asks functorch the same way
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _compiled_code_calls_kernels(device: str) -> bool:
    """Whether ours is worth an op that inductor cannot look into: on the CPU it is several times faster."""
    if device == "cuda":
        return settings.kernel_mode() != "off"
    return device == "cpu" and use_cpu_library()


def _load_cpu_library() -> bool:
    return use_cpu_library()


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second.
_compiled_code_calls_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
_load_cpu_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd inside of an op: the dispatcher has left it out by the time that an implementation runs."""
    autograd = torch._C.DispatchKey.AutogradFunctionality  # there is no public way
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        yield


def full_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Within it autocast changes no dtype on a device of that type."""
    if not torch.amp.is_autocast_available(device):  # as on meta
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def prepare(x: Tensor) -> None:
    """Load the CPU library before its ops are called for the first time; CUDA kernels are loaded one by one."""
    if x.device.type == "cpu":
        _load_cpu_library()
