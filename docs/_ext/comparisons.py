"""Tables of one result each, that of the comp-sum losses, of adversarial training, or of class activation maps.

A function takes the record and says nothing of where it comes from: `tables.py` does.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

Record = dict[str, Any]

CLAIM_WORDS = {None: "not measured", True: "holds", False: "does not hold"}
TRADES_METHODS = {
    "trades": "TRADES, lambda {strength:g}",
    "trades_divergence": "TRADES, Kullback-Leibler, beta {strength:g}",
    "smooth": "smooth comp-sum, rho {rho:g}, tau {tau:g}",
    "smooth_rho_margin": "the same with the rho-margin, rho {rho:g}, tau {tau:g}",
}
# Of each method of explanation: its name, the rival it is measured against, and that one's name.
EXPLAIN = {
    "smooth": ("Smooth Grad-CAM++", "torchcam", "torchcam"),
    "forwards": ("Smooth Grad-CAM++", "plain_forwards", "n + 1 forward passes"),
    "targets": ("Smooth Grad-CAM++ of 5 classes", "one_by_one", "5 calls"),
    "plus": ("Grad-CAM++", "grad_cam", "pytorch-grad-cam"),
}
EXPLAIN_VARIANTS = {
    "ours": "",
    "ours_first_call": "; linear tail, first call",
    "ours_later_calls": "; linear tail, later calls",
    "grad_cam_frozen": "",
}
EXPLAINERS = {
    "smooth_grad_cam_pp": "Smooth Grad-CAM++",
    "grad_cam_pp": "Grad-CAM++",
    "grad_cam": "Grad-CAM",
    "torchcam": "torchcam's Smooth Grad-CAM++",
}
# Part of the evidence and a figure of it, by the head of a column.
QUALITY = {
    "four classes: in its cell": ("mosaics", "in_cell"),
    "hottest pixel there": ("mosaics", "hottest_in_cell"),
    "one class twice: in both cells": ("same_class_twice", "in_cells"),
    "smaller over larger": ("same_class_twice", "balance"),
    "two shapes: in their boxes": ("shapes_two_and_another", "in_boxes"),
    "both found": ("shapes_two_and_another", "all_found"),
    "three shapes: all found": ("shapes_three", "all_found"),
    "insertion": ("photos", "insertion_auc"),
    "average drop, %": ("photos", "average_drop"),
}
METHODS = {"pgd_at": "PGD-AT", "trades": "TRADES, beta {:g}", "advcompsum": "smooth comp-sum, nu {:g}"}
STEPS = {
    "ours": "AdvCompSumLoss",
    "our_trades": "TradesLoss",
    "our_pgd_at": "PGDATLoss",
    "published_trades": "TRADES as published",
    "no_attack": "no attack",
}


CONVEX_NAMES = {"convexes": ("convex", "convexes"), "gaussians": ("Gaussian", "Gaussians")}
CONVEX_RIVALS = {
    "tiles_in_pytorch": "PyTorch, tile by tile",
    "naive_in_pytorch": "PyTorch, naive",
    "two_threads": "two threads, wall clock",
}


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _claims(verdicts: dict[str, bool | None]) -> str:
    return markdown(["claim", "here"], [[name.replace("_", " "), CLAIM_WORDS[held]] for name, held in verdicts.items()])


def trades_consistency(record: Record) -> str:
    """Angle and risk of each minimiser."""
    body = [
        [TRADES_METHODS[row["method"]].format(**row), f"{row['angle']:.3f}", f"{row['adversarial_risk']:g}"]
        for row in record["results"]
    ]
    table = markdown(["minimised", "angle of w", "adversarial 0/1 risk"], body)
    return f"{_claims(record['verdicts'])}\n\n{table}"


def noise(record: Record) -> str:
    """Accuracy by noise and tau, means over the seeds, and the claims."""
    rows = [row for row in record["results"] if "val_acc" in row]
    taus = sorted({row["tau"] for row in rows})
    body = []
    for rate in sorted({row["noise"] for row in rows}):
        cells = [[100 * r["val_acc"] for r in rows if (r["noise"], r["tau"]) == (rate, tau)] for tau in taus]
        body.append([f"{rate:.0%}", *(f"{mean(cell):.1f}" if cell else "-" for cell in cells)])
    table = markdown(["wrong labels", *(f"tau {tau:g}" for tau in taus)], body)
    return f"{_claims(record['verdicts'])}\n\n{table}"


def adversarial(record: Record) -> str:
    """Clean and robust accuracy of each setting, on the pictures that chose and on the test pictures; the claims."""

    def named(method: str, strength: float) -> str:
        return METHODS[method].format(strength)

    def points(value: float, deviation: float | None = None) -> str:
        return f"{100 * value:.1f}" + ("" if deviation is None else f" ({100 * deviation:.1f})")

    choice = [
        [named(row["method"], row["strength"]), points(row["clean"]), points(row["pgd"])]
        for row in record["results"]
        if row["stage"] == "choice" and "pgd" in row
    ]
    reasons: dict[tuple[str, float], list[str]] = {}
    for name, cells in record["comparison"].items():
        method, _, reason = (name, "", "") if name in METHODS else name.rpartition("_")
        reasons.setdefault((method, cells["strength"]), []).append(reason)
    comparison = []
    for (method, strength), why in reasons.items():
        cells = record["comparison"][f"{method}_{why[0]}".rstrip("_")]
        figures = [points(cells[k], cells[f"{k}_sd"]) for k in ("clean", "pgd", "apgd-ce", "worst_case")]
        comparison.append([named(method, strength), " and ".join(why), *figures])
    parts = [
        markdown(["test, mean (deviation)", "chosen as", "clean", "PGD-40", "APGD-CE", "worst case"], comparison),
        _claims(record["verdicts"]),
        markdown(["chosen on held-out pictures", "clean", "PGD-40"], choice),
    ]
    return "\n\n".join(parts)


def adversarial_step(record: Record) -> str:
    """Time of a step of each method over that of one without attack."""
    body = []
    for row in record["results"]:
        plain = row["rivals"]["no_attack"]["ratio_to_ours"]
        body.append([str(row["steps"]), *(f"{row['rivals'][name]['ratio_to_ours'] / plain:.2f}" for name in STEPS)])
    return markdown(["attack steps", *STEPS.values()], body)


def explain(record: Record) -> str:
    """Time and memory of class activation maps against other libraries, and the promises."""
    body, peaks = [], ""
    for row in record["results"]:
        method, rival, against = EXPLAIN[row["method"]]
        where = f"{row['model']} {row['layer']}, n = {row['samples']}, {row['images']} x {row['size']} x {row['size']}"
        if "peak_mb" in row:
            mb = row["peak_mb"]
            peaks = f"Peak memory of {method}, {where}: {mb['ours']:.0f} MB, {against} {mb[rival]:.0f} MB."
            continue
        theirs = row["rivals"][rival]["median_ms"]
        for name, figures in row["rivals"].items():
            if name == rival:
                continue
            low, high = figures["quartiles"]
            what = "pytorch-grad-cam, parameters frozen by hand" if name == "grad_cam_frozen" else method
            faster = f"{figures['yardstick_over_it']:.2f} ({low:.2f} to {high:.2f})"
            cells = [f"{what}{EXPLAIN_VARIANTS[name]}", where, f"{figures['median_ms']:.0f}", against, f"{theirs:.0f}"]
            body.append([*cells, faster])
    head = ["method", "on", "ms", "against", "ms", "times as fast (quartiles)"]
    return "\n\n".join([markdown(head, body), peaks, _promises(record)])


def quality(record: Record) -> str:
    """Where the heat of each method is, and what was expected of it."""
    results, body = record["results"], []
    for method, name in EXPLAINERS.items():
        figures = [results[part].get(method, {}).get(figure) for part, figure in QUALITY.values()]
        body.append([name, *("-" if value is None else f"{value:.3g}" for value in figures)])
    return "\n\n".join([markdown(["", *QUALITY], body), _promises(record)])


def convex_speed(record: Record) -> str:
    """Times of the convex rasterizer by scene and size, its rivals beside them, and the promises."""
    body = []
    for row in record["results"]:
        ours = row["rivals"]["ours"]
        if row["what"] == "memory":
            continue
        others = [
            f"{CONVEX_RIVALS[name]} {_three(r['ratio_to_ours'])}" for name, r in row["rivals"].items() if name != "ours"
        ]
        where = f"{row['scene'].replace('_', ' ')}, {row['count']} at {row['size']} x {row['size']}"
        body.append([where, row["what"].replace("_", " + "), f"{ours['median_ms']:.1f}", ", ".join(others)])
    memory = next(row for row in record["results"] if row["what"] == "memory")["rivals"]
    said = ", ".join(
        f"{name.replace('_', ' ')} {r['peak_mb']:.3g} MB ({r['convexes']} convexes)" for name, r in memory.items()
    )
    head = ["scene, convexes, pixels", "", "ours, ms", "times of ours"]
    return "\n\n".join([markdown(head, body), f"Peak memory beyond the inputs: {said}.", _promises(record)])


def convex_quality(record: Record) -> str:
    """Convexes beside Gaussians on the same pictures, and the promises: means over the seeds that were run."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in record["results"]:
        if row["what"] != "tuning" and "psnr" in row:
            points = f" of {row['k']} points" if row["toy"] != "boxes" and "k" in row else ""
            one = CONVEX_NAMES[row["what"]][row["count"] > 1]
            found.setdefault(row["toy"], {}).setdefault(f"{row['count']} {one}{points}", []).append(row["psnr"])
    parts = []
    for toys in (["boxes"], [toy for toy in found if toy != "boxes"]):
        names = list(found[toys[0]]) if toys and toys[0] in found else []
        means = {toy: [sum(found[toy][name]) / len(found[toy][name]) for name in names] for toy in toys if names}
        body = [[toy.replace("_", " "), *(f"{value:.2f}" for value in values)] for toy, values in means.items()]
        parts += [markdown(["PSNR in dB", *names], body)] if body else []
    return "\n\n".join([*parts, _promises(record)])


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _promises(record: Record) -> str:
    rows = [[p["claim"], str(p["measured"]), CLAIM_WORDS[p["met"]]] for p in record["acceptance"]]
    return markdown(["expected", "measured", "here"], rows)
