"""Run the emulated kernels under the address and undefined-behaviour sanitizers.

python -m scripts.sanitize_kernels                    # every target
python -m scripts.sanitize_kernels --only selftest    # those whose name holds this text

Prints one line a target and exits with 1 on a finding. The first line is the proof that a finding would be seen: a
kernel that writes past the end of its caller's memory must be reported.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.kernels import test_emulator as emulator
from zoo.kernels.emulate import Library, build

ROOT = Path(__file__).resolve().parents[1]
_SCHEDULES = ((0, 1), (1, 1), (2, 1))

# Each runs in a process of its own, with a folder to build libraries in; it calls build(..., sanitize=True).
Target = Callable[[Path], None]


def selftest(folder: Path) -> None:
    """The right kernels of the emulator's own tests, under every schedule."""
    library = Library(build(emulator.SOURCE, include=emulator.INCLUDE, folder=folder, sanitize=True))
    for schedule, seed in _SCHEDULES:
        for check in emulator.RIGHT:
            check(emulator.Launcher(library, schedule, seed))


def polycom(folder: Path) -> None:
    """PolyNorm, its gated form and PolyReLU, forward and backward: ragged rows, every variant, every schedule."""
    import torch

    from tests.implementations import emulated_kernels
    from zoo.functional import poly_norm, poly_norm_mul, poly_relu
    from zoo.kernels.emulation import SCHEDULES, EmulatedMachine

    for dtype in (torch.float32, torch.bfloat16):
        for schedule in SCHEDULES.values():
            with emulated_kernels(EmulatedMachine(folder, schedule, sanitize=True)):
                for rows, width in ((3, 1), (9, 37), (2, 1037), (2, 17001)):
                    x, mul = (torch.randn(rows, width).to(dtype).requires_grad_() for _ in range(2))
                    weight, bias, scores = torch.randn(3), torch.randn(1), torch.rand(rows)
                    per_row = torch.randn(rows, 3), torch.randn(rows, 1)
                    for y in (
                        poly_norm(x, weight, bias),
                        poly_norm(x, *per_row, tokens_per_expert=[1] * rows),
                        poly_norm_mul(x, mul, weight, bias, scores=scores, clamp=1.0),
                        poly_relu(x, weight, bias),
                    ):
                        y.float().sum().backward()


def evonorm(folder: Path) -> None:
    """Every EvoNorm kernel: both layouts, groups that fit on chip and that do not, ragged planes, every schedule."""
    import torch

    from tests.implementations import emulated_kernels
    from zoo.functional import evonorm_b, evonorm_s
    from zoo.kernels.emulation import SCHEDULES, EmulatedMachine

    for dtype in (torch.float32, torch.bfloat16):
        for schedule in SCHEDULES.values():
            with emulated_kernels(EmulatedMachine(folder, schedule, sanitize=True)):
                for shape in ((2, 6, 3, 5), (1, 20, 9, 9), (1, 4, 37, 41)):
                    for layout in (torch.contiguous_format, torch.channels_last):
                        x = torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_()
                        v, weight, bias = torch.randn(3, shape[1])
                        for y in (
                            evonorm_s(x, v, weight, bias, 2),
                            *(evonorm_b(x, None, weight, bias, None, True, variant=f"b{k}") for k in range(3)),
                        ):
                            y.float().sum().backward()


def comp_sum(folder: Path) -> None:
    """Every kernel of the comp-sum losses: ragged rows, planes, ignored targets and wrong ones, every schedule."""
    import torch

    from tests.implementations import emulated_kernels
    from zoo.kernels.emulation import SCHEDULES, EmulatedMachine
    from zoo.losses.comp_sum.ops import comp_sum_backward, comp_sum_forward

    for dtype in (torch.float32, torch.bfloat16):
        for schedule in SCHEDULES.values():
            with emulated_kernels(EmulatedMachine(folder, schedule, sanitize=True)):
                for shape in ((3, 1, 1), (9, 37, 1), (3, 2051, 1), (2, 17001, 1), (2, 5, 41), (1, 130, 7)):
                    scores, target = torch.randn(shape).to(dtype), torch.randint(shape[1], (shape[0], shape[2]))
                    target.view(-1)[:2] = torch.tensor([-100, shape[1]])
                    taus = torch.rand(target.shape)
                    for given in (None, taus):
                        loss, statistics = comp_sum_forward(scores, target, given, 1.5, 2.0, -100)
                        comp_sum_backward(torch.ones_like(loss), scores, target, statistics, given, 1.5, 2.0, -100)


TARGETS: list[tuple[str, Target]] = [
    ("selftest", selftest),
    ("polycom", polycom),
    ("evonorm", evonorm),
    ("comp_sum", comp_sum),
]


def out_of_bounds(folder: Path) -> None:
    """One element past the end of a buffer: what the sanitizers must find."""
    library = Library(build(emulator.SOURCE, include=emulator.INCLUDE, folder=folder, sanitize=True))
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    buffer = ctypes.c_void_p(libc.malloc(10 * 4))
    emulator.Launcher(library)("global_write", 1, 1, buffer, 9)
    emulator.Launcher(library)("global_write", 1, 1, buffer, 10)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="run the targets whose name holds this text")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        os.environ.pop("LD_PRELOAD")  # for this process alone: compilers need no sanitizer
        name, folder = options.child
        dict([*TARGETS, ("out_of_bounds", out_of_bounds)])[name](Path(folder))
        return 0

    chosen = [name for name, _ in TARGETS if options.only in name]
    if not chosen:
        parser.error(f"no target holds {options.only!r}; there are {', '.join(name for name, _ in TARGETS)}")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        proof = _child("out_of_bounds", folder)
        seen = proof.returncode != 0 and "heap-buffer-overflow" in proof.stderr and "global_write" in proof.stderr
        failures += _line("self-check", seen, "a write out of bounds is found", proof)
        for name in chosen:
            done = _child(name, folder)
            failures += _line(name, done.returncode == 0, "clean", done)
    return min(failures, 1)


def _child(name: str, folder: str) -> subprocess.CompletedProcess[str]:
    """Run one target where the sanitizers are loaded before Python, which is not built with them."""
    # libstdc++ has to be there when libasan looks for the exception functions that it wraps.
    preload = " ".join(_library(library) for library in ("libasan.so", "libstdc++.so"))
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much memory until it exits
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide what lies past the end of a small buffer
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "scripts.sanitize_kernels", "--child", name, folder]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _library(name: str) -> str:
    """Where the compiler finds a library of its own."""
    compiler = os.environ.get("CXX", "g++").split()
    done = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _line(name: str, good: bool, what: str, done: subprocess.CompletedProcess[str]) -> int:
    """Print how a target went, with what it had to say if badly; 1 if so."""
    print(f"{name}: {what if good else 'FAILED'}", flush=True)
    if not good:
        print(done.stdout + done.stderr, flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
