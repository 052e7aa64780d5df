"""What is handed to the CUDA driver, against one that runs on the host: calls, handles, arguments, stream, errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

DRIVER = Path(__file__).parent / "driver/libcuda.cpp"

# In a process of its own: the driver is found by the dynamic linker, and torch is told that there is a device.
PROGRAM = """
import contextlib, threading
from types import SimpleNamespace
import torch
from zoo.errors import KernelError
from zoo.kernels import launch, nvrtc
from zoo.kernels.launch import Gpu, Kernel, Signature
from zoo.kernels.sources import Unit

torch.version.cuda = "13.0"
properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="a device")
torch.cuda.get_device_properties = lambda index: properties
torch.cuda.current_stream = lambda index: SimpleNamespace(cuda_stream=0xabc)
torch.cuda.device = lambda index: contextlib.nullcontext()
nvrtc.cubin = lambda unit, arch: print(f"compile {unit.name} sm_{arch}") or b"\\x7fELF" + bytes(60)

machine = Gpu(0)
launch.machine_of = lambda device: machine
print("shared", machine.shared_bytes)
unit = Unit("scale.cu", "float32", "plain")
signature = Signature("S* x, S* y, C factor, i64 n")
scale = Kernel(unit, "scale", signature)
x, y = torch.arange(5.0), torch.zeros(5)
scale((3, 2, 1), (64, 2, 1), x, y, 2.5, 5, shared=70000)
print(y.tolist())
scale((1, 1, 1), (32, 1, 1), x, y, -1.0, 4)
print(y.tolist())
other = Kernel(unit, "other", signature)
for kernel, block in ((scale, (2048, 1, 1)), (other, (1, 1, 1))):
    try:
        kernel((1, 1, 1), block, x, y, 1.0, 5)
    except KernelError as error:
        print(error)
thread = threading.Thread(target=lambda: scale((1, 1, 1), (1, 1, 1), x, y, 3.0, 1))
thread.start(); thread.join()
print(y[0].item())
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", str(folder / "libcuda.so.1"), str(DRIVER)], check=True)
    return folder


def test_kernels_are_loaded_once_and_launched_as_asked(driver: Path) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONUNBUFFERED": "1"}
    # The driver writes through C's buffer: unbuffered both, so that lines keep their order.
    command = (
        ["stdbuf", "-o0", sys.executable, "-c", PROGRAM] if shutil.which("stdbuf") else [sys.executable, "-c", PROGRAM]
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = [
        "shared 43008",  # half of a multiprocessor, less what kernels take themselves
        "compile scale-plain-float32 sm_90",
        "context 0xc0",
        "load",
        "attribute 8 43008",
        "launch 3 2 1, 64 2 1, 70000, stream 0xabc",
        "[0.0, 2.5, 5.0, 7.5, 10.0]",
        "launch 1 1 1, 32 1 1, 0, stream 0xabc",
        "[-0.0, -1.0, -2.0, -3.0, 10.0]",
        "scale with grid (1, 1, 1), block (2048, 1, 1), 0 bytes shared: CUDA driver: invalid argument",
        "CUDA driver: named symbol not found",
        "launch 1 1 1, 1 1 1, 0, stream 0xabc",
        "0.0",
    ]
    assert lines == expected
