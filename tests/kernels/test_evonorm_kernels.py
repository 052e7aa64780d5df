"""What the tests of EvoNorm on every implementation do not see: which kernel serves, cuts of planes, barriers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests._numerics import assert_close
from tests.implementations import emulated_kernels
from tests.kernels.breaking import schedules_that_notice
from tests.norms.evonorm_baselines import oracle_b, oracle_s
from zoo.functional import evonorm_b, evonorm_s
from zoo.kernels import sources
from zoo.kernels.emulation import EmulatedMachine
from zoo.norms.evonorm import cuda

F64 = torch.float64


def _s(x: Tensor, groups: int) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = evonorm_s(x, torch.full((x.shape[1],), 0.7, dtype=x.dtype), None, None, groups)
    return [y, *torch.autograd.grad(y, x, y.detach())]


def _b(x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = evonorm_b(x, torch.full((x.shape[1],), 0.7, dtype=x.dtype), None, None, None, True)
    return [y, *torch.autograd.grad(y, x, y.detach())]


def _expected(x: Tensor, groups: int | None) -> list[Tensor]:
    x = x.detach().double().requires_grad_()
    v = torch.full((x.shape[1],), 0.7, dtype=F64)
    y = oracle_b(x, v, None, None, None) if groups is None else oracle_s(x, v, None, None, groups)
    return [y, *torch.autograd.grad(y, x, y.detach())]


def _agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, wanted in zip(actual, expected, strict=True):
        assert_close(ours, wanted)


def test_a_group_stays_on_chip_where_it_fits(kernel_folder: Path) -> None:
    """Forward holds x in shared memory, backward x and the incoming gradient; beyond that there are two passes."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12, 12, dtype=F64)  # 2304 bytes a group
    for shared, used in (
        (8192, {"evonorm_s_fwd_slab", "evonorm_s_bwd_slab"}),
        (4096, {"evonorm_s_fwd_slab", "evonorm_s_sums_planes", "evonorm_s_grad_planes"}),
        (1024, {"evonorm_s_apply_planes", "evonorm_s_sums_planes", "evonorm_s_grad_planes"}),
    ):
        with emulated_kernels(EmulatedMachine(kernel_folder, shared_bytes=shared)) as machine:
            _agree(_s(x, 2), _expected(x, 2))
        names = {name for name, _, _ in machine.launched}
        assert names - {"evonorm_moments_planes", "evonorm_merge"} == used


@pytest.mark.parametrize("shape", [(1, 2, 1537), (1, 3, 4096), (2, 1, 999), (1, 5, 259)])
def test_large_planes_are_cut(shape: tuple[int, ...], kernel_folder: Path) -> None:
    """Few planes are shared by many threads: odd lengths, parts that begin inside a pack, a short last part."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=F64)
    for last in (False, True):
        tensor = x.unsqueeze(-1).to(memory_format=torch.channels_last) if last else x
        with emulated_kernels(EmulatedMachine(kernel_folder, shared_bytes=256)) as machine:
            _agree(_s(tensor, 1), _expected(tensor, 1))
            _agree(_b(tensor), _expected(tensor, None))
        merged = Counter(name for name, _, _ in machine.launched)["evonorm_merge"]
        # The S layer always merges planes to groups, the B layer only parts. One channel lies the same way in both.
        assert merged == (2 if shape[2] >= (2048 if last and shape[1] > 1 else 512) else 1)


@pytest.mark.parametrize("channels", [1, 3, 8, 20, 24, 70, 300])
def test_channels_last_of_any_width(channels: int, kernel_folder: Path) -> None:
    """Whole packs, packs that are not whole, more packs than a block has columns."""
    torch.manual_seed(0)
    for dtype in (F64, torch.bfloat16):
        x = torch.randn(2, channels, 3, 5).to(dtype).to(memory_format=torch.channels_last)
        with emulated_kernels(EmulatedMachine(kernel_folder)):
            y, expected = _b(x)[0], _expected(x, None)[0]
        assert_close(y, expected)


def test_a_tensor_that_begins_inside_a_pack(kernel_folder: Path) -> None:
    torch.manual_seed(0)
    whole = torch.randn(2 * 4 * 9 + 1, dtype=torch.float32)
    x = whole[1:].view(2, 4, 3, 3)
    assert x.data_ptr() % 16
    with emulated_kernels(EmulatedMachine(kernel_folder)):
        _agree(_s(x, 2), _expected(x, 2))


@pytest.mark.parametrize(
    ("length", "pack", "lanes"), [(1, 8, 1), (16, 8, 1), (49, 8, 4), (64, 8, 4), (196, 8, 16), (3136, 8, 32)]
)
def test_threads_of_a_plane_have_about_two_packs_each(length: int, pack: int, lanes: int) -> None:
    assert cuda._lanes(length, pack) == lanes


def test_cuts_cover_a_plane_in_equal_aligned_segments() -> None:
    for length in (1, 7, 8, 49, 999, 12544):
        for parts in (1, 2, 3, 7, 64):
            count, segment = cuda._cut(length, parts, 8)
            assert segment % 8 == 0
            assert (count - 1) * segment < length <= count * segment
            assert count <= parts


# Barriers


def _results(machine: EmulatedMachine) -> list[Tensor]:
    torch.manual_seed(0)
    found: list[Tensor] = []
    with emulated_kernels(machine):
        for shape in ((1, 24, 6, 8), (2, 4, 40, 7)):
            x = torch.randn(shape, dtype=F64)
            found += [*_s(x, 2), *_b(x)]
            last = x.to(memory_format=torch.channels_last)
            found += [*_s(last, 2), *_b(last)]
    return [t.detach() for t in found]


BROKEN = {
    "before the sum over a block's rows": ("spread.cuh", 0),
    "after the sum over a block's rows": ("spread.cuh", 1),
    "after the mean of a block's rows": ("moments.cu", 0),
}


def test_every_barrier_of_the_family_is_in_the_list() -> None:
    texts = {path.name: path.read_text() for path in (sources.folder() / "evonorm").glob("*.cu*")}
    counts = {name: text.count("__syncthreads();") for name, text in texts.items()}
    assert {name: count for name, count in counts.items() if count} == {"spread.cuh": 2, "moments.cu": 1}


@pytest.mark.slow
@pytest.mark.parametrize("what", list(BROKEN))
def test_kernel_without_it_is_caught(what: str, tmp_path: Path, kernel_folder: Path) -> None:
    """Remove one barrier: in some schedule results differ or the emulator reports."""
    name, occurrence = BROKEN[what]
    folders = {"scratch": tmp_path, "kernel_folder": kernel_folder}
    assert schedules_that_notice(_results, f"evonorm/{name}", "__syncthreads();", occurrence, **folders)


@pytest.mark.gpu
def test_tensors_beyond_two_gigabytes() -> None:
    """Offsets need 64 bits: the last sample alone gives the same, but for the cut of its planes."""
    x = torch.randn(36, 256, 352, 352, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**30
    weight = torch.ones(256, device="cuda")
    y = evonorm_s(x, weight, weight, None, 32)
    assert_close(y[-1:], evonorm_s(x[-1:].clone(), weight, weight, None, 32).double())
