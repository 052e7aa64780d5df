"""evonorm_s and evonorm_b on every implementation, against the paper's formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close, rms_ratio
from tests.implementations import IMPLEMENTATIONS
from tests.norms.evonorm_baselines import oracle_b, oracle_s
from zoo.functional import evonorm_b, evonorm_s

F64 = torch.float64
# One schedule of the emulator is enough here: tests/kernels looks for barriers in all of them.
OTHER_SCHEDULES = ("emulated_ascending", "emulated_descending")
pytestmark = [
    pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i not in OTHER_SCHEDULES], indirect=True),
    pytest.mark.usefixtures("implementation"),
]

Layer = Callable[..., Tensor]

# groups are the most divisors not above 32 that the authors' code would take, or fewer
SHAPES = {
    "maps": ((2, 8, 5, 7), 4),
    "odd_maps": ((2, 24, 9, 9), 24),
    "many_channels": ((2, 144, 3, 2), 24),
    "long": ((1, 40, 11, 13), 20),
    "large_maps": ((1, 4, 41, 41), 2),
    "one_sample_one_group": ((1, 6, 4, 4), 1),
    "one_pixel": ((3, 8, 1, 1), 2),
    "rows": ((5, 6), 2),
    "sequence": ((2, 6, 33), 3),
    "volume": ((2, 4, 3, 2, 5), 2),
}


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    x = (2 * torch.randn(shape) + 0.5).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    return x


def _parameters(channels: int, dtype: torch.dtype, samples: int | None = None) -> list[Tensor]:
    """v, weight, bias off their start values, the last two for each sample if there is a number of them."""
    shape = (channels,) if samples is None else (samples, channels)
    v, weight, bias = torch.randn(channels), 1 + torch.randn(shape) / 4, torch.randn(shape)
    return [t.to(torch.float64 if dtype is F64 else torch.float32) for t in (v, weight, bias)]


def _compare(ours: Layer, oracle: Layer, leaves: list[Tensor], *, loose: float = 1.0) -> None:
    """Outputs and gradients. Gradients go along with x, or sums over a channel would cancel."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, expected = ours(*leaves), oracle(*exact)
    grad = (torch.randn_like(expected) + 1 + expected.detach()).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for layout in (torch.contiguous_format, torch.channels_last) if y.ndim == 4 else ():
        assert y.is_contiguous(memory_format=layout) == leaves[0].is_contiguous(memory_format=layout)
    for name, actual, exactly in zip(("y", "dx", *"pqr"), (y, *gradients), (expected, *wanted), strict=False):
        try:
            assert_close(actual, exactly, loose=loose)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def _s_case(variant: str, groups: int, eps: float = 1e-3) -> tuple[Layer, Layer, bool]:
    """Ours and the oracle as functions of x, (v), weight, bias; whether there is a v."""
    if variant == "s0":
        return (
            lambda x, v, w, b: evonorm_s(x, v, w, b, groups, eps),
            lambda x, v, w, b: oracle_s(x, v, w, b, groups, eps=eps),
            True,
        )
    rms, linear = variant[:2] == "s2", variant.endswith("linear")
    moment, act = "rms" if rms else "var", "none" if linear else "silu"
    return (
        lambda x, w, b: evonorm_s(x, None, w, b, groups, eps, moment=moment, act=act),
        lambda x, w, b: oracle_s(x, None, w, b, groups, eps=eps, rms=rms, linear=linear),
        False,
    )


def _b_case(variant: str, running_var: Tensor | None, eps: float = 1e-3) -> tuple[Layer, Layer, bool]:
    training, exact = running_var is None, None if running_var is None else running_var.double()
    if variant == "b0":
        return (
            lambda x, v, w, b: evonorm_b(x, v, w, b, running_var, training, eps=eps),
            lambda x, v, w, b: oracle_b(x, v, w, b, exact, eps=eps),
            True,
        )
    return (
        lambda x, w, b: evonorm_b(x, None, w, b, running_var, training, eps=eps, variant=variant),
        lambda x, w, b: oracle_b(x, None, w, b, exact, eps=eps, variant=variant),
        False,
    )


@pytest.mark.parametrize("variant", ["s0", "s1", "s2", "s0_linear", "s2_linear"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_s_layers_are_the_formula(variant: str, name: str) -> None:
    torch.manual_seed(0)
    shape, groups = SHAPES[name]
    ours, oracle, has_v = _s_case(variant, groups)
    parameters = _parameters(shape[1], F64)
    _compare(ours, oracle, [_leaf(shape, F64), *parameters[0 if has_v else 1 :]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["b0", "b1", "b2"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_b_layers_are_the_formula(variant: str, name: str, training: bool) -> None:
    torch.manual_seed(0)
    shape, _ = SHAPES[name]
    ours, oracle, has_v = _b_case(variant, None if training else 1 + torch.rand(shape[1], dtype=F64))
    parameters = _parameters(shape[1], F64)
    _compare(ours, oracle, [_leaf(shape, F64), *parameters[0 if has_v else 1 :]])


@pytest.mark.parametrize("name", ["maps", "odd_maps", "many_channels", "long", "large_maps", "one_pixel"])
def test_channels_last(name: str) -> None:
    torch.manual_seed(0)
    shape, groups = SHAPES[name]
    x, parameters = _leaf(shape, F64, "channels_last"), _parameters(shape[1], F64)
    for case in (_s_case("s0", groups), _s_case("s2", groups), *(_b_case(f"b{i}", None) for i in range(3))):
        ours, oracle, has_v = case
        _compare(ours, oracle, [x, *parameters[0 if has_v else 1 :]])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_once(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    for name in ("odd_maps", "long"):
        shape, groups = SHAPES[name]
        x, parameters = _leaf(shape, dtype, layout), _parameters(shape[1], dtype)
        # The emulator compiles a source for each dtype and B layer: the others share their code with these.
        layers = {torch.float32: ("b0", "b1", "b2"), torch.bfloat16: ("b0",), torch.float16: ()}[dtype]
        for ours, oracle, has_v in (_s_case("s0", groups), *(_b_case(layer, None) for layer in layers)):
            _compare(ours, oracle, [x, *parameters[0 if has_v else 1 :]])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_scale_and_shift_of_each_sample(layout: str) -> None:
    torch.manual_seed(0)
    for name in ("maps", "large_maps"):
        shape, groups = SHAPES[name]
        x, parameters = _leaf(shape, F64, layout), _parameters(shape[1], F64, samples=shape[0])
        for ours, oracle, has_v in (_s_case("s0", groups), _b_case("b0", None), _b_case("b1", None)):
            _compare(ours, oracle, [x, *parameters[0 if has_v else 1 :]])


def test_one_of_scale_and_shift_for_each_sample() -> None:
    torch.manual_seed(0)
    (samples, channels, *space), groups = SHAPES["maps"]
    x = _leaf((samples, channels, *space), F64)
    v, weight, bias = _parameters(channels, F64)
    _, own_weight, own_bias = _parameters(channels, F64, samples=samples)
    ours, oracle, _ = _s_case("s0", groups)
    _compare(ours, oracle, [x, v, own_weight, bias])
    _compare(ours, oracle, [x, v, weight, own_bias])


def test_absent_parameters() -> None:
    torch.manual_seed(0)
    x = _leaf((2, 6, 3, 3), F64)
    _compare(lambda x: evonorm_s(x, None, None, None, 3, act="silu"), lambda x: oracle_s(x, None, None, None, 3), [x])
    _compare(
        lambda x, b: evonorm_s(x, None, None, b, 3, act="silu"),
        lambda x, b: oracle_s(x, None, None, b, 3),
        [x, torch.randn(2, 6, dtype=F64)],
    )
    for variant in ("b0", "b1", "b2"):
        _compare(
            lambda x, variant=variant: evonorm_b(x, None, None, None, None, True, variant=variant),
            lambda x, variant=variant: oracle_b(x, None, None, None, None, variant=variant),
            [x],
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_of_ten_thousand_costs_no_digits_of_the_deviation(layout: str) -> None:
    """E[x^2] - E[x]^2 gives 0 to 24 instead of 1 here."""
    torch.manual_seed(0)
    x = (1e4 + torch.randn(2, 8, 16, 16)).to(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    y = evonorm_s(x, None, None, None, 2, act="none")
    assert rms_ratio(y, oracle_s(x.double(), None, None, None, 2, linear=True)) < 1e-4
    running_var = torch.ones(8)
    evonorm_b(x, None, None, None, running_var, True, momentum=1.0)
    assert rms_ratio(running_var, x.double().var((0, 2, 3), correction=0)) < 1e-4


@pytest.mark.parametrize("unbiased", [False, True])
def test_running_variance_moves_as_specified(unbiased: bool) -> None:
    torch.manual_seed(0)
    x = _leaf((3, 4, 2, 3), F64)
    start = torch.rand(4, dtype=F64)
    running_var = start.clone()
    evonorm_b(x, None, None, None, running_var, True, 0.25, variant="b2", unbiased_running_var=unbiased)
    target = x.var((0, 2, 3), correction=int(unbiased))
    assert_close(running_var, 0.75 * start + 0.25 * target)
    before = running_var.clone()
    evonorm_b(x, None, None, None, running_var, False, 0.25, variant="b2")
    assert torch.equal(running_var, before)


def test_an_empty_batch_leaves_the_running_variance_alone() -> None:
    running_var = torch.full((4,), 0.5)
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        x = torch.zeros(shape, requires_grad=True)
        y = evonorm_b(x, torch.ones(4), None, None, running_var, True)
        assert y.shape == shape
        y.sum().backward()
    assert torch.equal(running_var, torch.full((4,), 0.5))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_what_is_empty_adds_nothing_to_gradients(shape: tuple[int, ...], implementation: str) -> None:
    parameters = [torch.ones(4).requires_grad_() for _ in range(3)]
    x = torch.zeros(shape, requires_grad=True)
    for y in (evonorm_s(x, *parameters, 2), evonorm_b(x, *parameters, None, True)):
        assert y.shape == shape
        for gradient in torch.autograd.grad(y.sum(), parameters):
            assert torch.equal(gradient, torch.zeros(4)), implementation


@pytest.mark.parametrize("training", [True, False])
def test_equal_sides_of_the_maximum_share_the_gradient(training: bool) -> None:
    """torch.maximum gives each side half, and so does the formula. All numbers here are exact."""
    one = torch.ones(1, dtype=F64)
    # With v = 0 both sides of B0 are 1 for x = -1, 1; both of B1 are 2 for x = 1, of B2 for x = -1.
    cases = (
        [("b0", [-1.0, 1.0], 1.0)] if training else [("b0", [-1.0, 1.0], 1.0), ("b1", [1.0], 4.0), ("b2", [-1.0], 4.0)]
    )
    for variant, values, variance in cases:
        ours, oracle, has_v = _b_case(variant, None if training else variance * one, eps=0.0)
        x = torch.tensor([[values]], dtype=F64).requires_grad_()
        v, weight, bias = ((number * one).requires_grad_() for number in (0.0, 2.0, 3.0))
        leaves = [x, *((v,) if has_v else ()), weight, bias]
        grad = torch.tensor([[[1.0, 3.0][: len(values)]]], dtype=F64)
        actual = torch.autograd.grad(ours(*leaves), leaves, grad)
        wanted = torch.autograd.grad(oracle(*leaves), leaves, grad)
        for mine, exactly in zip(actual, wanted, strict=True):
            assert_close(mine, exactly)


def test_sums_of_a_plane_do_not_reach_beyond_it() -> None:
    """Of three elements the last vector is not whole. With eps = 0 the maximum is 0 where nothing is."""
    x = torch.full((2, 2, 3), 2.0, dtype=F64)
    parameters = [torch.full((2,), number, dtype=F64).requires_grad_() for number in (1.0, 2.0, 3.0)]
    running_var = torch.zeros(2, dtype=F64)
    grad = torch.arange(1.0, 13.0, dtype=F64).view(2, 2, 3)
    actual = torch.autograd.grad(evonorm_b(x, *parameters, running_var, False, eps=0.0), parameters, grad)
    wanted = torch.autograd.grad(oracle_b(x, *parameters, running_var, eps=0.0), parameters, grad)
    for ours, exactly in zip(actual, wanted, strict=True):
        assert_close(ours, exactly)


def test_nan_stays_where_it_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 3, 3)
    x[1, 2, 0, 0] = float("nan")
    y = evonorm_s(x, torch.ones(4), None, None, 2)
    assert y[1, 2:].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert y[1, :2].isfinite().all()
    y = evonorm_b(x, torch.ones(4), None, None, None, True)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3]].isfinite().all()
    y = evonorm_b(x, torch.ones(4), None, None, torch.ones(4), False)
    assert y[1, 2].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_one_value_a_channel_is_finite() -> None:
    x = torch.randn(1, 4, 1, 1, requires_grad=True)
    y = evonorm_b(x, torch.ones(4), None, None, None, True)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_large_gates_do_not_overflow() -> None:
    x = torch.tensor([[[-1e30, -100.0, 100.0, 1e30]]])
    y = evonorm_s(x, torch.tensor([3.0]), None, None, 1, 1e-5, act="swish_v")
    assert y.isfinite().all()
    assert (y[0, 0, :2] == 0).all()


def test_derivatives_of_first_and_second_order() -> None:
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in (_leaf((2, 4, 2, 2), F64), *_parameters(4, F64))]
    for ours in (_s_case("s0", 2)[0], _b_case("b0", None)[0], _b_case("b0", torch.ones(4, dtype=F64))[0]):
        assert torch.autograd.gradcheck(ours, leaves)
        assert torch.autograd.gradgradcheck(ours, leaves)


def test_backward_repeats_its_bits() -> None:
    torch.manual_seed(0)
    x, parameters = _leaf((4, 24, 9, 9), torch.float32), _parameters(24, torch.float32)
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    for ours in (_s_case("s0", 24)[0], _b_case("b0", None)[0]):
        y = ours(*leaves)
        first, again = (torch.autograd.grad(y, leaves, y.detach(), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_incoming_gradient_is_not_written_to() -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    grad = torch.randn(2, 4, 3, 3)
    before, weight = grad.clone(), torch.ones(4)
    for y in (evonorm_s(x, weight, weight, None, 2), evonorm_b(x, weight, weight, None, None, True)):
        y.backward(grad)
        assert torch.equal(grad, before)
