"""The convex rasterizer, forward and forward + backward, against PyTorch: the formula tile by tile, and naively.

    python -m scripts.bench.convex              # on the CPU, one thread; three minutes and 3 GB
    python -m scripts.bench.convex --quick      # seconds: does the script work?

from the repository root. ZOO_KERNELS=off measures the tile-based form in PyTorch instead of the native kernels, at one
size. The naive rival evaluates every convex at every pixel and lets autograd keep all of it, as a first version of
anybody's would; it runs on every 20th of the 2,000 convexes, and its time is scaled by 20, for it grows linearly. Three
scenes of K = 6 points and random colours: "soft", edges a few pixels wide; "hard", edges and corners below a pixel; and
"published_start", the sharpness and opacity that a fit starts with in the paper, where every convex is a cloud over
thirty tiles. Other sizes of the picture show the same picture, by `reference_focal`. Times are CPU seconds of one
thread; those of two threads against one are the wall's. Memory is how far a fresh process grows over what it is after a
pass with eight convexes on 8 x 8 pixels. Nothing is timed before pictures and gradients are those of the naive loop in
float64 (exit status 1 if not).
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scripts.bench import _speed
from scripts.bench._speed import Results
from scripts.bench._timing import Run, interleave, summarise
from zoo import settings
from zoo.kernels import use_cpu_library
from zoo.splat import rasterization_convex
from zoo.splat.convex.reference import rasterization_convex_reference

Pass = Literal["forward", "forward_backward", "memory"]
Against = Literal["everything", "nothing", "two_threads"]

COUNT, SIZE, K = 2000, 256, 6
COUNTS, SIZES = (500, 2000, 8000, 32000), (128, 256, 512, 1024)
NAIVE_EVERY = 20  # convexes of which the naive loop renders one
FOCAL = 1.1  # over the width of the picture
WARM = 8  # convexes, and pixels a side, of the pass before memory is measured

# Radius, smoothness, sharpness, and the range of opacities. The first two make about 3 pairs of tile and convex each.
SCENES: dict[str, tuple[float, float, float, tuple[float, float]]] = {
    "soft": (0.04, 2.0, 0.05, (0.1, 0.9)),
    "hard": (0.05, 20.0, 3.0, (0.1, 0.9)),
    "published_start": (0.05, 2.0, 9.5e-4, (0.1, 0.1)),
}
PROMISED = ("soft", "hard")
# What is promised on the CPU, in milliseconds and in multiples of the naive loop's speed.
MILLISECONDS: dict[Pass, float] = {"forward": 10.0, "forward_backward": 25.0}
FASTER, FASTER_IN_PYTORCH = 500.0, 20.0
PICTURE_TOLERANCE, GRADIENT_TOLERANCE = 1e-12, 1e-10  # in float64; of gradients over their largest entry


@dataclass(frozen=True)
class Case:
    """One scene at one size, one way through."""

    scene: str
    count: int
    size: int
    what: Pass
    against: Against = "nothing"

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def focal(self) -> float:
        """Of the picture of 256 x 256, whose sharpness all others have."""
        return FOCAL * SIZE


@dataclass(frozen=True)
class Convexes:
    """A scene and its camera, as the rasterizers take them."""

    points: Tensor  # [N, K, 3]
    delta: Tensor  # [N]
    sigma: Tensor  # [N]
    opacities: Tensor  # [N]
    colors: Tensor  # [N, 3]
    viewmats: Tensor  # [1, 4, 4]
    Ks: Tensor  # [1, 3, 3]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.points, self.delta, self.sigma, self.opacities, self.colors

    def changed(self, change: Callable[[Tensor], Tensor]) -> Convexes:
        """Leaves of their own, each changed."""
        leaves = (change(leaf.detach()).requires_grad_() for leaf in self.leaves)
        return Convexes(*leaves, self.viewmats, self.Ks)

    def to(self, *place: Any) -> Convexes:
        moved = self.changed(lambda leaf: leaf.to(*place))
        return Convexes(*moved.leaves, self.viewmats.to(*place), self.Ks.to(*place))


def convexes(case: Case) -> Convexes:
    """Random convexes in a box before the camera that fills the picture."""
    radius, delta, sigma, (low, high) = SCENES[case.scene]
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(case.count, 3, generator=generator) * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([-1, -1, 2])
    points = place[:, None] + radius * torch.randn(case.count, K, 3, generator=generator)
    opacities = low + (high - low) * torch.rand(case.count, generator=generator)
    colors = torch.rand(case.count, 3, generator=generator)
    focal, middle = FOCAL * case.size, case.size / 2
    Ks = torch.tensor([[[focal, 0, middle], [0, focal, middle], [0, 0, 1]]])
    full = partial(torch.full, (case.count,))
    return Convexes(points, full(delta), full(sigma), opacities, colors, torch.eye(4)[None], Ks).changed(torch.clone)


def _passes(render: Callable[..., Any], scene: Convexes, case: Case, backward: bool) -> Callable[[], Any]:
    """The forward without gradients, or forward and backward of a weighted sum of the picture."""
    size, cameras = case.size, (scene.viewmats, scene.Ks)
    weight = torch.randn(1, size, size, 3, generator=torch.Generator().manual_seed(1)).to(scene.points)

    def forward() -> Tensor:
        with torch.no_grad():
            return render(*scene.leaves, *cameras, size, size, reference_focal=case.focal)[0]

    def both() -> tuple[Tensor, ...]:
        picture = render(*scene.leaves, *cameras, size, size, reference_focal=case.focal)[0]
        return torch.autograd.grad((picture * weight).sum(), scene.leaves)

    return both if backward else forward


def rivals(case: Case, scene: Convexes, native: bool) -> dict[str, Run]:
    """Everything that is timed, ours first; the naive loop on every 20th convex."""
    run = partial(_passes, case=case, backward=case.what != "forward")
    ours = run(rasterization_convex, scene)
    found = {"ours": ours}
    if case.against == "two_threads":
        found["two_threads"] = lambda: _on_threads(2, ours)
    if case.against == "everything":
        if native:
            found["tiles_in_pytorch"] = run(partial(rasterization_convex, backend="torch"), scene)
        few = scene.changed(lambda leaf: leaf[::NAIVE_EVERY].clone())
        found["naive_in_pytorch"] = run(rasterization_convex_reference, few)
    return found


def _on_threads(threads: int, run: Run) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run()
    finally:
        torch.set_num_threads(before)


def check(case: Case, device: torch.device) -> None:
    """Raise AssertionError unless ours, in float64, has the picture and the gradients of the naive loop.

    Every 20th convex on a small picture; once a scene.
    """
    if case.against != "everything" or case.what != "forward_backward":
        return
    small = Case(case.scene, case.count, 64, case.what)
    scene = convexes(small).changed(lambda leaf: leaf[::NAIVE_EVERY].clone()).to(device, torch.float64)
    got, wanted = (
        [_passes(render, scene, small, False)(), *_passes(render, scene, small, True)()]
        for render in (rasterization_convex, rasterization_convex_reference)
    )
    names = ("picture", *(field.name for field in fields(Convexes)))
    for name, mine, theirs in zip(names, got, wanted, strict=False):
        largest, allowed = (1.0, PICTURE_TOLERANCE) if name == "picture" else (theirs.abs().max(), GRADIENT_TOLERANCE)
        off = float((mine - theirs).abs().max() / largest)
        if not off <= allowed:
            raise AssertionError(f"{case.scene}: picture or gradient, {name} is {off:.1e} from that of the naive loop")


def measure(case: Case, device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """Times of every rival, or memory; what there is to see."""
    if case.what == "memory":
        return {**case.facts(), "rivals": memory(case)}
    scene = convexes(case).to(device)
    native = device.type != "cpu" or use_cpu_library()
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and case.against != "two_threads"
    times = interleave(
        rivals(case, scene, native), rounds=rounds, clock=time.process_time if alone else time.perf_counter
    )
    if "naive_in_pytorch" in times:
        times["naive_in_pytorch"] = [NAIVE_EVERY * seconds for seconds in times["naive_in_pytorch"]]
    table: dict[str, dict[str, float]] = summarise(times, "ours")
    if "naive_in_pytorch" in table:
        table["naive_in_pytorch"]["scaled_by"] = NAIVE_EVERY
    return {**case.facts(), **_seen(case, scene), "rivals": table}


@torch.no_grad()
def _seen(case: Case, scene: Convexes) -> dict[str, Any]:
    size = case.size
    _, alpha, meta = rasterization_convex(
        *scene.leaves, scene.viewmats, scene.Ks, size, size, reference_focal=case.focal
    )
    visible, pairs = int((meta["hull_size"] > 0).sum()), len(meta["flatten_ids"])
    return {"visible": visible, "pairs": pairs, "mean_alpha": round(float(alpha.mean()), 3)}


def memory(case: Case) -> dict[str, dict[str, float]]:
    """Peak growth in MB of forward and backward: ours with all convexes, the naive loop with every 20th."""
    table = {}
    for name, every in (("ours", 1), ("naive_in_pytorch", NAIVE_EVERY)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            grown = fresh.submit(_growth, case, every).result()
        table[name] = {"peak_mb": grown, "convexes": len(range(0, case.count, every))}
    return table


def _growth(case: Case, every: int) -> float:
    """MB by which the resident memory grows at most; for a fresh process on Linux."""
    torch.set_num_threads(1)
    render = rasterization_convex if every == 1 else rasterization_convex_reference
    small = Case(case.scene, WARM, WARM, case.what)
    _passes(render, convexes(small), small, True)()
    scene = convexes(case)
    run = _passes(render, scene.changed(lambda leaf: leaf[::every].clone()), case, True)
    before = _status("VmRSS")
    run()
    # The peak of this program: that of getrusage begins at the peak of the process that started it.
    return round(max(0, _status("VmHWM") - before) / 1024, 1)


def _status(name: str) -> int:
    """Kilobytes, as Linux says."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def acceptance(results: Results, native: bool) -> list[dict[str, Any]]:
    """The promises; None where this run did not measure one.

    Args:
        results: of :func:`measure`.
        native: whether the CPU library ran, or the tile-based form in PyTorch, which promises less.
    """
    promises = []
    for scene in PROMISED:
        for what, most in MILLISECONDS.items():
            facts = Case(scene, COUNT, SIZE, what, "everything").facts().items()
            rows = next((row["rivals"] for row in results if facts <= row.items()), None)
            where = f"{COUNT} {scene} convexes at {SIZE} x {SIZE}, {what.replace('_', ' + ')}"
            if native:
                measured = None if rows is None else rows["ours"]["median_ms"]
                met = None if measured is None else measured <= most
                promises.append({"claim": f"{where}: at most {most:g} ms", "measured": measured, "met": met})
            least = FASTER if native else FASTER_IN_PYTORCH
            measured = None if rows is None else rows["naive_in_pytorch"]["ratio_to_ours"]
            met = None if measured is None else measured >= least
            claim = f"{where}: at least {least:g} times as fast as a naive loop in PyTorch"
            promises.append({"claim": claim, "measured": measured, "met": met})
    return promises


def cases(quick: bool) -> list[Case]:
    """What is promised, the published start, every number of convexes at every size, two threads, memory."""
    passes: tuple[Pass, ...] = ("forward", "forward_backward")
    if quick:
        small = [Case("soft", 60, 32, what, "everything") for what in passes]
        return [*small, Case("soft", 60, 32, "forward", "two_threads"), Case("soft", 60, 32, "memory")]
    found = [Case(scene, COUNT, SIZE, what, "everything") for scene in PROMISED for what in passes]
    if settings.kernel_mode() == "off":
        return [*found, Case("soft", COUNT, SIZE, "memory")]  # the others would take an hour
    found += [Case("published_start", COUNT, SIZE, what) for what in passes]
    found += [Case("soft", count, size, what) for count in COUNTS for size in SIZES for what in passes]
    two = ((COUNT, SIZE), (COUNTS[-1], SIZES[-1]))
    found += [Case("soft", count, size, what, "two_threads") for count, size in two for what in passes]
    return [*found, Case("soft", COUNT, SIZE, "memory")]


def main(arguments: list[str]) -> int:
    columns = {field.name: width for field, width in zip(fields(Case)[:4], (15, 6, 5, 16), strict=True)}
    family = _speed.Family("convex", 7, cases, check, measure, acceptance, columns)
    return _speed.main(family, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
