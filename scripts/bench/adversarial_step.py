"""A step of adversarial training against the loop that TRADES was published with, and against a step without attack.

    python -m scripts.bench.adversarial_step             # a small residual network on the CPU, one thread; minutes
    python -m scripts.bench.adversarial_step --quick     # seconds: does the script work?

from the repository root. A step is forward, attack, backward and optimizer. In units of a forward pass F, with 2F for a
backward pass and F for one to the pictures alone, K steps of the attack cost the published loop 3K + 9 (it scores the
clean pictures again in each, and three times at the end), ours 2K + 6, and a step without attack is 3. Nothing is timed
before TradesLoss has the published loop's gradients in float64, from the same starting points (exit status 1 if not).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.bench._speed import RESULTS
from scripts.bench._timing import Run, interleave, summarise, write_results
from tests._numerics import assert_close
from zoo.attacks import PGDAttack
from zoo.losses.adversarial import AdvCompSumLoss, PGDATLoss, TradesLoss
from zoo.tasks.classify import SmallResNet

EPS, STEP, NOISE, BETA = 8 / 255, 2 / 255, 0.001, 6.0
STEPS = (10, 3, 1)
# Of the first entry of STEPS: our time over the published loop's, and over that of a step without attack.
PUBLISHED, STANDARD = 0.80, 11.0

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def published(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The loss of TRADES as its authors' code computes it, pass for pass."""
    divergence = nn.KLDivLoss(reduction="sum")
    model.eval()
    x_adv = x.detach() + NOISE * torch.randn(x.shape, dtype=x.dtype)
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            loss = divergence(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1))
        (slope,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + STEP * slope.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    natural = F.cross_entropy(model(x), y)
    robust = divergence(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1)) / len(x)
    return natural + BETA * robust


def losses(steps: int) -> dict[str, Step]:
    """Everything that is timed, ours first."""
    attack = {"steps": steps, "step_size": STEP}
    ours, at = AdvCompSumLoss(PGDAttack.adv_comp_sum(**attack)), PGDATLoss(PGDAttack.madry(steps=steps))
    trades = TradesLoss(PGDAttack.trades(**attack), beta=BETA)
    return {
        "ours": lambda model, x, y: ours(model, x, y).loss,
        "published_trades": lambda model, x, y: published(model, x, y, steps),
        "our_trades": lambda model, x, y: trades(model, x, y).loss,
        "our_pgd_at": lambda model, x, y: at(model, x, y).loss,
        "no_attack": lambda model, x, y: F.cross_entropy(model(x), y),
    }


def _model(width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return SmallResNet(10, width, 1, nn.ReLU, nn.BatchNorm2d).to(dtype)


def _batch(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pictures away from 0 and 1: the published loop does not cut its starting points off there, ours does."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 + 0.8 * torch.rand(size, 3, 16, 16, generator=generator, dtype=dtype)
    return x, torch.arange(size) % 10


def check() -> None:
    """Raise AssertionError unless TradesLoss has loss and gradients of the published loop."""
    found = {}
    x, y = _batch(8, torch.float64)
    for name in ("published_trades", "our_trades"):
        model = _model(4, torch.float64)
        torch.manual_seed(1)
        loss = losses(3)[name](model, x, y)
        found[name] = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    for got, wanted in zip(found["our_trades"], found["published_trades"], strict=True):
        assert_close(got, wanted, loose=100)


def measure(steps: int, width: int, batch: int, rounds: int) -> dict[str, Any]:
    """Times of a step of every method, each on a model and with an optimizer of its own."""
    x, y = _batch(batch)

    def step(loss: Step) -> Run:
        model = _model(width).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()

        return run

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    runs = {name: step(loss) for name, loss in losses(steps).items()}
    return {
        "steps": steps,
        "width": width,
        "batch": batch,
        "rivals": summarise(interleave(runs, rounds=rounds, clock=clock), "ours"),
    }


def acceptance(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The promises for K = 10; None where this run did not measure one."""
    rows = next((row["rivals"] for row in results if row["steps"] == STEPS[0]), None)
    promises = []
    for rival, what, most in (
        ("published_trades", "the published loop of TRADES", PUBLISHED),
        ("no_attack", "a step without attack", STANDARD),
    ):
        measured = None if rows is None else round(1 / rows[rival]["ratio_to_ours"], 3)
        claim = f"a step with {STEPS[0]} attack steps: at most {most:g} of the time of {what}"
        promises.append({"claim": claim, "measured": measured, "met": None if measured is None else measured <= most})
    return promises


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help="figures per rival, at least 2 (15; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a tiny network, four pictures, one attack step")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (results/adversarial_step.json)")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"adversarial_step{'_quick' if args.quick else ''}.json"
    torch.set_num_threads(1)
    try:
        check()
    except AssertionError as error:
        print(f"nothing timed, ours is wrong: {error}", file=sys.stderr)
        return 1
    results = []
    for steps in (1,) if args.quick else STEPS:
        width, batch = (4, 4) if args.quick else (16, 64)
        results.append(measure(steps, width, batch, args.rounds or (2 if args.quick else 15)))
        for name, row in results[-1]["rivals"].items():
            print(f"K = {steps:2}  {name:18}", *(f"{key} {value:<9}" for key, value in row.items()), flush=True)
    promises = acceptance(results)
    what = "a step of training, CPU time of one thread"
    write_results(out, results, device="cpu", what=what, acceptance=promises)
    for promise in promises:
        said = {True: "met", False: "MISSED", None: "not measured"}[promise["met"]]
        print(f"{said}: {promise['claim']} (measured {promise['measured']})")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
