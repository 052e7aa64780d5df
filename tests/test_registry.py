"""Catalog, factory, registration, plug-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import zoo
from zoo import registry
from zoo.catalog import (
    COMPONENTS,
    PAPERS,
    ActivationName,
    ExplainerName,
    LayerName,
    LossName,
    MetricName,
    NormName,
    RendererName,
)

rows = pytest.mark.parametrize("row", COMPONENTS, ids=lambda row: f"{row.kind}-{row.name}")


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@rows
def test_row_resolves_to_a_documented_exported_class(row: zoo.catalog.Component) -> None:
    cls = zoo.get(row.kind, row.name)
    assert issubclass(cls, nn.Module) or row.kind == "explainer"  # which holds a model, but is none
    assert cls.__doc__
    assert getattr(zoo, cls.__name__) is cls
    assert row.paper in PAPERS or (row.paper is None and row.kind == "metric")
    assert row.dist == "paperzoo"


def test_names_in_signatures_are_the_rows() -> None:
    assert set(get_args(ActivationName)) == set(zoo.list("activation"))
    assert set(get_args(ExplainerName)) == set(zoo.list("explainer"))
    assert set(get_args(LayerName)) == set(zoo.list("layer"))
    assert set(get_args(LossName)) == set(zoo.list("loss"))
    assert set(get_args(MetricName)) == set(zoo.list("metric"))
    assert set(get_args(NormName)) == set(zoo.list("norm"))
    assert set(get_args(RendererName)) == set(zoo.list("renderer"))


def test_list_filters() -> None:
    assert zoo.list("activation", "poly*u") == ["polyprelu", "polyrelu"]
    assert zoo.list(paper="polycom", tag="language") == zoo.list(paper="polycom")
    assert zoo.list(tag="no such tag") == []


def test_create_passes_arguments() -> None:
    module = zoo.create("activation", "polynorm", 2, eps=1e-3, dtype=torch.float64)
    assert (module.order, module.eps, module.weight.dtype) == (2, 1e-3, torch.float64)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("polyrelu", "PolyReLU(order=3)"),
        ({"name": "polyrelu", "order": 2}, "PolyReLU(order=2)"),
        ("torch.nn.ReLU", "ReLU()"),
        ({"class_path": "torch.nn.ELU", "init_args": {"alpha": 0.5}}, "ELU(alpha=0.5)"),
        ({"class_path": "torch.nn.ELU"}, "ELU(alpha=1.0)"),
        (nn.GELU, "GELU(approximate='none')"),
    ],
)
def test_factory_reads_what_a_config_says(spec: object, expected: str) -> None:
    assert repr(zoo.factory("activation", spec)()) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (
            "activation",
            "polyrel",
            r"no activation is called 'polyrel'\. Did you mean 'polyrelu' or .*Available: polycom, ",
        ),
        ("norm", "polyrelu", r"^'polyrelu' is an activation, not a norm\."),
        ("activaton", "polyrelu", r"no kind of component is called 'activaton'\. Did you mean 'activation'\? Kinds: "),
        ("activation", "torch.nn.ReLUU", r"torch\.nn has no 'ReLUU'\. Did you mean 'ReLU'\?"),
        ("activation", "no_such_module.X", r"no activation at 'no_such_module\.X': No module named"),
    ],
)
def test_unknown_names_get_the_nearest_one(kind: str, spec: str, message: str) -> None:
    with pytest.raises(zoo.UnknownComponentError, match=message):
        zoo.factory(kind, spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "polyrelu", "ordr": 2},
            r"activation 'polyrelu' has no argument 'ordr'\. Did you mean 'order'\? It takes",
        ),
        ({"order": 2}, r"needs a 'name' key, got \{'order': 2\}"),
        ({"class_path": "torch.nn.ELU", "alpha": 1}, r"takes only init_args beside it, got 'alpha'"),
        (3, r"is a name, a mapping or a callable, got 3"),
    ],
)
def test_wrong_arguments_are_told_before_building(spec: object, message: str) -> None:
    with pytest.raises(zoo.ComponentArgumentError, match=message):
        zoo.factory("activation", spec)  # type: ignore[arg-type]


def test_create_tells_a_missing_argument() -> None:
    with pytest.raises(zoo.ComponentArgumentError, match=r"layer 'poly_ffn': missing a required argument: 'dim'"):
        zoo.create("layer", "poly_ffn")


@pytest.mark.usefixtures("scratch_registry")
def test_register_adds_a_users_class() -> None:
    @zoo.register("activation", "halved", tags=frozenset({"test"}))
    class Halved(nn.Module):
        """Half of the input."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    assert zoo.get("activation", "halved") is Halved
    assert zoo.info("activation", "halved").summary == "Half of the input."
    assert zoo.list(tag="test") == ["halved"]
    with pytest.raises(
        ValueError, match=r"activation 'halved' is already provided by .*Halved \(tests\).*replace=True"
    ):
        zoo.register("activation", "halved")(Halved)
    zoo.register("activation", "halved", replace=True)(nn.Identity)
    assert zoo.get("activation", "halved") is nn.Identity


def test_plugins_add_rows_and_broken_ones_harm_nobody(tmp_path: Path) -> None:
    """Two fake distributions on the path: one announces a row, one raises when it is loaded."""
    for name, body in {
        "acme": (
            "from zoo.catalog import Component\nROWS = [Component('acme_act', 'activation', 'torch.nn:Tanh', 'tanh')]\n"
        ),
        "bad": "raise RuntimeError('broken on purpose')\nROWS = []\n",
    }.items():
        (tmp_path / f"{name}_plugin.py").write_text(body)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[zoo.components]\n{name} = {name}_plugin:ROWS\n")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import zoo
assert "acme_act" in zoo.list("activation")
assert type(zoo.create("activation", "acme_act")).__name__ == "Tanh"
try: zoo.info("activation", "nothing_like_it")
except zoo.UnknownComponentError as error: print(error)
from zoo.cli import main
print(main(["doctor"]))
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env={**_environment(), "ZOO_PLUGINS": "1"})
    assert "1 plug-in(s) failed to load; run `zoo doctor`." in done.stdout
    assert "BROKEN: plug-in bad_plugin:ROWS failed to load: RuntimeError('broken on purpose')" in done.stdout
    assert done.stdout.splitlines()[-1] == "1"
    off = subprocess.run(run, capture_output=True, text=True, check=False, env={**_environment(), "ZOO_PLUGINS": "0"})
    assert "AssertionError" in off.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
