"""Comp-sum losses in the CPU library: what only this implementation has. That it equals the formulas: tests/losses."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zoo.losses.comp_sum.ops
from tests._numerics import assert_close
from zoo.kernels import cpu, sources, use_cpu_library
from zoo.losses.comp_sum import eager
from zoo.losses.comp_sum.reference import comp_sum_reference

OPS = torch.ops.zoo
assert zoo.losses.comp_sum.ops  # which defines them
SOURCE = Path(__file__).parent / "conversions/exponential.cpp"
TYPES = {"float": torch.float32, "double": torch.float64, "bf16": torch.bfloat16, "half": torch.float16}
DTYPES = tuple(TYPES.values())
INF, NAN, IGNORED = math.inf, math.nan, -100
C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


# The vectors' functions, for every instruction set this processor has: each has code of its own


@pytest.fixture(scope="module", params=cpu.levels())
def vectors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("exponential") / f"{request.param}.so"
    march = [f"-march={request.param}"] if platform.machine() == "x86_64" else []
    command = ["g++", "-std=c++20", "-O2", "-Wno-psabi", "-fPIC", "-shared", *march, f"-I{sources.folder()}"]
    subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.least_float.restype, library.least_double.restype = ctypes.c_float, ctypes.c_double
    return library


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _least(vectors: ctypes.CDLL, dtype: torch.dtype) -> float:
    return vectors.least_float() if dtype is torch.float32 else vectors.least_double()


def _exponential(vectors: ctypes.CDLL, values: Tensor, least: float | None = None) -> Tensor:
    result = torch.full_like(values, -1.0)
    function = vectors.exponential_float if values.dtype is torch.float32 else vectors.exponential_double
    bound = C_TYPES[values.dtype](_least(vectors, values.dtype) if least is None else least)
    function(_pointer(values), bound, _pointer(result), ctypes.c_int64(values.numel()))
    return result


def test_the_exponential_of_a_float_is_within_two_places_everywhere(vectors: ctypes.CDLL) -> None:
    bits = torch.arange(0, 2**32, 2039, dtype=torch.int64).to(torch.int32)  # every exponent and both signs
    values = torch.cat([bits.view(torch.float32), torch.linspace(-86.98, 88.722, 1_000_001)])
    least = _least(vectors, torch.float32)
    values = values[(values >= least) & (values <= 88.722)]
    ours, exact = _exponential(vectors, values).double(), values.double().exp()
    assert ((ours - exact).abs() / 2.0 ** (exact.log2().floor() - 23)).max() <= 2


def test_the_exponential_of_a_double_is_within_two_places(vectors: ctypes.CDLL) -> None:
    numpy = pytest.importorskip("numpy")
    if numpy.finfo(numpy.longdouble).nmant < 63:
        pytest.skip("needs a long double wider than a double")
    spread = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.cat([1417 * spread - 708, 80 * spread - 60, spread - 0.5])
    exact = numpy.exp(values.numpy().astype(numpy.longdouble))
    error = numpy.abs((_exponential(vectors, values).numpy() - exact) / exact)
    assert error.max() <= 2 * 2.0**-52


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exponential_has_limits_and_keeps_a_nan(vectors: ctypes.CDLL, dtype: torch.dtype) -> None:
    number = torch.finfo(dtype)
    overflow = math.log(number.max) + 1e-4
    payload = torch.tensor([NAN], dtype=dtype)
    payload.view(torch.int32)[0] |= 0x123  # a NaN that is not the usual one
    values = torch.tensor([-INF, INF, number.min, number.max, 0.0, -0.0, overflow, 1e4, -1e4, NAN], dtype=dtype)
    expected = torch.tensor([0.0, INF, 0.0, INF, 1.0, 1.0, INF, INF, 0.0, -7.0, -7.0], dtype=dtype)
    assert torch.equal(_exponential(vectors, torch.cat([values, payload])).nan_to_num(-7.0, INF), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_power_is_a_denormal_number(vectors: ctypes.CDLL, dtype: torch.dtype) -> None:
    least, smallest = _least(vectors, dtype), torch.finfo(dtype).tiny
    values = torch.linspace(1.2 * least, 0.99 * least, 20_001, dtype=dtype)
    powers = _exponential(vectors, values)
    assert torch.equal(powers == 0, values < least)
    assert powers[powers > 0].min() >= smallest
    assert math.exp(least) < 1.5 * smallest  # and little is left out
    assert torch.equal(_exponential(vectors, values, least=-40.0), torch.zeros_like(values))


@pytest.mark.parametrize("name", list(TYPES))
def test_what_stands_behind_the_end_of_a_row_can_be_chosen(vectors: ctypes.CDLL, name: str) -> None:
    lanes = 8 if name == "double" else 16
    for count in range(1, lanes):
        found = torch.full((lanes,), -1.0, dtype=TYPES[name])
        getattr(vectors, f"beyond_{name}")(ctypes.c_int(count), _pointer(found))
        assert found.tolist() == [1.0] * count + [7.0] * (lanes - count)


# The ops of the library


@pytest.fixture(scope="module")
def native() -> None:
    if not use_cpu_library():
        pytest.skip("no CPU library: needs a C++ compiler, and ZOO_KERNELS other than off")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, C, S], targets of which every fifth is ignored, and an incoming gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows = shape[0], shape[2]
    scores = (spread * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(shape[1], rows, generator=generator)
    target.view(-1)[4::5] = IGNORED
    grad = 0.5 + torch.rand(rows, generator=generator)
    return scores, target, grad.double() if dtype is torch.float64 else grad


def _run(
    scores: Tensor, target: Tensor, grad: Tensor, tau: float | Tensor = 1.0, cap: float = INF
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics and gradient."""
    rest = (tau, 1.0, cap, IGNORED) if isinstance(tau, Tensor) else (None, tau, cap, IGNORED)
    loss, statistics = OPS.comp_sum(scores, target, *rest)
    return loss, statistics, OPS.comp_sum_backward(grad, scores, target, statistics, *rest)


def _exact(
    scores: Tensor, target: Tensor, grad: Tensor, tau: float | Tensor = 1.0, cap: float = INF
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the closed form in float64."""
    rest = (tau.double(), 1.0, cap, IGNORED) if isinstance(tau, Tensor) else (None, tau, cap, IGNORED)
    loss, statistics = eager.comp_sum_forward(scores.double(), target, *rest)
    gradient = eager.comp_sum_backward(grad.double(), scores.double(), target, statistics, *rest)
    return loss, statistics, gradient


# Every remainder of one vector and of four; more than one piece of a row and of a walk over classes; positions that
# fill blocks, that do not, and one alone
WIDTHS = (*range(1, 71), 1000, 2049)
LENGTHS = (1, 5, 131)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [1.0, 0.0, 1.7])
def test_it_is_the_formula_at_every_width(native, tau: float, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for length in LENGTHS if width % 9 == 1 else (1,):
            scores, target, grad = _inputs((4, width, length), dtype)
            if dtype is torch.float16:
                grad *= {0.0: 2.0**-8, 1.0: 1.0, 1.7: 2.0**8}[tau]  # the slopes leave its range
            loss, _, gradient = _run(scores, target, grad, tau)
            exact = scores.double().requires_grad_()
            expected = comp_sum_reference(exact, target, tau)
            assert_close(loss, expected, loose=2)
            (wanted,) = torch.autograd.grad(expected, exact, grad.double())
            assert gradient.dtype is dtype
            assert_close(gradient, wanted, loose=2)


@pytest.mark.parametrize("shape", [(60, 10, 1), (40, 1000, 1), (1, 10, 60), (2, 97, 20)])
@pytest.mark.parametrize("tau", [1.0, 0.0, 0.5, 1.7, 3.0])
def test_every_row_has_its_digits(native, shape: tuple[int, int, int], tau: float) -> None:
    """Relative to the row itself: nearly all have a probable or a very improbable target."""
    for dtype, digits in ((torch.float32, 8e-6), (torch.float64, 2e-14)):
        scores, target, grad = _inputs(shape, dtype, spread=8.0)
        loss, statistics, gradient = _run(scores, target, grad, tau)
        expected, exact, wanted = _exact(scores, target, grad, tau)
        kept = target != IGNORED
        assert torch.equal(loss == 0, ~kept)
        assert ((loss - expected).abs() / expected)[kept].max() <= digits
        assert (statistics - exact).abs().max() <= digits
        rows, of = (t.double().movedim(1, -1)[kept] for t in (gradient, wanted))
        size = of.abs().amax(1).clamp_min(1e-30)  # beside what is no normal number, and therefore 0
        assert ((rows - of).abs().amax(1) / size).max() <= digits
        assert torch.equal(gradient.movedim(1, -1)[~kept], torch.zeros_like(gradient.movedim(1, -1)[~kept]))


@pytest.mark.parametrize("length", [1, 3])
def test_a_confident_row_keeps_what_is_left_of_its_loss(native, length: int) -> None:
    scores = torch.zeros(1, 3, length)
    scores[:, 1] = 38.0
    target = torch.ones(1, length, dtype=torch.int64)
    loss, _, gradient = _run(scores, target, torch.ones(1, length))
    assert loss[0, 0].item() == pytest.approx(2 * math.exp(-38.0), rel=4e-6)  # 6.3e-17
    assert gradient[0, :, 0].tolist() == pytest.approx(
        [math.exp(-38.0), -2 * math.exp(-38.0), math.exp(-38.0)], rel=4e-6
    )


@pytest.mark.parametrize("length", [1, 3])
def test_what_all_scores_have_in_common_changes_no_bit(native, length: int) -> None:
    scores, target, grad = _inputs((5, 300, length), torch.float32)
    scores = (1024 * scores).round() / 1024  # to which 8192 can be added exactly
    for tau in (0.5, 1.0, 1.7):
        (loss, _, gradient), (moved, _, of_moved) = (_run(scores + shift, target, grad, tau) for shift in (0, 8192))
        assert torch.equal(loss, moved)
        assert torch.equal(gradient, of_moved)


@pytest.mark.parametrize("shape", [(2, 250_000, 1), (1, 250_000, 3)])
def test_sums_over_many_classes_stay_exact(native, shape: tuple[int, int, int]) -> None:
    scores, target, grad = _inputs(shape, torch.float32, spread=0.1)  # all classes count
    scores[:, shape[1] // 2 :] += 0.25  # the maximum rises on the way
    target.fill_(7)
    loss, statistics, gradient = _run(scores, target, grad)
    expected, exact, wanted = _exact(scores, target, grad)
    assert ((loss - expected).abs() / expected).max() <= 1e-6
    assert (statistics - exact).abs().max() <= 1e-6
    assert ((gradient - wanted).abs().amax(1) / wanted.abs().amax(1)).max() <= 1e-6
    others = gradient.double().sum(1) - gradient[:, 7].double()
    assert (others / -gradient[:, 7] - 1).abs().max() <= 1e-6  # a row's gradient sums to 0


# More rows than one thread is given, and rows that are alone
@pytest.mark.parametrize("shape", [(700, 131, 1), (3, 40_000, 1), (2, 21, 5003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(native, threads, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(_run(*_inputs(shape, dtype), 1.7))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _in_a_crowd(row: list[float], target: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The row at the second of `length` positions, between ordinary ones that must not notice."""
    scores, targets, grad = _inputs((3, len(row), length), dtype)
    targets.fill_(0)
    place = (1, min(1, length - 1))
    scores[place[0], :, place[1]] = torch.tensor(row, dtype=dtype)
    targets[place] = target
    return scores, targets, grad


# Scores, target, tau, loss, gradient for an incoming 1; NaN as a gradient: every element. In float32 and float64.
E1 = math.log1p(math.e)
SPECIAL = {
    "others_impossible": ([-INF, 2.0, -INF], 1, 1.0, 0.0, [0.0, 0.0, 0.0]),
    "others_impossible_tau_0": ([-INF, 2.0, -INF], 1, 0.0, 0.0, [0.0, 0.0, 0.0]),
    "one_impossible": ([-INF, 0.0, 1.0], 1, 1.0, E1, [0.0, -math.e / (1 + math.e), math.e / (1 + math.e)]),
    "one_impossible_tau_0": ([0.0, -INF, 0.0, 1.0], 0, 0.0, 1 + math.e, [-1 - math.e, 0.0, 1.0, math.e]),
    "target_impossible": ([-INF, 0.0, 0.0], 0, 1.0, INF, [-1.0, 0.5, 0.5]),
    "target_impossible_tau_0": ([-INF, 0.0, -INF], 0, 0.0, INF, [-INF, INF, 0.0]),
    "target_impossible_tau_2": ([-INF, 0.0, 0.0], 0, 2.0, 1.0, [0.0, 0.0, 0.0]),
    "target_infinite": ([0.0, INF, 1.0], 1, 1.0, 0.0, [0.0, 0.0, 0.0]),
    "target_infinite_tau_0": ([0.0, INF, 1.0], 1, 0.0, 0.0, [0.0, 0.0, 0.0]),
    "other_infinite": ([0.0, INF, 1.0], 2, 1.0, NAN, [NAN] * 3),
    "nan": ([0.0, 1.0, NAN], 0, 1.0, NAN, [NAN] * 3),
    "nan_first": ([NAN, 1.0, 0.0, 3.0], 3, 0.5, NAN, [NAN] * 4),
    "nan_at_the_target": ([0.0, NAN, 1.0], 1, 1.7, NAN, [NAN] * 3),
    "nan_among_impossible": ([0.0, -INF, NAN, -INF], 0, 1.0, NAN, [NAN] * 4),
    "nan_ignored": ([NAN, INF, 0.0], IGNORED, 1.0, 0.0, [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("name", list(SPECIAL))
def test_special_scores(native, name: str, length: int, dtype: torch.dtype) -> None:
    row, y, tau, expected, wanted = SPECIAL[name]
    digits = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    scores, target, grad = _in_a_crowd(row, y, length, dtype)
    grad[1] = 1.0
    loss, statistics, gradient = _run(scores, target, grad, tau)
    place = (1, min(1, length - 1))
    assert loss[place].item() == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert gradient[place[0], :, place[1]].tolist() == pytest.approx(wanted, rel=digits, nan_ok=True)
    others = torch.ones(3, length, dtype=torch.bool)
    others[place] = False
    assert loss[others].isfinite().all()
    assert gradient.movedim(1, -1)[others].isfinite().all()
    if y == IGNORED:
        assert statistics[:, place[0], place[1]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("length", [1, 3])
def test_a_class_alone_has_neither_loss_nor_gradient(native, length: int) -> None:
    scores, target, grad = (
        torch.full((2, 1, length), 3.0),
        torch.zeros(2, length, dtype=torch.int64),
        torch.ones(2, length),
    )
    for tau in (0.0, 1.0, 2.5):
        loss, statistics, gradient = _run(scores, target, grad, tau)
        assert torch.equal(loss, torch.zeros(2, length))
        assert torch.equal(gradient, torch.zeros(2, 1, length))
        assert (statistics == -INF).all()


@pytest.mark.parametrize("length", [1, 6])
def test_no_incoming_gradient_means_none_whatever_the_scores(native, length: int) -> None:
    scores, target, grad = _inputs((5, 21, length), torch.float32)
    scores[0] = NAN
    grad[:3] = 0
    gradient = _run(scores, target, grad)[2]
    assert torch.equal(gradient[:3], torch.zeros(3, 21, length))
    assert gradient[3:].abs().sum() > 0


@pytest.mark.parametrize("length", [1, 6])
def test_a_bound_on_the_weight_holds_in_loss_and_gradient(native, length: int) -> None:
    scores, target, grad = _inputs((9, 13, length), torch.float64, spread=9.0)
    for tau in (0.0, 0.5):
        found, expected = _run(scores, target, grad, tau, 1.5), _exact(scores, target, grad, tau, 1.5)
        for ours, wanted in zip(found, expected, strict=True):
            assert_close(ours, wanted, loose=4)
        assert found[2].abs().max() <= 1.5 * math.exp(1.5)  # grad is below 1.5


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tau_for_each_row(native, length: int, dtype: torch.dtype) -> None:
    scores, target, grad = _inputs((11, 13, length), dtype)
    taus = torch.linspace(0, 2.5, 11 * length, dtype=grad.dtype).reshape(11, length)
    taus.view(-1)[::3] = 1.0
    found, expected = _run(scores, target, grad, taus), _exact(scores, target, grad, taus)
    for ours, wanted in zip(found, expected, strict=True):
        assert_close(ours, wanted, loose=2)


@pytest.mark.parametrize("length", [1, 7])
def test_rows_may_be_strided_or_expanded(native, length: int) -> None:
    scores, target, _ = _inputs((12, 13, length), torch.float32)
    wide = torch.stack([target, torch.full_like(target, 10**9)], 2).flatten(1)[:, ::2]
    assert length == 1 or not wide.is_contiguous()
    tau = torch.tensor(1.7).expand(12, length)
    expanded = torch.tensor(0.25).expand(12, length)
    found = _run(scores, wide, expanded, tau)
    expected = _run(scores, target.contiguous(), expanded.contiguous(), tau.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_gradient_is_a_denormal_number(native, length: int, dtype: torch.dtype) -> None:
    """With one, each of these elements would take a hundred times as long on some processors."""
    lowest = math.log(torch.finfo(dtype).tiny)
    scores = (
        torch.linspace(1.1 * lowest, 0.5 * lowest, 4000, dtype=dtype)[None, :, None].expand(2, -1, length).contiguous()
    )
    scores[:, 5] = 0
    target = torch.full((2, length), 7)
    gradient = _run(scores, target, torch.full((2, length), 1e-4, dtype=dtype))[2].abs()
    assert gradient[gradient > 0].min() >= torch.finfo(dtype).tiny
    assert 100 < (gradient == 0).sum() // (2 * length) < 3800


@pytest.mark.parametrize("shape", [(0, 5, 1), (0, 5, 4), (3, 5, 0)])
def test_nothing_has_no_loss(native, shape: tuple[int, int, int]) -> None:
    rows = shape[0], shape[2]
    loss, statistics, gradient = _run(torch.zeros(shape), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows))
    assert (loss.shape, statistics.shape, gradient.shape) == (rows, (2, *rows), shape)


# What does not fit

X, Y, G, STATS = torch.zeros(2, 6, 5), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5), torch.zeros(2, 2, 5)
WRONG = Y.clone()
WRONG[1, 3] = 6
REST = (None, 1.0, INF, IGNORED)
CLASSES = r"target\[1, 3\] is 6, but there are 6 classes; give classes in \[0, 6\), or ignore_index, -100"
MISFITS: dict[str, tuple[Callable[[], object], str]] = {
    "class": (lambda: OPS.comp_sum(X, WRONG, *REST), CLASSES),
    "class_backward": (lambda: OPS.comp_sum_backward(G, X, WRONG, STATS, *REST), CLASSES),
    "negative_class": (lambda: OPS.comp_sum(X, Y - 1, *REST), r"target\[0, 0\] is -1, but there are 6 classes"),
    "axes": (lambda: OPS.comp_sum(X[0], Y, *REST), r"scores must be \[B, C, S\] with C >= 1, got 2 axes"),
    "no_class": (lambda: OPS.comp_sum(X[:, :0], Y, *REST), r"got 3 axes and no class"),
    "strides": (lambda: OPS.comp_sum(X.transpose(1, 2), Y[:, :1].expand(2, 6), *REST), "scores must be contiguous"),
    "dtype": (lambda: OPS.comp_sum(X.int(), Y, *REST), "expected a tensor of float64, float32, bfloat16 or float16"),
    "target": (lambda: OPS.comp_sum(X, Y[:, :4], *REST), r"target must be \[B, S\] with the samples and positions"),
    "target_dtype": (lambda: OPS.comp_sum(X, Y.int(), *REST), "target must be .* and int64"),
    "taus": (lambda: OPS.comp_sum(X, Y, G.double(), *REST[1:]), "taus must be .* and of the compute dtype"),
    "grad": (lambda: OPS.comp_sum_backward(G[:1], X, Y, STATS, *REST), r"grad must be \[B, S\] with the samples"),
    "statistics": (
        lambda: OPS.comp_sum_backward(G, X, Y, STATS[:1], *REST),
        r"statistics must be \[2, B, S\] as the forward left them",
    ),
}


@pytest.mark.parametrize("name", list(MISFITS))
def test_what_does_not_fit_is_said(native, name: str) -> None:
    call, message = MISFITS[name]
    with pytest.raises(RuntimeError, match=message):
        call()
