"""PolyCom and PyTorch's machinery: op registration, compile, export, function transforms, memory, dispatch."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import zoo.functional
from tests._numerics import assert_close
from tests.activations.polycom_baselines import official_poly_norm
from tests.implementations import IMPLEMENTATIONS
from zoo.activations.polycom import PolyNorm, PolyNormGLU, PolyReLU
from zoo.functional import poly_norm, poly_norm_mul, poly_relu
from zoo.kernels import ops, use_cpu_library


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _op_arguments() -> dict[str, tuple[str, tuple[Any, ...]]]:
    x, grad, weight, bias, stats = _leaf(4, 5), _leaf(4, 5), _leaf(3), _leaf(1), torch.rand(4, 4)
    return {
        "poly_relu": ("poly_relu", (x, weight, bias)),
        "poly_relu_without_bias": ("poly_relu", (x, weight, None)),
        "poly_relu_backward": ("poly_relu_backward", (grad, x, weight)),
        "poly_norm": ("poly_norm", (x, weight, bias, 1e-6, True)),
        "poly_norm_l2_row_weights": ("poly_norm", (x, _leaf(4, 3), _leaf(4, 1), 1e-6, False)),
        "poly_norm_half": ("poly_norm", (x.detach().bfloat16(), weight, None, 1e-6, True)),
        "poly_norm_backward": ("poly_norm_backward", (grad, x, weight, stats, 1e-6, True)),
        "poly_norm_mul": ("poly_norm_mul", (x, _leaf(4, 5), weight, bias, _leaf(4), 1e-6, True, 1.0)),
        "poly_norm_mul_bare": ("poly_norm_mul", (x, _leaf(4, 5), weight, None, None, 1e-6, True, None)),
        "poly_norm_mul_backward": (
            "poly_norm_mul_backward",
            (grad, x, _leaf(4, 5), weight, bias, _leaf(4), stats, 1e-6, True, 1.0),
        ),
    }


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck looks at .grad itself
@pytest.mark.parametrize("case", list(_op_arguments()))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:3] + IMPLEMENTATIONS[-2:], indirect=True)
@pytest.mark.usefixtures("implementation")
def test_opcheck(case: str) -> None:
    name, arguments = _op_arguments()[case]
    torch.library.opcheck(getattr(torch.ops.zoo, name).default, arguments)


def _saved_bytes(function: Any, *inputs: Tensor) -> int:
    """Distinct storage kept for the backward, parameters left out."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_little_more_than_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(64, 4096).to(dtype).requires_grad_()
    weight, bias = _leaf(3), _leaf(1)
    size = x.untyped_storage().nbytes()
    assert _saved_bytes(poly_norm, x, weight, bias) <= 1.01 * size
    assert _saved_bytes(poly_relu, x, weight, bias) <= 1.01 * size
    assert _saved_bytes(official_poly_norm, x, weight, bias) > 5 * size
    mul = torch.randn(64, 4096).to(dtype).requires_grad_()
    assert _saved_bytes(poly_norm_mul, x, mul, weight, bias) <= 2 * 1.01 * size


def test_ten_row_counts_cost_one_recompilation() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = PolyNorm()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for rows in range(3, 13):
        x = torch.randn(rows, 16, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert_close(y, module(x))
    assert counter.frame_count <= 2


def test_compiled_path_has_the_behaviours_of_the_eager_one() -> None:
    torch.compiler.reset()
    compiled = torch.compile(poly_norm, fullgraph=True, backend="aot_eager")
    x, weight, bias = torch.randn(5, 16), torch.randn(3), torch.randn(1)
    x[1] *= 1e30
    x[2, 3], x[3, 3] = float("inf"), float("nan")
    torch.testing.assert_close(compiled(x, weight, bias), poly_norm(x, weight, bias), equal_nan=True)


def test_second_derivative_of_a_compiled_region_raises() -> None:
    """PyTorch's limit, documented in the package: it must not be silently wrong."""
    torch.compiler.reset()
    compiled = torch.compile(PolyNorm(), backend="aot_eager")
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.square().sum().backward()


@pytest.mark.parametrize(("mode", "called"), [("auto", True), ("off", False)])
@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@pytest.mark.usefixtures("implementation")
def test_compiled_code_calls_the_kernel_where_there_is_one(
    mode: str, called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One opaque call instead of a graph that inductor fuses half as well; elementwise PolyReLU stays in the graph."""
    monkeypatch.setenv("ZOO_KERNELS", mode)
    monkeypatch.setattr(ops, "use_cpu_library", use_cpu_library.__wrapped__)  # without its memory
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if "zoo" in str(node.target))
        return graph

    x, weight = torch.randn(3, 8), torch.randn(3)
    for function, name in (
        (lambda: poly_norm(x, weight), "poly_norm"),
        (lambda: poly_norm_mul(x, x, weight), "poly_norm_mul"),
        (lambda: poly_relu(x, weight), None),
    ):
        torch.compiler.reset()
        seen.clear()
        assert_close(torch.compile(function, backend=backend, fullgraph=True)(), function())
        assert bool(seen) == bool(called and name)
        assert all(f"zoo.{name}" in target or f"zoo::{name}" in target for target in seen)


@pytest.mark.slow
def test_inductor_agrees_with_eager(require_cpp_compiler: None) -> None:
    torch.compiler.reset()
    module = PolyNorm()
    compiled = torch.compile(module, fullgraph=True)
    x, grad = torch.randn(7, 100), torch.randn(7, 100)
    x[0] *= 1e20
    results = []
    for function in (module, compiled):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, *module.parameters()), grad)))
    for actual, expected in zip(*reversed(results), strict=True):
        assert_close(actual, expected, loose=2)


@pytest.fixture
def require_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"inductor needs a C++ compiler: {error}")


@pytest.mark.parametrize("module", [PolyNorm(backend="eager"), PolyNorm(), PolyReLU(), PolyNormGLU()], ids=str)
def test_export_holds_only_core_ops(module: torch.nn.Module) -> None:
    x = torch.randn(3, 8)
    arguments = (x, torch.randn(3, 8)) if isinstance(module, PolyNormGLU) else (x,)
    program = torch.export.export(module, arguments)
    assert not any("zoo" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(*arguments), module(*arguments))


def test_eager_backend_calls_no_custom_op() -> None:
    called: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(3, 8)
    with Recorder():
        PolyNorm(backend="eager")(x)
        PolyReLU(backend="eager")(x)
    assert called
    assert not [name for name in called if "zoo" in name]
    with Recorder():
        PolyNorm()(x)
    assert "zoo.poly_norm.default" in called


def test_per_sample_gradients() -> None:
    """vmap over grad, with the parameters shared."""
    module = PolyNorm(dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (row,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(module(row).square().sum(), list(module.parameters()))
        for (name, _), wanted in zip(module.named_parameters(), expected, strict=True):
            assert_close(per_sample[name][i], wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, when forward mode is first used
def test_jacobians_of_both_modes_agree() -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    weight, bias = torch.randn(3, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    reverse = torch.func.jacrev(poly_norm)(x, weight, bias)
    assert_close(torch.func.jacfwd(poly_norm)(x, weight, bias), reverse)
    leaf = x.clone()
    assert_close(torch.autograd.functional.jacobian(lambda t: poly_norm(t, weight, bias), leaf), reverse)


def test_inference_mode_and_no_grad() -> None:
    x, module = torch.randn(3, 8), PolyNorm()
    with torch.inference_mode():
        inferred = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), inferred)
    assert torch.equal(module(x), inferred)


def test_frozen_coefficients_and_frozen_input() -> None:
    x, module = torch.randn(3, 8), PolyNorm()
    module(x).sum().backward()
    assert module.weight.grad is not None
    module.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", zoo.functional.__all__)
def test_functional_docstring_example_runs(name: str) -> None:
    function = getattr(zoo.functional, name)
    names = {**vars(zoo.functional), "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
