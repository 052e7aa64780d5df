"""metrics.jsonl stays whole whatever happens to the process that writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.engine.jsonl import JSONLLogger, read_metrics


@pytest.fixture
def logger(tmp_path: Path) -> JSONLLogger:
    logger = JSONLLogger(str(tmp_path / "run"))
    for step in range(4):
        logger.log_metrics({"train/loss": float(step)}, step)
    return logger


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_step_comes_first(logger: JSONLLogger) -> None:
    assert lines(logger.path)[0] == '{"step": 0, "train/loss": 0.0}'


def test_rewind_sets_later_lines_aside(logger: JSONLLogger) -> None:
    logger.rewind(2)
    assert [row["step"] for row in read_metrics(logger.path)] == [0, 1]
    aside = logger.path.with_name("metrics.superseded.jsonl")
    assert [json.loads(line)["step"] for line in lines(aside)] == [2, 3]


def test_rewind_to_the_end_changes_nothing(logger: JSONLLogger) -> None:
    before = logger.path.read_bytes()
    logger.rewind(4)
    assert logger.path.read_bytes() == before
    assert not logger.path.with_name("metrics.superseded.jsonl").exists()


def test_torn_line_neither_spoils_the_next_nor_is_lost(logger: JSONLLogger) -> None:
    with logger.path.open("a") as file:
        file.write('{"step": 4, "tra')
    logger.log_metrics({"train/loss": 5.0}, 5)
    assert [row["step"] for row in read_metrics(logger.path)] == [0, 1, 2, 3, 5]
    logger.rewind(6)
    assert '{"step": 4, "tra' in lines(logger.path.with_name("metrics.superseded.jsonl"))


def test_facts_begin_every_line(tmp_path: Path) -> None:
    logger = JSONLLogger(str(tmp_path), "evaluations.jsonl", {"command": "test"})
    logger.log_metrics({"test/loss": 1.0}, 0)
    assert lines(tmp_path / "evaluations.jsonl") == ['{"command": "test", "step": 0, "test/loss": 1.0}']


def test_rewind_without_a_file(tmp_path: Path) -> None:
    JSONLLogger(str(tmp_path)).rewind(3)
    assert list(tmp_path.iterdir()) == []
