"""The claim of the EvoNorm paper at a size a laptop reaches: which layer trains at which batch size?

    python -m scripts.bench.evonorm_batch                      # four layers, five batch sizes, two seeds: forty runs
    python -m scripts.bench.evonorm_batch --jobs 2 --resume    # two at a time; keep the runs that are in the file
    python -m scripts.bench.evonorm_batch --quick --layers evonorm_s0 --batches 2 --seeds 0

Every run is `python -m zoo fit` on configs/classify/shapes_<layer>_b32.yaml with another batch size and what follows
from it: the learning rate 0.1 B / 64, the warm-up over the same number of pictures. All see the same number of
pictures. The file is written after each run; verdicts are computed from the rows, and are null while a run that they
need is missing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from scripts.bench import _training
from scripts.bench._timing import write_results
from scripts.bench._training import ROOT, Rows

RESULTS = ROOT / "scripts" / "bench" / "results"
LAYERS = ("bn_relu", "gn_relu", "evonorm_s0", "evonorm_b0")
BATCHES = (1, 2, 4, 16, 32)
COMMON = "_parts/quiet"
BASE = 32  # batch size of the configs the others are made from
# At batch 1 S0 is this much above BN-ReLU, and within that of its own accuracy at batch 32.
AHEAD, APART = 0.30, 0.02


@cache
def _config(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


@dataclass(frozen=True)
class Run:
    """One training run."""

    layer: str
    batch: int
    seed: int
    quick: bool = False

    @property
    def config(self) -> str:
        return f"classify/shapes_{self.layer}_b{BASE}"

    def arguments(self) -> list[str]:
        """Of `python -m zoo`, without the folder."""
        config, model = _config(self.config), _config(self.config)["model"]["init_args"]
        rate = model["optimizer"]["init_args"]["lr"] * self.batch / BASE
        warmup = model["lr_scheduler"]["init_args"]["warmup_steps"] * BASE // self.batch
        changed = [
            f"--data.init_args.batch_size={self.batch}",
            f"--model.init_args.optimizer.init_args.lr={rate}",
            f"--model.init_args.lr_scheduler.init_args.warmup_steps={warmup}",
            f"--last.every_n_train_steps={config['last']['every_n_train_steps'] * BASE // self.batch}",
        ]
        if self.quick:
            changed += ["--trainer.max_steps=2", "--trainer.limit_val_batches=2", "--trainer.val_check_interval=2"]
        configs = ["--config", self.config, "--config", COMMON]
        return ["fit", *configs, "--seed_everything", str(self.seed), "--data.seed", str(self.seed), *changed]

    def facts(self) -> dict[str, Any]:
        """The beginning of the run's row; a row with the same recipe is not run again on --resume."""
        recipe = _training.recipe((self.config, COMMON), self.arguments())
        return {"layer": self.layer, "batch": self.batch, "seed": self.seed, "recipe": recipe}

    def row(self) -> dict[str, Any]:
        """Train, and collect what came out."""
        return {**self.facts(), **_training.train(self.arguments(), _training.outcome)}


def verdicts(rows: Rows, seeds: list[int]) -> dict[str, bool | None]:
    """The claims, for every asked seed; None if a run is missing."""
    found = {(row["layer"], row["batch"], row["seed"]): row for row in rows if "val_acc" in row}

    def for_every_seed(holds: Any, *needed: tuple[str, int]) -> bool | None:
        cells = [[found.get((*which, seed)) for which in needed] for seed in seeds]
        if not seeds or any(cell is None for of_seed in cells for cell in of_seed):
            return None
        return all(holds(*of_seed) for of_seed in cells)

    return {
        "s0_30_points_above_bn_at_batch_1": for_every_seed(
            lambda s0, bn: s0["val_acc"] >= bn["val_acc"] + AHEAD, ("evonorm_s0", 1), ("bn_relu", 1)
        ),
        "s0_loss_not_above_bn_at_batch_2": for_every_seed(
            lambda s0, bn: s0["val_loss"] <= bn["val_loss"], ("evonorm_s0", 2), ("bn_relu", 2)
        ),
        "s0_at_batch_1_within_2_points_of_batch_32": for_every_seed(
            lambda one, many: abs(one["val_acc"] - many["val_acc"]) <= APART, ("evonorm_s0", 1), ("evonorm_s0", 32)
        ),
        "b0_above_bn_at_batch_32": for_every_seed(
            lambda b0, bn: b0["val_acc"] > bn["val_acc"], ("evonorm_b0", 32), ("bn_relu", 32)
        ),
        "s0_above_bn_at_batch_32": for_every_seed(
            lambda s0, bn: s0["val_acc"] > bn["val_acc"], ("evonorm_s0", 32), ("bn_relu", 32)
        ),
        "s0_above_gn_at_every_batch": for_every_seed(
            lambda *cells: all(s0["val_acc"] > gn["val_acc"] for s0, gn in zip(cells[::2], cells[1::2], strict=True)),
            *((layer, batch) for batch in BATCHES for layer in ("evonorm_s0", "gn_relu")),
        ),
    }


def shown(rows: Rows, seeds: list[int], claims: dict[str, bool | None]) -> str:
    """Accuracy / loss by layer and batch size, one pair a seed, and the claims."""
    found = {(row["layer"], row["batch"], row["seed"]): row for row in rows if "val_acc" in row}
    lines = [" ".join(f"{cell!s:>26}" for cell in ("val/acc / val/loss", *BATCHES))]
    for layer in LAYERS:
        cells = []
        for batch in BATCHES:
            mine = [found.get((layer, batch, seed)) for seed in seeds]
            cells.append(", ".join("-" if r is None else f"{r['val_acc']:.3f}/{r['val_loss']:.3f}" for r in mine))
        lines.append(" ".join(f"{cell:>26}" for cell in (layer, *cells)))
    words = {None: "not measured", True: "holds", False: "does not hold"}
    return "\n".join([*lines, *(f"{name}: {words[value]}" for name, value in claims.items())])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--resume", action="store_true", help="keep finished rows of the file with the same recipe")
    parser.add_argument("--quick", action="store_true", help="two steps and two validation batches a run")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/evonorm_batch.json)")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"evonorm_batch{'_quick' if args.quick else ''}.json"

    def recipe_of(row: dict[str, Any]) -> dict[str, Any]:
        return Run(row["layer"], row["batch"], row["seed"], args.quick).facts()["recipe"]

    rows = _training.finished_rows(out, recipe_of) if args.resume else []
    finished = {(row["layer"], row["batch"], row["seed"]) for row in rows}
    # The slow ones first, so that two at a time end together.
    asked = [(layer, batch, seed) for batch in sorted(args.batches) for seed in args.seeds for layer in args.layers]
    todo = [Run(*which, args.quick) for which in asked if which not in finished]
    seeds = sorted({*args.seeds, *(seed for _, _, seed in finished)})
    settings = {name: getattr(args, name) for name in ("layers", "batches", "seeds", "jobs", "quick")}

    def save() -> dict[str, bool | None]:
        rows.sort(key=lambda row: (row["seed"], LAYERS.index(row["layer"]), row["batch"]))
        claims = verdicts(rows, seeds)
        write_results(out, rows, device="cpu", settings=settings, verdicts=claims)
        return claims

    def said(row: dict[str, Any]) -> str:
        return f"val/acc {row['val_acc']:.3f}, val/loss {row['val_loss']:.3f} in {row['wall_s']:.0f} s"

    _training.run_all(todo, rows, args.jobs, save, said)
    print(shown(rows, seeds, save()))
    print(f"written: {out}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
