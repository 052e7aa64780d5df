"""Importing the package costs nothing until a component is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "torchvision", "timm", "lightning", "torchmetrics", "gsplat", "matplotlib", "torch._dynamo")

REPORT = """
import json, resource, sys, warnings
warnings.simplefilter("error")
before = resource.getrusage(resource.RUSAGE_SELF)
{code}
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([cpu, [name for name in {heavy!r} if name in sys.modules]]))
"""


def measured(code: str) -> tuple[float, list[str], str]:
    """CPU seconds, heavy modules loaded, and what else was printed, of a fresh interpreter."""
    script = REPORT.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    return *json.loads(last), "\n".join(printed) + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import zoo",
        "import zoo; zoo.list(); zoo.list('activation'); zoo.info('activation', 'polynorm')",
        "from zoo.cli import main; main(['list'])",
    ],
)
def test_catalog_answers_without_torch(code: str) -> None:
    best = min(measured(code)[0] for _ in range(6))
    _, loaded, _ = measured(code)
    assert loaded == []
    assert best < 0.15


def test_help_is_light() -> None:
    code = "from zoo.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    _, loaded, printed = measured(code)
    assert loaded == []
    assert "fit" in printed


def test_import_prints_nothing() -> None:
    assert measured("import zoo")[2] == "\n" or measured("import zoo")[2] == ""


def test_component_loads_torch_and_little_else() -> None:
    _, loaded, printed = measured("from zoo import PolyReLU, PolyNorm")
    assert set(loaded) <= {"torch", "numpy"}
    assert not printed.strip()
    own = min(
        measured(
            "import torch, numpy\nbase = resource.getrusage(resource.RUSAGE_SELF)\n"
            "from zoo import PolyReLU, PolyNorm\nbefore = base"
        )[0]
        for _ in range(6)
    )
    assert own < 0.15
