"""Comp-sum losses in the CPU library: what only this implementation has. That it equals the formulas: tests/losses."""

from __future__ import annotations

import ctypes
import decimal
import math
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zoo.losses.comp_sum.ops
from tests._numerics import assert_close
from tests.losses import decimal_oracle
from zoo.kernels import cpu, sources, use_cpu_library
from zoo.losses.comp_sum import eager
from zoo.losses.comp_sum.reference import comp_sum_reference

OPS = torch.ops.zoo
assert zoo.losses.comp_sum.ops  # which defines them
CONVERSIONS = Path(__file__).parent / "conversions"
# The exponential, and what only the numbers of a row are made of
SOURCE = '#include "exponential.cpp"\n' + "".join(
    f'extern "C" void {name}_{type}(const {type}* from, {type}* to, std::int64_t count) {{\n'
    f"  cpu::for_each_vector<{type}, 1>(0, count, [&](std::int64_t j, auto some, int) {{\n"
    f"    cpu::store(to + j, cpu::{name}(cpu::load(from + j, some)), some);\n  }});\n}}\n"
    for name in ("exponential_minus_one", "log_one_plus", "logarithm")
    for type in ("float", "double")
)
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
    source = path.with_suffix(".cpp")
    source.write_text(SOURCE)
    march = [f"-march={request.param}"] if platform.machine() == "x86_64" else []
    command = ["g++", "-std=c++20", "-O2", "-Wno-psabi", "-fPIC", "-shared", *march, f"-I{sources.folder()}"]
    subprocess.run([*command, f"-I{CONVERSIONS}", str(source), "-o", str(path)], check=True)
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


def _applied(vectors: ctypes.CDLL, name: str, values: Tensor) -> Tensor:
    result = torch.full_like(values, -7.0)
    function = getattr(vectors, f"{name}_{'float' if values.dtype is torch.float32 else 'double'}")
    function(_pointer(values), _pointer(result), ctypes.c_int64(values.numel()))
    return result


# Arguments over which the result keeps its relative precision. The logarithm of a sum is one of a number from 1 on.
_SPREAD = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FUNCTIONS = {
    "exponential_minus_one": torch.cat([100 * _SPREAD - 20, 2 * _SPREAD - 1, (_SPREAD - 0.5) * 2.0 ** (-80 * _SPREAD)]),
    "log_one_plus": torch.cat([_SPREAD, 2.0 ** (-120 * _SPREAD), _SPREAD.new_tensor([0.0, 1.0])]),
    "logarithm": torch.cat([1 + _SPREAD, 2.0 ** (120 * _SPREAD), 2.0 ** (-120 * _SPREAD) / 1.5]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions_of_a_row_are_within_four_places(vectors: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    numpy = pytest.importorskip("numpy")
    if numpy.finfo(numpy.longdouble).nmant < 63:
        pytest.skip("needs a long double wider than a double")
    values = FUNCTIONS[name].to(dtype)
    values = values[values <= 88] if dtype is torch.float32 else values
    wide = values.numpy().astype(numpy.longdouble)
    function = {"exponential_minus_one": numpy.expm1, "log_one_plus": numpy.log1p, "logarithm": numpy.log}[name]
    exact = function(wide)
    error = numpy.abs(_applied(vectors, name, values).numpy() - exact)
    assert (error <= 4 * torch.finfo(dtype).eps * numpy.abs(exact)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions_of_a_row_have_limits_and_keep_a_nan(vectors: ctypes.CDLL, dtype: torch.dtype) -> None:
    overflow, largest = math.log(torch.finfo(dtype).max), torch.finfo(dtype).max
    for name, values in {
        "exponential_minus_one": {0.0: 0.0, -INF: -1.0, -1e4: -1.0, INF: INF, 1e4: INF, 1.0001 * overflow: INF},
        "log_one_plus": {0.0: 0.0},
        "logarithm": {1.0: 0.0, 0.0: -INF, INF: INF, largest: overflow},
    }.items():
        found = _applied(vectors, name, torch.tensor([*values, NAN], dtype=dtype))
        assert found.tolist() == pytest.approx([*values.values(), NAN], rel=1e-7, abs=0, nan_ok=True)


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


# Margins of a target over the others, up to where exp(-margin) is no normal number; relative precision for each
MARGINS = (0.0, 2.0**-20, -(2.0**-20), 0.125, -0.125)
PRECISE = {torch.float64: (745, 1e-13, 1e-12), torch.float32: (103, 4e-6, 4e-5)}


@pytest.mark.parametrize("dtype", list(PRECISE), ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7, 3.0])
def test_every_margin_has_the_digits_of_its_loss_and_gradient(
    native, monkeypatch, tau: float, dtype: torch.dtype
) -> None:
    # 1 + exp(-745) takes more digits than the 60 of the other tests
    monkeypatch.setattr(decimal_oracle, "_CONTEXT", decimal.Context(prec=350, Emax=10**9, Emin=-(10**9)))
    furthest, of_loss, of_gradient = PRECISE[dtype]
    margins = torch.tensor([*MARGINS, *(furthest * (k / 40) for k in range(-40, 41))], dtype=dtype)
    rows = torch.stack([margins, torch.zeros_like(margins), torch.full_like(margins, -0.75)], 1)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    for scores in (rows[..., None], rows.T[None].contiguous()):  # along the classes, and across
        target = torch.zeros_like(scores[:, 0], dtype=torch.int64)
        loss, _, gradient = _run(scores, target, torch.ones_like(scores[:, 0]), tau)
        found = zip(rows.tolist(), loss.view(-1).tolist(), gradient.movedim(1, -1).reshape(-1, 3).tolist(), strict=True)
        for row, value, slopes in found:
            exact = decimal_oracle.comp_sum(row, 0, tau)
            expected, *wanted = map(decimal_oracle.as_float, (exact[0], *exact[1]))
            expected, *wanted = (math.copysign(INF, v) if abs(v) > largest else v for v in (expected, *wanted))
            assert value == pytest.approx(expected, rel=of_loss, abs=2 * smallest), row
            assert slopes == pytest.approx(wanted, rel=of_gradient, abs=2 * smallest), row


# Rows are computed in blocks of 128, and the scores of short ones in groups


def _with_taus(
    classes: int, rows: int, across: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of rows along the classes or across them, and a tau for each."""
    scores, target, grad = _inputs((1, classes, rows) if across else (rows, classes, 1), dtype, spread=4.0)
    taus = torch.linspace(0, 2.5, rows, dtype=grad.dtype).reshape(target.shape)
    taus.view(-1)[::3] = 1.0
    return scores, target, grad, taus


def _of_rows(at: slice, across: bool, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [(t[..., at] if across else t[at]).contiguous() for t in tensors]


def _results(scores: Tensor, target: Tensor, grad: Tensor, taus: Tensor) -> list[Tensor]:
    """Loss, m, log E and gradient, with a bound on the weight that holds back some rows."""
    loss, statistics, gradient = _run(scores, target, grad, taus, 1.5)
    return [loss, *statistics, gradient]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
@pytest.mark.parametrize(
    ("classes", "rows"), [*((5, rows) for rows in (2, 63, 64, 65, 127, 128, 129, 260)), (100, 130), (3000, 5)]
)
def test_rows_beside_it_change_no_bit_of_a_row(
    native, classes: int, rows: int, across: bool, dtype: torch.dtype
) -> None:
    inputs = _with_taus(classes, rows, across, dtype)
    together = _results(*inputs)
    some = 2 if across else 1  # a position alone would be a row along the classes
    for first in (*range(0, rows - some, some), rows - some):
        at = slice(first, first + some)
        alone = _results(*_of_rows(at, across, inputs))
        assert all(map(torch.equal, alone, _of_rows(at, across, together)))


@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
def test_rows_without_a_number_change_no_bit_of_others(native, across: bool) -> None:
    rows, classes = 131, 21
    inputs = scores, target, grad, taus = _with_taus(classes, rows, across)
    before = _results(*inputs)
    lines = scores[0].T if across else scores[..., 0]
    mad, mute = (0, 3, 62, 65, 127, 128, 130), (1, 126)
    for row, value in zip(mad, (NAN, INF, -INF, NAN, INF, NAN, NAN), strict=True):
        lines[row, row % 3 :] = value
    lines[mad[-1]], taus.view(-1)[mad[3]], grad.view(-1)[mad[4]] = 0.0, NAN, NAN
    ignored = target.view(-1) == IGNORED
    for numbers in (lines, taus.view(-1), grad.view(-1)):
        numbers[ignored] = NAN
    grad.view(-1)[list(mute)] = 0.0
    after = _results(*inputs)
    others = [row for row in range(rows) if row not in (*mad, *mute)]
    for old, new in zip(before, after, strict=True):
        old, new = (t.movedim(-1, 0).flatten(1) if across else t.flatten(1) for t in (old, new))
        assert torch.equal(old[others], new[others])
    silent = after[-1].movedim(1, -1).reshape(rows, classes)[list(mute)]
    assert torch.equal(silent, torch.zeros_like(silent))


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


@pytest.mark.parametrize("length", [1, 4])
def test_an_impossible_target_among_taus_of_their_own(native, length: int) -> None:
    scores = torch.tensor([-INF, 0.0, 0.0]).expand(3, -1)[..., None].repeat(1, 1, length)
    taus = torch.tensor([[1.0], [2.0], [1.5]]).repeat(1, length)
    target, grad = torch.zeros(3, length, dtype=torch.int64), torch.ones(3, length)
    loss, _, gradient = _run(scores, target, grad, taus)
    for place in range(length):
        assert loss[:, place].tolist() == [INF, 1.0, 2.0]
        wanted = torch.tensor([[-1.0, 0.5, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(gradient[..., place], wanted, rtol=1e-6, atol=0)


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
