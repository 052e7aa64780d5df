"""The four points of scripts/bench/trades_consistency.py: what is claimed of them, and that the losses decide it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import trades_consistency as recipe
from zoo.losses import comp_sum_loss

F64 = torch.float64
ANGLES = torch.linspace(-3, 3, 13, dtype=F64)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return recipe.measure()


def of(rows: list[dict[str, Any]], method: str, **setting: float) -> list[dict[str, Any]]:
    found = [r for r in rows if r["method"] == method and all(r[name] == value for name, value in setting.items())]
    assert found
    return found


def test_trades_errs_on_half_of_the_mass(rows: list[dict[str, Any]]) -> None:
    margin_form = of(rows, "trades")
    assert [r["strength"] for r in margin_form] == [1, 3, 6, 10]
    assert all(-0.22 < r["angle"] < -0.165 for r in margin_form)
    assert {r["adversarial_risk"] for r in margin_form + of(rows, "trades_divergence")} == {0.5}


@pytest.mark.parametrize("tau", [0, 1, 1.5, 2])
def test_smooth_loss_errs_nowhere_where_rho_is_small(rows: list[dict[str, Any]], tau: float) -> None:
    (at,), (below,) = of(rows, "smooth", rho=0.1, tau=tau), of(rows, "smooth", rho=0.05, tau=tau)
    assert -1.24 < at["angle"] < -1.19
    assert -1.38 < below["angle"] < -1.36
    assert at["adversarial_risk"] == below["adversarial_risk"] == 0


@pytest.mark.parametrize("tau", [0, 1, 1.5, 2])
@pytest.mark.parametrize("rho", [0.3, 1])
def test_smooth_loss_errs_on_half_where_rho_is_large(rows: list[dict[str, Any]], rho: float, tau: float) -> None:
    (row,) = of(rows, "smooth", rho=rho, tau=tau)
    assert row["adversarial_risk"] == 0.5


def test_rho_margin_finds_the_angle_that_suits_all_points(rows: list[dict[str, Any]]) -> None:
    for row in of(rows, "smooth_rho_margin"):
        assert row["angle"] == pytest.approx(-math.pi / 2, abs=1e-6)
        assert row["adversarial_risk"] == 0
        assert row["loss"] == pytest.approx(recipe.RADIUS, abs=1e-6)  # nothing but the penalty


def test_edge_of_the_range_of_rho_is_near_g(rows: list[dict[str, Any]]) -> None:
    """At rho = g the smooth loss still succeeds, but for tau = 2."""
    risks = {row["tau"]: row["adversarial_risk"] for row in of(rows, "smooth", rho=recipe.G)}
    assert risks == {0: 0, 1: 0, 1.5: 0, 2: 0.5}


def test_two_scores_have_the_margin_for_their_difference() -> None:
    f = recipe.values(ANGLES)
    labels = recipe.LABELS.expand(len(ANGLES), 4)
    margins = f * torch.tensor([1.0, 1.0, -1.0, -1.0])
    first, second = -recipe.G * ANGLES.sin(), recipe.I * ANGLES.cos() - recipe.G * ANGLES.sin()
    torch.testing.assert_close(margins, torch.stack([first, second, first, second], 1))
    loss = comp_sum_loss(recipe.scores(f), labels, tau=0, reduction="none")
    torch.testing.assert_close(loss, (-margins).exp())


def test_penalty_is_the_radius_for_every_angle_and_attack() -> None:
    labels = recipe.LABELS.expand(len(ANGLES), 4)
    data = comp_sum_loss(recipe.scores(recipe.values(ANGLES)), labels, tau=1, rho=0.1, reduction="none")
    penalty = recipe.smooth(0.1, 1)(ANGLES) - data
    torch.testing.assert_close(penalty, torch.full_like(penalty, recipe.RADIUS))


def test_attacks_are_the_worst_in_the_ball() -> None:
    """No other point of the sphere gives a greater loss, and the risk counts just the margins an attack can close."""
    around = torch.linspace(0, 2 * math.pi, 721, dtype=F64)
    directions = recipe.RADIUS * torch.stack([around.cos(), around.sin()], 1)
    for angle in ANGLES.tolist():
        w = torch.tensor([math.cos(angle), math.sin(angle)], dtype=F64)
        f = recipe.values(torch.tensor([angle], dtype=F64))[0]
        attacked = ((recipe.POINTS + directions.unsqueeze(1)) * w).sum(2)  # [720, 4]
        worst = torch.log1p((-3 * f * attacked).exp()).amax(0)
        margins = f * torch.tensor([1.0, 1.0, -1.0, -1.0])
        first = torch.log1p((-margins).exp())
        torch.testing.assert_close(
            recipe.trades(3)(torch.tensor([angle], dtype=F64))[0], first + worst, rtol=0, atol=1e-5
        )
        turned = (attacked * torch.tensor([1.0, 1.0, -1.0, -1.0])).amin(0) <= 1e-6
        assert recipe.adversarial_risk(angle) == recipe.MASSES[turned].sum()


def test_script_records_rows_and_verdicts(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    out = tmp_path / "trades_consistency.json"
    assert recipe.main(["--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["results"] == rows
    assert set(record["verdicts"].values()) == {True}
    assert record["environment"]["packages"]["torch"]


def test_one_row_is_enough_to_refute_a_claim(rows: list[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        changed = [*rows[:index], {**row, "adversarial_risk": 0.25}, *rows[index + 1 :]]
        claimed = row["method"] != "smooth" or row["rho"] != recipe.G  # between success and failure nothing is claimed
        assert sum(not value for value in recipe.verdicts(changed).values()) == claimed


def test_committed_results_are_those_of_the_code(rows: list[dict[str, Any]]) -> None:
    committed = json.loads(recipe.OUT.read_text())["results"]
    assert [{**r, "angle": None, "loss": None} for r in committed] == [{**r, "angle": None, "loss": None} for r in rows]
    for theirs, mine in zip(committed, rows, strict=True):
        assert theirs["angle"] == pytest.approx(mine["angle"], abs=1e-5)
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-5)
