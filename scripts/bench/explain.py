"""Class activation maps against torchcam 0.5.0 and pytorch-grad-cam 1.5.7: time, memory, and cost in forward passes.

    pip install torchcam==0.5.0 grad-cam==1.5.7
    python -m scripts.bench.explain             # ResNets of random weights on the CPU, one thread; 4 minutes, 2 GB
    python -m scripts.bench.explain --quick     # seconds: does the script work?

from the repository root. Every rival has a model of its own, chooses the class itself and returns maps in [0, 1]. The
peers are called as their documentation says, on extractors made beforehand, with inputs in the usual layout:
channels_last, in which ours runs, made both slower. "grad_cam_frozen" goes beyond its documentation: no parameter needs
a gradient, the input does. Peak memory is how far the resident memory of a fresh process grows over what it is after a
pass with one image. Nothing is timed before ours, told to round off as pytorch-grad-cam does, has its maps of
Grad-CAM++ (exit status 1 if not).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from scripts.bench._speed import RESULTS
from scripts.bench._timing import Run, interleave, summarise, write_results
from zoo.explain import CAMWarning, GradCAMpp, SmoothGradCAMpp

Method = Literal["smooth", "forwards", "targets", "plus"]
# What each method is measured against: the rival's name, and its words.
YARDSTICKS: dict[Method, tuple[str, str]] = {
    "smooth": ("torchcam", "torchcam"),
    "forwards": ("plain_forwards", "n + 1 plain forward passes without gradients"),
    "targets": ("one_by_one", "a call for each of them"),
    "plus": ("grad_cam", "pytorch-grad-cam"),
}
METHODS: dict[Method, str] = {
    "smooth": "Smooth Grad-CAM++",
    "forwards": "Smooth Grad-CAM++",
    "targets": "Smooth Grad-CAM++ of 5 classes",
    "plus": "Grad-CAM++",
}
VARIANTS = {
    "ours": "",
    "ours_first_call": ", linear tail, first call",
    "ours_later_calls": ", linear tail, later calls",
}
CLASSES = 5
SAME = 1e-5  # how far maps of pytorch-grad-cam may be from ours
MEMORY = 0.25  # our peak memory over torchcam's, at most


@dataclass(frozen=True)
class Case:
    """One method at one layer; promised is by variant of ours how many times as long its yardstick takes at least."""

    method: Method
    model: str
    layer: str
    samples: int = 1
    images: int = 1
    size: int = 224
    promised: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "promised"}

    def __str__(self) -> str:
        copies = "" if self.method == "plus" else f", n = {self.samples}"
        images = "" if self.images == 1 else f", {self.images} images"
        return f"{METHODS[self.method]}, {self.model} {self.layer}{copies}{images}"

    @property
    def has_linear_tail(self) -> bool:
        return self.layer == "layer4"  # average pooling and a linear layer follow


CASES = (
    Case("smooth", "resnet18", "layer4", 25, promised={"ours": 1.25, "ours_first_call": 8, "ours_later_calls": 20}),
    Case("smooth", "resnet18", "layer3", 8, promised={"ours": 1.2}),
    Case("smooth", "resnet50", "layer4", 8, promised={"ours": 1.1, "ours_first_call": 3}),
    Case("smooth", "resnet18", "layer4", 8, images=4, promised={"ours": 1.15, "ours_first_call": 3}),
    Case("forwards", "resnet18", "layer4", 8, promised={"ours": 1.0}),
    Case("targets", "resnet18", "layer3", 8, promised={"ours": 2.3}),
    Case("plus", "resnet18", "layer4", promised={"ours": 2.3}),
    Case("plus", "resnet18", "layer3", promised={"ours": 1.7}),
    Case("plus", "resnet50", "layer4", promised={"ours": 2.3}),
)
LARGE = Case("smooth", "resnet50", "layer4", 8, images=8)  # whose memory is measured
QUICK = tuple(Case(method, "resnet18", "layer4", 2, size=64) for method in METHODS)
QUICK_LARGE = Case("smooth", "resnet18", "layer4", 2, images=2, size=64)


def network(name: str) -> nn.Module:
    """Random weights. By zero_init_last a residual block would start as the identity, and its tail look linear."""
    torch.manual_seed(0)
    return timm.create_model(name, zero_init_last=False).eval()


def images(case: Case) -> Tensor:
    return torch.randn(case.images, 3, case.size, case.size, generator=torch.Generator().manual_seed(1))


def _smooth(case: Case, x: Tensor) -> dict[str, Run]:
    model = network(case.model)

    def cam(**options: Any) -> SmoothGradCAMpp:
        return SmoothGradCAMpp(model, case.layer, n_samples=case.samples, **options)

    every, known = cam(linear_tail="sample"), cam()
    runs: dict[str, Run] = {"ours": lambda: every(x).heatmap(size=None)}
    if case.has_linear_tail:
        runs["ours_first_call"] = lambda: cam()(x).heatmap(size=None)
        runs["ours_later_calls"] = lambda: known(x).heatmap(size=None)  # calls before the clock starts are the first
    runs["torchcam"] = _torchcam(case, x)
    return runs


def _torchcam(case: Case, x: Tensor) -> Run:
    from torchcam.methods import SmoothGradCAMpp as TorchCAM

    model = network(case.model)
    cam = TorchCAM(model, case.layer, num_samples=case.samples)

    def run() -> list[Tensor]:
        with torch.no_grad():  # of the clean pass nobody needs the graph; with it the peak is half as high again
            scores = model(x)
        return cam(scores.argmax(1).tolist(), scores)

    return run


def _forwards(case: Case, x: Tensor) -> dict[str, Run]:
    model = network(case.model)
    cam = SmoothGradCAMpp(network(case.model), case.layer, n_samples=case.samples, linear_tail="sample")

    def plain() -> None:
        with torch.no_grad():
            for _ in range(case.samples + 1):
                model(x)

    return {"ours": lambda: cam(x).heatmap(size=None), "plain_forwards": plain}


def _targets(case: Case, x: Tensor) -> dict[str, Run]:
    cam = SmoothGradCAMpp(network(case.model), case.layer, n_samples=case.samples, linear_tail="sample")
    classes = torch.arange(CLASSES).unsqueeze(0)

    def one_by_one() -> list[Tensor]:
        return [cam(x, target).heatmap(size=None) for target in range(CLASSES)]

    return {"ours": lambda: cam(x, classes).heatmap(size=None), "one_by_one": one_by_one}


def _plus(case: Case, x: Tensor) -> dict[str, Run]:
    cam = GradCAMpp(network(case.model), case.layer)
    frozen = network(case.model).requires_grad_(False)
    return {
        "ours": lambda: cam(x).heatmap(),
        "grad_cam": _grad_cam(network(case.model), case.layer, x),
        "grad_cam_frozen": _grad_cam(frozen, case.layer, x.clone().requires_grad_()),
    }


def _grad_cam(model: nn.Module, layer: str, x: Tensor) -> Callable[[], Any]:
    from pytorch_grad_cam import GradCAMPlusPlus

    cam = GradCAMPlusPlus(model=model, target_layers=[model.get_submodule(layer)])
    return lambda: cam(input_tensor=x, targets=None)


RIVALS: dict[Method, Callable[[Case, Tensor], dict[str, Run]]] = {
    "smooth": _smooth,
    "forwards": _forwards,
    "targets": _targets,
    "plus": _plus,
}


def difference(layer: str) -> float:
    """The largest one between maps in [0, 1] of pytorch-grad-cam's Grad-CAM++ and ours with its eps, ResNet-18."""
    x = images(Case("plus", "resnet18", layer))
    ours = GradCAMpp(network("resnet18"), layer, eps=1e-6, denominator="signed", normalize="minmax").heatmap(x)
    theirs = torch.from_numpy(_grad_cam(network("resnet18"), layer, x)())
    return float((ours - theirs).abs().max())


def check() -> None:
    """Raise AssertionError unless Grad-CAM++ is that of pytorch-grad-cam."""
    for layer in ("layer3", "layer4"):
        found = difference(layer)
        if not found <= SAME:
            raise AssertionError(f"Grad-CAM++ of ResNet-18 {layer} is {found:.1e} from that of pytorch-grad-cam")


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times of every rival, and by rounds how many times as long as each the yardstick takes."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleave(RIVALS[case.method](case, images(case)), rounds=rounds, clock=clock)
    rows: dict[str, dict[str, Any]] = {**summarise(times, "ours")}
    yardstick = times[YARDSTICKS[case.method][0]]
    for name, row in rows.items():
        ratios = [theirs / mine for theirs, mine in zip(yardstick, times[name], strict=True)]
        row["yardstick_over_it"] = round(median(ratios), 3)
        row["quartiles"] = [round(ratio, 3) for ratio in quantiles(ratios, n=4)[::2]]
    return {**case.facts(), "rivals": rows}


def peak_growth(case: Case, rival: str) -> float:
    """MB by which the resident memory grows at most while a rival runs; for a fresh process on Linux."""
    import resource  # not everywhere

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CAMWarning)
    x = images(case)
    with torch.no_grad():
        network(case.model)(x[:1])
    run = _torchcam(case, x) if rival == "torchcam" else _smooth(case, x)[rival]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    run()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


def memory(case: Case) -> dict[str, Any]:
    """Peak growth of ours, every copy drawn, and of torchcam, each in a process of its own."""
    peaks = {}
    for rival in ("ours", "torchcam"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            peaks[rival] = fresh.submit(peak_growth, case, rival).result()
    return {**case.facts(), "peak_mb": peaks}


def acceptance(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The promises; None where this run did not measure one."""
    promises = []
    for case in CASES:
        facts = case.facts().items()
        rows = next((row["rivals"] for row in results if "rivals" in row and facts <= row.items()), None)
        for name, least in case.promised.items():
            measured = None if rows is None else rows[name]["yardstick_over_it"]
            against = YARDSTICKS[case.method][1]
            claim = f"{case}{VARIANTS[name]}: at least {least:g} times as fast as {against}"
            promises.append({"claim": claim, "measured": measured, "met": None if rows is None else measured >= least})
    facts = LARGE.facts().items()
    peaks = next((row["peak_mb"] for row in results if "peak_mb" in row and facts <= row.items()), None)
    share = None if peaks is None else round(peaks["ours"] / peaks["torchcam"], 3)
    claim = f"{LARGE}: at most {MEMORY:g} of torchcam's peak memory"
    promises.append({"claim": claim, "measured": share, "met": None if share is None else share <= MEMORY})
    return promises


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help="figures per rival, at least 2 (7; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 on 64 x 64 pixels, two copies")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/explain_cpu.json)")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"explain_cpu{'_quick' if args.quick else ''}.json"
    rounds = args.rounds or (2 if args.quick else 7)
    torch.set_num_threads(1)
    try:
        check()
    except AssertionError as error:
        print(f"nothing timed, ours is wrong: {error}", file=sys.stderr)
        return 1
    results = [memory(QUICK_LARGE if args.quick else LARGE)]
    print("peak memory, MB:", results[0]["peak_mb"], flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CAMWarning)  # that the tail is linear is what is measured
        for case in QUICK if args.quick else CASES:
            results.append(measure(case, rounds))
            for name, row in results[-1]["rivals"].items():
                print(f"{case}  {name:16}", *(f"{key} {value!s:<9}" for key, value in row.items()), flush=True)
    promises = acceptance(results)
    what = "heatmaps by one call, CPU time of one thread; peak growth of resident memory"
    peers = {name: version(name) for name in ("torchcam", "grad-cam")}
    write_results(out, results, device="cpu", what=what, rounds=rounds, peers=peers, acceptance=promises)
    for promise in promises:
        said = {True: "met", False: "MISSED", None: "not measured"}[promise["met"]]
        print(f"{said}: {promise['claim']} (measured {promise['measured']})")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
