"""Everything a GPU can tell about the kernels, in one command and under eight minutes.

    python -m scripts.gpu_check            # from the repository root; needs torch, numpy and pytest

Compiles the kernels, compares every one with its float64 oracle, runs `pytest -m gpu`, measures what the device can
copy and multiply, times the benchmarks against the peers that are installed, writes
scripts/bench/results/<device>-<date>.json and prints a short table. Exit status 1 if a kernel or a test is wrong; a
missed target of speed is shown, and is not an error. No setting of the device is changed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from scripts.bench import _gpu
from scripts.bench._timing import write_results
from zoo.errors import KernelError
from zoo.kernels import launch, nvrtc

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts/bench/results"
FAMILIES = ("scripts.bench.polycom_gpu", "scripts.bench.evonorm_gpu", "scripts.bench.comp_sum_gpu")
"""Modules with `units()`, `checks(device)` and `benchmarks()`."""

_SECONDS = 450.0  # of the eight minutes, for everything
_TEST_PATHS = ("tests/kernels", "tests/activations", "tests/norms", "tests/losses")


def compile_units(families: list[Any]) -> dict[str, Any]:
    """Compile what is used below, in parallel."""
    units = [unit for family in families for unit in family.units()]
    arch = launch.gpu(torch.cuda.current_device()).arch
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(lambda unit: len(nvrtc.cubin(unit, arch)), units))
    return {"arch": arch, "units": len(units), "bytes": sum(sizes), "seconds": round(time.perf_counter() - start, 1)}


def compare(families: list[Any], device: torch.device) -> dict[str, Any]:
    """Run every check; the failures by name."""
    failed: dict[str, str] = {}
    count = 0
    for family in families:
        for name, check in family.checks(device):
            count += 1
            torch.manual_seed(0)
            try:
                check()
            except (AssertionError, RuntimeError) as error:  # wrong, or the launch failed
                failed[name] = _short(error)
    return {"checks": count, "failed": failed}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def run_tests(seconds: float) -> dict[str, Any]:
    """`pytest -m gpu`: the tests of the CPU, on the GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--maxfail=30",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *_TEST_PATHS,
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"ok": False, "summary": f"not finished after {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"ok": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:], "failures": failures}


def measure(
    families: list[Any], device: torch.device, deadline: float, failed: dict[str, str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The device's ceilings and every benchmark that starts before the deadline; to `failed` goes what does not run."""
    limits = _gpu.ceilings(device)
    results = []
    for family in families:
        for benchmark in family.benchmarks():
            if time.monotonic() > deadline:
                print(f"out of time before {benchmark.name} {benchmark.facts}")
                continue
            try:
                results.append(_gpu.run(benchmark, device, limits["copy_bytes_per_s"], deadline))
            except RuntimeError as error:  # the other figures are worth keeping
                failed[f"{benchmark.name} {benchmark.facts}"] = _short(error)
                continue
            print(row(results[-1]), flush=True)
    return limits, results


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    ours = result["rivals"]["ours"]["median_ms"]
    others = [f"{name} {r['ratio_to_ours']:.2f}x" for name, r in result["rivals"].items() if name != "ours"]
    verdict = "met" if result["met"] else f"MISSED {result['target_share']:.0%}"
    where = f"{result['name']:22} {result['shape']!s:15}"
    promised = [
        f"{name} {'met' if ratio['met'] else 'MISSED'} {ratio['target']:.2f}x"
        for name, ratio in result.get("target_ratios", {}).items()
    ]
    share = f"{result['share_of_copy']:6.1%} of copy, {verdict:11}"
    return f"{where} {ours:8.4f} ms  {share}  {', '.join([*others, *promised])}"


def file_name(device: str, date: str) -> str:
    """`nvidia-h100-80gb-hbm3-2026-01-31.json`."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{date}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/<device>-<date>.json)")
    parser.add_argument("--no-tests", action="store_true", help="leave out `pytest -m gpu`")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "gpu_check needs a CUDA device and a torch built for CUDA; `zoo doctor` says what is here", file=sys.stderr
        )
        return 2
    os.environ.setdefault("ZOO_KERNELS", "require")  # a fallback must not pass for a kernel
    begin = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    families = [importlib.import_module(module) for module in FAMILIES]
    try:
        compiled = compile_units(families)
    except KernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{name}: compiled {compiled['units']} units for sm_{compiled['arch']} in {compiled['seconds']} s", flush=True
    )
    compared = compare(families, device)
    print(f"compared {compared['checks']} cases, {len(compared['failed'])} wrong", flush=True)
    tests = {"ok": True, "summary": "left out"} if options.no_tests else run_tests(_SECONDS / 2)
    print(f"pytest -m gpu: {tests['summary']}", flush=True)
    limits: dict[str, float] = {}
    results: list[dict[str, Any]] = []
    if not compared["failed"]:  # the time of a wrong kernel means nothing
        limits, results = measure(families, device, begin + _SECONDS, compared["failed"])
    for what, error in compared["failed"].items():
        print(f"WRONG {what}: {error}")
    out = options.out or RESULTS / file_name(name, time.strftime("%Y-%m-%d"))
    facts = {"compiled": compiled, "compared": compared, "tests": tests, "ceilings": limits}
    write_results(out, results, device=name, what="one call on the device", **facts)
    print(f"wrote {out}; {time.monotonic() - begin:.0f} s")
    return 0 if tests["ok"] and not compared["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
