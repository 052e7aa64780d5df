"""What the tests of the comp-sum losses do not see: how kernels share out rows, where rows begin, targets, barriers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close
from tests.implementations import emulated_kernels
from tests.kernels.breaking import schedules_that_notice
from zoo.kernels import sources
from zoo.kernels.emulation import SCHEDULES, EmulatedMachine
from zoo.losses import comp_sum_loss
from zoo.losses.comp_sum import cuda, eager
from zoo.losses.comp_sum.ops import comp_sum_backward, comp_sum_forward
from zoo.losses.comp_sum.reference import comp_sum_reference

F64 = torch.float64
IGNORED = -100
INF, NAN = math.inf, math.nan
# [B, C, S]: one element, less than a pack, ragged rows, whole packs; lanes of a warp up to 4096 bytes, then a block;
# positions last, in one tile and in several, with the classes of a position in one warp and in several.
ROWS = ((4, 1, 1), (9, 2, 1), (33, 7, 1), (6, 63, 1), (5, 100, 1), (3, 1000, 1), (3, 1037, 1), (2, 4111, 1))
PLANES = ((2, 1, 3), (2, 2, 40), (3, 9, 7), (1, 70, 25), (2, 130, 5))


def _rows(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, targets with every fifth ignored, a tau a row, incoming gradients."""
    batch, classes, inner = shape
    wide = F64 if dtype is F64 else torch.float32
    scores = (3 * torch.randn(shape)).to(dtype)
    target = torch.randint(classes, (batch, inner))
    target.view(-1)[2::5] = IGNORED
    taus = torch.tensor([0.0, 0.7, 1.0, 1.3, 2.5], dtype=wide).repeat(batch * inner)[: batch * inner].view(batch, inner)
    return scores, target, taus, torch.randn(batch, inner, dtype=wide)


def _both(scores: Tensor, target: Tensor, taus: Tensor | None, grad: Tensor, tau: float = 1.0, cap: float = INF):
    """Loss and gradient of the ops."""
    loss, statistics = comp_sum_forward(scores, target, taus, tau, cap, IGNORED)
    return loss, comp_sum_backward(grad, scores, target, statistics, taus, tau, cap, IGNORED), statistics


def _expected(
    scores: Tensor, target: Tensor, tau: Tensor | float, grad: Tensor, cap: float = INF
) -> tuple[Tensor, Tensor]:
    exact = scores.double().requires_grad_()
    loss = comp_sum_reference(exact, target, tau.double() if isinstance(tau, Tensor) else tau, cap, IGNORED)
    return loss.detach(), torch.autograd.grad(loss, exact, grad.double())[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_every_shape_equals_the_reference(dtype: torch.dtype, schedule: str, kernel_folder: Path) -> None:
    with emulated_kernels(EmulatedMachine(kernel_folder, SCHEDULES[schedule])) as machine:
        for shape in ROWS + PLANES:
            scores, target, taus, grad = _rows(shape, dtype)
            loss, slopes, _ = _both(scores, target, taus, grad)
            wanted, wanted_slopes = _expected(scores, target, taus, grad)
            # tau = 0 is exp of a sum that float32 has rounded
            assert_close(loss, wanted, loose=10)
            assert_close(slopes, wanted_slopes, loose=10)
    ways = {name.removeprefix(f"comp_sum_{way}_") for way in ("fwd", "bwd") for name, *_ in machine.launched}
    assert {"lanes", "block", "planes"} <= ways


def test_half_types_are_rounded_once(kernel_folder: Path) -> None:
    with emulated_kernels(EmulatedMachine(kernel_folder)):
        for shape in ((5, 100, 1), (3, 2111, 1), (2, 9, 7)):
            scores, target, taus, grad = _rows(shape, torch.bfloat16)
            loss, slopes, _ = _both(scores, target, taus, grad)
            wanted, wanted_slopes = _expected(scores, target, taus, grad)
            assert loss.dtype is torch.float32
            assert_close(loss, wanted, loose=10)
            assert_close(slopes, wanted_slopes)


@pytest.mark.parametrize("shape", [(3, 63, 1), (2, 1037, 1), (2, 9, 7)])
def test_scores_that_start_off_a_16_byte_boundary(shape: tuple[int, int, int], kernel_folder: Path) -> None:
    """A slice of a flat buffer is contiguous, and its first element lies anywhere."""
    scores, target, taus, grad = _rows(shape, torch.float32)
    buffer = torch.full((scores.numel() + 2,), NAN)
    moved = buffer[1:-1].view(shape).copy_(scores)
    assert moved.data_ptr() % 16
    with emulated_kernels(EmulatedMachine(kernel_folder)):
        for here, there in zip(_both(scores, target, taus, grad), _both(moved, target, taus, grad), strict=True):
            assert torch.equal(here, there)


@pytest.mark.parametrize("shape", [(6, 11, 1), (2, 1100, 1), (1, 11, 6)])
def test_one_tau_for_all_rows_and_a_bound_on_their_weight(shape: tuple[int, int, int], kernel_folder: Path) -> None:
    scores, target, _, grad = _rows(shape, F64)
    with emulated_kernels(EmulatedMachine(kernel_folder)):
        for tau in (0.0, 0.5, 1.0, 1.7):
            for cap in (INF, 1.5):
                loss, slopes, _ = _both(scores, target, None, grad, tau, cap)
                wanted, wanted_slopes = _expected(scores, target, tau, grad, cap)
                assert_close(loss, wanted)
                assert_close(slopes, wanted_slopes)


def test_tau_near_one_is_not_rounded_before_it_is_taken_from_one(kernel_folder: Path) -> None:
    """0.1 times 700 is the exponent: what float32 has lost of 0.9 would show in the fifth place of the loss."""
    scores, target = torch.tensor([[[-700.0], [0.0]]]), torch.zeros(1, 1, dtype=torch.int64)
    with emulated_kernels(EmulatedMachine(kernel_folder)):
        loss, _ = comp_sum_forward(scores, target, None, 0.9, INF, IGNORED)
    assert loss.item() == pytest.approx(math.expm1(0.1 * 700) / 0.1, rel=6e-6)


# Scores of a row whose target is its class 0, the loss at tau = 1, and whether its gradient is NaN.
SPECIAL = (
    ((1.0, -INF, -INF), 0.0, False),  # no other class
    ((-INF, 1.0, 2.0), INF, False),  # the target is out of the question
    ((INF, 1.0, 2.0), 0.0, False),
    ((1.0, INF, 2.0), NAN, True),
    ((1.0, INF, NAN), NAN, True),
    ((1.0, NAN, 2.0), NAN, True),
    ((1.0, NAN, -INF), NAN, True),
    ((NAN, 1.0, 2.0), NAN, True),
    ((-INF, -INF, -INF), NAN, True),
    ((1.0, -INF, 0.0), math.log1p(math.exp(-1.0)), False),
    ((80.0, 0.0, 0.0), 2 * math.exp(-80.0), False),
)


@pytest.mark.parametrize("layout", ["lanes", "block", "planes"])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_infinities_and_nans_stay_in_their_rows(layout: str, dtype: torch.dtype, kernel_folder: Path) -> None:
    """Among scores of -inf the three stand at the ends and in the middle, whoever reads them."""
    classes = {"lanes": 37, "block": 1100, "planes": 19}[layout]
    rows = torch.full((len(SPECIAL), classes), -INF, dtype=dtype)
    places = [classes // 2, 0, classes - 1]
    rows[:, places] = torch.tensor([row for row, _, _ in SPECIAL], dtype=dtype)
    scores = rows.t()[None].contiguous() if layout == "planes" else rows[:, :, None]
    target = torch.full((len(SPECIAL),), places[0]).view(scores.shape[0], scores.shape[2])
    grad = torch.ones(target.shape, dtype=dtype)
    with emulated_kernels(EmulatedMachine(kernel_folder)) as machine:
        for tau in (0.5, 1.0, 2.0):
            loss, slopes, statistics = _both(scores, target, None, grad, tau)
            expected = torch.tensor([value for _, value, _ in SPECIAL], dtype=dtype)
            if tau != 1:
                expected = torch.expm1((1 - tau) * expected) / (1 - tau)
            torch.testing.assert_close(loss.flatten(), expected, equal_nan=True)
            by_row = slopes[0].t() if layout == "planes" else slopes[:, :, 0]
            assert by_row.isnan().any(1).tolist() == [nan for *_, nan in SPECIAL]
            arguments = (scores, target, statistics, None, tau, INF, IGNORED)
            closed = eager.comp_sum_backward(grad, *arguments)
            torch.testing.assert_close(slopes, closed, equal_nan=True)
            assert not comp_sum_backward(torch.zeros_like(grad), *arguments).any()  # g = 0 silences a row, NaN or not
    assert {name.rpartition("_")[2] for name, *_ in machine.launched} == {layout}


@pytest.mark.parametrize("shape", [(6, 5, 1), (6, 1100, 1), (1, 5, 6)])
def test_target_out_of_range_makes_its_row_nan_and_no_other(shape: tuple[int, int, int], kernel_folder: Path) -> None:
    scores, target, taus, grad = _rows(shape, torch.float32)
    target, wrong = target.flatten(), torch.tensor([1, 4])
    target[wrong] = torch.tensor([-1, shape[1]])
    target = target.view(shape[0], shape[2])
    kept = torch.ones(6, dtype=torch.bool).index_fill(0, wrong, False)
    with emulated_kernels(EmulatedMachine(kernel_folder)):
        loss, slopes, statistics = _both(scores, target, taus, grad)
        tame = torch.where(kept.view_as(target), target, 0)
        right, right_slopes, right_statistics = _both(scores, tame, taus, grad)
    for found, wanted in (
        (loss.flatten(), right.flatten()),
        (slopes.movedim(1, 2).reshape(6, -1), right_slopes.movedim(1, 2).reshape(6, -1)),
        (statistics.view(2, 6).t(), right_statistics.view(2, 6).t()),
    ):
        assert found[wrong].isnan().all()
        assert torch.equal(found[kept], wanted[kept])


def test_a_class_may_be_the_ignored_one(kernel_folder: Path) -> None:
    scores, target = torch.randn(8, 3, dtype=F64), torch.tensor([0, 1, 2, 1, 0, 2, 1, 1])
    with emulated_kernels(EmulatedMachine(kernel_folder)):
        loss = comp_sum_loss(scores, target, 1.5, ignore_index=1, reduction="none")
    assert torch.equal(loss == 0, target == 1)


def test_no_rows_launch_nothing(kernel_folder: Path) -> None:
    with emulated_kernels(EmulatedMachine(kernel_folder)) as machine:
        for shape in ((0, 5, 1), (2, 5, 0)):
            loss, slopes, statistics = _both(*_rows(shape, torch.float32))
            assert (loss.shape, slopes.shape, statistics.shape) == (
                (shape[0], shape[2]),
                shape,
                (2, shape[0], shape[2]),
            )
    assert machine.launched == []


# How the work is shared out


@pytest.mark.parametrize(
    ("classes", "dtype", "forward", "threads"),
    [
        (10, torch.float32, "lanes", 256),
        (1024, torch.float32, "lanes", 256),
        (1025, torch.float32, "block", 96),
        (2048, torch.bfloat16, "lanes", 256),
        (2049, torch.bfloat16, "block", 96),
        (9000, torch.float32, "block", 512),
    ],
)
def test_width_chooses_the_kernel(
    classes: int, dtype: torch.dtype, forward: str, threads: int, kernel_folder: Path
) -> None:
    with emulated_kernels(EmulatedMachine(kernel_folder)) as machine:
        comp_sum_loss(torch.zeros(1, classes, dtype=dtype), torch.zeros(1, dtype=torch.int64))
    assert machine.launched == [(f"comp_sum_fwd_{forward}", (1, 1, 1), (threads, 1, 1))]


@pytest.mark.parametrize(("packs", "lanes"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 4), (125, 32), (256, 32)])
def test_lanes_load_about_four_packs_each(packs: int, lanes: int) -> None:
    assert cuda._lanes(packs) == lanes


def test_few_long_rows_are_cut(kernel_folder: Path) -> None:
    """Elements of the gradient do not know of each other: the same bits, whoever writes them."""
    results = []
    for multiprocessors in (1, 8):
        machine = EmulatedMachine(kernel_folder)
        machine.multiprocessors = multiprocessors
        torch.manual_seed(0)
        with emulated_kernels(machine):
            scores, target, taus, grad = _rows((4, 12400, 1), F64)
            # at the ends, and where one part of 2067 packs meets the next
            target[0], target[1], target[3] = 0, 12399, 4134
            results.append(_both(scores, target, taus, grad)[1])
        results.append(machine.launched[-1][1][0] // 4)
    assert results[1::2] == [1, 3]
    assert torch.equal(results[0], results[2])


def test_parts_cover_a_row() -> None:
    machine = EmulatedMachine(Path())
    for rows in (1, 3, 1000):
        for packs in (257, 1000, 8000, 65536):
            threads = cuda._block_threads(packs)
            parts, segment = cuda._parts(rows, packs, threads, machine)
            assert (parts - 1) * segment < packs <= parts * segment
            assert parts == 1 or segment >= 4 * threads


@pytest.mark.parametrize(
    ("positions", "classes", "groups"),
    [(4096, 1000, 1), (2048, 1000, 2), (1000, 1000, 8), (10, 15, 1), (10, 16, 2), (10, 70, 8)],
)
def test_few_positions_of_many_classes_are_shared_by_warps(positions: int, classes: int, groups: int) -> None:
    assert cuda._groups(positions, classes, EmulatedMachine(Path())) == groups


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("planes", [False, True])
def test_tensors_beyond_two_gigabytes(dtype: torch.dtype, planes: bool) -> None:
    """Offsets need 64 bits: the last rows alone give the same, but for who sums up the classes of a position."""
    classes = 4099
    count = 8 * (2**31 // classes // 8 + 2)  # scores, not bytes, beyond 2^31
    if torch.cuda.mem_get_info()[0] < 3 * count * classes * dtype.itemsize:
        pytest.skip("needs three tensors of 2^31 scores")
    scores = torch.empty((8, classes, count // 8) if planes else (count, classes), device="cuda", dtype=dtype).normal_()
    target = torch.randint(classes, scores[:, 0].shape, device="cuda")

    def both(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores.detach().requires_grad_()
        loss = comp_sum_loss(scores, target, 1.5, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]

    last = slice(-1 if planes else -8, None)
    for whole, alone in zip(both(scores, target), both(scores[last].clone(), target[last]), strict=True):
        assert_close(whole[last], alone.double(), loose=4)


# Barriers


def _results(machine: EmulatedMachine) -> list[Tensor]:
    """Forward and backward of a row a block and of positions whose classes several warps share."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    with emulated_kernels(machine):
        for shape in ((3, 1100, 1), (1, 70, 25)):
            found += _both(*_rows(shape, F64))
    return found


def test_the_only_barrier_of_the_family_is_the_one_below() -> None:
    """Those of `common/rows.cuh` are in the list of the PolyCom kernels."""
    texts = {path.name: path.read_text() for path in (sources.folder() / "comp_sum").glob("*.cu*")}
    assert {name: text.count("__syncthreads();") for name, text in texts.items()} == {"comp_sum.cu": 1, "passes.cuh": 0}


@pytest.mark.slow
def test_kernel_without_it_is_caught(tmp_path: Path, kernel_folder: Path) -> None:
    """Remove it from the source: in some schedule results differ or the emulator reports."""
    folders = {"scratch": tmp_path, "kernel_folder": kernel_folder}
    assert schedules_that_notice(_results, "comp_sum/comp_sum.cu", "__syncthreads();", 0, **folders)
