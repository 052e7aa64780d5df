"""Code blocks of the pages run, their links lead somewhere, and the picture's script draws it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from zoo import registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))  # a page may register a component
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    names: dict = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_gallery_draws_the_picture(tmp_path: Path) -> None:
    runpy.run_path(str(DOCS / "gallery/polycom_curves.py"))["draw"](tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000
