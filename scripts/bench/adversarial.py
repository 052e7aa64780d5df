"""Smooth adversarial comp-sum against TRADES and PGD-AT, at a size a laptop reaches: CIFAR-10 at 16 x 16.

    python -m scripts.bench.adversarial                      # 12 runs to choose, about 15 to compare
    python -m scripts.bench.adversarial --jobs 2 --resume    # two at a time; keep the runs that are in the file
    python -m scripts.bench.adversarial --quick              # two steps a run, few pictures: does it work?

Needs CIFAR-10 as configs/robust/cifar16_*.yaml do. Every run is `python -m zoo fit` on one of them, without validation;
its averaged weights are then attacked here.

1. Choice. One seed a setting, on 1,000 training pictures held out: TRADES' beta and our nu over a grid, and PGD-AT. Of
   a method with a grid two settings go on: "robust", of the highest accuracy under PGD-40, and "clean", of the highest
   clean accuracy among those at most a point below PGD-AT under PGD-40 (if none is, the "robust" one). Ties go to the
   smaller strength.
2. Comparison. The settings chosen, with three other seeds, on 1,000 test pictures: clean, under PGD-40 on the margin
   with two restarts, and what APGD-CE and then targeted APGD-DLR leave of that, the worst case.

The file is written after each run; verdicts are of means over the seeds, and null while a run that they need is
missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml

from scripts.bench import _training
from scripts.bench._timing import write_results
from scripts.bench._training import ROOT, Rows
from zoo.attacks import PGDAttack, evaluate_robustness, mini_autoattack
from zoo.data import ImageFolder
from zoo.tasks import AdversarialClassifier

RESULTS = ROOT / "scripts" / "bench" / "results"
COMMON = "_parts/quiet"
EPS = 8 / 255
PICTURES = 1000
SELECTION_SEED = 100
# by method, the argument of the loss that weighs its second term, and its grid
GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "trades": ("beta", (1.0, 3.0, 6.0, 12.0, 20.0)),
    "advcompsum": ("nu", (0.05, 0.1, 0.2, 0.3, 0.6, 1.0)),
    "pgd_at": ("", (0.0,)),
}
WITHIN = 0.01  # of PGD-AT's robust accuracy, for the "clean" choice
CHOICES = ("robust", "clean")


@cache
def _data() -> ImageFolder:
    config = yaml.safe_load((ROOT / "configs" / "robust" / "cifar16_pgd_at.yaml").read_text())
    arguments = {**config["data"]["init_args"], "batch_size": 250}
    data = ImageFolder(**arguments)
    data.setup()
    return data


def attacks(stage: str, quick: bool) -> dict[str, Any]:
    """Those of a stage, the cheap one first."""
    steps = {"steps": 2} if quick else {}
    margin = {"step_rule": "sign", "step_ratio": 1 / 8, "step_decay": None, **steps}
    pgd = PGDAttack.gowal_eval(eps=EPS, restarts=1 if stage == "choice" else 2, **margin)
    return {"pgd": pgd} if stage == "choice" else {"pgd": pgd, **mini_autoattack(EPS, **steps)}


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation; `strength` is beta or nu, and 0 of PGD-AT."""

    stage: str
    method: str
    strength: float
    seed: int
    quick: bool = False

    @property
    def config(self) -> str:
        return f"robust/cifar16_{self.method}"

    def arguments(self) -> list[str]:
        """Of `python -m zoo`, without the folder."""
        name = GRID[self.method][0]
        changed = [f"--model.loss.{name}={self.strength}"] if name else []
        changed += ["--trainer.limit_val_batches=0", f"--data.seed={self.seed}"]
        if self.quick:
            changed += ["--trainer.max_steps=2"]
        configs = ["--config", self.config, "--config", COMMON]
        return ["fit", *configs, "--seed_everything", str(self.seed), *changed]

    def facts(self) -> dict[str, Any]:
        """The beginning of the run's row; a row with the same recipe is not run again on --resume."""
        recipe = _training.recipe((self.config, COMMON), self.arguments())
        recipe["attacks"] = {name: repr(attack) for name, attack in attacks(self.stage, self.quick).items()}
        which = {"stage": self.stage, "method": self.method, "strength": self.strength, "seed": self.seed}
        return {**which, "recipe": recipe}

    def row(self) -> dict[str, Any]:
        """Train, attack, and collect what came out."""
        return {**self.facts(), **_training.train(self.arguments(), self._outcome)}

    def _outcome(self, folder: Path) -> dict[str, Any]:
        module = AdversarialClassifier.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", map_location="cpu")
        data = _data()
        loader = data.val_dataloader() if self.stage == "choice" else data.test_dataloader()
        pictures = 20 if self.quick else PICTURES
        generator = torch.Generator().manual_seed(self.seed)
        under = {name: replace(a, generator=generator) for name, a in attacks(self.stage, self.quick).items()}
        found = evaluate_robustness(module, loader, under, pictures)
        return {**_training.outcome(folder), **found}


def chosen(rows: Rows) -> dict[str, float] | None:
    """The strength of each choice, e.g. {"trades_robust": 6.0, ...}; None while a run that decides is missing."""
    found = {(row["method"], row["strength"]): row for row in rows if row["stage"] == "choice" and "pgd" in row}
    if any((method, strength) not in found for method, (_, grid) in GRID.items() for strength in grid):
        return None
    level = found["pgd_at", 0.0]["pgd"] - WITHIN
    result = {"pgd_at": 0.0}
    for method in ("trades", "advcompsum"):
        of_method = [found[method, strength] for strength in GRID[method][1]]  # max() takes the first of equals
        robust = max(of_method, key=lambda row: row["pgd"])
        enough = [row for row in of_method if row["pgd"] >= level - 1e-9]
        clean = max(enough, key=lambda row: row["clean"]) if enough else robust
        result |= {f"{method}_robust": robust["strength"], f"{method}_clean": clean["strength"]}
    return result


def method_of(choice: str) -> str:
    """The method of a choice."""
    return choice if choice in GRID else choice.rpartition("_")[0]


def figures(rows: Rows, choices: Mapping[str, float] | None, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the seeds of each choice; only of those with every run."""
    table: dict[str, dict[str, Any]] = {}
    for choice, strength in (choices or {}).items():
        which = ("comparison", method_of(choice), strength)
        found = {
            row["seed"]: row
            for row in rows
            if (row["stage"], row["method"], row["strength"]) == which and "worst_case" in row
        }
        if not seeds or not set(seeds) <= set(found):
            continue
        table[choice] = {"strength": strength}
        for name in ("clean", "pgd", "apgd-ce", "worst_case"):
            values = [found[seed][name] for seed in seeds]
            table[choice] |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}
    return table


def verdicts(table: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | None]:
    """The claims, of PGD-40 and of the worst case; None if a run is missing."""

    def holds(claim: Any, *needed: str) -> bool | None:
        return bool(claim(*(table[name] for name in needed))) if set(needed) <= set(table) else None

    claims: dict[str, bool | None] = {}
    for under in ("pgd", "worst_case"):
        claims |= {
            f"clean_choice_2_points_cleaner_than_pgd_at_and_within_1_point_{under}": holds(
                lambda ours, at, u=under: ours["clean"] >= at["clean"] + 0.02 and ours[u] >= at[u] - 0.01,
                "advcompsum_clean",
                "pgd_at",
            ),
            f"clean_choice_1_point_more_robust_than_trades_robust_{under}": holds(
                lambda ours, trades, u=under: ours[u] >= trades[u] + 0.01, "advcompsum_clean", "trades_robust"
            ),
            f"robust_choice_2_points_more_robust_than_trades_robust_{under}": holds(
                lambda ours, trades, u=under: ours[u] >= trades[u] + 0.02, "advcompsum_robust", "trades_robust"
            ),
            f"robust_choice_at_most_half_a_point_below_pgd_at_{under}": holds(
                lambda ours, at, u=under: ours[u] >= at[u] - 0.005, "advcompsum_robust", "pgd_at"
            ),
            f"clean_choice_cleaner_than_trades_clean_and_not_less_robust_{under}": holds(
                lambda ours, trades, u=under: ours["clean"] > trades["clean"] and ours[u] >= trades[u],
                "advcompsum_clean",
                "trades_clean",
            ),
        }
    return claims


def shown(rows: Rows, table: Mapping[str, Mapping[str, Any]], claims: Mapping[str, bool | None]) -> str:
    """Both stages, and the claims."""
    lines = [f"{'choice: method, strength':>28}    clean   PGD-40"]
    for row in rows:
        if row["stage"] == "choice" and "pgd" in row:
            lines.append(f"{row['method']:>20} {row['strength']:7g} {row['clean']:8.1%} {row['pgd']:8.1%}")
    lines.append(f"{'comparison: mean, strength':>28}    clean   PGD-40  APGD-CE  worst")
    for choice, cells in table.items():
        values = (f"{cells[name]:8.1%}" for name in ("clean", "pgd", "apgd-ce", "worst_case"))
        lines.append(f"{choice:>20} {cells['strength']:7g} {' '.join(values)}")
    words = {None: "not measured", True: "holds", False: "does not hold"}
    return "\n".join([*lines, *(f"{name}: {words[value]}" for name, value in claims.items())])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the comparison")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--resume", action="store_true", help="keep finished rows of the file with the same recipe")
    parser.add_argument("--quick", action="store_true", help="two steps a run, twenty pictures, attacks of two steps")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/adversarial.json)")
    args = parser.parse_args(arguments)
    if SELECTION_SEED in args.seeds:
        parser.error(f"seed {SELECTION_SEED} chooses; compare with others")
    out = args.out or RESULTS / f"adversarial{'_quick' if args.quick else ''}.json"
    torch.set_num_threads(1)  # runs are evaluated side by side
    _data()  # here, so that no two runs read the archive at once

    def recipe_of(row: dict[str, Any]) -> dict[str, Any]:
        return Run(row["stage"], row["method"], row["strength"], row["seed"], args.quick).facts()["recipe"]

    rows = _training.finished_rows(out, recipe_of) if args.resume else []
    settings = {"seeds": args.seeds, "selection_seed": SELECTION_SEED, "jobs": args.jobs, "quick": args.quick}

    def save() -> dict[str, bool | None]:
        rows.sort(key=lambda row: (row["stage"], row["method"], row["strength"], row["seed"]))
        choices = chosen(rows)
        table = figures(rows, choices, args.seeds)
        claims = verdicts(table)
        write_results(out, rows, device="cpu", settings=settings, chosen=choices, comparison=table, verdicts=claims)
        return claims

    def said(row: dict[str, Any]) -> str:
        return (
            f"clean {row['clean']:.3f}, PGD-40 {row['pgd']:.3f}, worst {row['worst_case']:.3f} in {row['wall_s']:.0f} s"
        )

    def run(asked: Sequence[Run]) -> None:
        finished = {(row["stage"], row["method"], row["strength"], row["seed"]) for row in rows}
        todo = [r for r in asked if (r.stage, r.method, r.strength, r.seed) not in finished]
        _training.run_all(todo, rows, args.jobs, save, said)

    run([Run("choice", m, s, SELECTION_SEED, args.quick) for m, (_, grid) in GRID.items() for s in grid])
    choices = chosen(rows)
    if choices is not None:
        settings_chosen = sorted({(method_of(choice), strength) for choice, strength in choices.items()})
        run([Run("comparison", m, s, seed, args.quick) for seed in args.seeds for m, s in settings_chosen])
    claims = save()
    print(shown(rows, figures(rows, choices, args.seeds), claims))
    print(f"written: {out}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
