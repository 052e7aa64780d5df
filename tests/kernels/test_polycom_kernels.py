"""What the tests of PolyCom on every implementation do not see: variants, widths, tails, alignment, loops, barriers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close
from tests.activations.polycom_baselines import oracle_poly_norm, oracle_poly_relu
from tests.implementations import IMPLEMENTATIONS, emulated_kernels, running_on
from tests.kernels.breaking import schedules_that_notice
from zoo.activations.polycom import cuda
from zoo.functional import poly_norm, poly_norm_mul, poly_relu
from zoo.kernels import sources
from zoo.kernels.emulation import EmulatedMachine

F64 = torch.float64
KERNELS = [i for i in IMPLEMENTATIONS if i not in ("formula", "closed_form")]
# Widths around the borders of the variants: a warp, a block, a block that reads the row twice; whole packs and ragged.
WIDTHS = (3, 31, 200, 1023, 1024, 1037, 2048, 9001, 17000)


@pytest.fixture
def implementation(request: pytest.FixtureRequest, kernel_folder: Path) -> Iterator[str]:
    with running_on(request.param, kernel_folder):
        yield request.param


on_every_kernel = pytest.mark.parametrize("implementation", KERNELS, indirect=True)


def _arguments(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, mul, grad in the dtype; weight, bias, scores in float32 or wider."""
    x, mul, noise = (torch.randn(rows, width) for _ in range(3))
    # Of noise alone the coefficients' gradients would be sums that cancel, and their relative error chance.
    x, mul, grad = x.to(dtype), mul.to(dtype), ((1 + mul) * (1 + x) + noise).to(dtype)
    wide = torch.float64 if dtype is F64 else torch.float32
    return (
        x,
        mul,
        grad,
        torch.tensor([0.3, 0.4, 0.3], dtype=wide),
        torch.tensor([0.1], dtype=wide),
        torch.rand(rows, dtype=wide),
    )


def _check(function, oracle, leaves: list[Tensor], grad: Tensor, *, like: torch.dtype) -> None:
    leaves = [t.detach().requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, expected = function(*leaves), oracle(*exact)
    ours = torch.autograd.grad(y, leaves, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for actual, exactly in zip((y, *ours), (expected, *wanted), strict=True):
        # Coefficients' gradients come in their own dtype, out of inputs that were rounded: exact for these inputs.
        assert_close(actual, exactly, like=actual.dtype if actual.dtype is not torch.float32 else like_of(like))


def like_of(dtype: torch.dtype) -> torch.dtype:
    """Sums of a half type's products are as exact as float32's."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@on_every_kernel
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("implementation")
def test_every_width_equals_the_oracle(dtype: torch.dtype, width: int) -> None:
    rows = 5 if width < 9000 else 3
    x, mul, grad, weight, bias, scores = _arguments(rows, width, dtype)
    _check(poly_norm, oracle_poly_norm, [x, weight, bias], grad, like=dtype)
    _check(
        lambda x, mul, weight, bias, scores: poly_norm_mul(x, mul, weight, bias, scores=scores),
        lambda x, mul, weight, bias, scores: oracle_poly_norm(x, weight, bias) * mul * scores[:, None],
        [x, mul, weight, bias, scores],
        grad,
        like=dtype,
    )


@on_every_kernel
@pytest.mark.parametrize("elements", [1, 7, 8, 9, 4095, 20001])
@pytest.mark.usefixtures("implementation")
def test_relu_of_any_length(elements: int) -> None:
    x, weight, bias = torch.randn(elements, dtype=F64), torch.randn(3, dtype=F64), torch.randn(1, dtype=F64)
    _check(
        poly_relu,
        lambda x, w, b: sum(w[k] * x.relu() ** (3 - k) for k in range(3)) + b,
        [x, weight, bias],
        torch.randn(elements, dtype=F64),
        like=F64,
    )


@on_every_kernel
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.usefixtures("implementation")
def test_rows_that_start_off_a_16_byte_boundary(offset: int) -> None:
    """A slice of a flat buffer is contiguous, and its first element lies anywhere."""

    def shifted(t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + 2 * offset,), float("nan"), dtype=t.dtype)
        view = buffer[offset : offset + t.numel()].view(t.shape)
        return view.copy_(t)

    x, _, grad, weight, bias, _ = _arguments(4, 63, torch.float32)
    for function in (poly_norm, poly_relu):
        results = []
        for place in (lambda t: t.clone(), shifted):
            leaf = place(x).requires_grad_()
            y = function(leaf, weight, bias)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, place(grad))))
        for aligned, moved in zip(*results, strict=True):
            assert torch.equal(aligned, moved)


@on_every_kernel
@pytest.mark.parametrize("width", [40, 1100])
@pytest.mark.usefixtures("implementation")
def test_more_rows_than_a_grid_has_teams(width: int) -> None:
    """Backward blocks loop over rows and leave one summand each; the sum is that over all rows, the same bits twice."""
    x, _, grad, weight, bias, _ = _arguments(200, width, torch.float32)
    _check(poly_norm, oracle_poly_norm, [x, weight, bias], grad, like=torch.float32)
    leaf = weight.clone().requires_grad_()
    first, second = (torch.autograd.grad(poly_norm(x, leaf, bias), leaf, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


@on_every_kernel
@pytest.mark.parametrize("width", [60, 1100, 9001])
@pytest.mark.usefixtures("implementation")
def test_huge_rows_among_ordinary_ones(width: int) -> None:
    """Rows are rescaled one by one, in every variant, forward and backward."""
    x, mul, grad, weight, bias, _ = _arguments(4, width, torch.float32)
    x[1], x[3] = x[1] * 1e20, x[3] * 1e9
    _check(poly_norm, oracle_poly_norm, [x, weight, bias], grad, like=torch.float32)
    _check(
        lambda x, mul, weight: poly_norm_mul(x, mul, weight),
        lambda x, mul, weight: oracle_poly_norm(x, weight, None) * mul,
        [x, mul, weight],
        grad,
        like=torch.float32,
    )


@on_every_kernel
@pytest.mark.usefixtures("implementation")
def test_coefficients_keep_their_own_dtype() -> None:
    """bfloat16 inputs with float64 coefficients, and the other way round: read exactly, gradients in their dtype."""
    x, _, grad, _, _, _ = _arguments(3, 50, torch.bfloat16)
    for dtype in (F64, torch.float32, torch.bfloat16, torch.float16):
        weight = torch.tensor([0.375, 0.25, 0.5], dtype=dtype, requires_grad=True)
        bias = torch.tensor([0.125], dtype=dtype, requires_grad=True)
        y = poly_norm(x, weight, bias)
        assert torch.equal(y, poly_norm(x, weight.float(), bias.float()))
        assert [g.dtype for g in torch.autograd.grad(y, (weight, bias), grad)] == [dtype, dtype]


@on_every_kernel
@pytest.mark.usefixtures("implementation")
def test_orders_up_to_the_largest() -> None:
    """Order 33 is beyond the kernels and goes through the formula, with the same result."""
    x = torch.randn(3, 20, dtype=F64)
    orders = (6, 33) if torch.get_default_device().type == "cuda" else (6, 32, 33)
    for order in orders:
        weight = torch.randn(order, dtype=F64)
        assert_close(poly_norm(x, weight), oracle_poly_norm(x, weight, None), loose=10)


@pytest.mark.parametrize(
    ("dtype", "gated", "width", "forward", "backward"),
    [
        (torch.float32, False, 512, "warp", "warp"),
        (torch.float32, False, 1021, "warp", "block"),
        (torch.float32, False, 1023, "block", "block"),  # rows that begin inside a pack need one pack more
        (torch.float32, False, 1024, "warp", "block"),
        (torch.float32, False, 1025, "block", "block"),
        (torch.bfloat16, False, 16384, "block", "block"),
        (torch.bfloat16, False, 16392, "loop", "loop"),
        (torch.float32, True, 8192, "block", "block"),
        (torch.float32, True, 8196, "block", "loop"),
        (F64, False, 8192, "block", "block"),
        (F64, False, 8194, "block", "loop"),
    ],
)
def test_width_chooses_the_variant(
    dtype: torch.dtype, gated: bool, width: int, forward: str, backward: str, kernel_folder: Path
) -> None:
    x, mul, grad, weight, bias, _ = _arguments(1, width, dtype)
    with emulated_kernels(EmulatedMachine(kernel_folder)) as machine:
        leaf = x.requires_grad_()
        y = poly_norm_mul(leaf, mul, weight, bias) if gated else poly_norm(leaf, weight, bias)
        torch.autograd.grad(y, leaf, grad)
    names = [name for name, *_ in machine.launched]
    assert names == [f"poly_norm_fwd_{forward}", f"poly_norm_bwd_{backward}", "polycom_finish"]


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@pytest.mark.usefixtures("implementation")
def test_threads_of_the_cpu_do_not_change_a_bit() -> None:
    x, mul, grad, weight, bias, scores = _arguments(300, 1000, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (x, mul, weight, bias, scores)]
            gated = poly_norm_mul(*leaves[:4], scores=leaves[4])
            relu = poly_relu(leaves[0], *leaves[2:4])
            found = [gated, relu, *torch.autograd.grad(gated, leaves, grad)]
            results.append([*found, *torch.autograd.grad(relu, (leaves[0], *leaves[2:4]), grad)])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_grid_smaller_than_the_work(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beyond the 2^31 blocks a grid may have: forward blocks take several turns."""
    monkeypatch.setattr(cuda, "MOST_BLOCKS", 2)
    x, _, _, weight, bias, _ = _arguments(40, 1100, F64)
    with emulated_kernels(EmulatedMachine(kernel_folder)) as machine:
        assert_close(poly_norm(x, weight, bias), oracle_poly_norm(x, weight, bias))
        assert_close(poly_norm(x[:, :40], weight, bias), oracle_poly_norm(x[:, :40], weight, bias))
        assert_close(poly_relu(x, weight, bias), oracle_poly_relu(x, weight, bias))
    assert {grid for _, grid, _ in machine.launched} == {(2, 1, 1)}


def test_more_summands_than_the_last_block_has_threads(kernel_folder: Path) -> None:
    """A large GPU leaves hundreds: each thread of the second kernel adds up several."""
    machine = EmulatedMachine(kernel_folder)
    machine.multiprocessors = 150
    x, weight = torch.randn(350_000), torch.tensor([0.3, 0.4, 0.3], requires_grad=True)
    exact = weight.detach().double().requires_grad_()
    with emulated_kernels(machine):
        (actual,) = torch.autograd.grad(poly_relu(x, weight), weight, torch.ones_like(x))
    assert next(grid for name, grid, _ in machine.launched if name == "poly_relu_bwd")[0] > 256
    y = oracle_poly_relu(x.double(), exact, None)
    assert_close(actual, torch.autograd.grad(y, exact, torch.ones_like(y))[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_beyond_two_gigabytes(dtype: torch.dtype) -> None:
    """Offsets need 64 bits. To the bit, because the last eight rows lie in their packs as eight rows alone do."""
    width = 4099
    rows = 8 * (2**31 // width // dtype.itemsize // 8 + 2)
    x = torch.randn(rows, width, device="cuda", dtype=dtype).requires_grad_()
    weight, bias = torch.tensor([0.3, 0.4, 0.3], device="cuda"), torch.zeros(1, device="cuda")
    for function in (poly_norm, poly_relu):
        y = function(x, weight, bias)
        (dx,) = torch.autograd.grad(y, x, y.detach())
        last = x[-8:].detach().clone().requires_grad_()
        alone = function(last, weight, bias)
        assert torch.equal(y[-8:], alone)
        assert torch.equal(dx[-8:], torch.autograd.grad(alone, last, alone.detach())[0])


# Barriers


def _results(machine: EmulatedMachine) -> list[Tensor]:
    """Forward and backward of rows in the warp and in the block variant, some of them rescaled."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    with emulated_kernels(machine):
        for width in (40, 1100):
            x, _, grad, weight, bias, _ = _arguments(40, width, F64)
            x[::3, -1] = 1e12  # in one warp alone
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            y = poly_norm(*leaves)
            found += [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    return found


BROKEN = {
    "barrier of the sum over a block's warps": ("__syncthreads();", 0),
    "barrier of a row's sums": ("__syncthreads();", 1),
    "barrier of a row's maximum": ("__syncthreads();", 2),
    "two buffers in turn for sums": ("turn ^= 1;", 0),
}


def test_every_barrier_of_the_row_kernels_is_in_the_list() -> None:
    paths = [path for family in ("common", "polycom") for path in (sources.folder() / family).rglob("*.cu*")]
    text = "".join(path.read_text() for path in paths)
    assert text.count("__syncthreads();") == 3


@pytest.mark.slow
@pytest.mark.parametrize("what", list(BROKEN))
def test_kernel_without_it_is_caught(what: str, tmp_path: Path, kernel_folder: Path) -> None:
    """Remove one line of the source: in some schedule results differ or the emulator reports."""
    line, occurrence = BROKEN[what]
    folders = {"scratch": tmp_path, "kernel_folder": kernel_folder}
    assert schedules_that_notice(_results, "common/rows.cuh", line, occurrence, **folders)
