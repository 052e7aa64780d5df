"""One CPU library, several versions of torch: it is built once, here, and must compute the same in each.

python -m scripts.check_stable_abi                                        # 2.10.0, 2.11.0 and 2.14.1
python -m scripts.check_stable_abi --torch 2.10.0 2.14.1 --use-current    # this environment for the version it has

Each version gets an environment with torch and numpy alone, installed once, several GB; zoo runs from this checkout.
Prints a line a version and exits with 1 on a difference: from the families' closed forms in their `eager.py`,
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
from zoo.losses import comp_sum
from zoo.losses.comp_sum import eager as comp_sum_eager
from zoo.norms import evonorm
from zoo.norms.evonorm import eager as evonorm_eager
from zoo.splat import sh
from zoo.splat.convex import eager as convex_eager
from zoo.splat.convex import ops as convex

ROOT = Path(__file__).resolve().parents[1]
OPS = (
    *(f"{op}{suffix}" for op in ("poly_relu", "poly_norm", "poly_norm_mul") for suffix in ("", "_backward")),
    *("evonorm_s", "evonorm_s_backward", "evonorm_moments", "evonorm_b_apply", "evonorm_b_sums", "evonorm_b_grad"),
    *("comp_sum", "comp_sum_backward"),
    *("convex_project", "convex_project_bwd", "convex_isect", "convex_raster", "convex_raster_bwd"),
    *("sh_eval", "sh_eval_bwd"),
)
MAPS = ((2, 6, 5), (1, 40, 99), (3, 8, 1), (0, 4, 9))  # [N, C, L]
SCORES = ((7, 3, 1), (5, 1000, 1), (2, 4099, 1), (3, 21, 150), (1, 130, 5), (0, 9, 1))  # [B, C, S]
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
            self._digest.update(mine.flatten().clone().view(torch.uint8).numpy().tobytes())
            self.count += 1
            if mine.numel() and not mine.is_floating_point():
                assert torch.equal(mine, other), f"{what}, output {k}: other integers"
            elif mine.numel():
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


def compare_evonorm_ops(tally: Tally) -> None:
    """The six ops against the closed forms, in both layouts, with parameters a channel and a sample."""
    zoo = torch.ops.zoo
    for dtype, shape, last, of_samples in itertools.product(TOLERANCES, MAPS, (False, True), (False, True)):
        what = f"{dtype} {list(shape)}{', channels last' if last else ''}{', a sample' if of_samples else ''}"
        samples, channels, _ = shape
        x, grad = (_values(seed, *shape, dtype=dtype) for seed in (1, 2))
        if last:
            x, grad = (t.transpose(1, 2).contiguous() for t in (x, grad))
        rows = (samples, channels) if of_samples else (channels,)
        v, weight, bias = (_values(seed, *size, dtype=dtype) for seed, size in ((3, rows[-1:]), (4, rows), (5, rows)))
        for rms, linear in ((False, False), (True, False), (False, True)):
            given = (x, v, weight, bias, 2, 1e-3, rms, linear, last)
            y, stats = zoo.evonorm_s(*given)
            tally.compare(f"evonorm_s, {what}", (y, stats), evonorm_eager.evonorm_s_forward(*given))
            given = (grad, x, v, weight, stats, 1e-3, rms, linear, last)
            ours, expected = zoo.evonorm_s_backward(*given), evonorm_eager.evonorm_s_backward(*given)
            tally.compare(f"evonorm_s_backward, {what}", ours, expected)
        moments = zoo.evonorm_moments(x, last)
        tally.compare(f"evonorm_moments, {what}", [moments], [evonorm_eager.evonorm_moments(x, last)])
        left, centre, pull = moments.new_full((channels,), 1.5), moments.new_ones(channels), moments[1] / 7
        for variant in range(3):
            rest = (moments, left, 1e-3, variant, last)
            ours, expected = (
                f(x, v, weight, bias, *rest) for f in (zoo.evonorm_b_apply, evonorm_eager.evonorm_b_apply)
            )
            tally.compare(f"evonorm_b_apply, {what}", [ours], [expected])
            ours, expected = (f(grad, x, v, weight, *rest) for f in (zoo.evonorm_b_sums, evonorm_eager.evonorm_b_sums))
            tally.compare(f"evonorm_b_sums, {what}", [ours], [expected])
            given = (grad, x, v, weight, moments, left, centre, pull, centre / 3, *rest[2:])
            tally.compare(
                f"evonorm_b_grad, {what}", [zoo.evonorm_b_grad(*given)], [evonorm_eager.evonorm_b_grad(*given)]
            )


def compare_comp_sum_ops(tally: Tally) -> None:
    """Both ops against the closed form, with one tau and one a row."""
    zoo = torch.ops.zoo
    for dtype, shape, tau in itertools.product(TOLERANCES, SCORES, (0.0, 1.0, 1.7, None)):
        what = f"{dtype} {list(shape)}, tau {'of rows' if tau is None else tau}"
        rows = (shape[0], shape[2])
        compute = torch.promote_types(dtype, torch.float32)
        scores, grad = _values(1, *shape, dtype=dtype), _values(2, *rows, dtype=compute)
        target = torch.arange(rows[0] * rows[1]).reshape(rows) * 7 % shape[1]
        target.view(-1)[3::4] = -100
        taus = _values(3, *rows, dtype=compute).abs() if tau is None else None
        rest = (taus, tau or 0.0, 3.0, -100)
        loss, statistics = zoo.comp_sum(scores, target, *rest)
        expected = comp_sum_eager.comp_sum_forward(scores, target, *rest)
        tally.compare(f"comp_sum, {what}", (loss, *statistics), (expected[0], *expected[1]))
        ours, wanted = (
            op(grad / 64, scores, target, statistics, *rest)  # a slope of tau = 0 leaves half precision
            for op in (zoo.comp_sum_backward, comp_sum_eager.comp_sum_backward)
        )
        tally.compare(f"comp_sum_backward, {what}", [ours], [wanted])


def compare_convex_ops(tally: Tally) -> None:
    """The five ops and the harmonics against PyTorch, each given what ours gave before it; two cameras of one scene."""
    width, height, count = 37, 29, 20
    for dtype, k, clip in itertools.product((torch.float64, torch.float32), (3, 6, 8), (False, True)):
        what = f"{dtype}, {k} points{', clip' if clip else ''}"
        middles = _values(1, 1, count, 1, 3, dtype=dtype, largest=2.0) + torch.tensor([0, 0, 0.5 if clip else 3.0])
        # Cubes of the index: the values step evenly, and where points lie on a line, rounding decides on the hull.
        arms = (torch.arange(1, count * k * 3 + 1) ** 3 * 48271 % 65521 / 65520.0 - 0.5).reshape(1, count, k, 3)
        points = (middles + arms).to(dtype)
        delta, sigmas = _values(3, 1, count, dtype=dtype).abs() + 0.3, _values(4, 2, count, dtype=dtype).abs() + 0.1
        opacities = (_values(5, 2, count, dtype=dtype) / 4).abs() + 0.1
        viewmats = torch.eye(4, dtype=dtype).repeat(2, 1, 1)
        viewmats[1, :3, 3] = torch.tensor([0.1, -0.2, 0.3])
        Ks = torch.tensor([[40.0, 0, 18], [0, 38, 15], [0, 0, 1]], dtype=dtype).repeat(2, 1, 1)
        scene = (points, delta, sigmas, opacities, viewmats, Ks)
        options = (width, height, 0.1, 100.0, 0.0, 30.0, clip, True)
        projected = convex.convex_project(*scene, *options)
        tally.compare(f"convex_project, {what}", projected, convex_eager.convex_project(*scene, *options))
        means2d, depths, points2d, lines, sharpness, limits, hull_size, boxes, _ = projected
        footprint = (means2d, depths, lines, limits, hull_size, boxes, width, height, 16)
        met = convex.convex_isect(*footprint)
        tally.compare(f"convex_isect, {what}", met, convex_eager.convex_isect(*footprint))
        colors, behind = _values(6, 2, count, 3, dtype=dtype), _values(7, 2, 3, dtype=dtype)
        tensors = (means2d, lines, sharpness, opacities, colors, behind, sharpness, limits, hull_size, boxes, *met[1:])
        sizes = (width, height, 16)
        rendered = convex.convex_raster(*tensors, *sizes, True)
        tally.compare(f"convex_raster, {what}", rendered, convex_eager.convex_raster(*tensors, *sizes, True))
        grads = _values(8, 2, height, width, 3, dtype=dtype), _values(9, 2, height, width, dtype=dtype)
        ours, expected = (
            op(*grads, *tensors, *rendered[1:], *sizes)
            for op in (convex.convex_raster_bwd, convex_eager.convex_raster_bwd)
        )
        loose = dtype is torch.float32  # sums of either sign; the last bits are in the digest all the same
        tally.compare(f"convex_raster_bwd, {what}", ours, ours if loose else expected)
        arriving = (means2d, depths, points2d, *ours[:2])
        given = (*arriving, points, delta, sigmas, viewmats, Ks, lines, hull_size, 0.1, 30.0, clip, True, True)
        ours = convex.convex_project_bwd(*given)
        expected = ours if loose else convex_eager.convex_project_bwd(*given)
        tally.compare(f"convex_project_bwd, {what}", ours, expected)
        seen = hull_size > 0
        for degree in range(5):
            dirs, coeffs = _values(1, 2, count, 3, dtype=dtype), _values(2, 1, count, 25, 3, dtype=dtype)
            given = (dirs, coeffs, seen, degree)
            tally.compare(f"sh_eval, {what}", [sh.sh_eval(*given)], [sh.sh_formula(*given)])
            ours, expected = (op(colors, *given) for op in (torch.ops.zoo.sh_eval_bwd, sh._formula_gradients))
            tally.compare(f"sh_eval_bwd, {what}", ours, expected)


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
    x, v, weight = (
        _values(seed, *shape, dtype=torch.float64).requires_grad_()
        for seed, shape in ((1, (2, 4, 3)), (2, (4,)), (3, (4,)))
    )
    torch.library.opcheck(torch.ops.zoo.evonorm_s.default, (x, v, weight, None, 2, 1e-3, False, False, False))
    for function in (
        lambda x, v, weight: evonorm.evonorm_s(x, v, weight, None, 2, 1e-3),
        lambda x, v, weight: evonorm.evonorm_b(x, v, weight, None, None, True, eps=1e-3),
    ):
        assert torch.autograd.gradcheck(function, (x, v, weight))
        assert torch.autograd.gradgradcheck(function, (x, v, weight))
    scores, target = _values(1, 5, 4, dtype=torch.float64).requires_grad_(), torch.tensor([0, 3, -100, 1, 2])
    arguments = (scores[..., None], target[:, None], None, 1.7, float("inf"), -100)
    torch.library.opcheck(torch.ops.zoo.comp_sum.default, arguments)
    for tau in (0.0, 1.0, 1.7):
        assert torch.autograd.gradcheck(lambda z, tau=tau: comp_sum.comp_sum_loss(z, target, tau), scores)
        assert torch.autograd.gradgradcheck(lambda z, tau=tau: comp_sum.comp_sum_loss(z, target, tau), scores)


def check_here(library: Path) -> dict[str, object]:
    """What a child process does: all checks of this library in this environment."""
    assert cpu.find() == library, f"{cpu.find()} would be taken instead of {library}"
    assert use_cpu_library()
    for op in OPS:
        is_there = torch._C._dispatch_has_kernel_for_dispatch_key(f"zoo::{op}", "CPU")
        assert is_there, f"zoo::{op} is not from the library"
    tally = Tally()
    compare_ops(tally)
    compare_evonorm_ops(tally)
    compare_comp_sum_ops(tally)
    compare_convex_ops(tally)
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
            f"torch {found['torch']}: {found['count']} outputs of {len(OPS)} ops within {found['worst']:.2f} of the"
            f" tolerance, opcheck, gradcheck and gradgradcheck pass; bits {found['digest']}",
            flush=True,
        )
    if len(digests) > 1:
        print("FAILED: the bits differ between versions")
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
