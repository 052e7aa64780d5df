"""Which directory a command works in."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.engine import rundir
from zoo.errors import RunError

CONFIG = Path("configs/lm/small.yaml")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(folder: str, *checkpoints: str) -> Path:
    path = Path(folder)
    (path / "checkpoints").mkdir(parents=True)
    (path / rundir.RECORD).write_text("{}")
    (path / "config.yaml").write_text("")
    for name in checkpoints:
        (path / "checkpoints" / f"{name}.ckpt").touch()
    return path


def test_first_run_takes_the_name_of_its_config() -> None:
    assert rundir.choose(None, [CONFIG], None, fitting=True) == (Path("runs/small"), None)
    assert rundir.choose(None, [], None, fitting=True) == (Path("runs/unnamed"), None)


def test_later_runs_are_numbered() -> None:
    make_run("runs/small")
    assert rundir.choose(None, [CONFIG], None, fitting=True)[0] == Path("runs/small-2")
    make_run("runs/small-4")
    make_run("runs/smaller-9")
    assert rundir.choose(None, [CONFIG], None, fitting=True)[0] == Path("runs/small-5")


def test_resume_and_test_use_the_newest_run() -> None:
    make_run("runs/small", "last", "best")
    newest = make_run("runs/small-2", "last", "best")
    last = newest / "checkpoints/last.ckpt"
    assert rundir.choose(None, [CONFIG], "last", fitting=True) == (newest, last)
    assert rundir.choose(None, [CONFIG], "best", fitting=False) == (newest, newest / "checkpoints/best.ckpt")
    assert rundir.choose(None, [CONFIG], str(last), fitting=True) == (newest, last)


def test_training_from_another_checkpoint_is_a_new_run() -> None:
    run = make_run("runs/small", "last", "best")
    found = rundir.choose(None, [CONFIG], "best", fitting=True)
    assert found == (Path("runs/small-2"), run / "checkpoints/best.ckpt")


def test_record_of_a_run_names_it() -> None:
    run = make_run("runs/small-2", "last")
    make_run("runs/small-3", "last")
    record = [run / "config.yaml"]
    assert rundir.choose(None, record, "last", fitting=True) == (run, run / "checkpoints/last.ckpt")
    assert rundir.choose(None, record, None, fitting=True) == (Path("runs/small-4"), None)


def test_named_directory_is_never_shared() -> None:
    make_run("here", "last")
    with pytest.raises(
        RunError, match=r"^here already holds a run; pass --ckpt_path last to go on with it, or another"
    ):
        rundir.choose("here", [CONFIG], None, fitting=True)
    assert rundir.choose("there", [CONFIG], None, fitting=True) == (Path("there"), None)
    assert rundir.choose("here", [CONFIG], "last", fitting=True)[0] == Path("here")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("last", r"no checkpoint at runs/small/checkpoints/last.ckpt; train first"),
        ("x.ckpt", r"at x.ckpt; check the path"),
    ],
)
def test_missing_checkpoint_gets_a_sentence(checkpoint: str, message: str) -> None:
    for fitting in (True, False):
        with pytest.raises(RunError, match=message):
            rundir.choose(None, [CONFIG], checkpoint, fitting=fitting)


def test_directory_that_cannot_be_made_is_refused() -> None:
    Path("file").touch()
    with pytest.raises(
        RunError, match=r"cannot make the run directory file/run: .*file is a file; pass another --run_dir"
    ):
        rundir.check_writable(Path("file/run"))


def test_directory_taken_in_the_meantime_is_refused() -> None:
    rundir.claim(Path("run"), resuming=False)
    with pytest.raises(RunError, match="another run has just taken run; start this one again"):
        rundir.claim(Path("run"), resuming=False)
    rundir.claim(Path("run"), resuming=True)


def test_evaluation_takes_the_best_or_else_the_last() -> None:
    run = make_run("runs/small", "last")
    assert rundir.choose(None, [CONFIG], None, fitting=False) == (run, run / "checkpoints/last.ckpt")
    (run / "checkpoints/best.ckpt").touch()
    assert rundir.choose(None, [CONFIG], None, fitting=False) == (run, run / "checkpoints/best.ckpt")
    with pytest.raises(RunError, match=r"no checkpoint at other/checkpoints/last.ckpt; train first"):
        rundir.choose("other", [CONFIG], None, fitting=False)
