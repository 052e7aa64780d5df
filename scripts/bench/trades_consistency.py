"""Four points on which TRADES is not consistent and the smooth adversarial comp-sum loss is; exact, in milliseconds.

    python -m scripts.bench.trades_consistency

A linear classifier f(x) = w.x with w = (cos t, sin t), attacked within an l2 ball of radius 0.1. With g = 0.109 and
I = sqrt(1 - g^2) the points are (0, -g) and (I, -g) labelled +1, (0, g) and (-I, g) labelled -1; the first of each pair
has mass (1 - b) / 2, the second b / 2, b = 0.5. Every point can be classified with room for the attack (t = -pi/2 does
it), so the least adversarial risk is 0, and a loss is to be judged by the risk at its minimiser.

Two scores (f / 2, -f / 2) make the losses of the library binary: their difference in favour of the label is y f(x), the
margin. The attack on a linear model is known: it moves x by 0.1 along w or against it. TRADES is taken in the form the
theorem is about, phi(y f(x)) + max phi(lambda f(x) f(x')) with the logistic phi, and as its authors' code has it, with
beta times the divergence of the predictions.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench._timing import write_results
from zoo.losses import comp_sum_loss, smooth_adversarial_comp_sum_loss

OUT = Path(__file__).resolve().parent / "results" / "trades_consistency.json"
RADIUS, G, B = 0.1, 0.109, 0.5
I = math.sqrt(1 - G**2)  # noqa: E741 (the letter of the paper)
POINTS = torch.tensor([[0, -G], [I, -G], [0, G], [-I, G]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])
MASSES = torch.tensor([1 - B, B, 1 - B, B], dtype=torch.float64) / 2
STRENGTHS = (1, 3, 6, 10)  # lambda, beta
RHOS = (0.05, 0.1, G, 0.3, 1.0)
TAUS = (0.0, 1.0, 1.5, 2.0)
CONSISTENT_RHO = 0.1  # up to here the smooth loss must succeed, from 0.3 on it must fail

Rows = list[dict[str, Any]]
Loss = Callable[[Tensor], Tensor]  # angles [T] -> losses [T, 4], worst case over the attack


def values(angles: Tensor, shift: float = 0.0) -> Tensor:
    """f at the points, [T, 4], each moved by shift along w."""
    w = torch.stack([angles.cos(), angles.sin()], 1)
    return (w.unsqueeze(1) * (POINTS + shift * w.unsqueeze(1))).sum(2)


def scores(f: Tensor) -> Tensor:
    """[T, 2, 4]: class 0 for the label +1."""
    return torch.stack([f / 2, -f / 2], 1)


def trades(strength: float) -> Loss:
    """phi(y f(x)) + max over x' of phi(strength f(x) f(x')), phi(m) = log(1 + exp(-m))."""

    def loss(angles: Tensor) -> Tensor:
        f, labels = values(angles), LABELS.expand(len(angles), 4)
        agreement = torch.minimum(f * values(angles, RADIUS), f * values(angles, -RADIUS))
        first = comp_sum_loss(scores(f), labels, tau=1, reduction="none")
        return first + comp_sum_loss(scores(strength * agreement), torch.zeros_like(labels), tau=1, reduction="none")

    return loss


def trades_divergence(strength: float) -> Loss:
    """Cross-entropy + strength times the largest divergence of p(x') from p(x)."""

    def loss(angles: Tensor) -> Tensor:
        clean = scores(values(angles))
        moved = [scores(values(angles, shift)).log_softmax(1) for shift in (-RADIUS, RADIUS)]
        target = clean.log_softmax(1)
        penalty = torch.stack([F.kl_div(q, target, reduction="none", log_target=True).sum(1) for q in moved]).amax(0)
        first = comp_sum_loss(clean, LABELS.expand(len(angles), 4), tau=1, reduction="none")
        return first + strength * penalty

    return loss


def smooth(rho: float, tau: float, aux: str = "exp") -> Loss:
    """Ours; the penalty is the same in both directions of the attack, and for every w of length 1."""

    def loss(angles: Tensor) -> Tensor:
        clean, moved = scores(values(angles)), scores(values(angles, RADIUS))
        labels = LABELS.expand(len(angles), 4)
        return smooth_adversarial_comp_sum_loss(clean, moved, labels, tau=tau, rho=rho, aux=aux, reduction="none")

    return loss


def minimiser(loss: Loss) -> float:
    """The angle in (-pi, pi] of least mean loss: a grid, then finer ones around its best."""
    low, high = -math.pi, math.pi
    while high - low > 1e-9:
        angles = torch.linspace(low, high, 2001, dtype=torch.float64)
        best = angles[(loss(angles) @ MASSES).argmin()].item()
        low, high = best - (high - low) / 1000, best + (high - low) / 1000
    return best


def adversarial_risk(angle: float) -> float:
    """Mass of the points that an attack can turn, exactly."""
    margin = values(torch.tensor([angle], dtype=torch.float64))[0] * torch.tensor([1.0, 1.0, -1.0, -1.0])
    return MASSES[margin <= RADIUS].sum().item()


def row(method: str, loss: Loss, **setting: float) -> dict[str, Any]:
    angle = minimiser(loss)
    least = (loss(torch.tensor([angle], dtype=torch.float64)) @ MASSES).item()
    facts = {"angle": round(angle, 6), "loss": round(least, 6), "adversarial_risk": adversarial_risk(angle)}
    return {"method": method, **setting, **facts}


def measure() -> Rows:
    """Every method and setting."""
    return [
        *(row("trades", trades(strength), strength=strength) for strength in STRENGTHS),
        *(row("trades_divergence", trades_divergence(strength), strength=strength) for strength in STRENGTHS),
        *(row("smooth", smooth(rho, tau), rho=rho, tau=tau) for rho in RHOS for tau in TAUS),
        *(row("smooth_rho_margin", smooth(G, tau, "rho_margin"), rho=G, tau=tau) for tau in TAUS),
    ]


def verdicts(rows: Rows) -> dict[str, bool]:
    """The claims, each over all the rows it speaks of."""

    def risks(holds: Callable[[dict[str, Any]], bool]) -> set[float]:
        found = {r["adversarial_risk"] for r in rows if holds(r)}
        assert found, "a claim speaks of no row"
        return found

    return {
        "trades_fails": risks(lambda r: r["method"] == "trades") == {0.5},
        "trades_with_divergence_fails": risks(lambda r: r["method"] == "trades_divergence") == {0.5},
        "smooth_succeeds_up_to_rho_0.1": risks(lambda r: r["method"] == "smooth" and r["rho"] <= CONSISTENT_RHO) == {0},
        "smooth_fails_from_rho_0.3_on": risks(lambda r: r["method"] == "smooth" and r["rho"] >= 0.3) == {0.5},
        "smooth_with_rho_margin_succeeds": risks(lambda r: r["method"] == "smooth_rho_margin") == {0},
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args(arguments).out
    rows = measure()
    claims = verdicts(rows)
    write_results(out, rows, device="cpu", settings={"radius": RADIUS, "g": G, "b": B}, verdicts=claims)
    for r in rows:
        setting = ", ".join(f"{name} {r[name]:g}" for name in ("strength", "rho", "tau") if name in r)
        print(f"{r['method']:>18} {setting:<20} t = {r['angle']:+.4f}, adversarial risk {r['adversarial_risk']:g}")
    print("\n".join(f"{name}: {'holds' if value else 'does not hold'}" for name, value in claims.items()))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
