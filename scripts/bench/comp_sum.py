"""Comp-sum losses, forward and backward, against F.cross_entropy and the ways generalised cross-entropy is written.

    python -m scripts.bench.comp_sum                  # on the CPU, one thread; a quarter of an hour and 8 GB
    python -m scripts.bench.comp_sum --threads 2 --out scripts/bench/results/comp_sum_cpu_2_threads.json
    python -m scripts.bench.comp_sum --quick          # seconds: does the script work?

from the repository root. ZOO_KERNELS=off measures the closed form in PyTorch instead of the native kernels. Rivals:
F.cross_entropy, torch.compile of it, the loss by softmax and a power, and the same with one-hot targets and clamped
probabilities as code for noisy labels has it; for the linear head F.linear followed by F.cross_entropy, torch.compile
of it, and F.linear_cross_entropy where torch has it, whole and in chunks. F.cross_entropy is the yardstick for every
tau. Nothing is timed before ours equals cross-entropy in float64, carried over to tau, in loss and gradients in every
case (exit status 1 if not).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from scripts.bench import _speed
from scripts.bench._speed import time_rivals
from scripts.bench._timing import Run
from tests._numerics import assert_close
from zoo.losses import comp_sum_loss, linear_comp_sum_loss

# The acceptance shape first: a language model's head; then classifiers of three sizes, and segmentation.
SHAPES = ((8192, 32000), (2048, 1000), (1024, 100), (128, 10), (4, 21, 128, 128))
HALF_SHAPE = (4096, 32000)  # in bfloat16
LINEAR = (512, 128, 32768)  # rows, features, classes
QUICK_SHAPES, QUICK_LINEAR = ((64, 50), (2, 5, 4, 4)), (16, 8, 40)
TAUS = (1.0, 1.7)
COMPILED = "cross_entropy_compiled"
YARDSTICK = "cross_entropy"
CHUNK = 128  # rows of F.linear_cross_entropy at a time: as fast as 64 and 256, and 32 takes 1.4 times as long
# What is promised: our time over that of the yardstick at the first shape, and peak memory over the scores' bytes.
FASTER, PEAK = 0.65, 1.1
SMALL, SMALL_MILLISECONDS = 1.3, 0.1  # elsewhere: either of the two
LINEAR_FASTER, LINEAR_CHUNKED = 0.70, 1.10
WITHOUT_COMPILER = 1.0  # the closed form is not slower than the yardstick
CHUNKED = "linear_cross_entropy_chunked"

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One loss on one input."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tau: float

    def facts(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"op": self.op, "shape": list(self.shape), "dtype": dtype, "tau": self.tau}

    @property
    def score_bytes(self) -> int:
        rows, *_, classes = self.shape
        count = rows * classes if self.op == "linear_comp_sum" else torch.Size(self.shape).numel()
        return count * self.dtype.itemsize


def _of_probability(p: Tensor, tau: float) -> Tensor:
    return -p.log() if tau == 1 else (1 - p ** (tau - 1)) / (tau - 1)


def _by_softmax(scores: Tensor, target: Tensor, tau: float) -> Tensor:
    p = scores.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    return _of_probability(p, tau).mean()


def _by_one_hot(scores: Tensor, target: Tensor, tau: float) -> Tensor:
    p = scores.softmax(1).clamp(min=1e-7, max=1.0)
    labels = F.one_hot(target, scores.shape[1]).movedim(-1, 1).to(p.dtype)
    return _of_probability((labels * p).sum(1), tau).mean()


def _linear(features: Tensor, matrix: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, matrix), target)


def rivals(case: Case) -> dict[str, Loss]:
    """Everything that is timed, ours first."""
    tau = case.tau
    if case.op == "comp_sum":
        return {
            "ours": lambda scores, target: comp_sum_loss(scores, target, tau),
            YARDSTICK: F.cross_entropy,
            COMPILED: torch.compile(F.cross_entropy, fullgraph=True, dynamic=False),
            "softmax": lambda scores, target: _by_softmax(scores, target, tau),
            "one_hot": lambda scores, target: _by_one_hot(scores, target, tau),
        }
    found: dict[str, Loss] = {
        "ours": lambda features, matrix, target: linear_comp_sum_loss(features, matrix, target, tau),
        YARDSTICK: _linear,
        COMPILED: torch.compile(_linear, fullgraph=True, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.14
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        found["linear_cross_entropy"] = F.linear_cross_entropy
        found[CHUNKED] = lambda *inputs: F.linear_cross_entropy(*inputs, options=options)
    return found


def _inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Scores, or features and matrix; then the targets."""
    generator = torch.Generator().manual_seed(0)
    if case.op == "comp_sum":
        sizes, classes, rows = [case.shape], case.shape[1], (case.shape[0], *case.shape[2:])
    else:
        count, features, classes = case.shape
        sizes, rows = [(count, features), (classes, features)], (count,)
    leaves = [torch.randn(size, generator=generator).to(device, case.dtype) for size in sizes]
    if case.op == "linear_comp_sum":
        leaves[1] /= case.shape[1] ** 0.5
    target = torch.randint(classes, rows, generator=generator).to(device)
    return *(t.requires_grad_() for t in leaves), target


def _step(function: Loss, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(function(*inputs), inputs[:-1])


def _expected(case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients in float64, from cross-entropy as torch has it."""
    *leaves, target = (t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs)
    scores = leaves[0] if case.op == "comp_sum" else F.linear(*leaves)
    nll = F.cross_entropy(scores, target, reduction="none")
    loss = (nll if case.tau == 1 else torch.expm1((1 - case.tau) * nll) / (1 - case.tau)).mean()
    return [loss, *torch.autograd.grad(loss, leaves)]


def check(case: Case, device: torch.device) -> None:
    """Raise AssertionError unless ours equals cross-entropy carried over to tau, in a part of the samples."""
    inputs = _inputs(case, device)
    part = max(1, min(len(inputs[0]), 2**22 * len(inputs[0]) * case.dtype.itemsize // case.score_bytes))
    rows, target = inputs[0].detach()[:part].requires_grad_(), inputs[-1][:part]
    inputs = (rows, *inputs[1:-1], target)
    loss = rivals(case)["ours"]
    actual = (loss(*inputs), *_step(loss, inputs)())
    for name, got, wanted in zip(("loss", "gradient", "of matrix"), actual, _expected(case, inputs), strict=False):
        try:
            assert_close(got, wanted, loose=1 if case.op == "comp_sum" else 20)  # whose scores come from sums
        except AssertionError as error:
            raise AssertionError(f"{case.facts()}: {name}: {error}") from None


def peak(step: Run) -> int:
    """Bytes torch holds on the CPU at most at once, beyond what was there; the results of the step are among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = step()
    assert recorded.profiler is not None
    # The table of the profiler adds up what each op leaves behind; when it came and went is only written here.
    events = recorded.profiler.kineto_results.events()
    held = highest = 0
    for _, amount in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += amount
        highest = max(highest, held)
    del result
    return highest


def measure(case: Case, device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """Times, saved bytes and peak memory of every rival that runs, and why another did not."""
    torch.compiler.reset()  # one specialised graph a shape: the compiled rival at its best
    inputs, losses = _inputs(case, device), rivals(case)
    steps: dict[str, Run] = {name: _step(loss, inputs) for name, loss in losses.items()}
    row = time_rivals(case, steps, losses, inputs, compiled=COMPILED, rounds=rounds, quick=quick)
    if device.type == "cpu":
        for name, figures in row["rivals"].items():
            figures["peak_over_scores"] = round(peak(steps[name]) / case.score_bytes, 3)
    return row


def _promise(claim: str, measured: float | None, most: float) -> dict[str, Any]:
    return {"claim": claim, "measured": measured, "met": None if measured is None else measured <= most}


def acceptance(results: list[dict[str, Any]], native: bool) -> list[dict[str, Any]]:
    """The promises for every tau; None where this run did not measure one.

    Args:
        results: of :func:`measure`.
        native: whether the CPU library ran, or the closed form in PyTorch, which promises less.
    """
    promises = []

    def figures(case: Case) -> tuple[str, dict[str, Any]]:
        facts = case.facts()
        rows = next((row["rivals"] for row in results if facts.items() <= row.items()), {})
        return f"{facts['op']} {facts['shape']} {facts['dtype']}, tau {case.tau:g}:", rows

    def share(rows: dict[str, Any], rival: str) -> float | None:
        return round(1 / rows[rival]["ratio_to_ours"], 3) if rival in rows else None

    for tau in TAUS:
        where, rows = figures(Case("comp_sum", SHAPES[0], torch.float32, tau))
        most = FASTER if native else WITHOUT_COMPILER
        claim = f"{where} at most {most:g} of the time of F.cross_entropy"
        promises.append(_promise(claim, share(rows, YARDSTICK), most))
        claim = f"{where} at most {PEAK:g} times its scores in memory beside them"
        promises.append(_promise(claim, rows.get("ours", {}).get("peak_over_scores"), PEAK))
        where, rows = figures(Case("linear_comp_sum", LINEAR, torch.float32, tau))
        most = LINEAR_FASTER if native else WITHOUT_COMPILER
        claim = f"{where} at most {most:g} of the time of F.linear and F.cross_entropy"
        promises.append(_promise(claim, share(rows, YARDSTICK), most))
        if not native:
            continue
        if rows.keys() and CHUNKED not in rows:
            continue  # this torch has no rival to compare with
        claim = f"{where} at most {LINEAR_CHUNKED:g} of the time of F.linear_cross_entropy in chunks of {CHUNK}"
        promises.append(_promise(claim, share(rows, CHUNKED), LINEAR_CHUNKED))
    for tau in TAUS if native else ():
        for shape in SHAPES[1:]:
            where, rows = figures(Case("comp_sum", shape, torch.float32, tau))
            claim = f"{where} at most {SMALL:g} of the time of F.cross_entropy, or {SMALL_MILLISECONDS:g} ms more"
            promise = _promise(claim, share(rows, YARDSTICK), SMALL)
            if rows:
                more = rows["ours"]["median_ms"] - rows[YARDSTICK]["median_ms"]
                promise["met"] = promise["met"] or more <= SMALL_MILLISECONDS
            promises.append(promise)
    return promises


def cases(quick: bool) -> list[Case]:
    """Every shape, then bfloat16, then the linear head, each for every tau."""
    inputs: list[tuple[str, tuple[int, ...], torch.dtype]]
    inputs = [("comp_sum", shape, torch.float32) for shape in (QUICK_SHAPES if quick else SHAPES)]
    inputs.append(("comp_sum", QUICK_SHAPES[0] if quick else HALF_SHAPE, torch.bfloat16))
    inputs.append(("linear_comp_sum", QUICK_LINEAR if quick else LINEAR, torch.float32))
    return [Case(op, shape, dtype, tau) for op, shape, dtype in inputs for tau in TAUS]


def main(arguments: list[str]) -> int:
    columns = {"op": 15, "shape": 18, "dtype": 9, "tau": 4}
    return _speed.main(_speed.Family("comp_sum", 9, cases, check, measure, acceptance, columns), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
