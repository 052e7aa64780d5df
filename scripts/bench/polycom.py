"""PolyNorm and PolyReLU, forward and backward on one CPU thread, against the authors' formula and what torch offers.

    python -m scripts.bench.polycom [--rounds 15] [--out scripts/bench/results/polycom_cpu.json]

from the repository root. Rivals: the official formula in native autograd, the same under activation checkpointing (as
the authors run it), torch.compile of it, and F.gelu as the activation everybody has. About three minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from scripts.bench._timing import interleave, saved_multiple, summarise, write_results
from tests.activations.polycom_baselines import (
    official_poly_norm,
    official_poly_norm_checkpointed,
    official_poly_relu,
)
from zoo.functional import poly_norm, poly_relu

SHAPES = ((512, 4096), (2048, 1024), (64, 8256), (16, 32768))
DTYPES = (torch.float32, torch.bfloat16)

Activation = Callable[[Tensor, Tensor, Tensor], Tensor]


def _without_coefficients(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gelu(x)


def _rivals() -> dict[str, dict[str, Activation]]:
    """Everything that is timed, ours first, by what it computes."""
    return {
        "poly_norm": {
            "ours": poly_norm,
            "official": official_poly_norm,
            "official_checkpointed": official_poly_norm_checkpointed,
            "official_compiled": torch.compile(official_poly_norm, dynamic=False),
            "gelu": _without_coefficients,
        },
        "poly_relu": {
            "ours": poly_relu,
            "official": official_poly_relu,
            "official_compiled": torch.compile(official_poly_relu, dynamic=False),
            "gelu": _without_coefficients,
        },
    }


def _inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """x, weight, bias, all in the dtype as in the authors' bfloat16 run, and the incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    weight, bias = torch.full((3,), 1 / 3, dtype=dtype), torch.zeros(1, dtype=dtype)
    return (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()), grad


def _step(function: Activation, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(function(*inputs), inputs, grad, allow_unused=True)

    return run


def _measure(op: str, rows: int, width: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()  # one specialised graph a shape: the compiled rival at its best
    rivals, (inputs, grad) = _rivals()[op], _inputs(rows, width, dtype)
    steps = {name: _step(function, inputs, grad) for name, function in rivals.items()}
    times = interleave(steps, rounds=rounds, clock=time.process_time)
    table: dict[str, dict[str, float]] = summarise(times, "ours")
    for name, function in rivals.items():
        table[name]["saved_over_input"] = saved_multiple(function, *inputs)
    for name, row in table.items():
        print(f"{op:10} [{rows}, {width}] {str(dtype)[6:]:9} {name:22}", *(f"{k} {v:<9}" for k, v in row.items()))
    return {"op": op, "shape": [rows, width], "dtype": str(dtype)[6:], "rivals": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="figures per rival (15)")
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/polycom_cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [
        _measure(op, rows, width, dtype, args.rounds)
        for op in ("poly_norm", "poly_relu")
        for rows, width in SHAPES
        for dtype in DTYPES
    ]
    facts = {"what": "forward and backward, CPU time of one thread", "implementation": "eager closed form"}
    write_results(args.out, results, device="cpu", rounds=args.rounds, **facts)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
