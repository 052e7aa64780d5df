"""PolyReLU and PolyNorm against float64 autograd of the papers' formulas, and the behaviours the formulas promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close, rms_ratio
from tests.activations.polycom_baselines import (
    official_poly_norm,
    official_poly_relu,
    oracle_poly_norm,
    oracle_poly_relu,
)
from tests.implementations import IMPLEMENTATIONS
from zoo.functional import poly_norm, poly_norm_mul, poly_relu

F64 = torch.float64
pytestmark = [
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True),
    pytest.mark.usefixtures("implementation"),
]


def _with_gradients(function, *inputs: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients for fresh leaves made of the inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _regimes() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """x, weight, bias of the five regimes of the acceptance list, and two beyond."""
    start, trained = torch.ones(3, dtype=F64) / 3, torch.tensor([0.45, 0.47, 0.22], dtype=F64)
    x = torch.randn(16, 96, dtype=F64)
    return {
        "init": (x, start, torch.zeros(1, dtype=F64)),
        "trained": (x, trained, torch.full((1,), 0.03, dtype=F64)),
        "large": (1e3 * x, trained, torch.ones(1, dtype=F64)),
        "tiny": (1e-3 * x, trained, torch.ones(1, dtype=F64)),
        "one_column": (x[:, :1], trained, torch.ones(1, dtype=F64)),
        "rescaled": (1e7 * x, trained, torch.ones(1, dtype=F64)),
        "mixed_rows": (x * 10.0 ** torch.arange(-8, 8, dtype=F64)[:, None], trained, torch.ones(1, dtype=F64)),
    }


@pytest.mark.parametrize("regime", list(_regimes()))
def test_poly_norm_equals_the_official_formula_in_float64(regime: str) -> None:
    x, weight, bias = _regimes()[regime]
    grad = torch.randn_like(x)
    ours = _with_gradients(poly_norm, x, weight, bias, grad=grad)
    # With one column dx is the difference of two terms that agree to a part in 1e6: the official formula itself is
    # 1.8e-12 from the exact value there, and so is ours.
    bound = 1e-11 if regime == "one_column" else 1e-12
    for actual, expected in zip(ours, _with_gradients(official_poly_norm, x, weight, bias, grad=grad), strict=True):
        assert rms_ratio(actual, expected) <= bound


@pytest.mark.parametrize("regime", ["init", "trained", "large", "tiny", "one_column"])
def test_poly_relu_equals_the_official_formula_in_float64(regime: str) -> None:
    x, weight, bias = _regimes()[regime]
    grad = torch.randn_like(x)
    ours = _with_gradients(poly_relu, x, weight, bias, grad=grad)
    for actual, expected in zip(ours, _with_gradients(official_poly_relu, x, weight, bias, grad=grad), strict=True):
        assert rms_ratio(actual, expected) <= 1e-12


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("norm", ["rms", "l2"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_any_order_and_norm_equals_the_oracle(order: int, norm: str, scale: float) -> None:
    x, weight, bias = scale * torch.randn(9, 63, dtype=F64), torch.randn(order, dtype=F64), torch.randn(1, dtype=F64)
    grad = torch.randn_like(x)
    expected = _with_gradients(lambda *a: oracle_poly_norm(*a, norm=norm), x, weight, bias, grad=grad)
    for backend in ("auto", "eager"):
        ours = _with_gradients(lambda *a, b=backend: poly_norm(*a, norm=norm, backend=b), x, weight, bias, grad=grad)
        for actual, wanted in zip(ours, expected, strict=True):
            assert_close(actual, wanted)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_poly_norm_derivatives(order: int, with_bias: bool, norm: str) -> None:
    x, weight = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.randn(order, dtype=F64, requires_grad=True)
    bias = torch.randn(1, dtype=F64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return poly_norm(x, weight, bias, norm=norm)

    inputs = (x, weight, bias) if with_bias else (x, weight)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_third_derivative_of_poly_norm_is_that_of_the_oracle() -> None:
    x, weight = torch.randn(4, dtype=F64), torch.tensor([0.5, 0.2, 0.3], dtype=F64)

    def third(function) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = function(leaf, weight.clone().requires_grad_(), None)
        for _ in range(2):
            (y,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    assert_close(third(poly_norm), third(oracle_poly_norm), loose=100)


def test_gradient_penalty_reaches_the_coefficients() -> None:
    """What a step-wise variation regulariser does: differentiate a first derivative, then step the parameters."""
    x = torch.randn(5, 6, dtype=F64)

    def penalty(function) -> list[Tensor]:
        leaf, weight = x.clone().requires_grad_(), torch.tensor([0.5, 0.2, 0.3], dtype=F64, requires_grad=True)
        (dx,) = torch.autograd.grad(function(leaf, weight, None).sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), (leaf, weight)))

    for actual, expected in zip(penalty(poly_norm), penalty(oracle_poly_norm), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "scale", "bounds"),
    [
        (torch.float32, 1.0, (3e-7, 5e-7, 1e-6)),
        (torch.bfloat16, 1.0, (1.8e-3, 1.9e-3, 2e-3)),
        (torch.bfloat16, 8.0, (1.8e-3, 1.9e-3, 2e-3)),
        (torch.float16, 8.0, (3e-4, 3e-4, 3e-4)),
    ],
)
def test_low_precision_error(dtype: torch.dtype, scale: float, bounds: tuple[float, ...]) -> None:
    """Acceptance 2: relative L2 error of y, dx, dweight against float64, coefficients kept in float32."""
    x, grad = (scale * torch.randn(16, 512)).to(dtype), torch.randn(16, 512).to(dtype)
    weight, bias = torch.tensor([0.3, 0.4, 0.3]), torch.zeros(1)
    ours = _with_gradients(poly_norm, x, weight, bias, grad=grad)
    exact = _with_gradients(oracle_poly_norm, x.double(), weight.double(), bias.double(), grad=grad.double())
    for actual, expected, bound in zip(ours, exact, bounds, strict=False):
        assert actual.isfinite().all()
        assert rms_ratio(actual, expected) <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    """The rounded float32 result, bit for bit: nothing in between is rounded to the half type."""
    x, weight, bias = torch.randn(7, 100).to(dtype), torch.tensor([0.3, 0.4, 0.3]), torch.tensor([0.1])
    assert torch.equal(poly_norm(x, weight, bias), poly_norm(x.float(), weight, bias).to(dtype))
    assert torch.equal(poly_relu(x, weight, bias), poly_relu(x.float(), weight, bias).to(dtype))


def test_float16_at_its_largest_stays_finite_and_bounded() -> None:
    x = torch.randn(8, 64).sign().mul(6e4).half()
    x[0, 0], x[0, 1:] = 6e4, 0  # one dominant element reaches the bound
    weight, bias = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.5])
    y = poly_norm(x, weight, bias)
    assert y.isfinite().all()
    bound = 64**0.5 * weight.abs().sum() + bias.abs()
    assert y.abs().max() <= bound
    assert y.max() > 0.9 * bound


@pytest.mark.parametrize(
    ("order", "scale"),
    [(o, s) for o in (1, 3, 4) for s in (1e3, 2.6e6, 1e10, 1e19, 1e30, 1e38)] + [(1, 3e38), (3, 3e38)],
)  # 1e38^8 is about the last power that the float64 oracle can hold
def test_rows_beyond_float32_powers_are_exact(order: int, scale: float) -> None:
    x = torch.rand(6, 33) * 2 - 1
    x[::2] *= scale  # every other row, so that ordinary and rescaled rows share a block
    weight, bias, grad = torch.randn(order), torch.randn(1), torch.randn_like(x)
    ours = _with_gradients(poly_norm, x, weight, bias, grad=grad)
    exact = _with_gradients(oracle_poly_norm, *(t.double() for t in (x, weight, bias)), grad=grad.double())
    dx, expected = ours.pop(1), exact.pop(1)
    for actual, wanted in zip(ours, exact, strict=True):
        assert_close(actual, wanted, loose=4)
    for row, wanted in zip(dx, expected, strict=True):  # row by row: their sizes differ by the scale
        if wanted.abs().max() > 1e-30:
            assert_close(row, wanted, like=torch.float32, loose=8)


def test_a_row_does_not_depend_on_the_others_of_its_block() -> None:
    x, weight, bias = torch.randn(6, 33), torch.randn(3), torch.randn(1)
    alone = poly_norm(x, weight, bias)
    crowd = poly_norm(torch.cat([x, torch.full((1, 33), 1e20)]), weight, bias)
    assert torch.equal(crowd[:6], alone)


def test_output_is_bounded() -> None:
    weight, bias = torch.randn(3, dtype=F64), torch.randn(1, dtype=F64)
    x = torch.randn(64, 17, dtype=F64) * 10.0 ** torch.randint(-6, 7, (64, 17))
    y = poly_norm(x, weight, bias)
    assert y.abs().max() <= 17**0.5 * weight.abs().sum() + bias.abs()


def test_l2_terms_are_rms_terms_over_the_root_of_the_width() -> None:
    """Ratio 16 at D = 256, once eps is scaled along."""
    x, weight = torch.randn(4, 256, dtype=F64), torch.randn(3, dtype=F64)
    rms = poly_norm(x, weight, eps=1e-6)
    l2 = poly_norm(x, weight, eps=256e-6, norm="l2")
    assert_close(rms, 16 * l2)


def test_lemma_1_special_cases() -> None:
    """ReLU, squared ReLU and plain powers are PolyReLUs; coefficients descend."""
    x = torch.randn(50, dtype=F64)
    for weight, expected in [((0, 0, 1), x.relu()), ((0, 1, 0), x.relu() ** 2), ((1, 0, 0), x.relu() ** 3)]:
        assert_close(poly_relu(x, torch.tensor(weight, dtype=F64)), expected)


def test_order_one_is_the_normalised_input() -> None:
    x = torch.randn(3, 40, dtype=F64)
    y = poly_norm(x, torch.ones(1, dtype=F64), eps=1e-6)
    assert_close(y, torch.nn.functional.rms_norm(x, (40,), eps=1e-6))


def test_poly_norm_does_not_see_the_scale_without_eps() -> None:
    x, weight = torch.randn(3, 40, dtype=F64), torch.tensor([0.3, 0.2, 0.5], dtype=F64)
    plain = poly_norm(x, weight, eps=0.0)
    assert_close(poly_norm(7.3 * x, weight, eps=0.0), plain)


def test_one_column_is_x_over_its_magnitude() -> None:
    x = torch.randn(9, 1, dtype=F64)
    y = poly_norm(x, torch.ones(1, dtype=F64), eps=1e-2)
    assert_close(y, x / (x**2 + 1e-2).sqrt())


def test_zero_row_gives_the_bias_and_a_finite_slope() -> None:
    x, weight, bias = torch.zeros(2, 5, dtype=F64), torch.tensor([0.2, 0.3, 0.5], dtype=F64), torch.ones(1, dtype=F64)
    grad = torch.randn_like(x)
    y, dx, *_ = _with_gradients(poly_norm, x, weight, bias, grad=grad)
    assert torch.equal(y, torch.ones_like(y))
    assert_close(dx, grad * 0.5 / 1e-6**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("large", [1.0, 3e4])
def test_nan_and_inf_stay_in_their_row(dtype: torch.dtype, large: float) -> None:
    """A NaN takes its row; an inf becomes NaN and leaves the bias to the row's finite elements, huge ones too."""
    x = torch.randn(4, 6, dtype=F64).to(dtype)
    x[0, 2], x[1, 3], x[3] = float("nan"), float("inf"), x[3] * large
    x[1, 4] = torch.finfo(dtype).max
    weight, bias = torch.tensor([0.3, 0.4, 0.3], dtype=F64), torch.tensor([0.25], dtype=F64)
    y = poly_norm(x, weight, bias)
    assert y[0].isnan().all()
    assert y[1, 3].isnan()
    assert (y[1, [0, 1, 2, 4, 5]] == 0.25).all()
    clean = poly_norm(x[2:], weight, bias)
    assert_close(y[2:], clean)  # not to the bit: alone, the rows lie differently in 16-byte packs
    assert clean.isfinite().all()


def test_infinite_row_is_kept_out_of_the_gradients_of_others() -> None:
    x = torch.randn(3, 6)
    weight, bias, grad = torch.randn(3), torch.randn(1), torch.randn(3, 6)
    clean = _with_gradients(poly_norm, x, weight, bias, grad=grad)[1]
    x[1, 2] = -float("inf")
    dx = _with_gradients(poly_norm, x, weight, bias, grad=grad)[1]
    assert torch.equal(dx[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    for function in (poly_norm, poly_relu):
        x, weight, bias = torch.zeros(shape), torch.randn(3), torch.randn(1)
        y, dx, dweight, dbias = _with_gradients(function, x, weight, bias, grad=torch.zeros(shape))
        assert y.shape == dx.shape == shape
        assert torch.equal(dweight, torch.zeros(3))
        assert torch.equal(dbias, torch.zeros(1))


def test_single_row_without_batch_axes() -> None:
    x, weight = torch.randn(11, dtype=F64), torch.randn(3, dtype=F64)
    assert_close(poly_norm(x, weight), oracle_poly_norm(x, weight, None))


def _layouts() -> dict[str, Tensor]:
    x = torch.randn(2, 5, 4, 6, dtype=F64)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "permuted": torch.randn(6, 2, 4, 5, dtype=F64).permute(1, 3, 2, 0),
        "sliced": torch.randn(2, 5, 4, 12, dtype=F64)[..., ::2],
        "expanded": torch.randn(2, 1, 4, 6, dtype=F64).expand(2, 5, 4, 6),
    }


@pytest.mark.parametrize("layout", list(_layouts()))
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_layout_and_axis(layout: str, dim: int, implementation: str) -> None:
    """Right for any strides, and laid out as an elementwise op would."""
    x = _layouts()[layout]
    weight, bias, grad = torch.randn(3, dtype=F64), torch.randn(1, dtype=F64), torch.randn(2, 5, 4, 6, dtype=F64)
    for function, oracle in (
        (lambda *a: poly_norm(*a, dim=dim), lambda *a: oracle_poly_norm(*a, dim=dim)),
        (poly_relu, oracle_poly_relu),
    ):
        if implementation != "formula":  # movedim decides the strides there
            assert function(x, weight, bias).stride() == x.sin().stride()
        leaf = x.detach().requires_grad_()
        y = function(leaf, weight, bias)
        (dx,) = torch.autograd.grad(y, leaf, grad)
        expected, expected_dx, *_ = _with_gradients(oracle, x, weight, bias, grad=grad)
        assert_close(y, expected)
        assert_close(dx, expected_dx)


@pytest.mark.parametrize("function", [poly_norm, poly_relu])
def test_incoming_gradient_may_be_shared_with_a_residual(function) -> None:
    """y + x hands the same gradient tensor to both branches: writing to it would change the other one by O(1)."""
    x, weight, bias = torch.randn(6, 40), torch.randn(3), torch.randn(1)
    grad = torch.randn(6, 40)
    kept = grad.clone()
    ours = _with_gradients(lambda x, *a: function(x, *a) + x, x, weight, bias, grad=grad)
    assert torch.equal(grad, kept)
    expected = _with_gradients(lambda x, *a: function(x, *a, backend="eager") + x, x, weight, bias, grad=grad)
    for actual, wanted in zip(ours, expected, strict=True):
        assert_close(actual, wanted)


def test_gradient_of_an_expanded_cotangent() -> None:
    """sum() sends back a stride-0 gradient."""
    x = torch.randn(6, 40, dtype=F64, requires_grad=True)
    weight = torch.randn(3, dtype=F64)
    poly_norm(x, weight).sum().backward()
    leaf = x.detach().requires_grad_()
    oracle_poly_norm(leaf, weight, None).sum().backward()
    assert_close(x.grad, leaf.grad)


@pytest.mark.parametrize("rows", [1, 100, 700])
def test_block_boundaries_do_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken in blocks: one block, many, and a last one that is not full."""
    monkeypatch.setattr("zoo.activations.polycom.eager.CPU_BLOCK_BYTES", 8 * 63 * 32)
    x, weight, bias = torch.randn(rows, 63, dtype=F64), torch.randn(3, dtype=F64), torch.randn(1, dtype=F64)
    grad = torch.randn_like(x)
    for function, oracle in ((poly_norm, oracle_poly_norm), (poly_relu, oracle_poly_relu)):
        ours = _with_gradients(function, x, weight, bias, grad=grad)
        for actual, expected in zip(ours, _with_gradients(oracle, x, weight, bias, grad=grad), strict=True):
            assert_close(actual, expected)


@pytest.mark.usefixtures("deterministic")
def test_no_uninitialised_memory_is_read() -> None:
    """Deterministic mode fills fresh memory with NaN."""
    x, mul, weight, bias = torch.randn(5, 33), torch.randn(5, 33), torch.randn(3), torch.randn(1)
    for function in (poly_norm, poly_relu):
        assert all(t.isfinite().all() for t in _with_gradients(function, x, weight, bias, grad=torch.randn(5, 33)))
    results = _with_gradients(poly_norm_mul, x, mul, weight, bias, grad=torch.randn(5, 33))
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_backwards_give_the_same_bits(dtype: torch.dtype) -> None:
    x, grad = torch.randn(300, 1000).to(dtype), torch.randn(300, 1000).to(dtype)
    weight, bias = torch.randn(3), torch.randn(1)
    for function in (poly_norm, poly_relu):
        first, second = (_with_gradients(function, x, weight, bias, grad=grad) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
