"""Run directories: one for each run, never two runs in one, nothing of an earlier run overwritten."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import RunError

RECORD = "environment.json"  # written first, so its presence marks a directory that holds a run
_NUMBERED = re.compile(r"-(\d+)$")


def holds_run(folder: Path) -> bool:
    """Whether a run has written anything here."""
    return any((folder / name).exists() for name in (RECORD, "metrics.jsonl", "checkpoints"))


def choose(
    given: str | None, configs: list[Path], checkpoint: str | None, *, fitting: bool
) -> tuple[Path, Path | None]:
    """The directory and the checkpoint of a command.

    A new run takes `runs/<stem of the first config>`, or that name with the next free number. A resume from `last`
    goes on in the newest run of that name; from any other checkpoint it starts a new run, so that the later states of
    the old one stay.

    Args:
        given: `--run_dir`, if any.
        configs: the config files, in order.
        checkpoint: `--ckpt_path`: "best", "last", a file, or None: the best, or else the last, if nothing is trained.
        fitting: whether the command trains.

    Returns:
        Run directory and checkpoint file, or None for no checkpoint.

    Raises:
        RunError: if the checkpoint does not exist, or a new run would fall into the directory of another.
    """
    base, current = _base(given, configs)
    if checkpoint is None and not fitting:  # never evaluate untrained weights by accident
        checkpoint = "best" if (current / "checkpoints" / "best.ckpt").is_file() else "last"
    file: Path | None = None
    if checkpoint is not None:
        file = current / "checkpoints" / f"{checkpoint}.ckpt" if checkpoint in {"best", "last"} else Path(checkpoint)
        if not file.is_file():
            cure = (
                "train first with `zoo fit`, or pass --run_dir" if checkpoint in {"best", "last"} else "check the path"
            )
            raise RunError(f"no checkpoint at {file}; {cure}")
    if not fitting:
        return current, file
    if file is not None and file.resolve() == (current / "checkpoints" / "last.ckpt").resolve():
        return current, file
    if given is not None:
        if holds_run(base):
            raise RunError(f"{base} already holds a run; pass --ckpt_path last to go on with it, or another --run_dir")
        return base, file
    return _next_free(base), file


def check_writable(folder: Path) -> None:
    """Refuse a run directory that cannot be written to, before anything is trained.

    Raises:
        RunError: if the directory or its nearest existing parent is not a writable folder.
    """
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise RunError(f"cannot make the run directory {folder}: {nearest} is a file; pass another --run_dir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write to {nearest}, where the run directory {folder} goes; pass another --run_dir")


def claim(folder: Path, *, resuming: bool) -> None:
    """Make the directory; a new run must be the one that makes its record file.

    Raises:
        RunError: if another run took the directory in the meantime, or it cannot be made.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not resuming:
            (folder / RECORD).open("x").close()
    except FileExistsError:
        raise RunError(f"another run has just taken {folder}; start this one again") from None
    except OSError as error:
        raise RunError(
            f"cannot write to the run directory {folder} ({error.strerror}); pass another --run_dir"
        ) from None


def _base(given: str | None, configs: list[Path]) -> tuple[Path, Path]:
    """Directory a new run would take if free, and the directory of the run that exists."""
    if given is not None:
        return Path(given), Path(given)
    if configs and configs[0].name == "config.yaml" and holds_run(configs[0].parent):
        recorded = configs[0].parent  # a run repeated, resumed or tested from its own record
        return recorded.with_name(_NUMBERED.sub("", recorded.name)), recorded
    base = Path("runs") / (configs[0].stem if configs else "unnamed")
    return base, _newest(base)


def _numbered(base: Path) -> dict[int, Path]:
    found = {1: base} if holds_run(base) else {}
    if base.parent.is_dir():
        for folder in base.parent.iterdir():
            match = _NUMBERED.search(folder.name)
            if match and folder.name == f"{base.name}{match.group()}" and holds_run(folder):
                found[int(match.group(1))] = folder
    return found


def _newest(base: Path) -> Path:
    found = _numbered(base)
    return found[max(found)] if found else base


def _next_free(base: Path) -> Path:
    found = _numbered(base)
    return base.with_name(f"{base.name}-{max(found) + 1}") if found else base
