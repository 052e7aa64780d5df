"""One CPU library, several versions of torch: it is built once, here, and must compute the same in each.

python -m scripts.check_stable_abi                                        # 2.10.0, 2.11.0 and 2.14.1
python -m scripts.check_stable_abi --torch 2.10.0 2.14.1 --use-current    # this environment for the version it has

Each version gets an environment with torch and numpy alone, installed once, several GB; zoo runs from this checkout.
Prints a line a version and exits with 1 on a difference: from the closed forms of `zoo/activations/polycom/eager.py`,
in opcheck or gradcheck, or between versions, whose results must be equal to the last bit. Not part of CI.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo.activations import polycom
from zoo.activations.polycom import eager
from zoo.errors import KernelError, ZooError
from zoo.kernels import cpu, use_cpu_library

ROOT = Path(__file__).resolve().parents[1]
OPS = ("poly_relu", "poly_norm", "poly_norm_mul")
EPS = 1e-6
SHAPES = ((1, 3), (3, 37), (5, 1000), (2, 4099), (0, 8))  # of one element the gradient is all cancellation
ORDERS = (1, 2, 3, 5, 7)  # the library has code of its own up to 5
# Of an output's dtype, relative to its largest magnitude. Both sides round once to half precision and may do so to
# either side; sums are taken in another order.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Tally:
    """Compares outputs, and keeps what the report says."""

    def __init__(self) -> None:
        self.count, self.worst, self._digest = 0, 0.0, hashlib.sha256()

    def compare(self, what: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Raises AssertionError with the output that differs."""
        for k, (mine, other) in enumerate(zip(ours, expected, strict=True)):
            alike = mine.shape == other.shape and mine.dtype == other.dtype
            assert alike, f"{what}, output {k}: {mine.shape} {mine.dtype}, not {other.shape} {other.dtype}"
            self._digest.update(mine.contiguous().view(torch.uint8).numpy().tobytes())
            self.count += 1
            if mine.numel():
                error, largest = (mine.double() - other.double()).abs().max(), other.double().abs().max()
                part = float(error / largest.clamp_min(1e-30)) / TOLERANCES[mine.dtype]
                assert part <= 1, f"{what}, output {k}: {part:.3g} times the tolerance"  # NaN fails too
                self.worst = max(self.worst, part)

    @property
    def digest(self) -> str:
        """Of all bits of all outputs of ours."""
        return self._digest.hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """Arguments of the ops, and a cotangent."""

    what: str
    x: Tensor
    mul: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor | None
    scores: Tensor | None
    rms: bool
    clamp: float | None


def cases() -> Iterator[Case]:
    """Every dtype, ragged sizes, coefficients in two dtypes and in sets a row, rows that must be rescaled."""
    for dtype, (rows, width), order, is_wide, is_large in itertools.product(
        TOLERANCES, SHAPES, ORDERS, (False, True), (False, True)
    ):
        parameters = torch.promote_types(dtype, torch.float32) if is_wide else dtype
        sets = (rows,) if order == 3 and is_wide else ()
        yield Case(
            f"{dtype} [{rows}, {width}], order {order}, {parameters} coefficients{', large' if is_large else ''}",
            x=_values(1, rows, width, dtype=dtype, largest=3e4 if is_large else 3.0),
            mul=_values(2, rows, width, dtype=dtype),
            grad=_values(3, rows, width, dtype=dtype),
            weight=_values(4, *sets, order, dtype=parameters),
            bias=None if order == 2 else _values(5, *sets, 1, dtype=parameters),
            scores=None if order == 5 else _values(6, rows, dtype=parameters),
            rms=order != 1,
            clamp=1.5 if order == 3 else None,
        )


def _values(seed: int, *shape: int, dtype: torch.dtype, largest: float = 3.0) -> Tensor:
    """Between -largest / 3 and largest, so that sums do not cancel; exact arithmetic, the same in every torch."""
    count = torch.Size(shape).numel()
    scattered = (torch.arange(1, count + 1) * 2654435761 + seed * 40503) % 65521
    return ((scattered.double() / 65520 * 4 - 1) * (largest / 3)).reshape(shape).to(dtype)


def compare_ops(tally: Tally) -> None:
    """The six ops against the closed forms."""
    zoo = torch.ops.zoo
    for case in cases():
        x, weight, bias, rms = case.x, case.weight, case.bias, case.rms
        y, stats = zoo.poly_norm(x, weight, bias, EPS, rms)
        tally.compare(f"poly_norm, {case.what}", (y, stats), eager.poly_norm_forward(x, weight, bias, EPS, rms))
        ours = zoo.poly_norm_backward(case.grad, x, weight, stats, EPS, rms)
        expected = eager.poly_norm_backward(case.grad, x, weight, stats, rms)
        tally.compare(f"poly_norm_backward, {case.what}", ours, expected)

        gated = (x, case.mul, weight, bias, case.scores)
        y, stats = zoo.poly_norm_mul(*gated, EPS, rms, case.clamp)
        expected = eager.poly_norm_mul_forward(*gated, EPS, rms, case.clamp)
        tally.compare(f"poly_norm_mul, {case.what}", (y, stats), expected)
        ours = zoo.poly_norm_mul_backward(case.grad, *gated, stats, EPS, rms, case.clamp)
        expected = eager.poly_norm_mul_backward(case.grad, *gated, stats, rms, case.clamp)
        tally.compare(f"poly_norm_mul_backward, {case.what}", ours, expected)

        if weight.ndim == 1 and "large" not in case.what:  # whose powers leave float32
            expected = eager.poly_relu_forward(x, weight, bias)
            tally.compare(f"poly_relu, {case.what}", [zoo.poly_relu(x, weight, bias)], [expected])
            ours = zoo.poly_relu_backward(case.grad, x, weight)
            tally.compare(f"poly_relu_backward, {case.what}", ours, eager.poly_relu_backward(case.grad, x, weight))


def check_gradients() -> None:
    """What torch asks of an op, and gradients against differences."""
    x, weight, bias = (
        _values(seed, *shape, dtype=torch.float64).requires_grad_()
        for seed, shape in ((1, (3, 5)), (2, (3,)), (3, (1,)))
    )
    torch.library.opcheck(torch.ops.zoo.poly_relu.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.zoo.poly_norm.default, (x, weight, bias, EPS, True))
    assert torch.autograd.gradcheck(polycom.poly_norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(polycom.poly_norm, (x, weight, bias))


def check_here(library: Path) -> dict[str, object]:
    """What a child process does: all checks of this library in this environment."""
    assert cpu.find() == library, f"{cpu.find()} would be taken instead of {library}"
    assert use_cpu_library()
    for op in OPS:
        for name in (f"zoo::{op}", f"zoo::{op}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), f"{name} is not from the library"
    tally = Tally()
    compare_ops(tally)
    check_gradients()
    return {"torch": torch.__version__, "count": tally.count, "worst": tally.worst, "digest": tally.digest}


def environment(version: str, folder: Path) -> Path:
    """The interpreter of an environment with that torch, made if absent.

    Raises:
        KernelError: if pip cannot install it.
    """
    home = folder / f"torch-{version}"
    python = home / "bin/python"
    if not list(home.glob(f"lib/python*/site-packages/torch-{version}*.dist-info")):
        print(f"installing torch {version} into {home}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", f"torch=={version}", "numpy"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no message")
            raise KernelError(f"pip cannot install torch {version}: {why}")
    return python


def check_in(python: Path, library: Path) -> dict[str, object]:
    """Run the checks in another environment.

    Raises:
        KernelError: if one fails.
    """
    variables = {"ZOO_KERNELS": "require", "ZOO_KERNEL_DIR": str(library.parent), "ZOO_PLUGINS": "0"}
    # No compiler: what cannot be loaded must not be built again.
    variables |= {"PYTHONPATH": str(ROOT), "CXX": "/nonexistent", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "scripts.check_stable_abi", "--child", str(library)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise KernelError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "2.11.0", "2.14.1"], metavar="VERSION")
    parser.add_argument("--envs", type=Path, default=ROOT / "build/abi", help="folder of the environments")
    parser.add_argument("--use-current", action="store_true", help="do not install the version that is here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(check_here(options.child)))
        return 0
    try:
        library = cpu.library()
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{library.name}, built beside torch {torch.__version__}, Python {platform.python_version()}")
    digests, status = set(), 0
    for version in options.torch:
        try:
            is_here = options.use_current and torch.__version__.partition("+")[0] == version
            python = Path(sys.executable) if is_here else environment(version, options.envs)
            found = check_in(python, library)
        except KernelError as error:
            print(f"torch {version}: FAILED: {error}", flush=True)
            status = 1
            continue
        digests.add(found["digest"])
        print(
            f"torch {found['torch']}: {found['count']} outputs of {2 * len(OPS)} ops within {found['worst']:.2f} of the"
            f" tolerance, opcheck, gradcheck and gradgradcheck pass; bits {found['digest']}",
            flush=True,
        )
    if len(digests) > 1:
        print("FAILED: the bits differ between versions")
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
