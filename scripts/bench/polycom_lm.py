"""The claim of the PolyCom paper at a size a laptop reaches: which activation trains the byte-level LM best?

    python -m scripts.bench.polycom_lm                      # six activations, seeds 0, 1, 2: eighteen runs, one by one
    python -m scripts.bench.polycom_lm --jobs 2 --resume    # two at a time; keep the runs that are already in the file
    python -m scripts.bench.polycom_lm --quick --activations polynorm --seeds 0

Every run is `python -m zoo fit` on configs/lm/stdlib_<activation>.yaml, one thread, in a folder that is thrown away;
its row holds what report/result.json and the last checkpoint say. The file is written after each run. Verdicts are
computed from the rows, and are null while a run that they need is missing. The corpus is the running interpreter's
standard library, so rows of another Python are not kept on --resume.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.bench import _training
from scripts.bench._timing import write_results
from scripts.bench._training import ROOT, Rows

RESULTS = ROOT / "scripts" / "bench" / "results"
ACTIVATIONS = ("polynorm", "polyrelu", "relu2", "relu", "gelu", "swiglu")
COMMON = "_parts/quiet"
GAP, MOVED = 0.04, 0.05  # what we ask of PolyNorm's lead and of its coefficients
START = 1 / 3  # where the coefficients of order 3 begin


@dataclass(frozen=True)
class Run:
    """One training run."""

    activation: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def config(self) -> str:
        return f"lm/stdlib_{self.activation}"

    def arguments(self) -> list[str]:
        """Of `python -m zoo`, without the folder."""
        configs = ["--config", self.config, "--config", COMMON]
        return ["fit", *configs, "--seed_everything", str(self.seed), "--data.seed", str(self.seed), *self.overrides]

    def recipe(self) -> dict[str, Any]:
        """A row with the same one is not run again on --resume."""
        return _training.recipe((self.config, COMMON), self.arguments())

    def facts(self) -> dict[str, Any]:
        """The beginning of the run's row."""
        return {"activation": self.activation, "seed": self.seed, "recipe": self.recipe()}

    def row(self) -> dict[str, Any]:
        """Train, and collect what came out."""
        return {**self.facts(), **_training.train(self.arguments(), collected)}


def collected(folder: Path) -> dict[str, Any]:
    """What a finished run directory says."""
    row = _training.outcome(folder)
    learned = coefficients(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    if learned:
        row["coefficients"] = learned
        row["largest_move"] = max(abs(value - START) for block in learned for value in block["weight"])
    return row


def coefficients(state: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Learned polynomial of every block, in order; none for an activation without parameters."""
    prefixes = [key.removesuffix("weight") for key in state if key.endswith("ffn.act.weight")]
    return [
        {
            "block": prefix.removesuffix(".ffn.act."),
            "weight": [round(value, 5) for value in state[f"{prefix}weight"].tolist()],  # cube, square, linear
            "bias": round(state[f"{prefix}bias"].item(), 5),
        }
        for prefix in prefixes
    ]


def verdicts(rows: Rows, seeds: list[int]) -> dict[str, Any]:
    """The claims, computed from the validation losses of every asked seed."""
    loss = {(row["activation"], row["seed"]): row["val_loss"] for row in rows if "val_loss" in row}
    moves = [row["largest_move"] for row in rows if row["activation"] == "polynorm" and "largest_move" in row]

    def lead(name: str, others: tuple[str, ...]) -> float | None:
        """Smallest distance over the seeds to the best of the others; None if a run is missing."""
        needed = [(activation, seed) for seed in seeds for activation in (name, *others)]
        if not seeds or not loss.keys() >= set(needed):
            return None
        return min(loss[other, seed] - loss[name, seed] for seed in seeds for other in others)

    first = lead("polynorm", tuple(name for name in ACTIVATIONS if name != "polynorm"))
    of_five = lead("polynorm", ("polyrelu", "swiglu", "gelu", "relu"))  # squared ReLU is an ablation of the paper's
    over_smooth, relu_lead = lead("polynorm", ("swiglu", "gelu")), lead("polyrelu", ("gelu", "swiglu"))
    return {
        "polynorm_lowest_every_seed": None if first is None else first > 0,
        "polynorm_lowest_of_the_papers_five": None if of_five is None else of_five > 0,
        "polynorm_below_swiglu_and_gelu_by": None if over_smooth is None else round(over_smooth, 5),
        "polyrelu_below_gelu_and_swiglu": None if relu_lead is None else relu_lead > 0,
        "coefficients_moved_more_than_0.05": min(moves) > MOVED if len(moves) == len(seeds) > 0 else None,
    }


def shown(rows: Rows, seeds: list[int], claims: dict[str, Any]) -> str:
    """Losses by activation and seed, and the acceptance lines."""
    found = {(row["activation"], row["seed"]): row for row in rows}
    body = []
    for name in ACTIVATIONS:
        mine = [found.get((name, seed), {}) for seed in seeds]
        losses = [f"{row['val_loss']:.4f}" if "val_loss" in row else "-" for row in mine]
        walls = [f"{row['wall_s']:.0f}" if "wall_s" in row else "-" for row in mine]
        parameters = next((str(row["parameters"]) for row in mine if "parameters" in row), "-")
        body.append([name, *losses, parameters, " ".join(walls)])
    gap = claims["polynorm_below_swiglu_and_gelu_by"]
    lines = [
        verdict(
            "PolyNorm has the lowest validation loss of the six for every seed", claims["polynorm_lowest_every_seed"]
        ),
        verdict("PolyNorm has the lowest of the paper's five", claims["polynorm_lowest_of_the_papers_five"]),
        verdict(
            f"PolyNorm is at least {GAP} below SwiGLU and GELU (smallest gap {gap})",
            None if gap is None else gap >= GAP,
        ),
        verdict("PolyReLU is below GELU and SwiGLU", claims["polyrelu_below_gelu_and_swiglu"]),
        verdict(f"PolyNorm's coefficients moved by more than {MOVED}", claims["coefficients_moved_more_than_0.05"]),
    ]
    header = ["val/loss", *(f"seed {seed}" for seed in seeds), "parameters", "seconds"]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rows_shown = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in (header, *body)]
    return "\n".join([*rows_shown, *lines])


def verdict(claim: str, holds: bool | None) -> str:
    """A claim and whether the figures bear it out."""
    return f"{claim}: {'not measured' if holds is None else 'holds' if holds else 'does not hold'}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=None, help="other than the configs' 400")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--resume", action="store_true", help="keep finished rows of the file with the same recipe")
    parser.add_argument("--quick", action="store_true", help="two steps and two validation batches a run")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/polycom_lm.json)")
    args = parser.parse_args(arguments)
    args.out = args.out or RESULTS / f"polycom_lm{'_quick' if args.quick else ''}.json"
    return args


def overrides(args: argparse.Namespace) -> tuple[str, ...]:
    """What differs from the configs; nothing by default. A shorter run validates once, at its end."""
    steps = args.max_steps or (2 if args.quick else None)
    changed = () if steps is None else (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}")
    quick = ("--trainer.limit_val_batches=2", "--model.init_args.sample_tokens=0") if args.quick else ()
    return changed + quick


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    changed = overrides(args)

    def recipe_of(row: dict[str, Any]) -> dict[str, Any]:
        return Run(row["activation"], row["seed"], changed).recipe()

    rows = _training.finished_rows(args.out, recipe_of) if args.resume else []
    finished = {(row["activation"], row["seed"]) for row in rows}
    asked = [(name, seed) for seed in args.seeds for name in args.activations]
    todo = [Run(*which, changed) for which in asked if which not in finished]
    seeds = sorted({*args.seeds, *(seed for _, seed in finished)})
    settings = {name: getattr(args, name) for name in ("activations", "seeds", "max_steps", "jobs", "quick")}

    def save() -> dict[str, Any]:
        rows.sort(key=lambda row: (row["seed"], ACTIVATIONS.index(row["activation"])))
        claims = verdicts(rows, seeds)
        write_results(args.out, rows, device="cpu", settings=settings, verdicts=claims)
        return claims

    _training.run_all(
        todo, rows, args.jobs, save, lambda row: f"val/loss {row['val_loss']:.4f} in {row['wall_s']:.0f} s"
    )
    print(shown(rows, seeds, save()))
    print(f"written: {args.out}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
