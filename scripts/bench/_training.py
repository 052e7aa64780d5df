"""Evidence by training runs: each is `python -m zoo fit` in a folder that is thrown away, its row what came out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parents[2]

Rows = list[dict[str, Any]]


class Run(Protocol):
    """One training run."""

    def facts(self) -> dict[str, Any]:
        """The beginning of the run's row: what tells it from others, and its `recipe`."""
        ...

    def row(self) -> dict[str, Any]:
        """Train, and collect what came out."""
        ...


def recipe(configs: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """What decides the outcome, the code aside; a row with the same recipe need not be made again.

    Args:
        configs: below `configs/`, without the ending.
        arguments: of `python -m zoo`.
    """
    text = b"".join((ROOT / "configs" / f"{name}.yaml").read_bytes() for name in configs)
    return {
        "arguments": list(arguments),
        "configs_sha256": hashlib.sha256(text).hexdigest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def train(arguments: Sequence[str], collect: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Run `python -m zoo` in a folder of its own; what `collect` finds there.

    Raises:
        RuntimeError: if the command failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="zoo_bench_") as scratch:
        folder = Path(scratch) / "run"
        # One thread: runs side by side do not disturb each other, and sums are in the same order everywhere.
        done = subprocess.run(
            [sys.executable, "-m", "zoo", *arguments, "--run_dir", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-2000:]}")
        return collect(folder)


def outcome(folder: Path) -> dict[str, Any]:
    """What every finished run directory says: final metrics, size, seconds, commit."""
    result = json.loads((folder / "report" / "result.json").read_text())
    record = json.loads((folder / "environment.json").read_text())
    return {
        **{name.replace("/", "_"): value for name, value in result["final"].items() if name.startswith("val/")},
        "steps": result["steps"],
        "parameters": result["parameters"],
        "wall_s": result["wall_s"],
        "git": record["git"],
    }


def finished_rows(path: Path, recipe_of: Callable[[dict[str, Any]], dict[str, Any]]) -> Rows:
    """Finished rows of an earlier file that running them again would not change."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["results"]
    return [row for row in rows if "error" not in row and row["recipe"] == recipe_of(row)]


def run_all(
    todo: Sequence[Any], rows: Rows, jobs: int, save: Callable[[], object], said: Callable[[dict[str, Any]], str]
) -> None:
    """Add the row of every run to `rows`, `jobs` at a time; save after each and say what came out.

    Whatever goes wrong in one run is recorded in its row and does not cost the others.
    """
    print(f"{len(rows)} run(s) kept, {len(todo)} to go", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run.row): run for run in todo}
        for future in as_completed(futures):
            run, error = futures[future], future.exception()
            row = {**run.facts(), "error": repr(error)} if error else future.result()
            rows.append(row)
            save()
            facts = " ".join(str(value) for name, value in run.facts().items() if name != "recipe")
            print(f"{facts}: {row.get('error') or said(row)}", flush=True)
