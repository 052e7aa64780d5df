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

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from scripts.bench import _speed
from scripts.bench._speed import time_rivals
from tests._numerics import assert_close
from tests.activations.polycom_baselines import (
    official_poly_norm,
    official_poly_norm_checkpointed,
    official_poly_relu,
    oracle_poly_norm,
    oracle_poly_relu,
)
from zoo.functional import poly_norm, poly_relu

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
    return time_rivals(case, steps, rivals, inputs, compiled=COMPILED, rounds=rounds, quick=quick)


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


def cases(quick: bool) -> list[Case]:
    """Every op and dtype at every shape."""
    shapes = QUICK_SHAPES if quick else SHAPES
    return [Case(op, shape, dtype) for op in ("poly_norm", "poly_relu") for shape in shapes for dtype in DTYPES]


def main(arguments: list[str]) -> int:
    columns = {"op": 10, "shape": 13, "dtype": 9}
    return _speed.main(_speed.Family("polycom", 15, cases, check, measure, acceptance, columns), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
