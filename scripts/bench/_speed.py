"""What the speed benchmarks of the families share: the command, the promises' verdicts, rivals timed in one process."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scripts.bench._timing import Run, interleave, saved_multiple, summarise, write_results
from zoo import settings
from zoo.kernels import use_cpu_library

RESULTS = Path(__file__).resolve().parent / "results"

Results = list[dict[str, Any]]


class Case(Protocol):
    """One operation on one input."""

    def facts(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Family:
    """A family's part of its benchmark.

    Args:
        name: of the result, `<name>_<device>.json`.
        rounds: figures per rival unless asked otherwise.
        cases: of a whole or a quick run.
        check: raises AssertionError unless ours is right.
        measure: `(case, device, rounds, quick)` to a row.
        acceptance: `(results, native)` to promises, each a claim, what was measured and whether it is met.
        columns: of a case's facts, with their widths, to print.
    """

    name: str
    rounds: int
    cases: Callable[[bool], Sequence[Any]]
    check: Callable[[Any, torch.device], None]
    measure: Callable[[Any, torch.device, int, bool], dict[str, Any]]
    acceptance: Callable[[Results, bool], list[dict[str, Any]]]
    columns: dict[str, int]


def time_rivals(
    case: Case,
    steps: dict[str, Run],
    forwards: dict[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    *,
    compiled: str,
    rounds: int,
    quick: bool,
) -> dict[str, Any]:
    """Times and saved bytes of every rival that runs, and why another did not.

    Args:
        case: for its facts.
        steps: forward and backward of each rival, ours first.
        forwards: the forward of each, of the inputs.
        inputs: the first one is the measure of saved bytes.
        compiled: the rival that needs a compiler.
        rounds: figures per rival.
        quick: do not wait for the compiler.
    """
    skipped: dict[str, str] = {}
    if quick:
        skipped[compiled] = "--quick does not wait for the compiler"
    else:
        try:
            steps[compiled]()
        except RuntimeError as error:  # no C++ compiler or Triton; whatever else fails must be seen
            skipped[compiled] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    running = {name: step for name, step in steps.items() if name not in skipped}
    # The CPU time of one thread leaves out what neighbours take; several threads or a GPU need the wall's.
    alone = inputs[0].device.type == "cpu" and torch.get_num_threads() == 1
    times = interleave(running, rounds=rounds, clock=time.process_time if alone else time.perf_counter)
    table: dict[str, dict[str, float]] = summarise(times, "ours")
    for name, row in table.items():
        row["saved_over_input"] = saved_multiple(forwards[name], *inputs)
    return {**case.facts(), "rivals": table, **({"skipped": skipped} if skipped else {})}


def show(result: dict[str, Any], columns: dict[str, int]) -> None:
    """A line a rival."""
    what = " ".join(f"{result[name]!s:{width}}" for name, width in columns.items())
    for name, row in result["rivals"].items():
        print(what, f"{name:22}", *(f"{key} {value:<9}" for key, value in row.items()), flush=True)
    for name, reason in result.get("skipped", {}).items():
        print(what, f"{name:22} skipped: {reason}", flush=True)


def main(family: Family, doc: str | None, arguments: list[str]) -> int:
    """Check, measure, record; exit status 1 if ours is wrong, and nothing is timed then."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (1)")
    rounds_help = f"figures per rival, at least 2 ({family.rounds}; 3 with --quick)"
    parser.add_argument("--rounds", type=int, default=None, help=rounds_help)
    parser.add_argument("--quick", action="store_true", help="one small shape, no torch.compile")
    out_help = f"JSON file (results/{family.name}_<device>.json)"
    parser.add_argument("--out", type=Path, default=None, help=out_help)
    args = parser.parse_args(arguments)
    rounds = args.rounds or (3 if args.quick else family.rounds)
    suffix = "" if settings.kernel_mode() != "off" else "_closed_form"
    out = args.out or RESULTS / f"{family.name}_{args.device.type}{suffix}{'_quick' if args.quick else ''}.json"
    torch.set_num_threads(args.threads)
    native = args.device.type == "cpu" and use_cpu_library()
    cases = family.cases(args.quick)
    try:
        for case in cases:
            family.check(case, args.device)
    except AssertionError as error:
        print(f"nothing timed, ours is wrong: {error}", file=sys.stderr)
        return 1
    results = []
    for case in cases:
        results.append(family.measure(case, args.device, rounds, args.quick))
        show(results[-1], family.columns)
    promises = family.acceptance(results, native)
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
