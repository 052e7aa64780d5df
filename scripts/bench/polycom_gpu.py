"""PolyCom's part of `scripts/gpu_check.py`: every kernel against the float64 oracle, and against its rivals' times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from scripts.bench._gpu import Benchmark
from tests._numerics import assert_close
from tests.activations.polycom_baselines import official_poly_norm, oracle_poly_norm, oracle_poly_relu
from zoo.functional import poly_norm, poly_norm_mul, poly_relu
from zoo.kernels.sources import Unit, poly_norm_unit, poly_relu_unit

ORDERS = (1, 2, 3, 4, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Every variant, whole packs and ragged rows.
SHAPES = ((5, 3), (64, 200), (33, 1037), (17, 4096), (9, 9001), (5, 16384), (3, 40000), (0, 64))
# 4096 x 16384 and the narrow and wide ends; the last is where the best other kernel collapses.
BENCHMARK_SHAPES = ((16384, 1024), (2048, 8192), (4096, 8256), (4096, 16384), (2048, 32768))

Check = tuple[str, Callable[[], None]]


def units() -> list[Unit]:
    """What is compiled before anything is timed."""
    found = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for order in ORDERS:
            found += [poly_relu_unit(name, order), poly_norm_unit(name, order, False)]
        found.append(poly_norm_unit(name, 3, True))
    return found


def _tensors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


def _compare(function: Callable[..., Tensor], oracle: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    leaves = [t.detach().requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, expected = function(*leaves), oracle(*exact)
    # A gradient that goes along with y: of noise alone the coefficients' gradients would be sums that cancel.
    grad = (torch.randn_like(expected) + expected.detach() + 1).to(y.dtype)
    ours, wanted = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, exact, grad.double())
    for what, actual, exactly in zip(("y", *range(9)), (y, *ours), (expected, *wanted), strict=False):
        half = actual.dtype in (torch.bfloat16, torch.float16)
        try:
            # Coefficients' gradients are sums over thousands of summands that partly cancel.
            assert_close(actual, exactly, loose=1 if half or actual.ndim > 1 else 20)
        except AssertionError as error:
            raise AssertionError(f"{'y' if what == 'y' else f'gradient {what}'}: {error}") from None


def checks(device: torch.device) -> Iterator[Check]:
    """Name and test of every kernel at every shape; a test raises AssertionError."""
    for dtype in DTYPES:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        label = str(dtype).removeprefix("torch.")
        for shape in SHAPES:

            def plain(dtype=dtype, shape=shape, wide=wide) -> None:
                (x,) = _tensors(shape, dtype, device, 1)
                weight, bias = (
                    torch.tensor([0.3, 0.4, 0.3], device=device, dtype=wide),
                    x.new_full((1,), 0.1, dtype=wide),
                )
                _compare(poly_norm, oracle_poly_norm, [x, weight, bias])
                _compare(poly_relu, oracle_poly_relu, [x, weight, bias])

            def gated(dtype=dtype, shape=shape, wide=wide) -> None:
                x, mul = _tensors(shape, dtype, device, 2)
                weight, bias = (
                    torch.tensor([0.3, 0.4, 0.3], device=device, dtype=wide),
                    x.new_full((1,), 0.1, dtype=wide),
                )
                scores = torch.rand(shape[0], device=device, dtype=wide)
                _compare(
                    lambda x, mul, weight, bias, scores: poly_norm_mul(x, mul, weight, bias, scores=scores),
                    lambda x, mul, weight, bias, scores: oracle_poly_norm(x, weight, bias) * mul * scores[:, None],
                    [x, mul, weight, bias, scores],
                )

            yield f"poly_norm, poly_relu {list(shape)} {label}", plain
            yield f"poly_norm_mul {list(shape)} {label}", gated
        for order in ORDERS:

            def other(dtype=dtype, order=order, wide=wide) -> None:
                x = _tensors((33, 77), dtype, device, 1)[0] / 2  # its fifth power must fit float16
                weight = torch.full((order,), 0.3, device=device, dtype=wide)
                _compare(lambda x, w: poly_norm(x, w), lambda x, w: oracle_poly_norm(x, w, None), [x, weight])
                _compare(lambda x, w: poly_relu(x, w), lambda x, w: oracle_poly_relu(x, w, None), [x, weight])

            yield f"order {order} {label}", other

        def strided(dtype=dtype, wide=wide) -> None:
            (x,) = _tensors((2, 20, 5, 9), dtype, device, 1)
            weight = torch.tensor([0.3, 0.4, 0.3], device=device, dtype=wide)
            for view in (x.transpose(1, 3), x[:, ::2], x.to(memory_format=torch.channels_last)):
                _compare(
                    lambda x, w: poly_norm(x, w, dim=1),
                    lambda x, w: oracle_poly_norm(x, w, None, dim=1),
                    [view, weight],
                )

        yield f"strided {label}", strided

    def huge() -> None:
        width = 4099
        rows = 8 * (2**31 // width // 2 // 8 + 2)  # the last eight then begin where the first eight do in their packs
        if torch.cuda.mem_get_info(device)[0] < 6 * 2**31:
            return
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        weight = torch.tensor([0.3, 0.4, 0.3], device=device)
        for function in (poly_norm, poly_relu):
            assert torch.equal(function(x, weight)[-8:], function(x[-8:].clone(), weight))

    if device.type == "cuda":
        yield "beyond 2^31 bytes", huge


def _coefficients(device: torch.device) -> tuple[Tensor, Tensor]:
    weight = torch.tensor([0.3, 0.4, 0.3], device=device, dtype=torch.bfloat16, requires_grad=True)
    return weight, torch.zeros(1, device=device, dtype=torch.bfloat16, requires_grad=True)


def _liger() -> Callable[..., Tensor] | None:
    """Liger-Kernel's PolyNorm where it is installed, told not to write into the incoming gradient."""
    try:
        from liger_kernel.ops.poly_norm import LigerPolyNormFunction
    except ImportError:
        return None
    return lambda x, weight, bias: LigerPolyNormFunction.apply(x, weight, bias, 1e-6, False)


def _forward_of(function: Callable[..., Tensor]) -> Callable[[Any], object]:
    def call(inputs: Any) -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


def _backward_of(function: Callable[..., Tensor]) -> Callable[[Any], object]:
    """The graph of a set of inputs is made at its first call, before the clock starts."""
    graphs: dict[int, Tensor] = {}

    def call(inputs: Any) -> object:
        *leaves, grad = inputs
        if id(leaves[0]) not in graphs:
            graphs[id(leaves[0])] = function(*leaves)
        return torch.autograd.grad(graphs[id(leaves[0])], leaves, grad, retain_graph=True)

    return call


def benchmarks() -> Iterator[Benchmark]:
    """PolyNorm, its gated form and PolyReLU in bfloat16, forward and backward."""
    liger = _liger()
    missing = {} if liger else {"liger": "not installed"}
    for shape in BENCHMARK_SHAPES:
        size = 2 * shape[0] * shape[1]
        facts = {"shape": list(shape), "dtype": "bfloat16"}
        compiled = torch.compile(official_poly_norm, fullgraph=True, dynamic=False)
        norm = {"ours": poly_norm, "official": official_poly_norm, "official_compiled": compiled}
        if liger:
            norm["liger"] = liger

        def leaves(device: torch.device, shape=shape) -> tuple[Tensor, ...]:
            (x,) = _tensors(shape, torch.bfloat16, device, 1)
            return (x.requires_grad_(), *_coefficients(device))

        def with_grad(device: torch.device, shape=shape, leaves=leaves) -> tuple[Tensor, ...]:
            return (*leaves(device), *_tensors(shape, torch.bfloat16, device, 1))

        def gated(device: torch.device, shape=shape) -> tuple[Tensor, ...]:
            x, mul = _tensors(shape, torch.bfloat16, device, 2)
            return (x.requires_grad_(), mul.requires_grad_(), *_coefficients(device))

        def gated_with_grad(device: torch.device, shape=shape, gated=gated) -> tuple[Tensor, ...]:
            return (*gated(device), *_tensors(shape, torch.bfloat16, device, 1))

        forward = {name: _forward_of(function) for name, function in norm.items()}
        yield Benchmark("poly_norm forward", facts, 2 * size, leaves, forward, skipped=missing)
        backward = {name: _backward_of(function) for name, function in norm.items()}
        yield Benchmark("poly_norm backward", facts, 3 * size, with_grad, backward, skipped=missing)
        relu, product = {"ours": poly_relu}, {"ours": poly_norm_mul}
        yield Benchmark("poly_relu forward", facts, 2 * size, leaves, {k: _forward_of(f) for k, f in relu.items()})
        yield Benchmark("poly_relu backward", facts, 3 * size, with_grad, {k: _backward_of(f) for k, f in relu.items()})
        yield Benchmark(
            "poly_norm_mul forward", facts, 3 * size, gated, {k: _forward_of(f) for k, f in product.items()}
        )
        calls = {k: _backward_of(f) for k, f in product.items()}
        yield Benchmark("poly_norm_mul backward", facts, 5 * size, gated_with_grad, calls)
