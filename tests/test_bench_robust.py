"""The evidence scripts of the comp-sum losses: what is run, what is chosen, what follows; and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import _training, adversarial, adversarial_step, comp_sum_noise
from zoo.attacks import APGDAttack, PGDAttack

# Noise


def noise_rows(**changed: float) -> list[dict[str, Any]]:
    accuracy = {
        0.0: {0.0: 0.98, 0.5: 0.98, 1.0: 0.98, 1.5: 0.97, 1.7: 0.97, 2.0: 0.88},
        0.4: {0.0: 0.85, 0.5: 0.77, 1.0: 0.87, 1.5: 0.95, 1.7: 0.94, 2.0: 0.80},
        0.6: {0.0: 0.69, 0.5: 0.54, 1.0: 0.70, 1.5: 0.89, 1.7: 0.91, 2.0: 0.64},
    }
    return [
        {
            "noise": noise,
            "tau": tau,
            "seed": seed,
            "val_acc": changed.get(f"{noise:g}/{tau:g}", value) + 0.01 * (seed - 1),
        }
        for seed in range(3)
        for noise, of_tau in accuracy.items()
        for tau, value in of_tau.items()
    ]


def test_claims_about_noise_follow_from_means() -> None:
    claims = comp_sum_noise.verdicts(noise_rows(), [0, 1, 2])
    assert list(claims.values()) == [True] * 4
    for i, cell in enumerate([{"0.6/1.7": 0.79}, {"0/1.5": 0.96}, {"0/2": 0.95}, {"0.4/1": 0.96}]):
        assert list(comp_sum_noise.verdicts(noise_rows(**cell), [0, 1, 2]).values()) == [j != i for j in range(4)]
    assert set(comp_sum_noise.verdicts(noise_rows(), [0, 1, 2, 3]).values()) == {None}


def test_runs_of_the_noise_script_differ_in_what_they_should() -> None:
    first, other = (comp_sum_noise.Run(0.6, tau, 2).arguments() for tau in (1.0, 1.7))
    assert [pair for pair in zip(first, other, strict=True) if pair[0] != pair[1]] == [
        ("--model.loss.tau=1.0", "--model.loss.tau=1.7")
    ]
    assert {"--data.label_noise=0.6", "--data.noise_seed=2", "--data.seed=2"} <= set(first)


@pytest.mark.slow
def test_noise_script_trains_records_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn", reason="needs the digits extra")
    asked = ["--quick", "--noises", "0.6", "--taus", "1.7", "--seeds", "0", "--out", str(tmp_path / "noise.json")]
    assert comp_sum_noise.main(asked) == 0
    record = json.loads((tmp_path / "noise.json").read_text())
    (row,) = record["results"]
    assert (row["noise"], row["tau"], row["seed"], row["steps"]) == (0.6, 1.7, 0, 10)
    assert 0 < row["val_acc"] < 1
    assert set(record["verdicts"].values()) == {None}
    capsys.readouterr()
    assert comp_sum_noise.main([*asked, "--resume"]) == 0
    assert capsys.readouterr().out.startswith("1 run(s) kept, 0 to go")


# A step


def test_step_script_measures_and_records(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "step.json"
    try:
        assert adversarial_step.main(["--quick", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    (row,) = record["results"]
    assert set(row["rivals"]) == set(adversarial_step.losses(1))
    assert [promise["met"] for promise in record["acceptance"]] == [None, None]  # not at this size


def test_step_script_times_nothing_when_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial_step, "BETA", 5.99)
    wrong = adversarial_step.losses(3)["our_trades"]
    monkeypatch.undo()
    right = adversarial_step.losses
    monkeypatch.setattr(adversarial_step, "losses", lambda steps: {**right(steps), "our_trades": wrong})
    out = tmp_path / "step.json"
    threads = torch.get_num_threads()
    try:
        assert adversarial_step.main(["--quick", "--out", str(out)]) == 1
    finally:
        torch.set_num_threads(threads)
    assert not out.exists()


def test_promises_of_a_step_follow_from_the_rows() -> None:
    def row(published: float, plain: float) -> list[dict[str, Any]]:
        rivals = {"published_trades": {"ratio_to_ours": published}, "no_attack": {"ratio_to_ours": plain}}
        return [{"steps": 10, "rivals": rivals}]

    assert [p["met"] for p in adversarial_step.acceptance(row(1.25, 1 / 11))] == [True, True]
    assert [p["met"] for p in adversarial_step.acceptance(row(1.2, 1 / 12))] == [False, False]


def test_committed_step_meets_the_acceptance() -> None:
    record = json.loads((adversarial_step.RESULTS / "adversarial_step.json").read_text())
    promises = adversarial_step.acceptance(record["results"])
    assert promises == record["acceptance"]
    assert all(promise["met"] for promise in promises)


# Attacks

# method, strength: clean, PGD-40 on the pictures held out
HELD_OUT = {
    ("trades", 1.0): (0.50, 0.10),
    ("trades", 3.0): (0.47, 0.14),
    ("trades", 6.0): (0.43, 0.16),
    ("trades", 12.0): (0.40, 0.17),
    ("trades", 20.0): (0.38, 0.17),
    ("advcompsum", 0.05): (0.44, 0.165),
    ("advcompsum", 0.1): (0.42, 0.18),
    ("advcompsum", 0.2): (0.40, 0.19),
    ("advcompsum", 0.3): (0.37, 0.20),
    ("advcompsum", 0.6): (0.33, 0.19),
    ("advcompsum", 1.0): (0.31, 0.18),
    ("pgd_at", 0.0): (0.37, 0.185),
}


def held_out(**changed: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"stage": "choice", "method": method, "strength": strength, "seed": 100, "clean": clean, "pgd": pgd}
        for (method, strength), figures in HELD_OUT.items()
        for clean, pgd in [changed.get(f"{method}_{strength:g}", figures)]
    ]


def test_the_choice_is_by_the_rule() -> None:
    assert adversarial.chosen(held_out()) == {
        "pgd_at": 0.0,
        "trades_robust": 12.0,  # of equals the smaller
        "trades_clean": 12.0,  # none within a point of PGD-AT
        "advcompsum_robust": 0.3,
        "advcompsum_clean": 0.1,  # 0.05 is cleaner, but too weak
    }
    nearer = adversarial.chosen(held_out(trades_3=(0.47, 0.175), pgd_at_0=(0.37, 0.175)))
    assert nearer is not None
    assert (nearer["trades_robust"], nearer["trades_clean"], nearer["advcompsum_clean"]) == (3.0, 3.0, 0.05)
    assert adversarial.chosen(held_out()[:-1]) is None


def compared(**figures: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Rows of three seeds about (clean, PGD-40, worst case)."""
    settings = {"pgd_at": 0.0, "trades_robust": 12.0, "advcompsum_robust": 0.3, "advcompsum_clean": 0.1}
    given = {
        "pgd_at": (0.37, 0.185, 0.17),
        "trades_robust": (0.40, 0.17, 0.155),
        "advcompsum_robust": (0.37, 0.195, 0.18),
        "advcompsum_clean": (0.42, 0.185, 0.165),
        **figures,
    }
    return [
        {
            "stage": "comparison",
            "method": adversarial.method_of(name),
            "strength": settings[name],
            "seed": seed,
            **{
                k: v + 0.01 * (seed - 1)
                for k, v in {"clean": clean, "pgd": pgd, "apgd-ce": pgd, "worst_case": worst}.items()
            },
        }
        for seed in range(3)
        for name, (clean, pgd, worst) in given.items()
    ]


def test_claims_about_attacks_follow_from_means() -> None:
    rows = held_out() + compared()
    table = adversarial.figures(rows, adversarial.chosen(rows), [0, 1, 2])
    assert set(table) == {"pgd_at", "trades_robust", "trades_clean", "advcompsum_robust", "advcompsum_clean"}
    assert table["pgd_at"]["clean"] == pytest.approx(0.37)
    assert table["pgd_at"]["worst_case_sd"] == pytest.approx(0.01)
    assert table["trades_clean"] == table["trades_robust"]
    claims = adversarial.verdicts(table)
    assert len(claims) == 10
    assert list(claims.values()) == [True] * 10
    # a worst case that loses what PGD-40 shows is seen
    hidden = held_out() + compared(advcompsum_clean=(0.42, 0.185, 0.10), advcompsum_robust=(0.37, 0.195, 0.12))
    claims = adversarial.verdicts(adversarial.figures(hidden, adversarial.chosen(hidden), [0, 1, 2]))
    assert [claim.endswith("_pgd") for claim in claims] == list(claims.values())
    not_cleaner = held_out() + compared(advcompsum_clean=(0.385, 0.185, 0.165))
    claims = adversarial.verdicts(adversarial.figures(not_cleaner, adversarial.chosen(not_cleaner), [0, 1, 2]))
    assert list(claims.values()) == [False, True, True, True, False] * 2


def test_a_missing_run_leaves_its_claims_open() -> None:
    rows = held_out() + [row for row in compared() if (row["method"], row["seed"]) != ("pgd_at", 2)]
    table = adversarial.figures(rows, adversarial.chosen(rows), [0, 1, 2])
    claims = adversarial.verdicts(table)
    assert "pgd_at" not in table
    assert [claim for claim, value in claims.items() if value is None] == [
        claim for claim in claims if "pgd_at" in claim
    ]
    assert set(adversarial.verdicts({}).values()) == {None}


def test_committed_comparison_is_whole_and_its_verdicts_follow() -> None:
    """Not that every claim holds: the page says which do."""
    record = json.loads((adversarial.RESULTS / "adversarial.json").read_text())
    rows, seeds = record["results"], record["settings"]["seeds"]
    assert len(seeds) >= 3
    assert adversarial.chosen(rows) == record["chosen"]
    table = adversarial.figures(rows, record["chosen"], seeds)
    assert set(table) == set(record["chosen"])
    assert adversarial.verdicts(table) == record["verdicts"]
    assert None not in record["verdicts"].values()


def test_the_choice_never_sees_what_the_comparison_reports() -> None:
    with pytest.raises(SystemExit):
        adversarial.main(["--seeds", "0", str(adversarial.SELECTION_SEED)])
    assert list(adversarial.attacks("choice", False)) == ["pgd"]
    under = adversarial.attacks("comparison", False)
    assert list(under) == ["pgd", "apgd-ce", "apgd-t"]
    pgd = under["pgd"]
    assert isinstance(pgd, PGDAttack)
    assert (pgd.steps, pgd.restarts, pgd.step_rule, pgd.step_ratio, pgd.objective) == (40, 2, "sign", 1 / 8, "margin")
    assert {attack.eps for attack in under.values()} == {8 / 255}
    assert isinstance(under["apgd-t"], APGDAttack)
    assert under["apgd-t"].loss == "dlr_targeted"


def test_runs_of_one_seed_differ_in_method_and_strength() -> None:
    three, six = (adversarial.Run("choice", "trades", beta, 100).arguments() for beta in (3.0, 6.0))
    assert [pair for pair in zip(three, six, strict=True) if pair[0] != pair[1]] == [
        ("--model.loss.beta=3.0", "--model.loss.beta=6.0")
    ]
    ours = adversarial.Run("comparison", "advcompsum", 0.3, 1).arguments()
    assert {"--model.loss.nu=0.3", "--data.seed=1", "robust/cifar16_advcompsum"} <= set(ours)
    assert not any(word.startswith("--model") for word in adversarial.Run("choice", "pgd_at", 0.0, 0).arguments())


def test_a_row_is_kept_until_what_decides_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = adversarial.Run("comparison", "pgd_at", 0.0, 0)
    recipe = run.facts()["recipe"]
    assert recipe == run.facts()["recipe"] == json.loads(json.dumps(recipe))
    assert adversarial.Run("comparison", "pgd_at", 0.0, 0, quick=True).facts()["recipe"] != recipe
    monkeypatch.setattr(adversarial, "EPS", 4 / 255)
    assert run.facts()["recipe"] != recipe


def test_averaged_weights_are_what_is_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint of a run, on the pictures of the stage."""
    loaded, asked = [], []
    data = type("Data", (), {"val_dataloader": lambda _: "held out", "test_dataloader": lambda _: "test"})()
    monkeypatch.setattr(adversarial, "_data", lambda: data)
    monkeypatch.setattr(_training, "outcome", lambda folder: {"steps": 390})
    monkeypatch.setattr(
        adversarial.AdversarialClassifier, "load_from_checkpoint", lambda path, **_: loaded.append(path) or "module"
    )
    monkeypatch.setattr(
        adversarial,
        "evaluate_robustness",
        lambda module, loader, under, n: asked.append((loader, list(under), n)) or {"clean": 1},
    )
    before = torch.get_rng_state()
    for stage in ("choice", "comparison"):
        assert adversarial.Run(stage, "pgd_at", 0.0, 0)._outcome(tmp_path) == {"steps": 390, "clean": 1}
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded == [tmp_path / "checkpoints" / "last.ckpt"] * 2
    assert asked == [("held out", ["pgd"], 1000), ("test", ["pgd", "apgd-ce", "apgd-t"], 1000)]
