"""What the pages say is so: their code runs, their commands parse, their links and tables lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from zoo import cli, registry
from zoo.catalog import COMPONENTS
from zoo.engine.configs import resolve

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
ONCE = ("python -m pip install ", "python -m pytest")  # what only a fresh machine runs


def page_name(page: Path) -> str:
    return page.relative_to(DOCS).with_suffix("").as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [
        code for language, code in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S) if language in languages
    ]


def commands(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "console", "bash")).splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def test_pages_are_there() -> None:
    names = {page_name(page) for page in PAGES}
    assert {"index", "training", "own_component", "evidence", "benchmarks", "components/polycom", "api/index"} <= names
    assert len(COMMANDS) > 25


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS / "_ext")
    spec = importlib.util.spec_from_file_location("tables", DOCS / "_ext/tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In order and in one namespace, as a reader would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))  # a page may register a component
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    names: dict[str, Any] = {"__name__": page.stem}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_yaml_blocks_parse(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Light commands run; those that train resolve their configs and options and stop before anything is built."""
    monkeypatch.chdir(tmp_path)
    if command.startswith(ONCE):
        return
    program, *arguments = shlex.split(re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command))
    if program == "python":
        script = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        assert (ROOT / script).is_file()
        return
    assert program == "zoo"
    if arguments[0] in cli.TRAINING:
        for word in arguments:
            if match := re.fullmatch(r"runs/(\w+)/config\.yaml", word):  # what an earlier command of the page wrote
                Path(word).parent.mkdir(parents=True)
                shutil.copy(resolve(f"lm/{match.group(1)}"), word)
        last = [] if any(word.endswith(".help") for word in arguments) else ["--print_config"]
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, *last])
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        if last:  # a component's name is checked only when something is built
            given = yaml.safe_load(printed.out)["model"]["init_args"]
            for kind, key in (("activation", "act"), ("norm", "norm"), ("loss", "loss")):
                if given.get(key) is not None:
                    registry.factory(kind, given[key])
    elif arguments[0] in ("explain", "export", "kernels"):  # these read, write, compile or delete files
        cli._parser().parse_args(arguments)
    else:
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out


def slug(heading: str) -> str:
    """The anchor MyST gives a heading, as GitHub does."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.is_file(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", found.read_text(), re.M)), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_tables_and_names_exist(page: Path, tables: ModuleType) -> None:
    text = page.read_text()
    assert set(re.findall(r"```\{zoo-table\} (\S+)", text)) <= tables.TABLES.keys()
    names = re.findall(r"^\.\. auto\w+:: (\S+)", text, re.M)
    names += re.findall(r"\{py:\w+\}`(?:[^`<]*<)?([\w.]+)>?`", text)
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module:
            assert (
                importlib.util.find_spec(name)
                if is_module(name)
                else hasattr(importlib.import_module(module), attribute)
            )


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a class is not a package
        return False


def test_every_page_is_in_a_contents_list() -> None:
    listed: set[str] = set()
    for page in PAGES:
        for body in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            entries = [line for line in body.splitlines() if line and line[0] != ":"]
            listed |= {(page.parent / entry).relative_to(DOCS).as_posix() for entry in entries}
    assert listed == {page_name(page) for page in PAGES} - {"index"}


@pytest.mark.parametrize("script", sorted((DOCS / "gallery").glob("*.py")), ids=lambda script: script.stem)
def test_gallery_draws_the_picture(script: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "curves.png"
    runpy.run_path(str(script))["draw"](drawn)
    assert 20_000 < drawn.stat().st_size < 150_000
    assert (DOCS / f"_static/{script.stem}.png").stat().st_size < 150_000


def test_component_table_is_the_catalog(tables: ModuleType) -> None:
    lines = tables.components().splitlines()
    assert len(lines) == 2 + len(COMPONENTS)
    assert all(any(f"`{row.name}`" in line for line in lines) for row in COMPONENTS)


def test_tables_stand_without_results(tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "nothing")
    made = {name: make() for name, make in tables.TABLES.items()}
    for name in ("speed", "speed-brief", "speed-closed-form", "runs", "evonorm-speed", "evonorm-batch"):
        assert made[name].startswith("Not measured yet: `scripts/bench/results/")
    assert "not measured yet" in made["gpu"]
    assert made["polycom-roofline"].count("| not measured |") == 24
    assert made["evonorm-roofline"].count("| not measured |") == 12
    for name in ("claims", "evonorm-claims"):
        assert all(line.count("| not measured yet |") == 2 for line in made[name].splitlines()[2:])  # figure, verdict


def test_figures_of_a_gpu_reach_the_tables(tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = {
        "ours": {"median_ms": 0.0312, "ratio_to_ours": 1.0},
        "official": {"median_ms": 1.0, "ratio_to_ours": 32.0},
    }
    result = {"name": "poly_norm forward", "shape": [2048, 8192], "dtype": "bfloat16", "rivals": figures}
    result |= {"share_of_copy": 0.75, "target_share": 0.8, "met": False}
    environment = {"packages": {"torch": "2"}, "python": "3", "cpu_count": 2, "git": None, "devices": ["A GPU"]}
    record = {"device": "A GPU", "date": "2026-01-01", "environment": environment, "results": [result]}
    record |= {"ceilings": {"copy_bytes_per_s": 3e12}, "compared": {"checks": 9, "failed": {}}}
    (tmp_path / "a-gpu.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| 0.0312 | 75.0% (missed, target 80%) | official formula 32.00 |" in tables.gpu()
    roofline = tables.polycom_roofline()
    assert "| poly_norm forward | [2048, 8192] | 67 | 0.024 | 0.041 | 0.0312 (A GPU) |" in roofline
    assert roofline.count("| not measured |") == 23


def test_committed_results_make_tables(tables: ModuleType) -> None:
    for name, make in tables.TABLES.items():
        assert make(), name


@pytest.mark.parametrize(
    ("polynorm", "verdict", "figure"),
    [((2.0, 2.0), "holds", "+0.050, +0.050"), ((2.0, 2.1), "does not hold (1 of 2 seeds)", "+0.050, -0.050")],
)
def test_verdict_comes_from_the_figures(
    tables: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    polynorm: tuple[float, float],
    verdict: str,
    figure: str,
) -> None:
    losses = {"polyrelu": 2.05, "relu2": 2.2, "relu": 2.3, "gelu": 2.4, "swiglu": 2.5}
    rows = [
        {"activation": name, "seed": seed, "val_loss": loss, "parameters": 1, "wall_s": 1.0}
        for seed in (0, 1)
        for name, loss in {"polynorm": polynorm[seed], **losses}.items()
    ]
    environment = {"packages": {"torch": "2"}, "python": "3", "cpu_count": 2, "git": None}
    record = {"device": "cpu", "environment": environment, "results": rows}
    (tmp_path / "polycom_lm.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for claim in ("PolyNorm ends lowest of the paper's five", "PolyNorm ends lowest of the six"):
        assert f"{figure} nats a byte of lead" in claimed(tables, claim)
        assert claimed(tables, claim).endswith(f"| {verdict} |")
    assert claimed(tables, "SwiGLU ends below GELU").endswith("| does not hold (0 of 2 seeds) |")
    assert "2.050" in tables.runs()

    del rows[-1]
    (tmp_path / "polycom_lm.json").write_text(json.dumps(record))
    assert claimed(tables, "PolyNorm ends lowest of the paper's five").endswith("| not measured yet |")
    assert "not run" in tables.runs()


def test_batch_size_verdicts_come_from_the_figures(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accuracy = {"bn_relu": 0.5, "gn_relu": 0.8, "evonorm_s0": 0.85, "evonorm_b0": 0.4}
    rows = [
        {"layer": layer, "batch": batch, "seed": seed, "val_acc": value, "val_loss": 1 - value}
        for seed in (0, 1)
        for layer, value in accuracy.items()
        for batch in (1, 2, 4, 16, 32)
    ]
    rows[0]["val_acc"] = 0.6  # BN-ReLU at batch 1, seed 0
    environment = {"packages": {"torch": "2"}, "python": "3", "cpu_count": 2, "git": None}
    record = {"device": "cpu", "environment": environment, "results": rows}
    (tmp_path / "evonorm_batch.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in tables.batch_claims().splitlines()}
    first = lines["S0 is 30 points above BN-ReLU at batch 1"]
    assert "+25, +35 points of lead" in first
    assert first.endswith("| does not hold (1 of 2 seeds) |")
    assert lines["S0 is above GN-ReLU at every batch size"].endswith("| holds |")
    assert lines["S0 at batch 1 is within 2 points of batch 32"].endswith("| holds |")
    assert lines["B0 is above BN-ReLU at batch 32"].endswith("| does not hold (0 of 2 seeds) |")
    assert "60.0 / 0.500, 50.0 / 0.500" in tables.batch_sizes()
    del rows[-1]
    (tmp_path / "evonorm_batch.json").write_text(json.dumps(record))
    (last,) = [line for line in tables.batch_claims().splitlines() if line.startswith("| B0 is above")]
    assert last.endswith("| not measured yet |")


def claimed(tables: ModuleType, claim: str) -> str:
    """The row of a claim."""
    (line,) = [line for line in tables.claims().splitlines() if line.startswith(f"| {claim}")]
    return line
