"""config.yaml and environment.json: what is needed to repeat a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning as L

from ..environment import describe_environment, write_text
from . import rundir


class RunRecord(L.Callback):
    """Claim the run directory and write its record, before the first step.

    Args:
        folder: the run directory.
        config: the resolved config as YAML text.
        seed: the seed of the run.
        resuming: whether the directory's own run goes on.
    """

    def __init__(self, folder: Path, config: str, seed: int | bool, *, resuming: bool) -> None:
        self.folder, self.config, self.seed, self.resuming = folder, config, seed, resuming

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # by now every process has settled on the directory, so making it cannot send another one elsewhere
        if not trainer.is_global_zero:
            return
        rundir.claim(self.folder, resuming=self.resuming)
        write_text(self.folder / "config.yaml", self.config)
        record = {**describe_environment(), "command": sys.argv, "seed": self.seed, "run_dir": str(self.folder)}
        text = json.dumps(record, indent=2) + "\n"
        path = self.folder / rundir.RECORD
        if self.resuming and path.exists():
            previous = json.loads(path.read_text() or "{}")
            record["resumed"] = [*previous.pop("resumed", []), previous]
            text = json.dumps(record, indent=2) + "\n"
        write_text(path, text)
