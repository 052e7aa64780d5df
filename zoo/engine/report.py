"""report/: result.json and learning curves at the end of a fit, and what the task itself has to show."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ..environment import write_text
from .jsonl import read_metrics


class Report(L.Callback):
    """Write `report/` when training ends and say where it is.

    A task adds what it has to show by a method `write_report(folder) -> dict`, which writes files into the folder and
    returns plain data for result.json.

    Args:
        folder: the run directory.
        config: the resolved config as YAML text; its hash goes into result.json.
        monitor: metric of the best checkpoint, if one is kept.
        mode: "min" or "max" of that metric.
    """

    def __init__(self, folder: Path, config: str, monitor: str | None, mode: str) -> None:
        self.folder, self.config, self.monitor, self.mode = folder, config, monitor, mode
        self.summary = ""  # the lines a run ends with, once it has
        self._started = time.perf_counter()  # should no training start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # after on_train_end, where the last checkpoint was written: a report that fails costs no state
        if not trainer.is_global_zero or trainer.interrupted:
            return
        folder = self.folder / "report"
        folder.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.folder / "metrics.jsonl")
        result = self._result(trainer, pl_module, rows)
        write_report = getattr(pl_module, "write_report", None)
        if write_report is not None:
            result.update(write_report(folder))
        write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
        draw_learning_curves(rows, folder / "learning_curves.png")
        self.summary = summarize(result, folder)

    def _result(self, trainer: L.Trainer, pl_module: L.LightningModule, rows: list[dict[str, Any]]) -> dict[str, Any]:
        final: dict[str, float] = {}
        for row in rows:
            final.update({k: v for k, v in row.items() if k not in {"step", "epoch"}})
        parameters = list(pl_module.parameters())
        result: dict[str, Any] = {
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "final": final,
            "wall_s": round(time.perf_counter() - self._started, 3),
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "peak_memory_mib": round(_peak_memory_mib(pl_module.device), 1),
            "config_sha256": hashlib.sha256(self.config.encode()).hexdigest(),
        }
        scored = [(row[self.monitor], row["step"]) for row in rows if self.monitor in row]
        if self.monitor is not None and scored:
            value, step = (min if self.mode == "min" else max)(scored, key=lambda pair: pair[0])
            result["best"] = {"metric": self.monitor, "value": value, "after_steps": step + 1}  # lines count from 0
        return result


def summarize(result: dict[str, Any], folder: Path) -> str:
    """The reached figures and where the report is."""
    shown = {k: v for k, v in result["final"].items() if k.startswith("val/")} or result["final"]
    figures = "  ".join(f"{k} {v:.4g}" for k, v in shown.items() if isinstance(v, float))
    reached = figures or "nothing was logged; lower trainer.log_every_n_steps or validate"
    lines = [f"trained {result['steps']} steps in {result['wall_s']:.0f} s: {reached}"]
    if "best" in result:
        best = result["best"]
        lines.append(f"best {best['metric']} {best['value']:.4g} after {best['after_steps']} steps")
    lines.append(f"report: {folder}")
    return "\n".join(lines)


def draw_learning_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each quantity, e.g. train/loss and val/loss together, over steps."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for key, value in row.items():
            stage, _, quantity = key.rpartition("/")
            if stage in {"train", "val"} or key == "lr":
                curves[quantity][stage or key].append((row["step"], value))
    if not curves:
        return
    import matplotlib.style
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    columns = min(3, len(curves))
    shape = (math.ceil(len(curves) / columns), columns)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(4.2 * shape[1], 3.0 * shape[0]), layout="constrained")
        axes = figure.subplots(*shape, squeeze=False).flat
        for axis, (quantity, stages) in zip(axes, sorted(curves.items()), strict=False):
            for stage, points in sorted(stages.items()):
                many = len(points) > 50
                axis.plot(
                    *zip(*points, strict=True), label=stage, alpha=0.6 if many else 1.0, marker=None if many else "."
                )
            axis.set(title=quantity, xlabel="step")
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
        for axis in figure.axes[len(curves) :]:
            axis.remove()
        figure.savefig(path, dpi=120)


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux
