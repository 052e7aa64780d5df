"""A killed run, resumed, ends with the bits of the uninterrupted one, and loses no line of metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.forked import REPOSITORY, run_jobs

TINY = Path(__file__).with_name("tiny.yaml")
KILLED = -signal.SIGKILL

# 8 batches an epoch, 24 steps. Save every, kill after, in the validation after that step?, validate every, workers.
CASES = {
    "mid-epoch": (5, 13, False, 8, 0),
    "mid-epoch, two loader workers": (5, 13, False, 8, 2),
    "right after a save": (5, 15, False, 8, 0),
    "last step of an epoch, saved before": (5, 16, False, 8, 0),
    "saved at the end of an epoch": (8, 11, False, 8, 0),
    "saved at the end of an epoch, two loader workers": (8, 11, False, 8, 2),
    "in the validation of an epoch's end": (5, 16, True, 8, 0),
    "in a validation due with a save": (8, 16, True, 8, 0),
    "saved at a validation inside an epoch": (4, 7, False, 4, 0),
    "in a validation inside an epoch": (4, 12, True, 4, 0),
}


def arguments(text: Path, *, every: int, validate: int, workers: int = 0) -> list[str]:
    return [
        "fit",
        f"--config={TINY}",
        f"--data.path={text}",
        f"--data.num_workers={workers}",
        f"--last.every_n_train_steps={every}",
        f"--trainer.val_check_interval={validate}",
    ]


def kill_at(step: int, *, during_validation: bool = False) -> list[str]:
    return [
        "--trainer.callbacks+=tests.engine.killer.KillAt",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.during_validation={str(during_validation).lower()}",
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def metrics(run: Path) -> list[dict]:
    """Rows without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def assert_same_run(resumed: Path, whole: Path) -> None:
    expected = weights(whole)
    found = weights(resumed)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert metrics(resumed) == metrics(whole)
    best = [torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (resumed, whole)]
    assert best[0]["global_step"] == best[1]["global_step"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose training part is 34 windows of 16 bytes: 8 batches of 4, two windows dropped."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_bytes(bytes((i * i + 7 * i) % 251 for i in range(660)))
    return path


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(text: Path, tmp_path: Path) -> None:
    jobs: list[tuple[Path, list[str]]] = []
    expected: list[int] = []
    for i, (every, step, validation, validate, workers) in enumerate(CASES.values()):
        given = arguments(text, every=every, validate=validate, workers=workers)
        folders = tmp_path / f"{i}" / "whole", tmp_path / f"{i}" / "killed"
        for folder in folders:
            folder.mkdir(parents=True)
        kill = kill_at(step, during_validation=validation)
        jobs += [(folders[0], given), (folders[1], [*given, *kill]), (folders[1], [*given, "--ckpt_path=last"])]
        expected += [0, KILLED, 0]
    found = run_jobs(jobs)
    logs = "\n".join((folder / "log.txt").read_text()[-2000:] for folder, _ in jobs)
    assert found == expected, logs
    for i, name in enumerate(CASES):
        try:
            assert_same_run(tmp_path / f"{i}/killed/runs/tiny", tmp_path / f"{i}/whole/runs/tiny")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.slow
def test_longer_run_goes_on_where_the_shorter_one_ended(text: Path, tmp_path: Path) -> None:
    short, whole = tmp_path / "short", tmp_path / "whole"
    short.mkdir()
    whole.mkdir()
    # 13 steps end inside an epoch; without a schedule, which would have another length
    given = [*arguments(text, every=5, validate=8), "--model.lr_scheduler=null", "--trainer.max_epochs=-1"]
    first, all_steps = [*given, "--trainer.max_steps=13"], [*given, "--trainer.max_steps=24"]
    assert run_jobs([(short, first), (short, [*all_steps, "--ckpt_path=last"]), (whole, all_steps)]) == [0, 0, 0]
    assert_same_run(short / "runs/tiny", whole / "runs/tiny")


@pytest.mark.slow
def test_two_process_run_resumes_to_the_same_bits(text: Path, tmp_path: Path) -> None:
    ddp = ["--config=_parts/ddp2_cpu"]
    given = [*arguments(text, every=3, validate=4), "--data.batch_size=4", *ddp]

    def run(folder: Path, *more: str) -> int:
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "zoo", *given, *more]
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run(
                command, cwd=folder, env=environment, stdout=log, stderr=log, check=False, timeout=300
            )
        return done.returncode

    assert run(tmp_path / "whole") == 0, (tmp_path / "whole/log.txt").read_text()
    assert run(tmp_path / "killed", *kill_at(7)) == KILLED, (tmp_path / "killed/log.txt").read_text()
    assert run(tmp_path / "killed", "--ckpt_path=last") == 0, (tmp_path / "killed/log.txt").read_text()
    assert_same_run(tmp_path / "killed/runs/tiny", tmp_path / "whole/runs/tiny")
    assert not (tmp_path / "whole/runs/tiny-2").exists()
