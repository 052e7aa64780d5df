"""Public names may not vanish unnoticed: the golden list is `api_surface.json`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

GOLDEN = json.loads(Path(__file__).with_name("api_surface.json").read_text())


@pytest.mark.parametrize("module", GOLDEN)
def test_public_names_are_the_golden_ones(module: str) -> None:
    """After a change on purpose: edit api_surface.json and add a CHANGELOG line."""
    assert sorted(importlib.import_module(module).__all__) == GOLDEN[module]


def test_every_public_name_resolves() -> None:
    for name, names in GOLDEN.items():
        module = importlib.import_module(name)
        for public in names:
            assert getattr(module, public) is not None
        assert set(names) <= set(dir(module))
