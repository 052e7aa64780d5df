"""The benchmark of class activation maps runs, and its promises follow from its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import explain
from zoo.explain import GradCAMpp


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def peers() -> None:
    pytest.importorskip("torchcam")
    pytest.importorskip("pytorch_grad_cam")


@pytest.mark.slow
@pytest.mark.usefixtures("threads", "peers")
def test_script_measures_and_records(tmp_path: Path) -> None:
    out = tmp_path / "explain.json"
    assert explain.main(["--quick", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    memory, *rows = record["results"]
    assert set(memory["peak_mb"]) == {"ours", "torchcam"}
    assert [row["method"] for row in rows] == list(explain.METHODS)
    for row in rows:
        assert row["rivals"]["ours"]["ratio_to_ours"] == 1
        assert row["rivals"][explain.YARDSTICKS[row["method"]][0]]["yardstick_over_it"] == 1
    assert {promise["met"] for promise in record["acceptance"]} == {None}  # not at this size


@pytest.mark.usefixtures("threads", "peers")
def test_script_times_nothing_when_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "GradCAMpp", lambda *model, eps, **options: GradCAMpp(*model, **options))
    out = tmp_path / "explain.json"
    assert explain.main(["--quick", "--out", str(out)]) == 1
    assert not out.exists()


def figures(share: float, ours: float) -> list[dict[str, Any]]:
    """Rows in which every promise is exceeded by that factor, and memory in MB."""
    rows: list[dict[str, Any]] = [
        {
            **case.facts(),
            "rivals": {name: {"yardstick_over_it": share * least} for name, least in case.promised.items()},
        }
        for case in explain.CASES
    ]
    return [*rows, {**explain.LARGE.facts(), "peak_mb": {"ours": ours, "torchcam": 1000.0}}]


def test_promises_follow_from_the_rows() -> None:
    assert all(promise["met"] for promise in explain.acceptance(figures(1.0, 250.0)))
    missed = explain.acceptance(figures(0.99, 251.0))
    assert [promise["met"] for promise in missed] == [False] * 14
    assert [promise["met"] for promise in explain.acceptance([])] == [None] * 14
    assert len({promise["claim"] for promise in missed}) == 14


def test_committed_figures_meet_the_acceptance() -> None:
    record = json.loads((explain.RESULTS / "explain_cpu.json").read_text())
    promises = explain.acceptance(record["results"])
    assert promises == record["acceptance"]
    assert all(promise["met"] for promise in promises)
