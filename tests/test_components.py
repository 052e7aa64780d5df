"""The battery: what every row of the catalog must do, whatever it computes. Cases are in `cases.py`."""

from __future__ import annotations

import copy
import doctest
import functools
import inspect
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests._numerics import assert_close
from tests.cases import CASES, Case
from zoo.catalog import COMPONENTS, Component
from zoo.kernels.ops import compute_dtype

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_row = pytest.mark.parametrize("row", COMPONENTS, ids=lambda row: f"{row.kind}-{row.name}")
FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _row(case: Case) -> Component:
    return zoo.info(case.kind, case.name)  # type: ignore[arg-type]


def _module(case: Case, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    """The case's module with parameters off their start values, so that no gradient is zero by symmetry."""
    module = case.build(dtype=dtype, **more)
    generator = torch.Generator().manual_seed(10)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.1 * noise).to(parameter)
    return module


def _differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]


def _cotangent(y: Tensor) -> Tensor:
    """Eighths between -1/2 and 1: the same numbers in every dtype, and no sum that vanishes."""
    return ((torch.arange(y.numel()) % 13 - 4) / 8).view(y.shape).to(y.dtype)


def _gradients(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of its weighted sum for all float arguments and parameters."""
    arguments = _differentiable(tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments))
    y = module(*arguments)
    return y, list(torch.autograd.grad(y, [*_tensors(arguments), *module.parameters()], _cotangent(y)))


@every_row
def test_every_row_has_a_case(row: Component) -> None:
    if "adversarial" in row.tags or row.kind in ("explainer", "metric"):
        return  # called with a model: see tests/losses/test_adversarial.py, tests/explain and tests/metrics
    if row.kind == "renderer":
        return  # called with cameras, and gives a dictionary: see tests/splat
    assert any((case.kind, case.name) == (row.kind, row.name) for case in CASES)


def test_every_case_has_a_row() -> None:
    rows = {(row.kind, row.name) for row in COMPONENTS}
    assert {(case.kind, case.name) for case in CASES} <= rows


@every_case
def test_output_has_the_stated_shape_and_the_dtype_of_the_input(case: Case) -> None:
    for name in _row(case).dtypes:
        dtype = FLOATS[name]
        y = case.build(dtype=dtype)(*case.arguments(dtype))
        assert y.shape == case.output
        assert y.dtype is (compute_dtype(dtype) if case.kind == "loss" else dtype)


@every_case
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_low_precision_agrees_with_float64(case: Case, name: str) -> None:
    if name not in _row(case).dtypes:
        pytest.skip(f"{name} is not among the row's dtypes")
    dtype = FLOATS[name]
    module, arguments = _module(case, dtype), case.arguments(dtype)
    exact = copy.deepcopy(module).double()
    y, gradients = _gradients(module, arguments)
    expected, expected_gradients = _gradients(
        exact, tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    )
    assert_close(y, expected, like=dtype, loose=case.loose)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, wanted, loose=case.loose)


@every_case
def test_autocast_changes_no_more_than_precision(case: Case) -> None:
    module, arguments = _module(case, torch.float32), case.arguments(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(*arguments)
    assert_close(y, module(*arguments), like=torch.bfloat16, loose=2 * case.loose)


@every_case
def test_layout_of_the_inputs_does_not_matter(case: Case) -> None:
    module, arguments = _module(case), case.arguments()
    expected, expected_gradients = _gradients(module, arguments)

    def scattered(a: Any) -> Any:
        """The same numbers at every other place of a transposed buffer."""
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        buffer = a.new_zeros((*reversed(a.shape), 2))
        view = buffer[..., 1].permute(*reversed(range(a.ndim)))
        return view.copy_(a)

    strange = _differentiable(tuple(scattered(a) for a in arguments))
    assert not strange[0].is_contiguous()
    y = module(*strange)
    assert_close(y, expected)
    for g, wanted in zip(
        torch.autograd.grad(y, [*_tensors(strange), *module.parameters()], _cotangent(y)),
        expected_gradients,
        strict=True,
    ):
        assert_close(g, wanted)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.output) == 4], ids=str)
def test_channels_last_stays_channels_last(case: Case) -> None:
    module, arguments = _module(case), case.arguments()
    y = module(*(a.to(memory_format=torch.channels_last) if a.ndim == 4 else a for a in arguments))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, module(*arguments))
    assert module(*arguments).is_contiguous()


@pytest.mark.parametrize("case", [case for case in CASES if case.empty is not None], ids=str)
def test_empty_batch_gives_an_empty_result_and_zero_gradients(case: Case) -> None:
    module, arguments = _module(case), _differentiable(case.arguments(make=case.empty))
    y = module(*arguments)
    assert y.shape == arguments[0].shape
    y.sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def _function_of_everything(case: Case) -> tuple[Any, list[Tensor]]:
    """Forward as a function of its float arguments and parameters, and their values."""
    module, arguments = _module(case), case.arguments()
    names = [name for name, _ in module.named_parameters()]
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point()]

    def function(*values: Tensor) -> Tensor:
        filled = list(arguments)
        for place, value in zip(places, values, strict=False):
            filled[place] = value
        parameters = dict(zip(names, values[len(places) :], strict=True))
        return torch.func.functional_call(module, parameters, tuple(filled))

    values = [*_tensors(arguments), *(p.detach() for p in module.parameters())]
    return function, [v.clone().requires_grad_() for v in values]


@pytest.mark.parametrize("case", [case for case in CASES if _row(case).grad_order >= 1], ids=str)
def test_first_derivative(case: Case) -> None:
    function, values = _function_of_everything(case)
    assert torch.autograd.gradcheck(function, values, fast_mode=False)


@pytest.mark.parametrize("case", [case for case in CASES if _row(case).grad_order >= 2], ids=str)
def test_second_derivative(case: Case) -> None:
    function, values = _function_of_everything(case)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@every_case
def test_arguments_and_incoming_gradient_are_left_alone(case: Case) -> None:
    module, arguments = _module(case), _differentiable(case.arguments())
    before = [a.detach().clone() for a in _tensors(arguments)]
    y = module(*arguments)
    grad = torch.ones_like(y)
    torch.autograd.grad(y, _tensors(arguments), grad)
    assert torch.equal(grad, torch.ones_like(y))
    for a, wanted in zip(_tensors(arguments), before, strict=True):
        assert torch.equal(a, wanted)


@every_case
def test_two_calls_give_the_same_bits(case: Case) -> None:
    module, arguments = _module(case, torch.float32), case.arguments(torch.float32)
    (y, gradients), (again, gradients_again) = (_gradients(module, arguments) for _ in range(2))
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


@every_case
def test_state_dict_has_the_golden_keys_and_shapes(case: Case) -> None:
    assert {key: tuple(value.shape) for key, value in case.build().state_dict().items()} == case.state


@every_case
def test_state_dict_round_trip(case: Case) -> None:
    module, fresh = _module(case), case.build(dtype=torch.float64)
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(fresh(*case.arguments()), module(*case.arguments()))


@every_case
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(case: Case, copier: Any) -> None:
    module = _module(case)
    twin = copier(module)
    assert torch.equal(twin(*case.arguments()), module(*case.arguments()))
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.add_(1)
    for value, other in zip(twin.state_dict().values(), module.state_dict().values(), strict=True):
        assert not torch.equal(value, other)


@every_case
def test_compiles_without_a_graph_break(case: Case) -> None:
    torch.compiler.reset()
    module, arguments = _module(case), case.arguments()
    expected, expected_gradients = _gradients(module, arguments)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = _differentiable(arguments)
    y = compiled(*arguments)
    gradients = torch.autograd.grad(y, [*_tensors(arguments), *module.parameters()], _cotangent(y))
    assert_close(y, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("case", [case for case in CASES if case.vmap], ids=str)
def test_vmap_over_the_batch(case: Case) -> None:
    module, arguments = _module(case), case.arguments()
    shift = (
        1 if case.kwargs.get("dim", -1) > 0 else 0
    )  # an axis counted from the left moves when the first is mapped away
    inner = copy.deepcopy(module)
    if shift:
        inner.dim -= 1
    assert_close(torch.func.vmap(inner)(*arguments), module(*arguments))


@pytest.mark.parametrize("case", [case for case in CASES if case.placed], ids=str)
def test_factory_arguments_place_every_parameter(case: Case) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert {p.dtype for p in case.build(device="cpu", dtype=dtype).parameters()} == {dtype}
    meta = case.build(device="meta", dtype=torch.float32)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    arguments = [
        a.to("meta") if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.arguments(torch.float32)
    ]
    if all(not isinstance(a, Tensor) or a.is_meta for a in arguments):
        assert meta(*arguments).shape == case.output


@every_case
def test_meta_module_is_filled_by_reset_parameters(case: Case) -> None:
    """The way large models are built: shapes first, memory and start values later."""
    module = case.build(device="meta").to_empty(device="cpu")
    expected = case.build()
    for part, wanted in zip(module.modules(), expected.modules(), strict=True):
        if hasattr(part, "reset_parameters"):
            torch.manual_seed(0)
            part.reset_parameters()
            torch.manual_seed(0)
            wanted.reset_parameters()
    for key, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


@every_case
def test_repr_names_the_class(case: Case) -> None:
    module = case.build()
    assert repr(module).startswith(type(module).__name__ + "(")


@every_case
def test_misspelt_argument_is_refused(case: Case) -> None:
    with pytest.raises(zoo.ComponentArgumentError, match="no argument 'no_such_thing'"):
        case.build(no_such_thing=1)


@functools.cache
def _documented(row: Component) -> type[nn.Module]:
    return zoo.get(row.kind, row.name)


@every_row
def test_docstring_example_runs(row: Component) -> None:
    cls = _documented(row)
    names = {**vars(sys.modules[cls.__module__]), "torch": torch, "zoo": zoo}
    (example,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__, globs=names)
    assert example.examples, "the docstring has no example"
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0


@every_row
def test_docstring_names_its_source_and_shapes(row: Component) -> None:
    text = inspect.getdoc(_documented(row)) or ""
    assert "Shape:" in text
    assert ("Source:" in text) == (row.paper is not None)


@every_row
def test_every_constructor_argument_is_documented(row: Component) -> None:
    cls = _documented(row)
    if cls.__init__ is not cls.__mro__[1].__init__:  # a constructor of its own, not an inherited one
        text = inspect.getdoc(cls) or ""
        missing = [name for name in inspect.signature(cls).parameters if f"{name}:" not in text]
        assert not missing
