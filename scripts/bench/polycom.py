"""PolyNorm and PolyReLU, forward and backward, against the authors' formula and what torch offers.

    python -m scripts.bench.polycom                  # on the CPU, one thread; about three minutes
    python -m scripts.bench.polycom --device cuda
    python -m scripts.bench.polycom --quick          # seconds: does the script work?

from the repository root. ZOO_KERNELS=off measures the closed form in PyTorch instead of the native kernels. Rivals: the
official formula in native autograd, the same under activation checkpointing (as the authors run it), torch.compile of
it, and F.gelu as the activation everybody has. Nothing is timed before ours equals the float64 oracle in outputs and
gradients in every case (exit status 1 if not).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from scripts.bench._timing import interleave, saved_multiple, summarise, write_results
from tests._numerics import assert_close
from tests.activations.polycom_baselines import (
    official_poly_norm,
    official_poly_norm_checkpointed,
    official_poly_relu,
    oracle_poly_norm,
    oracle_poly_relu,
)
from zoo import settings
from zoo.functional import poly_norm, poly_relu
from zoo.kernels import use_cpu_library

RESULTS = Path(__file__).resolve().parent / "results"
# The acceptance shape first; (1536, 384) is our byte-level LM's, the last ones have few but wide rows.
SHAPES = ((512, 4096), (1536, 384), (2048, 1024), (64, 8256), (64, 16384), (16, 32768))
QUICK_SHAPES = ((64, 256),)
DTYPES = (torch.float32, torch.bfloat16)
FASTER, KEPT = 20.0, 1.01  # what the CPU library promises of PolyNorm at the first shape
FASTER_WITHOUT_COMPILER = 4.0  # what the closed form does, in float32
COMPILED = "official_compiled"

Activation = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One operation on one input."""

    op: str
    shape: tuple[int, int]
    dtype: torch.dtype

    def facts(self) -> dict[str, Any]:
        return {"op": self.op, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}


def _without_coefficients(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gelu(x)


def _rivals(op: str) -> dict[str, Activation]:
    """Everything that is timed, ours first."""
    if op == "poly_norm":
        ours, official = {"ours": poly_norm}, {"official": official_poly_norm}
        official["official_checkpointed"] = official_poly_norm_checkpointed
    else:
        ours, official = {"ours": poly_relu}, {"official": official_poly_relu}
    compiled = torch.compile(official["official"], fullgraph=True, dynamic=False)
    return {**ours, **official, COMPILED: compiled, "gelu": _without_coefficients}


def _inputs(case: Case, device: torch.device) -> tuple[Inputs, Tensor]:
    """x, weight, bias, all in the dtype as in the authors' bfloat16 run, and the incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(case.shape, generator=generator) for _ in range(2))
    # Of noise alone the coefficients' gradients would be sums that cancel, and their relative error chance.
    x, grad = (t.to(device, case.dtype) for t in (x, noise + x + 1))
    weight, bias = torch.full((3,), 1 / 3), torch.zeros(1)
    weight, bias = weight.to(device, case.dtype), bias.to(device, case.dtype)
    return (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()), grad


def _step(function: Activation, inputs: Inputs, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, grad, allow_unused=True)

    return run


def check(case: Case, device: torch.device) -> None:
    """Raise AssertionError unless ours equals the oracle, within the tolerances of the test suite."""
    ours, oracle = {"poly_norm": (poly_norm, oracle_poly_norm), "poly_relu": (poly_relu, oracle_poly_relu)}[case.op]
    inputs, grad = _inputs(case, device)
    exact_x, exact_weight, exact_bias = (t.detach().double().requires_grad_() for t in inputs)
    exact = (exact_x, exact_weight, exact_bias)
    actual = (ours(*inputs).detach(), *_step(ours, inputs, grad)())
    expected = (oracle(*exact).detach(), *_step(oracle, exact, grad.double())())
    for name, got, wanted in zip(("y", "dx", "dweight", "dbias"), actual, expected, strict=True):
        try:
            assert_close(got, wanted)
        except AssertionError as error:
            raise AssertionError(f"{case.facts()}: {name}: {error}") from None


def measure(case: Case, device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """Times and saved bytes of every rival that runs, and why another did not."""
    torch.compiler.reset()  # one specialised graph a shape: the compiled rival at its best
    rivals, (inputs, grad) = _rivals(case.op), _inputs(case, device)
    steps = {name: _step(function, inputs, grad) for name, function in rivals.items()}
    skipped: dict[str, str] = {}
    if quick:
        skipped[COMPILED] = "--quick does not wait for the compiler"
    else:
        try:
            steps[COMPILED]()
        except RuntimeError as error:  # no C++ compiler or Triton; whatever else fails must be seen
            skipped[COMPILED] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    for name in skipped:
        del steps[name]
    # The CPU time of one thread leaves out what neighbours take; several threads or a GPU need the wall's.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    times = interleave(steps, rounds=rounds, clock=time.process_time if alone else time.perf_counter)
    table: dict[str, dict[str, float]] = summarise(times, "ours")
    for name, row in table.items():
        row["saved_over_input"] = saved_multiple(rivals[name], *inputs)
    return {**case.facts(), "rivals": table, **({"skipped": skipped} if skipped else {})}


def acceptance(results: list[dict[str, Any]], native: bool) -> list[dict[str, Any]]:
    """The promises at the first shape; None where this run did not measure one.

    Args:
        results: of :func:`measure`.
        native: whether the CPU library ran, or the closed form in PyTorch.
    """
    promises = []
    for dtype in DTYPES if native else DTYPES[:1]:
        facts = Case("poly_norm", SHAPES[0], dtype).facts()
        rivals = next((case["rivals"] for case in results if facts.items() <= case.items()), {})
        where = f"PolyNorm {facts['shape']} {facts['dtype']}, forward and backward,"

        def at_least(claim: str, least: float, rival: str, rivals=rivals, where=where) -> None:
            measured = rivals.get(rival, {}).get("ratio_to_ours")
            met = None if measured is None else measured >= least
            promises.append({"claim": f"{where} {claim}", "measured": measured, "met": met})

        least = FASTER if native else FASTER_WITHOUT_COMPILER
        at_least(f"at least {least:g} times as fast as the official formula", least, "official")
        if native:
            at_least("not slower than torch.compile of the official formula", 1.0, COMPILED)
            at_least("not slower than F.gelu", 1.0, "gelu")
        kept = rivals.get("ours", {}).get("saved_over_input")
        met = None if kept is None else kept <= KEPT
        promises.append({"claim": f"{where} keeps at most {KEPT:g} times its input", "measured": kept, "met": met})
    return promises


def show(result: dict[str, Any]) -> None:
    what = f"{result['op']:10} {result['shape']!s:13} {result['dtype']:9}"
    for name, row in result["rivals"].items():
        print(what, f"{name:22}", *(f"{key} {value:<9}" for key, value in row.items()), flush=True)
    for name, reason in result.get("skipped", {}).items():
        print(what, f"{name:22} skipped: {reason}", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (1)")
    parser.add_argument("--rounds", type=int, default=None, help="figures per rival, at least 2 (15; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="one small shape, no torch.compile")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/polycom_<device>.json)")
    args = parser.parse_args(arguments)
    rounds = args.rounds or (3 if args.quick else 15)
    suffix = "" if settings.kernel_mode() != "off" else "_closed_form"
    out = args.out or RESULTS / f"polycom_{args.device.type}{suffix}{'_quick' if args.quick else ''}.json"
    torch.set_num_threads(args.threads)
    native = args.device.type == "cpu" and use_cpu_library()

    cases = [
        Case(op, shape, dtype)
        for op in ("poly_norm", "poly_relu")
        for shape in (QUICK_SHAPES if args.quick else SHAPES)
        for dtype in DTYPES
    ]
    try:
        for case in cases:
            check(case, args.device)
    except AssertionError as error:
        print(f"nothing timed, ours is wrong: {error}", file=sys.stderr)
        return 1
    results = []
    for case in cases:
        results.append(measure(case, args.device, rounds, args.quick))
        show(results[-1])
    promises = acceptance(results, native)
    what = "forward and backward"
    if args.device.type == "cpu":
        what += ", CPU time of one thread" if args.threads == 1 else f", {args.threads} threads"
    write_results(
        out,
        results,
        device=torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu",
        what=what,
        implementation="CPU library" if native else "closed form in PyTorch",
        rounds=rounds,
        acceptance=promises,
    )
    for promise in promises:
        said = {True: "met", False: "MISSED", None: "not measured"}[promise["met"]]
        print(f"{said}: {promise['claim']} (measured {promise['measured']})")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
