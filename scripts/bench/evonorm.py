"""EvoNorm S0 and B0 in training, forward and backward, against timm's layers and what they replace.

    python -m scripts.bench.evonorm                  # on the CPU, one thread; about four minutes
    python -m scripts.bench.evonorm --quick          # seconds: does the script work?

from the repository root. ZOO_KERNELS=off measures the closed form in PyTorch instead of the native kernels. Rivals:
timm's layer, torch.compile of it, BatchNorm followed by SiLU, GroupNorm followed by SiLU. Nothing is timed before ours
equals the float64 oracle in outputs and gradients in every case (exit status 1 if not).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench import _speed
from scripts.bench._speed import time_rivals
from tests._numerics import assert_close
from tests.norms.evonorm_baselines import oracle_b, oracle_s
from zoo.norms import EvoNorm2dB0, EvoNorm2dS0

# The acceptance shape first; a deep layer of a ResNet at batch 8; a wide map of a mobile network.
SHAPES = ((8, 64, 56, 56), (8, 256, 14, 14), (2, 24, 112, 112))
QUICK_SHAPES = ((2, 8, 7, 7),)
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COMPILED = "timm_compiled"
# What is promised in float32 at the first shape: (layer, rival, least time of the rival over ours).
NATIVE = (
    ("s0", "bn_silu", 2.0),
    ("s0", "timm", 10.0),
    ("s0", COMPILED, 1.0),
    ("b0", "bn_silu", 1.0),
    ("b0", "timm", 10.0),
)
WITHOUT_COMPILER = (("s0", "timm", 1.0), ("b0", "timm", 1.0))
KEPT = {True: 1.05, False: 2.0}  # bytes for the backward over those of the input, with and without kernels


@dataclass(frozen=True)
class Case:
    """One layer on one input."""

    layer: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str = "contiguous"

    def facts(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"op": f"evonorm_{self.layer}", "shape": list(self.shape), "dtype": dtype, "layout": self.layout}


def groups_of(channels: int) -> int:
    """What every rival with groups gets: ours by default."""
    return EvoNorm2dS0(channels).groups


def ours(layer: str, channels: int) -> nn.Module:
    return EvoNorm2dS0(channels) if layer == "s0" else EvoNorm2dB0(channels)


def rivals(layer: str, channels: int) -> dict[str, nn.Module]:
    """Everything that is timed, ours first."""
    import timm.layers

    groups = groups_of(channels)
    if layer == "s0":
        theirs: nn.Module = timm.layers.EvoNorm2dS0(channels, groups=groups)
    else:
        theirs = timm.layers.EvoNorm2dB0(channels, eps=1e-5)
    return {
        "ours": ours(layer, channels),
        "timm": theirs,
        COMPILED: theirs,
        "bn_silu": nn.Sequential(nn.BatchNorm2d(channels), nn.SiLU()),
        "gn_silu": nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU()),
    }


def _inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and the incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(case.shape, generator=generator) for _ in range(2))
    # Of noise alone the parameters' gradients would be sums that cancel, and their relative error chance.
    x, grad = (t.to(device, case.dtype).to(memory_format=LAYOUTS[case.layout]) for t in (x, noise + x + 1))
    return x.requires_grad_(), grad


def _step(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    wanted = [x, *module.parameters()]
    return lambda: torch.autograd.grad(function(x), wanted, grad)


def check(case: Case, device: torch.device) -> None:
    """Raise AssertionError unless ours equals the oracle, within the tolerances of the test suite."""
    x, grad = _inputs(case, device)
    module = ours(case.layer, case.shape[1]).to(device)
    exact = x.detach().double().contiguous().requires_grad_()
    v, weight, bias = (
        parameter.detach().double().requires_grad_() for parameter in (module.v, module.weight, module.bias)
    )
    if case.layer == "s0":
        y = oracle_s(exact, v, weight, bias, groups_of(case.shape[1]))
    else:
        y = oracle_b(exact, v, weight, bias, None)
    expected = (y, *torch.autograd.grad(y, [exact, v, weight, bias], grad.double()))
    out = module(x)
    actual = (out, *torch.autograd.grad(out, [x, module.v, module.weight, module.bias], grad))
    for name, got, wanted in zip(("y", "dx", "dv", "dweight", "dbias"), actual, expected, strict=True):
        try:
            assert_close(got, wanted, loose=1 if got.ndim > 1 else 20)  # sums over 25,000 summands that partly cancel
        except AssertionError as error:
            raise AssertionError(f"{case.facts()}: {name}: {error}") from None


def measure(case: Case, device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """Times and saved bytes of every rival that runs, and why another did not."""
    torch.compiler.reset()  # one specialised graph a shape: the compiled rival at its best
    x, grad = _inputs(case, device)
    modules = {name: module.to(device) for name, module in rivals(case.layer, case.shape[1]).items()}
    calls: dict[str, Callable[[Tensor], Tensor]] = dict(modules)
    calls[COMPILED] = torch.compile(modules[COMPILED], fullgraph=True, dynamic=False)
    steps = {name: _step(calls[name], module, x, grad) for name, module in modules.items()}
    return time_rivals(case, steps, calls, (x,), compiled=COMPILED, rounds=rounds, quick=quick)


def acceptance(results: list[dict[str, Any]], native: bool) -> list[dict[str, Any]]:
    """The promises in float32 at the first shape; None where this run did not measure one.

    Args:
        results: of :func:`measure`.
        native: whether the CPU library ran, or the closed form in PyTorch.
    """
    found: dict[str, dict[str, Any]] = {}
    for layer in ("s0", "b0"):
        facts = Case(layer, SHAPES[0], torch.float32).facts()
        found[layer] = next((case["rivals"] for case in results if facts.items() <= case.items()), {})
    promises = []
    for layer, rival, least in NATIVE if native else WITHOUT_COMPILER:
        measured = found[layer].get(rival, {}).get("ratio_to_ours")
        met = None if measured is None else measured >= least
        claim = f"{layer.upper()} {list(SHAPES[0])} float32: {rival} takes at least {least:g} times as long"
        promises.append({"claim": claim, "measured": measured, "met": met})
    for layer, rows in found.items():
        kept = rows.get("ours", {}).get("saved_over_input")
        claim = f"{layer.upper()} {list(SHAPES[0])} float32: keeps at most {KEPT[native]:g} times its input"
        promises.append({"claim": claim, "measured": kept, "met": None if kept is None else kept <= KEPT[native]})
    return promises


def cases(quick: bool) -> list[Case]:
    """Every layout and dtype at every shape."""
    return [
        Case(layer, shape, dtype, layout)
        for layer in ("s0", "b0")
        for shape in (QUICK_SHAPES if quick else SHAPES)
        for dtype in DTYPES
        for layout in LAYOUTS
    ]


def main(arguments: list[str]) -> int:
    columns = {"op": 10, "shape": 17, "dtype": 9, "layout": 13}
    return _speed.main(_speed.Family("evonorm", 9, cases, check, measure, acceptance, columns), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
