"""Tables of the pages as Markdown: components from the catalog, figures from scripts/bench/results/*.json.

A result that is not there yet does not break the build; the table then says which command makes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import comparisons
from comparisons import markdown

from zoo import registry, settings
from zoo.catalog import PAPERS

RESULTS = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "results"
SPEED_COMMAND = "python -m scripts.bench.polycom"
CLOSED_FORM_COMMAND = f"ZOO_KERNELS=off {SPEED_COMMAND}"
EVIDENCE_COMMAND = "python -m scripts.bench.polycom_lm"
GPU_COMMAND = "python -m scripts.gpu_check"
EVONORM_COMMAND = "python -m scripts.bench.evonorm"
BATCH_COMMAND = "python -m scripts.bench.evonorm_batch"
TRADES_COMMAND = "python -m scripts.bench.trades_consistency"
NOISE_COMMAND = "python -m scripts.bench.comp_sum_noise"
COMP_SUM_COMMAND = "python -m scripts.bench.comp_sum"
ADVERSARIAL_COMMAND = "python -m scripts.bench.adversarial"
STEP_COMMAND = "python -m scripts.bench.adversarial_step"
EXPLAIN_COMMAND = "python -m scripts.bench.explain"
CONVEX_COMMAND = "python -m scripts.bench.convex_quality"
QUALITY_COMMAND = "python -m scripts.bench.explain_quality"
# What makes each result of speed on the CPU.
COMMANDS = {
    "polycom_cpu": SPEED_COMMAND,
    "polycom_cpu_closed_form": CLOSED_FORM_COMMAND,
    "evonorm_cpu": EVONORM_COMMAND,
    "evonorm_cpu_closed_form": f"ZOO_KERNELS=off {EVONORM_COMMAND}",
    "comp_sum_cpu": COMP_SUM_COMMAND,
    "comp_sum_cpu_2_threads": f"{COMP_SUM_COMMAND} --threads 2 --out scripts/bench/results/comp_sum_cpu_2_threads.json",
    "comp_sum_cpu_closed_form": f"ZOO_KERNELS=off {COMP_SUM_COMMAND}",
}
# TB/s of elementwise kernels with two tensors and with more: published for the H100, 80 % of 2.04 for the A100-80G.
BANDWIDTHS = {"H100": (2.84, 2.94), "A100-80G": (1.63, 1.63)}
POLYCOM_SHAPES = ((2048, 8192), (4096, 8256), (4096, 16384), (2048, 32768))
POLYCOM_TENSORS = {
    "poly_norm forward": 2,
    "poly_norm backward": 3,
    "poly_relu forward": 2,
    "poly_relu backward": 3,
    "poly_norm_mul forward": 3,
    "poly_norm_mul backward": 5,
}

# Names of the rivals as a reader knows them; what is not here is shown as the script calls it.
RIVALS = {
    "ours": "ours",
    "official": "official formula",
    "official_checkpointed": "official, checkpointed",
    "official_compiled": "official, torch.compile",
    "gelu": "F.gelu",
    "timm": "timm",
    "timm_compiled": "timm, torch.compile",
    "bn_silu": "BatchNorm + SiLU",
    "gn_silu": "GroupNorm + SiLU",
    "cross_entropy": "F.cross_entropy",
    "cross_entropy_compiled": "the same, torch.compile",
    "softmax": "softmax and power",
    "one_hot": "one-hot, clamped",
    "linear_cross_entropy": "F.linear_cross_entropy",
    "linear_cross_entropy_chunked": "the same in chunks",
}
# Activation, its name, and the training loss of the paper's 1B model after 250 B tokens, read from its figure.
ACTIVATIONS = {
    "polynorm": ("PolyNorm", "2.171"),
    "polyrelu": ("PolyReLU", "2.178"),
    "swiglu": ("SwiGLU", "2.190"),
    "gelu": ("GELU", "2.209"),
    "relu": ("ReLU", "2.216"),
    "relu2": ("squared ReLU", "in an ablation figure only"),
}
NORMS = {"bn_relu": "BN-ReLU", "gn_relu": "GN-ReLU", "evonorm_s0": "EvoNorm-S0", "evonorm_b0": "EvoNorm-B0"}
BATCHES = (1, 2, 4, 16, 32)
EVONORM_SHAPES = ((128, 256, 56, 56), (256, 64, 112, 112), (128, 512, 28, 28))
# Kernel, layout, and tensors it reads or writes, forward and backward together.
EVONORM_PASSES = (
    ("evonorm_s0", "contiguous", 5),
    ("evonorm_b0", "contiguous", 8),
    ("evonorm_s0", "channels_last", 8),
    ("evonorm_b0", "channels_last", 8),
)
GAP, MOVED = 0.04, 0.05

Record = dict[str, Any]


def components() -> str:
    """One row a component of this distribution, by kind."""
    rows = [row for row in registry.rows() if row.dist == "paperzoo"]
    body = []
    for row in sorted(rows, key=lambda row: (registry.KINDS.index(row.kind), row.name)):
        module, _, cls = row.target.partition(":")
        paper = PAPERS.get(row.paper or "")
        source = paper.cited(row.equations) if paper else ""
        body.append([row.kind, f"`{row.name}`", row.summary, f"{{py:class}}`{cls} <{module}.{cls}>`", source])
    return markdown(["kind", "name", "what", "class", "paper"], body)


def environment_variables() -> str:
    """The table of zoo/settings.py."""
    lines = (settings.__doc__ or "").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def speed(name: str = "polycom_cpu", *, brief: bool) -> str:
    """Forward and backward times of a family on the CPU.

    Args:
        name: of the result.
        brief: the first shape alone.
    """
    record = load(name)
    if record is None:
        return not_run(name, COMMANDS[name])
    cases = record["results"]
    if brief:
        cases = [case for case in cases if case["shape"] == cases[0]["shape"]]
    parts = []
    for op in dict.fromkeys(case["op"] for case in cases):
        mine = [case for case in cases if case["op"] == op]
        others = [name for name in mine[0]["rivals"] if name != "ours"]
        head = [f"`{op}`", "ours, ms (quartiles apart)", *(f"{RIVALS.get(name, name)}, ratio" for name in others)]
        parts.append(markdown(head, [_speed_row(case, others) for case in mine]))
    parts.append(_kept(cases))
    return "\n\n".join([*parts, describe(record)])


def _speed_row(case: Record, others: Iterable[str]) -> list[str]:
    ours = case["rivals"]["ours"]
    ratios = [f"{case['rivals'][name]['ratio_to_ours']:.2f}" for name in others]
    what = f"{case['shape']} {case['dtype']} {case.get('layout', '').replace('_', ' ')}".rstrip()
    what += f" tau {case['tau']:g}" if "tau" in case else ""
    return [what, f"{ours['median_ms']:.2f} ({ours['iqr_ms']:.2f})", *ratios]


def _kept(cases: list[Record]) -> str:
    """What each rival keeps for the backward, the largest over the cases."""
    most: dict[tuple[str, str], float] = {}
    for case in cases:
        for name, figures in case["rivals"].items():
            key = case["op"], name
            most[key] = max(most.get(key, 0.0), figures["saved_over_input"])
    said = [
        f"`{op}` " + ", ".join(f"{RIVALS.get(n, n)} {size:.2f}" for (o, n), size in most.items() if o == op)
        for op in dict.fromkeys(op for op, _ in most)
    ]
    return f"Kept for the backward, in multiples of the input (largest of the cases): {'; '.join(said)}."


def gpu() -> str:
    """What has been measured on GPUs, device by device."""
    found = gpu_records()
    if not found:
        return f"GPU figures: not measured yet. `{GPU_COMMAND}` on a machine with one makes them."
    return "\n\n".join(_gpu_device(name, record) for name, record in found.items())


def gpu_records() -> dict[str, Record]:
    """Results of scripts/gpu_check.py, the latest last."""
    found = {name: record for name, record in records().items() if record.get("device") not in ("cpu", None)}
    return dict(sorted(found.items(), key=lambda item: item[1]["date"]))


def _gpu_device(name: str, record: Record) -> str:
    body = []
    for result in record["results"]:
        rivals = result["rivals"]
        others = ", ".join(f"{RIVALS.get(n, n)} {r['ratio_to_ours']:.2f}" for n, r in rivals.items() if n != "ours")
        verdict = "met" if result["met"] else "missed"
        share = f"{result['share_of_copy']:.1%} ({verdict}, target {result['target_share']:.0%})"
        what = f"{result['name']} {result['shape']} {result['dtype']} {result.get('layout', '')}".rstrip()
        for name, ratio in result.get("target_ratios", {}).items():
            verdict = "met" if ratio["met"] else "missed"
            others += f"; {RIVALS.get(name, name)} at least {ratio['target']:.2f}: {verdict}"
        body.append([what, f"{rivals['ours']['median_ms']:.4f}", share, others])
    head = ["operation", "ours, ms", "share of the copy bandwidth", "rivals, ratio to ours"]
    copy = record["ceilings"].get("copy_bytes_per_s", 0) / 1e12
    wrong = len(record["compared"]["failed"])
    said = f"Copy: {copy:.2f} TB/s. {record['compared']['checks']} comparisons, {wrong} wrong."
    return "\n\n".join([f"`{name}.json`", markdown(head, body), said, describe(record)])


def polycom_roofline() -> str:
    """Bytes a PolyCom kernel must move, the time that takes, and what was measured."""
    measured: dict[tuple[str, tuple[int, ...]], str] = {}
    for record in gpu_records().values():
        for result in record["results"]:
            ours = f"{result['rivals']['ours']['median_ms']:.4f} ({record['device']})"
            measured[result["name"], tuple(result["shape"])] = ours
    body = []
    for shape in POLYCOM_SHAPES:
        for name, tensors in POLYCOM_TENSORS.items():
            moved = 2 * tensors * shape[0] * shape[1]
            times = [f"{1e3 * moved / (rates[tensors > 2] * 1e12):.3f}" for rates in BANDWIDTHS.values()]
            body.append(
                [name, str(list(shape)), f"{moved / 1e6:.0f}", *times, measured.get((name, shape), "not measured")]
            )
    head = [
        "kernel, bfloat16",
        "shape",
        "MB moved",
        *(f"{device}, expected ms" for device in BANDWIDTHS),
        "measured ms",
    ]
    return markdown(head, body)


def claims() -> str:
    """Claim, the paper's number, ours, seeds, command, verdict."""
    record = load("polycom_lm")
    rows = record["results"] if record else []
    seeds = sorted({row["seed"] for row in rows})
    loss = {(row["activation"], row["seed"]): row["val_loss"] for row in rows if "val_loss" in row}
    moves = {
        row["seed"]: row["largest_move"] for row in rows if row["activation"] == "polynorm" and "largest_move" in row
    }

    def lead(name: str, *others: str) -> list[float]:
        """For each seed, how far an activation lies below the best of the others; empty if a run is missing."""
        needed = [(which, seed) for seed in seeds for which in (name, *others)]
        if not loss.keys() >= set(needed):
            return []
        return [min(loss[other, seed] for other in others) - loss[name, seed] for seed in seeds]

    def row(claim: str, paper: str, figures: list[float], unit: str, least: float, promise: str) -> list[str]:
        shown = f"{', '.join(f'{value:+.3f}' for value in figures)} {unit}" if figures else "not measured yet"
        verdict = "not measured yet"
        if figures:
            met = sum(value > least for value in figures)
            verdict = "holds" if met == len(figures) else f"does not hold ({met} of {len(figures)} seeds)"
        return [claim, promise, paper, shown, ", ".join(map(str, seeds)) or "0, 1", f"`{EVIDENCE_COMMAND}`", verdict]

    unit = "nats a byte of lead"
    five = lead("polynorm", "polyrelu", "swiglu", "gelu", "relu")
    six = lead("polynorm", *(name for name in ACTIVATIONS if name != "polynorm"))
    square = lead("polynorm", "relu2")
    smooth = lead("polynorm", "swiglu", "gelu")
    relu = lead("polyrelu", "swiglu", "gelu")
    baselines = _smaller(lead("swiglu", "gelu"), lead("gelu", "relu"))
    moved = [moves[seed] for seed in seeds] if moves.keys() >= set(seeds) else []
    body = [
        row("PolyNorm ends lowest of the paper's five", "2.171, the next 2.178", five, unit, 0, "yes"),
        row("PolyNorm ends lowest of the six", "no number", six, unit, 0, "withdrawn"),
        row("PolyNorm ends below squared ReLU", "no number", square, unit, 0, "no"),
        row(f"PolyNorm ends {GAP} below SwiGLU and GELU", "2.171, 2.190, 2.209", smooth, unit, GAP, "no"),
        row("PolyReLU ends below SwiGLU and GELU", "2.178, 2.190, 2.209", relu, unit, 0, "no"),
        row("SwiGLU ends below GELU, GELU below ReLU", "2.190, 2.209, 2.216", baselines, unit, 0, "no"),
        row(f"a coefficient of PolyNorm moves by {MOVED}", "no number", moved, "from 1/3", MOVED, "no"),
    ]
    head = ["claim", "promised here", "paper: training loss", "ours", "seeds", "command", "verdict"]
    return markdown(head, body)


def batch_sizes() -> str:
    """Accuracy and loss by layer and batch size, one pair a seed."""
    record = load("evonorm_batch")
    if record is None:
        return not_run("evonorm_batch", BATCH_COMMAND)
    rows = [row for row in record["results"] if "val_acc" in row]
    batches = sorted({row["batch"] for row in rows})
    body = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = []
        for batch in batches:
            mine = [row for row in rows if (row["layer"], row["batch"]) == (layer, batch)]
            cells.append(", ".join(f"{100 * row['val_acc']:.1f} / {row['val_loss']:.3f}" for row in mine))
        body.append([NORMS[layer], *cells])
    table = markdown(["validation accuracy, % / loss", *(f"batch {batch}" for batch in batches)], body)
    return "\n\n".join([table, describe(record)])


def batch_claims() -> str:
    """Claim, the paper's number, ours, seeds, command, verdict."""
    record = load("evonorm_batch")
    rows = record["results"] if record else []
    found = {(row["layer"], row["batch"], row["seed"]): row for row in rows if "val_acc" in row}
    seeds = sorted({seed for _, _, seed in found})

    def points(layer: str, batch: int, other: str, other_batch: int) -> list[float]:
        """The lead for each seed; short where a run is missing."""
        cells = [(found.get((layer, batch, s)), found.get((other, other_batch, s))) for s in seeds]
        return [100 * (a["val_acc"] - b["val_acc"]) for a, b in cells if a and b]

    losses = [(found.get(("evonorm_s0", 2, s)), found.get(("bn_relu", 2, s))) for s in seeds]
    below = [b["val_loss"] - a["val_loss"] for a, b in losses if a and b]
    over_gn = [points("evonorm_s0", batch, "gn_relu", batch) for batch in BATCHES]
    smallest = [min(of_seed) for of_seed in zip(*over_gn, strict=False)]  # short where a run is missing
    rows_shown = [
        ("S0 is 30 points above BN-ReLU at batch 1", "yes", "77.5 against 70.7 at batch 4 a device",
         points("evonorm_s0", 1, "bn_relu", 1), "points of lead", 30.0),
        ("S0 at batch 2 has no higher loss than BN-ReLU", "yes", "no number", below, "of loss less", 0.0),
        ("S0 at batch 1 is within 2 points of batch 32", "yes", "77.5 and 77.4",
         [2 - abs(d) for d in points("evonorm_s0", 1, "evonorm_s0", 32)], "points to spare", 0.0),
        ("S0 is above GN-ReLU at every batch size", "no", "1.5 to 2.0 points", smallest,
         "points of lead, smallest", 0.0),
        ("S0 is above BN-ReLU at batch 32", "no", "77.4 against 76.1 at batch 128 a device",
         points("evonorm_s0", 32, "bn_relu", 32), "points of lead", 0.0),
        ("B0 is above BN-ReLU at batch 32", "no", "EvoNorms are above in 12 of 14 settings",
         points("evonorm_b0", 32, "bn_relu", 32), "points of lead", 0.0),
    ]  # fmt: skip
    body = []
    for claim, promise, paper, figures, unit, least in rows_shown:
        shown, verdict = "not measured yet", "not measured yet"
        if figures and len(figures) == len(seeds):
            shown = f"{', '.join(f'{value:+.3g}' for value in figures)} {unit}"
            met = sum(value >= least for value in figures)
            verdict = "holds" if met == len(figures) else f"does not hold ({met} of {len(figures)} seeds)"
        body.append([claim, promise, paper, shown, ", ".join(map(str, seeds)) or "0, 1", f"`{BATCH_COMMAND}`", verdict])
    head = ["claim", "promised here", "paper: ImageNet accuracy", "ours", "seeds", "command", "verdict"]
    return markdown(head, body)


def evonorm_roofline() -> str:
    """Bytes the EvoNorm kernels must move, the time that takes, and what was measured."""
    measured: dict[tuple[str, tuple[int, ...], str], str] = {}
    for record in gpu_records().values():
        for result in record["results"]:
            ours = f"{result['rivals']['ours']['median_ms']:.4f} ({record['device']})"
            measured[result["name"], tuple(result["shape"]), result.get("layout", "")] = ours
    body = []
    for shape in EVONORM_SHAPES:
        for name, layout, passes in EVONORM_PASSES:
            moved = 2 * passes * math.prod(shape)
            times = [f"{1e3 * moved / (rates[1] * 1e12):.3f}" for rates in BANDWIDTHS.values()]
            found = measured.get((name, shape, layout), "not measured")
            body.append([name, layout.replace("_", " "), str(list(shape)), f"{moved / 1e6:.0f}", *times, found])
    devices = [f"{device}, expected ms" for device in BANDWIDTHS]
    head = ["forward and backward, bfloat16", "layout", "shape", "MB moved", *devices, "measured ms"]
    return markdown(head, body)


def _smaller(first: list[float], second: list[float]) -> list[float]:
    return [min(pair) for pair in zip(first, second, strict=True)] if first and second else []


def runs() -> str:
    """Validation loss of every run, and the coefficients PolyNorm ended with."""
    record = load("polycom_lm")
    if record is None:
        return not_run("polycom_lm", EVIDENCE_COMMAND)
    found = {(row["activation"], row["seed"]): row for row in record["results"] if "val_loss" in row}
    failed = [row for row in record["results"] if "error" in row]
    seeds = sorted({row["seed"] for row in record["results"]})
    body = []
    for name, (label, paper) in ACTIVATIONS.items():
        mine = [found.get((name, seed)) for seed in seeds]
        losses = [f"{row['val_loss']:.3f}" if row else "not run" for row in mine]
        parameters = next((f"{row['parameters']:,}" for row in mine if row), "")
        seconds = ", ".join(f"{row['wall_s']:.0f}" for row in mine if row)
        body.append([label, *losses, parameters, seconds, paper])
    head = [
        "activation",
        *(f"val/loss, seed {seed}" for seed in seeds),
        "parameters",
        "seconds a run",
        "paper: training loss",
    ]
    parts = [markdown(head, body)]
    learned = [
        [str(row["seed"]), block["block"].rpartition(".")[2], *_powers(block)]
        for row in found.values()
        if row["activation"] == "polynorm"
        for block in row.get("coefficients", [])
    ]
    if learned:
        parts += ["Where PolyNorm's coefficients ended; they start at 1/3 and 0:"]
        parts += [markdown(["seed", "block", "cube", "square", "linear", "constant"], learned)]
    parts += [f"{row['activation']}, seed {row['seed']}, failed: {row['error']}" for row in failed]
    asked = record.get("settings") or {}
    if asked.get("quick") or asked.get("max_steps"):
        parts.append(f"**Not the recipe**: run with {asked}.")
    return "\n\n".join([*parts, describe(record)])


def _powers(block: Record) -> list[str]:
    return [f"{value:.3f}" for value in (*block["weight"], block["bias"])]


def of(name: str, command: str, table: Callable[[Record], str]) -> str:
    """A table of one result, and where that comes from."""
    record = load(name)
    return not_run(name, command) if record is None else f"{table(record)}\n\n{describe(record)}"


def records() -> dict[str, Record]:
    """Every committed result by the name of its file; those of `--quick` are left out."""
    files = sorted(RESULTS.glob("*.json")) if RESULTS.is_dir() else []
    return {path.stem: json.loads(path.read_text()) for path in files if not path.stem.endswith("_quick")}


def load(name: str) -> Record | None:
    """One result, None if its script has not been run."""
    return records().get(name)


def not_run(name: str, command: str) -> str:
    """What stands in the place of a table that has no figures."""
    file = f"scripts/bench/results/{name}.json"
    return f"Not measured yet: `{file}` is not there. `{command}` from the repository root writes it."


def describe(record: Record) -> str:
    """Where, with what and from which commit a result comes."""
    env = record["environment"]
    git = env.get("git") or {}
    commit = (
        f"commit {git['commit'][:10]}{' with local changes' if git.get('dirty') else ''}"
        if git
        else "no commit recorded"
    )
    devices = ", ".join(env.get("devices") or []) if record.get("device") != "cpu" else ""
    machine = devices or f"{env.get('cpu') or 'CPU'}, {env['cpu_count']} cores"
    versions = ", ".join(
        f"{name} {env['packages'][name]}" for name in ("torch", "lightning") if name in env["packages"]
    )
    facts = [
        record.get("what"),
        record.get("implementation"),
        f"{record['rounds']} rounds" if "rounds" in record else None,
    ]
    said = [machine, versions, f"Python {env['python']}", *(fact for fact in facts if fact), commit, record.get("date")]
    return f"Measured on: {'; '.join(word for word in said if word)}."


TABLES: dict[str, Callable[[], str]] = {
    "components": components,
    "environment": environment_variables,
    "speed": lambda: speed(brief=False),
    "speed-brief": lambda: speed(brief=True),
    "speed-closed-form": lambda: speed("polycom_cpu_closed_form", brief=True),
    "gpu": gpu,
    "polycom-roofline": polycom_roofline,
    "claims": claims,
    "evonorm-speed": lambda: speed("evonorm_cpu", brief=False),
    "evonorm-speed-brief": lambda: speed("evonorm_cpu", brief=True),
    "evonorm-speed-closed-form": lambda: speed("evonorm_cpu_closed_form", brief=True),
    "evonorm-batch": batch_sizes,
    "evonorm-claims": batch_claims,
    "evonorm-roofline": evonorm_roofline,
    "runs": runs,
    "trades-consistency": lambda: of("trades_consistency", TRADES_COMMAND, comparisons.trades_consistency),
    "comp-sum-noise": lambda: of("comp_sum_noise", NOISE_COMMAND, comparisons.noise),
    "comp-sum-speed": lambda: speed("comp_sum_cpu", brief=False),
    "comp-sum-speed-brief": lambda: speed("comp_sum_cpu", brief=True),
    "comp-sum-speed-2-threads": lambda: speed("comp_sum_cpu_2_threads", brief=True),
    "comp-sum-speed-closed-form": lambda: speed("comp_sum_cpu_closed_form", brief=True),
    "adversarial": lambda: of("adversarial", ADVERSARIAL_COMMAND, comparisons.adversarial),
    "adversarial-step": lambda: of("adversarial_step", STEP_COMMAND, comparisons.adversarial_step),
    "explain": lambda: of("explain_cpu", EXPLAIN_COMMAND, comparisons.explain),
    "convex-speed": lambda: of("convex_cpu", "python -m scripts.bench.convex", comparisons.convex_speed),
    "convex-quality": lambda: of("convex_quality", CONVEX_COMMAND, comparisons.convex_quality),
    "explain-quality": lambda: of("explain_quality", QUALITY_COMMAND, comparisons.quality),
}
