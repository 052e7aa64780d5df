"""The emulator computes what a GPU would, under every schedule, and reports what a kernel gets wrong."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from zoo.kernels.emulate import EmulatorBuildError, EmulatorError, Library, build

INCLUDE = Path(__file__).parents[2] / "cuda_kernels"
SOURCE = Path(__file__).parent / "emulator/selftest.cu"
ASCENDING, DESCENDING, SHUFFLED = 0, 1, 2
SCHEDULES = [(ASCENDING, 1), (DESCENDING, 1), (SHUFFLED, 1), (SHUFFLED, 2)]
IDS = ["ascending", "descending", "shuffled-1", "shuffled-2"]


@dataclass(frozen=True)
class Launcher:
    """Launches under one schedule; arrays go as pointers, plain integers as int, what is ctypes already as it is."""

    library: Library
    schedule: int = ASCENDING
    seed: int = 1

    def __call__(
        self, name: str, grid: tuple[int, ...] | int, block: tuple[int, ...] | int, *arguments, shared: int = 0
    ) -> None:
        converted = [
            ctypes.c_void_p(argument.ctypes.data)
            if isinstance(argument, np.ndarray)
            else ctypes.c_int(argument)
            if isinstance(argument, int)
            else argument
            for argument in arguments
        ]
        self.library.launch(
            name, _triple(grid), _triple(block), shared, converted, schedule=self.schedule, seed=self.seed
        )


def _triple(size: tuple[int, ...] | int) -> tuple[int, int, int]:
    x, y, z = (*((size,) if isinstance(size, int) else size), 1, 1)[:3]
    return x, y, z


# ---- kernels that are right; scripts/sanitize_kernels.py runs these functions too ----


def block_sum(launch: Launcher) -> None:
    x, out = np.random.default_rng(0).integers(-1000, 1000, 1000).astype(np.float64), np.zeros(1)
    launch("block_sum", 2, 512, x, out, x.size)
    assert out[0] == x.sum()


def block_scan(launch: Launcher) -> None:
    for size in (1, 33, 100, 1024):
        x = np.random.default_rng(size).integers(-9, 9, size, dtype=np.int32)
        y = np.zeros_like(x)
        launch("block_scan", 1, size, x, y)
        np.testing.assert_array_equal(y, np.cumsum(x))


def warp_votes(launch: Launcher) -> None:
    x = np.random.default_rng(0).integers(0, 2, (6, 32), dtype=np.int32)
    x[1], x[4] = 0, 1
    out, y = np.zeros((6, 3), dtype=np.uint32), np.zeros_like(x)
    launch("warp_votes", 2, 96, x, out, y)
    ballots = [sum(int(bit) << lane for lane, bit in enumerate(row)) for row in x]
    np.testing.assert_array_equal(out, np.stack([ballots, x.any(1), x.all(1)], 1))
    right = np.concatenate([x[:, 1:], x[:, -1:]], 1)
    assert {*y[:, :-1].ravel() // 1000} == {0}
    np.testing.assert_array_equal(y % 1000, right)


def block_votes(launch: Launcher) -> None:
    threads, rounds = 70, 75
    for leave in (threads, 67, 40):
        out = np.full((threads, rounds, 3), -1, dtype=np.int32)
        launch("block_votes", 1, threads, out, rounds, ctypes.c_uint(leave))
        yes = np.minimum(np.arange(rounds), leave)
        np.testing.assert_array_equal(
            out[:leave], np.broadcast_to(np.stack([yes, yes == leave, yes > 0], 1), (leave, rounds, 3))
        )
        assert (out[leave:] == -1).all()


def histogram(launch: Launcher) -> None:
    bins = 10
    x, counts = np.random.default_rng(0).integers(0, bins, 1000, dtype=np.int32), np.zeros(bins, dtype=np.uint32)
    launch("histogram", 3, 40, x, counts, x.size, bins, shared=4 * bins)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=bins))


def atomics(launch: Launcher) -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, 90, dtype=np.int32)
    state = np.array([10**6, -(10**6), 2**31 - 1, 0, -1, 0, 0, -(10**6)], dtype=np.int32)
    wide, single = np.array([1, 0, 2**64 - 1], dtype=np.uint64), np.zeros(1, dtype=np.float32)
    launch("atomics", 2, 45, x, state, wide, single)
    assert [*state[:2], state[7]] == [x.min(), x.max(), x.max()]
    assert state[2] == (2**31 - 1 + int(x.sum()) + 2**31) % 2**32 - 2**31  # wraps around
    assert [*state[3:5]] == [np.bitwise_or.reduce(x), np.bitwise_and.reduce(x)]
    assert state[6] in x
    assert state[5] + state[6] == x.sum()
    assert [int(value) for value in wide] == [90 * 2**32 + 1, 2 ** int((x & 63).max()), 2 ** int((x & 63).min())]
    assert single[0] == 90


def reverse(launch: Launcher) -> None:
    x = np.arange(300, dtype=np.float32)
    y = np.zeros_like(x)
    launch("reverse", 3, 100, x, y, shared=400)
    np.testing.assert_array_equal(y.reshape(3, 100), x.reshape(3, 100)[:, ::-1])


def partial_warp_sum(launch: Launcher) -> None:
    for size in (1, 31, 32, 33, 90):
        x = np.random.default_rng(size).integers(0, 100, size, dtype=np.int32)
        out = np.zeros(-(-size // 32), dtype=np.int32)
        launch("partial_warp_sum", 1, size, x, out)
        np.testing.assert_array_equal(out, np.add.reduceat(x, np.arange(0, size, 32)))


def split_warp(launch: Launcher) -> None:
    x = np.random.default_rng(0).integers(0, 100, 32, dtype=np.int32)
    y = np.zeros_like(x)
    launch("split_warp", 1, 32, x, y)
    np.testing.assert_array_equal(y, np.tile([x[::2].sum(), x[1::2].max()], 16))


def coordinates(launch: Launcher) -> None:
    grid, block = (2, 3, 4), (5, 2, 3)
    out = np.zeros((24 * 30, 12), dtype=np.uint32)
    launch("coordinates", grid, block, out)
    expected = [
        (tx, ty, tz, bx, by, bz, *block, *grid)
        for bz, by, bx in np.ndindex(grid[::-1])
        for tz, ty, tx in np.ndindex(block[::-1])
    ]
    np.testing.assert_array_equal(out, expected)


def shuffle_widths(launch: Launcher) -> None:
    x = np.random.default_rng(0).normal(size=32)
    for width in (1, 2, 8, 16, 32):
        for operand in (0, 1, 3, 8, 17, 31, 33, -1):
            out = np.zeros((32, 4))
            launch("shuffle_widths", 1, 32, x, out, operand, width)
            np.testing.assert_array_equal(out, [x[_sources(lane, operand, width)] for lane in range(32)])


def _sources(lane: int, operand: int, width: int) -> list[int]:
    """The lanes that shfl, shfl_up, shfl_down and shfl_xor read, by the CUDA guide's rules for segments."""
    segment, offset = range(lane // width * width, lane // width * width + width), operand % 32
    up, down, xor = lane - offset, lane + offset, lane ^ offset
    return [
        segment[operand % width],
        up if up in segment else lane,
        down if down in segment else lane,
        xor if xor < segment.stop else lane,  # an earlier segment may be read, a later one may not
    ]


def intrinsics(launch: Launcher) -> None:
    out = np.zeros(16, dtype=np.float32)
    launch("intrinsics", 1, 1, ctypes.c_uint(0x00010100), ctypes.c_float(2.5), out)
    exact = [2, 3, 9, 15, 32, 2.5, -2.5, 2.5**-0.5, 2.5 / 3, math.exp(2.5), math.log(2.5), 2**2.5, 3.5, 2.5**-0.5]
    alignments = 8 + 4 + 16 + 16 + 8 + 16 + 8 + 4 + 16
    np.testing.assert_allclose(out, [*exact, (4 + 2 + 3) + 2 + (2 + 4) + (2 + 3 + 4), alignments], rtol=2e-7)


class Affine(ctypes.Structure):
    _fields_ = [("slope", ctypes.c_double), ("offset", ctypes.c_float)]


def affine(launch: Launcher) -> None:
    x, y = np.arange(50, dtype=np.float32), np.zeros(50)
    launch("affine", 2, 32, x, y, Affine(2.0, 0.5), ctypes.c_longlong(50))
    np.testing.assert_array_equal(y, 2.0 * x + 0.5)
    launch("affine", 2, 32, x, ctypes.c_void_p(None), Affine(2.0, 0.5), ctypes.c_longlong(50))


def finds_poison(launch: Launcher) -> None:
    """Shared memory starts as NaN in every block, whatever the block before has left there."""
    out = np.zeros((5, 2), dtype=np.int32)
    launch("finds_poison", 5, 4, out, shared=16)
    assert out.all()


RIGHT: tuple[Callable[[Launcher], None], ...] = (
    block_sum,
    block_scan,
    warp_votes,
    block_votes,
    histogram,
    atomics,
    reverse,
    partial_warp_sum,
    split_warp,
    coordinates,
    shuffle_widths,
    intrinsics,
    affine,
    finds_poison,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator with")
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library(build(SOURCE, include=INCLUDE, folder=folder))


@pytest.fixture(scope="module")
def launch(library: Library) -> Launcher:
    return Launcher(library)


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES, ids=IDS)
@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_right_kernels_are_right_under_every_schedule(
    library: Library, check: Callable[[Launcher], None], schedule: int, seed: int
) -> None:
    check(Launcher(library, schedule, seed))


# ---- schedules ----


def _turns(library: Library, schedule: int, seed: int = 1) -> np.ndarray:
    """[rounds, blocks * threads] the order in which the threads ran."""
    order, counter = np.full((2, 4 * 70), -1, dtype=np.int32), np.zeros(2, dtype=np.int32)
    Launcher(library, schedule, seed)("turns", 4, 70, order, counter, 2)
    return order


def test_ascending_and_descending_are_what_they_say(library: Library) -> None:
    threads = np.arange(4 * 70)
    np.testing.assert_array_equal(_turns(library, ASCENDING), [threads, threads])
    np.testing.assert_array_equal(_turns(library, DESCENDING), [threads[::-1], threads[::-1]])


def test_shuffled_is_a_new_order_each_round_and_the_seed_decides_it(library: Library) -> None:
    turns = _turns(library, SHUFFLED, 1)
    np.testing.assert_array_equal(np.sort(turns), [np.arange(4 * 70)] * 2)
    np.testing.assert_array_equal(turns, _turns(library, SHUFFLED, 1))
    other = _turns(library, SHUFFLED, 2)
    blocks = {tuple(order) for rounds in (turns, other) for order in (rounds.reshape(8, 70) % 70)}
    assert len(blocks) == 16  # all blocks and rounds differ
    assert tuple(turns[0, ::70] // 70) != tuple(other[0, ::70] // 70)  # so does the order of the blocks


def test_shuffled_both_mixes_warps_and_lets_one_run_ahead(library: Library) -> None:
    turns = np.stack([_turns(library, SHUFFLED, seed) for seed in range(4)]).reshape(-1, 70) % 70
    changes = (np.diff(turns // 32) != 0).sum(1)  # of the warp, of three, in each block and round
    assert changes.min() <= 3
    assert changes.max() >= 20


def test_missing_barrier_is_caught_by_other_schedules(library: Library) -> None:
    x = np.arange(1, 129, dtype=np.float32)
    right = np.concatenate([[0], x[:-1]])

    def result(schedule: int, seed: int) -> np.ndarray:
        y = np.full_like(x, -1)
        Launcher(library, schedule, seed)("missing_barrier", 1, 128, x, y)
        return y

    np.testing.assert_array_equal(result(ASCENDING, 1), right)
    for schedule, seed in SCHEDULES[1:]:
        y = result(schedule, seed)
        assert np.isnan(y).any()
        assert not np.array_equal(y, right)


def test_shared_memory_reused_too_early_is_caught(library: Library) -> None:
    """Only where a warp may run several collectives ahead of another."""
    threads, rounds = 128, 8
    right = np.broadcast_to(sum(range(threads)) + threads * np.arange(rounds), (threads // 32, rounds))
    for schedule, seed in SCHEDULES:
        out = np.zeros(right.shape, dtype=np.int32)
        Launcher(library, schedule, seed)("reused_too_early", 1, threads, out, rounds)
        assert not np.array_equal(out, right)


def test_race_between_blocks_is_caught_by_block_order(library: Library) -> None:
    for (schedule, seed), is_right in zip(SCHEDULES, [True, False, False, False], strict=True):
        out = np.full(20, -1, dtype=np.int32)
        Launcher(library, schedule, seed)("counts_on_block_order", 20, 32, out)
        assert np.array_equal(out, np.arange(20)) is is_right


# ---- reports ----


def _line(text: str) -> int:
    """Where the source has this text, which it has once."""
    (line,) = [number for number, content in enumerate(SOURCE.read_text().splitlines(), 1) if text in content]
    return line


def _report(
    launch: Launcher, name: str, grid: tuple[int, ...] | int, block: tuple[int, ...] | int, *arguments, shared: int = 0
) -> str:
    with pytest.raises(EmulatorError) as caught:
        launch(name, grid, block, *arguments, shared=shared)
    report = str(caught.value)
    assert report.startswith(f"kernel '{name}', ")
    assert "\n" not in report
    return report


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES, ids=IDS)
def test_deadlock_says_who_waits_where(library: Library, schedule: int, seed: int) -> None:
    out = np.zeros(64, dtype=np.int32)
    report = _report(Launcher(library, schedule, seed), "deadlock", 1, 64, out)
    assert "block (0, 0, 0): deadlock" in report
    assert f"threads 0-15 wait at __syncthreads (selftest.cu:{_line('line of the block')})" in report
    assert f"threads 16-31 wait at __syncwarp with mask 0xffffffff (selftest.cu:{_line('line of the warp')})" in report
    assert "threads 32-63 ended" in report


def test_report_names_the_block_and_a_failed_launch_leaves_the_next_alone(launch: Launcher) -> None:
    out = np.zeros(64, dtype=np.int32)
    report = _report(Launcher(launch.library, DESCENDING), "deadlock", (2, 3, 4), 64, out)
    assert "block (1, 2, 3): " in report
    block_sum(launch)
    block_scan(launch)


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES, ids=IDS)
def test_barriers_at_different_lines_are_reported(library: Library, schedule: int, seed: int) -> None:
    out = np.zeros(64, dtype=np.int32)
    report = _report(Launcher(library, schedule, seed), "divergent_barrier", 1, 64, out)
    assert "divergent barrier" in report
    assert f"threads 0-31 wait at __syncthreads (selftest.cu:{_line('one site')})" in report
    assert f"threads 32-63 wait at __syncthreads (selftest.cu:{_line('another site')})" in report


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES, ids=IDS)
def test_mask_with_lanes_that_ended_is_reported(library: Library, schedule: int, seed: int) -> None:
    report = _report(Launcher(library, schedule, seed), "exited_lanes", 1, 32, np.zeros(32, dtype=np.int32))
    assert "names lanes that have ended" in report
    assert "waits for lanes 3, 30-31" in report
    assert "threads 0-2, 4-29 wait at __shfl_sync with mask 0xffffffff" in report


def test_different_collectives_in_one_warp_are_reported(launch: Launcher) -> None:
    report = _report(launch, "mixed_collectives", 1, 64, np.zeros(64, dtype=np.int32))
    assert "lanes of warp 0 that name each other wait in different warp collectives" in report
    assert "threads 0-7 wait at __shfl_sync" in report
    assert "threads 8-31 wait at __any_sync" in report


def test_different_masks_in_one_collective_are_reported(launch: Launcher) -> None:
    report = _report(launch, "different_masks", 1, 32, np.zeros(32, dtype=np.int32))
    assert "thread 0 wait at __any_sync with mask 0x00000003" in report
    assert "threads 1-31 wait at __any_sync with mask 0xffffffff" in report


def test_masks_must_name_lanes_that_exist_and_the_caller(launch: Launcher) -> None:
    out = np.zeros(40, dtype=np.int32)
    report = _report(launch, "given_mask", 1, 40, out, ctypes.c_uint(0xFFFFFFFF))
    assert "thread 32 at __any_sync with mask 0xffffffff" in report
    assert "names lanes 8-31, which the last warp of a block of 40 threads does not have; launch whole warps" in report
    report = _report(launch, "given_mask", 1, 32, out, ctypes.c_uint(0x0000FFFF))
    assert "thread 16 at __any_sync with mask 0x0000ffff" in report
    assert "does not name the caller, lane 16" in report


def test_shuffle_width_must_be_a_power_of_two(launch: Launcher) -> None:
    for width in (0, 12, 64):
        report = _report(launch, "shuffle_widths", 1, 32, np.zeros(32), np.zeros(128), 0, width)
        assert f"the width {width} is not a power of two up to 32" in report


@pytest.mark.parametrize("value", [0, -1, 7])
def test_shared_memory_written_out_of_bounds_is_reported(launch: Launcher, value: int) -> None:
    launch("shared_write", 1, 2, 6, 4, value, shared=20)
    fixed, dynamic = "the shared array 'fixed' (28 bytes)", "the dynamic shared memory (20 bytes)"
    for fixed_index, dynamic_index, sentence in (
        (7, 4, f"past the end of {fixed}"),
        (-1, 4, f"before the start of {fixed}"),
        (6, 5, f"past the end of {dynamic}"),
        (0, -1, f"before the start of {dynamic}"),
    ):
        report = _report(launch, "shared_write", 3, 2, fixed_index, dynamic_index, value, shared=20)
        assert "block (0, 0, 0): a thread wrote " in report
        assert sentence in report


def test_write_to_dynamic_shared_memory_that_was_not_asked_for_is_reported(launch: Launcher) -> None:
    assert "the dynamic shared memory (0 bytes)" in _report(launch, "shared_write", 1, 2, 0, 0, 1)


def test_shared_memory_nobody_wrote_is_nan(launch: Launcher) -> None:
    y = np.zeros(64, dtype=np.float32)
    launch("uninitialised", 1, 64, y)
    assert (y[::2] == 1).all()
    assert np.isnan(y[1::2]).all()


def test_stack_overflow_is_reported(launch: Launcher) -> None:
    report = _report(launch, "deep_stack", 1, 3, np.zeros(3, dtype=np.int32), 40000)
    assert "thread 0 ran over its stack" in report
    block_sum(launch)


def test_exception_does_not_leave_the_library(launch: Launcher) -> None:
    assert "an exception left the kernel: from the kernel" in _report(launch, "throws", 1, 3)


@pytest.mark.parametrize(
    ("grid", "block", "sentence"),
    [
        ((0, 1, 1), (1, 1, 1), "the grid (0, 1, 1) is empty"),
        ((1, 1, 1), (32, 0, 1), "the block (32, 0, 1) is empty"),
        ((1, 1, 1), (1025, 1, 1), "the block (1025, 1, 1) has more than 1024 threads"),
        ((1, 1, 1), (64, 2, 16), "the block (64, 2, 16) has more than 1024 threads"),
        ((1, 1, 1), (1, 1, 65), "is deeper than 64"),
        ((1, 65536, 1), (1, 1, 1), "is larger than"),
        ((1, 1, -1), (1, 1, 1), "grid must be three sizes from 0 to 2^32 - 1, got (1, 1, -1)"),
    ],
)
def test_launch_that_a_gpu_would_refuse_is_refused(
    launch: Launcher, grid: tuple[int, ...], block: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(EmulatorError) as caught:
        launch("throws", grid, block)
    assert sentence in str(caught.value)


def test_largest_block_and_unknown_schedule(library: Library) -> None:
    y = np.zeros(1024, dtype=np.int32)
    Launcher(library)("block_scan", 1, (1024, 1, 1), np.ones_like(y), y)
    assert y[-1] == 1024
    with pytest.raises(EmulatorError, match="schedule 3 is not 0, 1 or 2"):
        Launcher(library, 3)("throws", 1, 1)


def test_arguments_must_fit_the_parameters(library: Library) -> None:
    pointer = ctypes.c_void_p(None)
    with pytest.raises(EmulatorError, match="kernel 'block_sum' has 3 parameters, got 2 arguments"):
        library.launch("block_sum", (1, 1, 1), (32, 1, 1), 0, [pointer, pointer])
    message = r"kernel 'block_sum': parameter 2 has 4 bytes, the argument c_long\(3\) has 8"
    with pytest.raises(EmulatorError, match=message):
        library.launch("block_sum", (1, 1, 1), (32, 1, 1), 0, [pointer, pointer, ctypes.c_int64(3)])


def test_unknown_kernel_is_answered_with_the_known_ones(library: Library) -> None:
    assert {check.__name__ for check in RIGHT} <= set(library.kernels)
    with pytest.raises(EmulatorError) as caught:
        library.launch("block_sun", (1, 1, 1), (1, 1, 1), 0, [])
    assert str(caught.value).startswith(f"no kernel 'block_sun' in {library.path}; it has block_sum, block_scan, ")


def test_two_host_threads_emulate_at_once(library: Library) -> None:
    start = threading.Barrier(2)

    def work(schedule: int) -> None:
        launch = Launcher(library, schedule)
        start.wait(timeout=30)
        for _ in range(20):
            block_scan(launch)
            block_sum(launch)
            warp_votes(launch)
            assert "deadlock" in _report(launch, "deadlock", 1, 64, np.zeros(64, dtype=np.int32))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, ASCENDING), pool.submit(work, DESCENDING)]:
            done.result(timeout=60)


# ---- building ----


@pytest.mark.usefixtures("folder")
def test_library_is_built_once_for_the_same_text(tmp_path: Path) -> None:
    include = tmp_path / "include"
    include.mkdir()
    header, source = include / "value.h", tmp_path / "one.cu"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "value.h"\nextern "C" int value() { return VALUE; }\n')
    options = {"include": include, "folder": tmp_path / "built"}
    paths = [build(source, **options), build(source, ["OTHER=1"], **options), build(source, flags=["-O0"], **options)]
    before = paths[0].stat().st_mtime_ns
    assert build(source, **options) == paths[0]
    assert paths[0].stat().st_mtime_ns == before
    header.write_text("#define VALUE 2\n")
    paths.append(build(source, **options))
    source.write_text(source.read_text() + "\n")
    paths.append(build(source, **options))
    assert len(set(paths)) == 5
    assert set(paths) == set(options["folder"].iterdir())


@pytest.mark.usefixtures("folder")
def test_source_that_does_not_compile_is_named_with_its_line(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("\nint f() {\n  return undeclared_name;\n}\n")
    with pytest.raises(EmulatorBuildError, match=r"broken\.cu:3:.*undeclared_name"):
        build(source, include=tmp_path, folder=tmp_path / "built")
    assert list((tmp_path / "built").iterdir()) == []


def test_absent_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++ -m64")
    with pytest.raises(EmulatorBuildError, match=r"'/nonexistent/g\+\+' cannot be run .*install g\+\+ or set CXX"):
        build(SOURCE, include=INCLUDE, folder=tmp_path)


def test_header_compiles_without_warnings_and_under_fortify(folder: Path) -> None:
    """Switching fibers is what _FORTIFY_SOURCE takes for a corrupted stack."""
    flags = ["-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
    fortified = Library(build(SOURCE, include=INCLUDE, folder=folder, flags=flags))
    block_sum(Launcher(fortified))


def test_libraries_do_not_share_state(library: Library, folder: Path) -> None:
    other = Library(build(SOURCE, include=INCLUDE, folder=folder, flags=["-O0"]))
    assert other.kernels == library.kernels
    assert len(set(other.kernels)) == len(other.kernels)
    for _ in range(2):
        block_scan(Launcher(library))
        block_scan(Launcher(other))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_same_source_compiles_for_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "selftest.cubin"
    command = [
        "nvcc",
        "-cubin",
        "-arch=sm_90",
        "-std=c++17",
        f"-I{INCLUDE}",
        "-Werror",
        "all-warnings",
        "-o",
        str(output),
    ]
    done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert output.stat().st_size > 0
