"""How well a few convexes take a scene, against as many Gaussians and against as many numbers in Gaussians.

    python -m scripts.bench.convex_quality                      # twenty minutes on one CPU core; needs gsplat
    python -m scripts.bench.convex_quality --jobs 2 --resume    # two at a time; keep what is in the file
    python -m scripts.bench.convex_quality --quick              # two minutes: does the script work?

1. "boxes", two boxes on a slab: `python -m zoo fit` on configs/splat/boxes_cpu.yaml with 24 and 60 convexes, three
   seeds, which draw cameras, points and order. Gaussians have the same pictures, points, loss, steps and order: 24, 41
   (14 numbers each, together as many as 24 convexes of 24) and 60. Figures are the PSNR of views that nothing was
   fitted to, after the last step.
2. Flat pictures of six shapes: one convex of three and of six points by configs/splat/image2d.yaml, against one and
   eight Gaussians in the plane. Fitted and judged is the same picture.

The Gaussians are tuned first: rates and first size one after the other, 24 of them on the boxes of another seed, the
best by its held-out views, and flat ones on all six shapes, each number of them. The convexes have the rates of the
configs. The file is written after each run.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch

from scripts.bench import _training
from scripts.bench._speed import RESULTS
from scripts.bench._timing import write_results
from scripts.bench._training import Rows
from zoo.data.scenes import PlanarPicture, ProceduralScene, Scene
from zoo.data.scenes.planar import PlanarShape

SHAPES: tuple[str, ...] = get_args(PlanarShape)
BOXES = "boxes"
CONFIGS = {BOXES: "splat/boxes_cpu", "planar": "splat/image2d"}
COMMON = "_parts/quiet"
STEPS = {BOXES: 1200, "planar": 1000}  # of the configs; a test compares
SEEDS, TUNING_SEED = (0, 1, 2), 100
CONVEXES, GAUSSIANS = (24, 60), (24, 41, 60)
POINTS, PLANAR_GAUSSIANS = (3, 6), (1, 8)
QUICK_STEPS = 4
PASSES = 1  # through the grid

# Values beside the defaults, in the order of the search.
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    BOXES: {
        "size": (0.3,),
        "means": (1e-2, 4e-2),
        "scales": (2e-2,),
        "opacities": (5e-2, 1e-1),
    },
    "planar": {
        "size": (0.3,),
        "means": (4e-2,),
        "scales": (4e-2,),
        "opacities": (1e-1,),
    },
}
QUICK_GRID: dict[str, tuple[float, ...]] = {"size": (0.3,)}

# What is promised of the boxes, in dB: so much more than these Gaussians, and so much.
AHEAD = ((24, 24, 4.0), (24, 41, 3.0), (60, 60, 8.0))
LEAST = ((60, 30.0),)


@dataclass(frozen=True)
class Tuning:
    """The search for the Gaussians' settings, on the boxes or on all flat shapes."""

    toy: str  # "boxes" or "planar"
    count: int
    quick: bool = False

    def facts(self) -> dict[str, Any]:
        recipe = {"steps": _steps(self.toy, self.quick), "grid": _listed(_grid(self.toy, self.quick)), **_versions()}
        return {"what": "tuning", "toy": self.toy, "count": self.count, "recipe": recipe}

    def row(self) -> dict[str, Any]:
        begin = time.perf_counter()
        tried = _workers().submit(_tune, self).result()
        best = {"psnr": tried[0]["psnr"], "tried": tried}
        return {**self.facts(), **best, "wall_s": round(time.perf_counter() - begin, 1)}


@dataclass(frozen=True)
class Gaussians:
    """One fit of Gaussians."""

    toy: str  # "boxes" or a shape
    count: int
    seed: int
    settings: tuple[tuple[str, float], ...]
    quick: bool = False

    def facts(self) -> dict[str, Any]:
        recipe = {"steps": _steps(self.toy, self.quick), "settings": dict(self.settings), **_versions()}
        return {"what": "gaussians", "toy": self.toy, "count": self.count, "seed": self.seed, "recipe": recipe}

    def row(self) -> dict[str, Any]:
        begin = time.perf_counter()
        psnr, numbers = _workers().submit(_fit, self).result()
        wall = round(time.perf_counter() - begin, 1)
        return {**self.facts(), "psnr": round(psnr, 3), "numbers": numbers, "wall_s": wall}


@dataclass(frozen=True)
class Convexes:
    """One fit of convexes, by the command."""

    toy: str  # "boxes" or a shape
    count: int
    seed: int
    k: int = 6
    quick: bool = False

    @property
    def configs(self) -> tuple[str, str]:
        return CONFIGS[_kind(self.toy)], COMMON

    def arguments(self) -> list[str]:
        """Of `python -m zoo`, without the folder."""
        changed = [f"--model.init_args.model.k={self.k}", f"--data.init_args.seed={self.seed}"]
        changed += [
            f"--data.init_args.{name}={value}" for name, value in _data(self.toy, self.count, self.quick).items()
        ]
        if self.quick:
            changed += [f"--trainer.max_steps={QUICK_STEPS}", f"--data.init_args.steps_per_epoch={QUICK_STEPS}"]
            changed += ["--trainer.check_val_every_n_epoch=1"]
        configs = [word for name in self.configs for word in ("--config", name)]
        return ["fit", *configs, "--seed_everything", str(self.seed), *changed]

    def facts(self) -> dict[str, Any]:
        recipe = _training.recipe(self.configs, self.arguments())
        made = {"what": "convexes", "toy": self.toy, "count": self.count, "k": self.k, "seed": self.seed}
        return {**made, "recipe": recipe}

    def row(self) -> dict[str, Any]:
        return {**self.facts(), **_training.train(self.arguments(), _outcome)}


def _kind(toy: str) -> str:
    return BOXES if toy == BOXES else "planar"


def _toys(kind: str, quick: bool) -> tuple[str, ...]:
    return (BOXES,) if kind == BOXES else SHAPES[-1:] if quick else SHAPES


def _steps(toy: str, quick: bool) -> int:
    return QUICK_STEPS if quick else STEPS[_kind(toy)]


def _grid(toy: str, quick: bool) -> dict[str, tuple[float, ...]]:
    return QUICK_GRID if quick else GRID[toy]


def _listed(grid: dict[str, tuple[float, ...]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in grid.items()}  # as JSON gives it back


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "gsplat": version("gsplat")}


def _data(toy: str, count: int, quick: bool) -> dict[str, Any]:
    """Arguments of the data that are not those of the config."""
    arguments: dict[str, Any] = {"num_points": count}
    if toy != BOXES:
        arguments["shape"] = toy
    return {**arguments, "size": 24, "supersample": 1} if quick else arguments


def scene(toy: str, count: int, seed: int, quick: bool) -> Scene:
    """What the convexes are fitted to; a test compares it with the configs."""
    arguments = {**_data(toy, count, quick), "seed": seed}
    return (ProceduralScene if toy == BOXES else PlanarPicture)(**arguments).scene


@functools.cache
def _workers() -> ProcessPoolExecutor:
    """Processes for the Gaussians, as many as there are runs at a time: threads would wait for each other's Python."""
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


def _tune(asked: Tuning) -> Rows:
    from scripts.bench import _gaussians  # which needs gsplat

    torch.set_num_threads(1)
    scenes = [scene(toy, asked.count, TUNING_SEED, asked.quick) for toy in _toys(asked.toy, asked.quick)]
    fit = _gaussians.fit_gaussians if asked.toy == BOXES else _gaussians.fit_planar_gaussians
    grid, steps = _grid(asked.toy, asked.quick), _steps(asked.toy, asked.quick)
    return _gaussians.tune_gaussians(scenes, asked.count, grid, steps, PASSES, fit)


def _fit(asked: Gaussians) -> tuple[float, int]:
    from scripts.bench import _gaussians

    torch.set_num_threads(1)
    fit = _gaussians.fit_gaussians if asked.toy == BOXES else _gaussians.fit_planar_gaussians
    pictures = scene(asked.toy, asked.count, asked.seed, asked.quick)
    settings = _gaussians.Settings(**dict(asked.settings))
    found = fit(pictures, asked.count, _steps(asked.toy, asked.quick), settings, asked.seed)
    return found.psnr, found.num_parameters


def _outcome(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "report" / "result.json").read_text())
    found = _training.outcome(folder)
    return {
        "psnr": round(found["val_psnr"], 3),
        "ssim": round(found["val_ssim"], 4),
        "numbers": result["trainable_parameters"],
        "wall_s": round(found["wall_s"], 1),
    }


def tunings(kind: str, quick: bool) -> list[Tuning]:
    """For every number of Gaussians of the flat pictures, and for the least of the boxes, which all then have."""
    return [Tuning(kind, count, quick) for count in (GAUSSIANS[:1] if kind == BOXES else PLANAR_GAUSSIANS)]


def fits(kind: str, settings: dict[tuple[str, int], dict[str, float]], seeds: Sequence[int], quick: bool) -> list[Any]:
    """Every fit of the boxes or of the flat pictures, the Gaussians' with the settings of their number.

    One convex and one Gaussian start in the middle of the picture whatever the seed, and have one run.
    """
    found: list[Any] = []
    for toy in _toys(kind, quick):
        convexes = [(count, 6) for count in CONVEXES] if kind == BOXES else [(1, k) for k in POINTS]
        found += [
            Convexes(toy, count, seed, k, quick) for count, k in convexes for seed in (seeds if count > 1 else (0,))
        ]
        for count in GAUSSIANS if kind == BOXES else PLANAR_GAUSSIANS:
            tuned = tuple(settings[kind, GAUSSIANS[0] if kind == BOXES else count].items())
            found += [Gaussians(toy, count, seed, tuned, quick) for seed in (seeds if count > 1 else (0,))]
    return found


def best_settings(rows: Rows) -> dict[tuple[str, int], dict[str, float]]:
    """By toy and number of Gaussians, the settings that the search found best."""
    found = {}
    for row in rows:
        if row["what"] == "tuning" and "tried" in row:
            best = row["tried"][0]
            found[row["toy"], row["count"]] = {name: best[name] for name in best if name not in ("psnr", "psnrs")}
    return found


def psnr(rows: Rows, what: str, toy: str, count: int, seeds: Sequence[int], k: int = 6) -> float | None:
    """Mean over the seeds; None if a run is missing."""
    found = {
        row["seed"]: row["psnr"]
        for row in rows
        if (row["what"], row["toy"], row["count"], row.get("k", k)) == (what, toy, count, k) and "psnr" in row
    }
    return mean(found[seed] for seed in seeds) if seeds and set(seeds) <= set(found) else None


def acceptance(rows: Rows, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The promises of held-out PSNR, means over the seeds; None if a run is missing."""

    def promise(claim: str, measured: float | None, least: float) -> dict[str, Any]:
        measured = None if measured is None else round(measured, 2)
        return {"claim": claim, "measured": measured, "met": None if measured is None else measured >= least}

    promises = []
    for count, gaussians, least in AHEAD:
        ours, theirs = psnr(rows, "convexes", BOXES, count, seeds), psnr(rows, "gaussians", BOXES, gaussians, seeds)
        more = None if ours is None or theirs is None else ours - theirs
        claim = f"boxes: {count} convexes at least {least:g} dB better than {gaussians} Gaussians"
        promises.append(promise(claim, more, least))
    for count, least in LEAST:
        ours = psnr(rows, "convexes", BOXES, count, seeds)
        promises.append(promise(f"boxes: {count} convexes at least {least:g} dB", ours, least))
    return promises


def shown(rows: Rows, seeds: Sequence[int]) -> str:
    """Tables of means."""

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else f'{value:.2f}':>10}"

    lines = ["boxes, dB on held-out views"]
    for what, counts in (("convexes", CONVEXES), ("gaussians", GAUSSIANS)):
        lines += [f"  {count:3} {what:10}{cell(psnr(rows, what, BOXES, count, seeds))}" for count in counts]
    heads = [*(f"K = {k}" for k in POINTS), *(f"{count} Gauss." for count in PLANAR_GAUSSIANS)]
    lines.append(f"{'flat pictures, dB':22}" + "".join(f"{head:>10}" for head in heads))
    for shape in SHAPES:
        values = [psnr(rows, "convexes", shape, 1, (0,), k) for k in POINTS]
        values += [psnr(rows, "gaussians", shape, n, seeds if n > 1 else (0,)) for n in PLANAR_GAUSSIANS]
        lines.append(f"  {shape:20}" + "".join(map(cell, values)))
    return "\n".join(lines)


def _said(row: dict[str, Any]) -> str:
    return f"{row['psnr']:.2f} dB, {row['wall_s']:.0f} s"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in the file")
    parser.add_argument("--quick", action="store_true", help="a few steps on small pictures, one seed")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/convex_quality.json)")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"convex_quality{'_quick' if args.quick else ''}.json"
    seeds = args.seeds[:1] if args.quick else args.seeds
    before: Rows = json.loads(out.read_text())["results"] if args.resume and out.exists() else []
    rows: Rows = []

    def save() -> None:
        promises = acceptance([] if args.quick else rows, seeds)
        write_results(out, rows, device="cpu", seeds=seeds, quick=args.quick, acceptance=promises)

    def run(wanted: Sequence[Any]) -> None:
        """Those of the file as they are, the others now."""
        todo = []
        for one in wanted:
            facts = one.facts().items()
            kept = next((row for row in before if "error" not in row and facts <= row.items()), None)
            todo += [one] if kept is None else []
            rows.extend([] if kept is None else [kept])
        _training.run_all(todo, rows, args.jobs, save, _said)

    for kind in CONFIGS:
        run(tunings(kind, args.quick))
        if any("error" in row for row in rows):
            print("stopped: the settings of the Gaussians are not known", file=sys.stderr)
            return 1
        run(fits(kind, best_settings(rows), seeds, args.quick))
    save()
    print(shown(rows, seeds))
    for promise in acceptance([] if args.quick else rows, seeds):
        said = {True: "met", False: "MISSED", None: "not measured"}[promise["met"]]
        print(f"{said}: {promise['claim']} (measured {promise['measured']})")
    print(f"wrote {out}")
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
