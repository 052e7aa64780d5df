"""Heat is where the objects are, under a network that was trained; and the committed figures of the evidence."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.bench import explain_quality
from zoo.explain import CAMError
from zoo.explain.demo import PHOTOS, demo_network, demo_photo

RESULTS = explain_quality.RESULTS / "explain_quality.json"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    try:
        demo_photo("coffee")
        return demo_network()
    except CAMError as error:
        pytest.skip(str(error))


def test_the_demo_network_knows_the_photos(network: torch.nn.Module) -> None:
    x = torch.stack([explain_quality.normalise(demo_photo(name)) for name in PHOTOS])
    with torch.no_grad():
        assert network(x).argmax(1).tolist() == list(PHOTOS.values())


def test_unknown_photos() -> None:
    with pytest.raises(CAMError, match="no demo photo is called 'dog'; there are coffee, chelsea"):
        demo_photo("dog")


def test_heat_in_mosaics(network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"smooth_grad_cam_pp", "grad_cam_pp"}
    every = explain_quality.methods
    monkeypatch.setattr(
        explain_quality, "methods", lambda *args: {k: heat for k, heat in every(*args).items() if k in ours}
    )
    four = explain_quality.different(network, 1)
    assert four["smooth_grad_cam_pp"]["in_cell"] >= 0.74
    assert four["smooth_grad_cam_pp"]["in_cell"] >= four["grad_cam_pp"]["in_cell"]
    assert four["smooth_grad_cam_pp"]["hottest_in_cell"] == 1
    pair = explain_quality.twice(network, 1)["smooth_grad_cam_pp"]
    assert pair["in_cells"] >= 0.85
    assert pair["balance"] >= 0.7


def test_committed_figures_and_what_follows_from_them() -> None:
    """Not that everything expected holds: the page says what does."""
    record = json.loads(RESULTS.read_text())
    assert not record["settings"]["quick"]
    promises = explain_quality.acceptance(record["results"])
    assert promises == record["acceptance"]
    assert [p["met"] for p in promises].count(None) == 0
    ours, theirs, plain = (record["results"]["mosaics"][k] for k in ("smooth_grad_cam_pp", "torchcam", "grad_cam_pp"))
    assert ours["in_cell"] >= theirs["in_cell"] + 0.1
    assert ours["in_cell"] >= plain["in_cell"]


def test_expectations_follow_from_the_figures() -> None:
    good = {"in_cell": 0.8, "hottest_in_cell": 1.0}
    results = {
        "mosaics": {"smooth_grad_cam_pp": good, "grad_cam_pp": {"in_cell": 0.7}, "torchcam": {"in_cell": 0.6}},
        "same_class_twice": {"smooth_grad_cam_pp": {"in_cells": 0.9, "balance": 0.95}},
        "shapes_two_and_another": {"smooth_grad_cam_pp": {"in_boxes": 0.5}},
        "shapes_three": {"smooth_grad_cam_pp": {"all_found": 0.95}},
        "photos": {"correlation_of_8_and_64_copies": 0.995},
    }
    assert all(p["met"] for p in explain_quality.acceptance(results))
    del results["mosaics"]["torchcam"]
    results["mosaics"]["grad_cam_pp"]["in_cell"] = 0.9
    assert [p["met"] for p in explain_quality.acceptance(results)][:4] == [True, True, False, None]
