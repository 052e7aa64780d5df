"""EvoNorm in the CPU library: what only this implementation has. That it equals the formulas: tests/norms."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zoo.norms.evonorm.ops
from tests._numerics import assert_close, rms_ratio
from zoo.kernels import cpu, sources, use_cpu_library
from zoo.norms.evonorm import eager

OPS = torch.ops.zoo
assert zoo.norms.evonorm.ops  # which defines them
SOURCE = Path(__file__).parent / "conversions/sigmoid.cpp"
TYPES = {"float": torch.float32, "double": torch.float64, "bf16": torch.bfloat16, "half": torch.float16}
EPS = 1e-3


# The vectors' functions, for every instruction set this processor has: each has code of its own


@pytest.fixture(scope="module", params=cpu.levels())
def vectors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("sigmoid") / f"{request.param}.so"
    march = [f"-march={request.param}"] if platform.machine() == "x86_64" else []
    command = ["g++", "-std=c++20", "-O2", "-Wno-psabi", "-fPIC", "-shared", *march, f"-I{sources.folder()}"]
    subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _sigmoid(vectors: ctypes.CDLL, values: Tensor) -> Tensor:
    result = torch.full_like(values, -1.0)
    name = "float" if values.dtype is torch.float32 else "double"
    getattr(vectors, f"sigmoid_{name}")(_pointer(values), _pointer(result), ctypes.c_int64(values.numel()))
    return result


def test_the_sigmoid_of_a_float_is_within_two_places_everywhere(vectors: ctypes.CDLL) -> None:
    bits = torch.arange(0, 2**32, 1021, dtype=torch.int64).to(torch.int32)  # every exponent and both signs
    dense = torch.linspace(-110, 20, 2_000_001)
    values = torch.cat([bits.view(torch.float32), dense])
    values = values[~values.isnan()]
    ours, exact = _sigmoid(vectors, values).double(), torch.sigmoid(values.double())
    place = (2.0 ** (exact.log2().floor() - 23)).clamp_min(2.0**-149)  # of a denormal number: the smallest one
    assert ((ours - exact).abs() / place).max() <= 2


def test_the_sigmoid_of_a_double_is_within_a_place(vectors: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(400_000, generator=generator, dtype=torch.float64)
    values = torch.cat([1400 * spread - 700, 80 * spread - 60, spread - 0.5])
    ours = _sigmoid(vectors, values)
    exact = _exact_sigmoid(values)
    assert ((ours - exact[0]) - exact[1]).abs().div(exact[0]).max() <= 3e-16


def _exact_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """As a sum of two doubles, from the 64 bits that numpy's long double has on this processor."""
    numpy = pytest.importorskip("numpy")
    if numpy.finfo(numpy.longdouble).nmant < 63:
        pytest.skip("needs a long double wider than a double")
    wide = x.numpy().astype(numpy.longdouble)
    small = numpy.exp(-numpy.abs(wide))
    exact = numpy.where(wide < 0, small, 1) / (1 + small)
    high = exact.astype(numpy.float64)
    return torch.from_numpy(high), torch.from_numpy((exact - high).astype(numpy.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sigmoid_has_limits_and_keeps_a_nan(vectors: ctypes.CDLL, dtype: torch.dtype) -> None:
    inf, largest = float("inf"), torch.finfo(dtype).max
    values = torch.tensor([-inf, inf, -largest, largest, 0.0, -0.0, float("nan")], dtype=dtype)
    expected = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5, float("nan")], dtype=dtype)
    assert torch.equal(_sigmoid(vectors, values).nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("name", list(TYPES))
def test_what_exists_is_the_start_of_a_row(vectors: ctypes.CDLL, name: str) -> None:
    lanes = 8 if name == "double" else 16
    for count in range(1, lanes):
        found = torch.full((lanes,), -1.0, dtype=TYPES[name])
        getattr(vectors, f"exist_{name}")(ctypes.c_int(count), _pointer(found))
        assert found.tolist() == [1.0] * count + [0.0] * (lanes - count)


@pytest.mark.parametrize("name", list(TYPES))
def test_parameters_meet_the_elements_they_belong_to(vectors: ctypes.CDLL, name: str) -> None:
    dtype = TYPES[name]
    numbers = torch.arange(8 if name == "double" else 16, dtype=torch.float64 if name == "double" else torch.float32)
    found = torch.zeros(len(numbers), dtype=dtype)
    getattr(vectors, f"placed_{name}")(_pointer(numbers), _pointer(found))
    assert torch.equal(found, numbers.to(dtype))


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


def _planes(t: Tensor, channels_last: bool) -> Tensor:
    """[N, C, L] from or to the layout of an op."""
    return t.transpose(1, 2).contiguous() if channels_last else t


def _numbers(x: Tensor) -> list[Tensor]:
    """For x [N, C, L]: v [C], weight, bias and pull [N, C], centre and batch_pull [C]."""
    generator = torch.Generator().manual_seed(1)
    samples, channels = x.shape[:2]
    shapes = ((channels,), *[(samples, channels)] * 3, (channels,), (channels,))
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    numbers[1] = 1 + numbers[1] / 4
    return [t.double() if x.dtype is torch.float64 else t for t in numbers]


def _all_ops(x: Tensor, grad: Tensor, groups: int, variant: int, channels_last: bool, *, rms: bool) -> list[Tensor]:
    """Outputs of the six ops on [N, C, L], those with pixels in that order again."""
    v, weight, bias, pull, centre, batch_pull = _numbers(x)
    x, grad = _planes(x, channels_last), _planes(grad, channels_last)
    y, stats = OPS.evonorm_s(x, v, weight, bias, groups, EPS, rms, False, channels_last)
    dx, *gradients = OPS.evonorm_s_backward(grad, x, v, weight, stats, EPS, rms, False, channels_last)
    moments = OPS.evonorm_moments(x, channels_last)
    left = (eager.batch_moments(moments)[1] + EPS).sqrt()
    slope = v if variant == 0 else None
    layer = (slope, weight, bias, moments, left, EPS, variant, channels_last)
    normed = OPS.evonorm_b_apply(x, *layer)
    layer = (slope, weight, moments, left)
    sums = OPS.evonorm_b_sums(grad, x, *layer, EPS, variant, channels_last)
    db = OPS.evonorm_b_grad(grad, x, *layer, centre, pull, batch_pull, EPS, variant, channels_last)
    pixels = [_planes(t, channels_last) for t in (y, dx, normed, db)]
    return [*pixels, stats, *gradients, moments, sums]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, and a cotangent along it: sums that cancel would say nothing."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return x.to(dtype), (noise + x + 1).to(dtype)


# Tasks of several rows and tiles, one sample and several, a short last row
@pytest.mark.parametrize("shape", [(1, 24, 5003), (3, 40, 1999), (5, 144, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_number_of_threads_changes_no_bit(
    native, threads, shape: tuple[int, int, int], channels_last: bool
) -> None:
    x, grad = _inputs(shape, torch.float32)
    results = []
    for count in (1, 2, 4):
        threads(count)
        results.append(_all_ops(x, grad, 8, 0, channels_last, rms=False))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Channels that fill vectors, that do so two, four or sixteen pixels together, and that never do; pixels left over
LAYOUT_SHAPES = [(2, 64, 49), (2, 24, 9), (3, 40, 5), (1, 7, 37), (2, 147, 6), (2, 12, 1), (1, 1, 100), (2, 8, 4100)]


@pytest.mark.parametrize("dtype", list(TYPES.values()), ids=str)
@pytest.mark.parametrize("shape", LAYOUT_SHAPES)
def test_both_layouts_are_the_closed_form(native, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, grad = _inputs(shape, dtype)
    groups = next(g for g in (8, 7, 4, 3, 1) if shape[1] % g == 0)
    for variant, rms in ((0, False), (1, True), (2, False)):
        contiguous, last = (
            _all_ops(x, grad, groups, variant, channels_last, rms=rms) for channels_last in (False, True)
        )
        for k, (a, b) in enumerate(zip(contiguous, last, strict=True)):
            assert_close(a, b.double(), loose=4 if dtype is torch.float32 and k > 3 else 2)
        parameters = [t.double() for t in _numbers(x)[:3]]
        y, stats = eager.evonorm_s_forward(x.double(), *parameters, groups, EPS, rms, False, False)
        assert_close(contiguous[0], y)
        assert_close(contiguous[4], stats)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mean", [1e4, -3e4])
def test_a_mean_of_ten_thousand_deviations_costs_no_digits(native, mean: float, channels_last: bool) -> None:
    x = _inputs((2, 6, 3000), torch.float32)[0] + mean
    moments = OPS.evonorm_moments(_planes(x, channels_last), channels_last)
    exact = x.double()
    assert rms_ratio(moments[1], exact.var(-1, correction=0)) < 2e-6
    assert (moments[0] - exact.mean(-1)).abs().max() <= abs(mean) * 2.0**-24
    stats = OPS.evonorm_s(_planes(x, channels_last), None, None, None, 3, 0.0, False, True, channels_last)[1]
    assert rms_ratio(stats[1], exact.view(2, 3, -1).std(-1, correction=0).reciprocal()) < 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_the_centre_is_guessed_from_may_differ_from_the_rest(native, channels_last: bool) -> None:
    x = _inputs((1, 3, 4096), torch.float32)[0] + 1e3
    x[..., ::128] = 0  # the pixels that are looked at
    x[..., :32] = 0
    moments = OPS.evonorm_moments(_planes(x, channels_last), channels_last)
    assert rms_ratio(moments[1], x.double().var(-1, correction=0)) < 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_over_large_maps_stay_exact(native, channels_last: bool) -> None:
    x, grad = _inputs((1, 2, 400_000), torch.float32)
    grad = grad.abs()
    arguments = (None, None)
    stats = OPS.evonorm_s(_planes(x, channels_last), None, None, None, 1, EPS, False, False, channels_last)[1]
    found = OPS.evonorm_s_backward(
        _planes(grad, channels_last), _planes(x, channels_last), *arguments, stats, EPS, False, False, channels_last
    )
    exact = eager.evonorm_s_backward(grad.double(), x.double(), *arguments, stats.double(), EPS, False, False, False)
    assert rms_ratio(_planes(found[0], channels_last), exact[0]) < 2e-7
    for ours, expected in zip(found[1:], exact[1:], strict=True):
        assert rms_ratio(ours, expected) < 2e-7


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_nan_stays_in_its_group_and_channel(native, channels_last: bool) -> None:
    x, grad = _inputs((2, 8, 21), torch.float32)
    x[0, 3, 20] = float("nan")  # in the last, shorter vector of a row
    flat = (_planes(x, channels_last), _planes(grad, channels_last))
    y, stats = OPS.evonorm_s(flat[0], None, None, None, 4, EPS, False, False, channels_last)
    dx, _, dweight, _ = OPS.evonorm_s_backward(*flat[::-1], None, None, stats, EPS, False, False, channels_last)
    group = torch.zeros(2, 8, 21, dtype=torch.bool)
    group[0, 2:4] = True
    assert torch.equal(_planes(y, channels_last).isnan(), group)
    assert torch.equal(_planes(dx, channels_last).isnan(), group)
    assert dweight.isnan().tolist() == [False, False, True, True, False, False, False, False]
    moments = OPS.evonorm_moments(flat[0], channels_last)
    assert moments.isnan().any(0).nonzero().tolist() == [[0, 3]]
    layer = (flat[0], None, None, moments, torch.ones(8), EPS, 0, channels_last)
    sums = OPS.evonorm_b_sums(flat[1], *layer)
    assert sums[:4].isnan().any(0).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_both_sides_of_a_tie_get_half(native, variant: int, channels_last: bool) -> None:
    x, grad = torch.zeros(2, 3, 21), torch.ones(2, 3, 21)
    moments, left = torch.zeros(2, 2, 3), torch.full((3,), 0.25).sqrt()
    arguments = (None, None, moments, left)
    flat = (_planes(grad, channels_last), _planes(x, channels_last))
    zeros = (torch.zeros(3), torch.zeros(2, 3), torch.zeros(3))
    dx = OPS.evonorm_b_grad(*flat, *arguments, *zeros, 0.25, variant, channels_last)
    assert torch.equal(dx, torch.full_like(dx, 2.0))  # h / D: e itself is 0 where x is
    # Off zero, where e is not: x is small beside the left side, and the mean square that of the tie.
    x = torch.full((2, 3, 21), 0.5)
    moments[1] = {0: 0.0, 1: 0.0, 2: 0.75}[variant]
    left = {0: 0.5 + 0.5, 1: 1.5 * 0.5, 2: 1.0 - 0.5}[variant] * torch.ones(3)
    sums = OPS.evonorm_b_sums(
        flat[0], _planes(x, channels_last), None, None, moments, left, 0.25, variant, channels_last
    )
    right_of_b1 = sums[0] / 1.5 if variant == 1 else sums[0]
    torch.testing.assert_close(right_of_b1, sums[1])
    torch.testing.assert_close(sums[1] + right_of_b1, -21 * 0.5 / left.square().expand(2, 3))


# What does not fit

X = torch.zeros(2, 6, 5)
NUMBERS = torch.zeros(2, 2, 6)
MISFITS = {
    "axes": (
        lambda: OPS.evonorm_moments(X[0], False),
        r"x must be \[N, C, L\], or \[N, L, C\] with channels_last, got 2",
    ),
    "strides": (lambda: OPS.evonorm_moments(X.transpose(1, 2), True), "x must be contiguous"),
    "dtype": (
        lambda: OPS.evonorm_moments(X.long(), False),
        "expected a tensor of float64, float32, bfloat16 or float16",
    ),
    "groups": (
        lambda: OPS.evonorm_s(X, None, None, None, 4, EPS, False, False, False),
        "groups must divide the 6 channels of x, got 4",
    ),
    "v": (
        lambda: OPS.evonorm_s(X, torch.ones(5), None, None, 2, EPS, False, False, False),
        r"v must be \[C\] with the 6 channels and 2 samples of x",
    ),
    "v_of_samples": (
        lambda: OPS.evonorm_s(X, torch.ones(2, 6), None, None, 2, EPS, False, False, False),
        r"v must be \[C\] with the 6 channels",
    ),
    "weight": (
        lambda: OPS.evonorm_s(X, None, torch.ones(3, 6), None, 2, EPS, False, False, False),
        r"weight must be \[C\] or \[N, C\] with the 6 channels and 2 samples of x",
    ),
    "bias": (
        lambda: OPS.evonorm_s(X, None, None, torch.ones(6, 2).t(), 2, EPS, False, False, False),
        "bias must be contiguous",
    ),
    "grad": (
        lambda: OPS.evonorm_s_backward(X[:1], X, None, None, torch.ones(2, 2, 2), EPS, False, False, False),
        "grad must be shaped and typed like x",
    ),
    "stats": (
        lambda: OPS.evonorm_s_backward(X, X, None, None, torch.ones(2, 2, 4), EPS, False, False, False),
        r"stats must be \[2, N, groups\], with groups that divide the 6 channels of x",
    ),
    "stats_dtype": (
        lambda: OPS.evonorm_s_backward(X, X, None, None, torch.ones(2, 2, 2).double(), EPS, False, False, False),
        "stats must hold numbers of the compute dtype",
    ),
    "moments": (
        lambda: OPS.evonorm_b_apply(X, None, None, None, NUMBERS[:, :1], torch.ones(6), EPS, 0, False),
        "moments must",
    ),
    "left": (
        lambda: OPS.evonorm_b_sums(X, X, None, None, NUMBERS, torch.ones(5), EPS, 0, False),
        "left must hold numbers of the compute dtype for every sample, channel or group of x",
    ),
    "pull": (
        lambda: OPS.evonorm_b_grad(
            X, X, None, None, NUMBERS, torch.ones(6), torch.ones(6), torch.ones(6), torch.ones(6), EPS, 0, False
        ),
        "pull must hold numbers",
    ),
    "variant": (
        lambda: OPS.evonorm_b_apply(X, None, None, None, NUMBERS, torch.ones(6), EPS, 3, False),
        "variant must be 0, 1 or 2, got 3",
    ),
}


@pytest.mark.parametrize("name", list(MISFITS))
def test_what_does_not_fit_is_said(native, name: str) -> None:
    call, message = MISFITS[name]
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0)])
def test_nothing_gives_gradients_of_zero(native, shape: tuple[int, int, int], channels_last: bool) -> None:
    x = _planes(torch.zeros(shape), channels_last)
    y, stats = OPS.evonorm_s(x, None, None, None, 2, EPS, False, False, channels_last)
    assert y.shape == x.shape
    assert stats.shape == (2, shape[0], 2)
    dx, *gradients = OPS.evonorm_s_backward(x, x, torch.ones(6), None, stats, EPS, False, False, channels_last)
    assert dx.shape == x.shape
    assert all(torch.equal(t, torch.zeros(6)) for t in gradients)
    moments = OPS.evonorm_moments(x, channels_last)
    sums = OPS.evonorm_b_sums(x, x, None, None, moments, torch.ones(6), EPS, 0, channels_last)
    assert torch.equal(sums, torch.zeros(5, shape[0], 6))
