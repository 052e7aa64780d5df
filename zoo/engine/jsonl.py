"""metrics.jsonl and evaluations.jsonl: one line per logging event, kept consistent when a killed run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class JSONLLogger(Logger):
    """Append metrics to a file of the run directory, one JSON object a line.

    Args:
        save_dir: the run directory.
        filename: `metrics.jsonl` is the record of training, `evaluations.jsonl` that of test and validate.
        facts: what every line begins with, before its step.
    """

    def __init__(self, save_dir: str, filename: str = "metrics.jsonl", facts: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._dir, self._filename, self._facts = Path(save_dir), filename, dict(facts or {})

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._dir)

    @property
    def log_dir(self) -> str:
        return str(self._dir)

    @property
    def path(self) -> Path:
        """The file of metrics."""
        return self._dir / self._filename

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**self._facts, "step": step, **metrics}) + "\n"
        if self._ends_torn():
            line = "\n" + line
        with self.path.open("a") as file:
            file.write(line)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml already holds them."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Set lines of steps that are about to be trained again aside, in `metrics.superseded.jsonl`.

        A half-written last line, which a kill leaves behind, is set aside too.
        """
        if not self.path.exists():
            return
        keep, superseded = [], []
        for line in self.path.read_text().splitlines():
            (keep if _precedes(line, step) else superseded).append(line + "\n")
        if not superseded:
            return
        with self.path.with_name("metrics.superseded.jsonl").open("a") as file:
            file.writelines(superseded)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(keep))
        os.replace(scratch, self.path)

    def _ends_torn(self) -> bool:
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:  # no file yet, or an empty one
            return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a half-written line is passed over."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            row = _parse(line)
            if row is not None:
                rows.append(row)
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _precedes(line: str, step: int) -> bool:
    row = _parse(line)
    if row is None:
        return False
    return row.get("step") is not None and row["step"] < step
