"""float16 and bfloat16 in the CPU library: every value there is, and floats around every place where rounding turns."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.kernels import cpu, sources

SOURCE = Path(__file__).parent / "conversions/conversions.cpp"
TYPES = {"half": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=cpu.levels())
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """For every instruction set this processor has: each has code of its own."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("conversions") / f"{request.param}.so"
    march = [f"-march={request.param}"] if platform.machine() == "x86_64" else []
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", *march, f"-I{sources.folder()}"]
    subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def _call(function, source: Tensor, result: torch.dtype) -> list[Tensor]:
    results = [torch.empty(source.shape, dtype=result) for _ in range(2)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (source, *results)]
    function(*pointers, ctypes.c_int64(source.numel()))
    return results


@pytest.mark.parametrize("name", list(TYPES))
def test_every_value_widens_as_torch_has_it(name: str, library: ctypes.CDLL) -> None:
    values = torch.arange(2**16).to(torch.int32).to(torch.int16).view(TYPES[name])
    expected = values.float()
    for actual in _call(getattr(library, f"widen_{name}"), values, torch.float32):
        assert torch.equal(actual.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(actual[number].view(torch.int32), expected[number].view(torch.int32))  # the sign of 0 too


@pytest.mark.parametrize("name", list(TYPES))
def test_floats_round_to_nearest_even(name: str, library: ctypes.CDLL) -> None:
    dtype = TYPES[name]
    representable = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).float()
    finite = representable[representable.isfinite()].sort().values
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    around = [middles, middles.nextafter(torch.tensor(float("inf"))), middles.nextafter(-torch.tensor(float("inf")))]
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    beyond = torch.tensor([65519.996, 65520.0, 1e38, 3.4e38, float("inf"), float("nan"), 0.0, -0.0, 1e-45])
    values = torch.cat([representable, *around, bits.view(torch.float32), beyond, -beyond])
    expected = values.to(dtype)
    for actual in _call(getattr(library, f"narrow_{name}"), values, dtype):
        # Signalling NaNs stay NaNs only through arithmetic, which the kernels always do; these come as they are.
        quiet = ~values.isnan() | ((values.view(torch.int32) >> 22) & 1).bool()
        assert torch.equal(actual.isnan()[quiet], expected.isnan()[quiet])
        number = ~expected.isnan()
        assert torch.equal(actual[number].view(torch.int16), expected[number].view(torch.int16))
