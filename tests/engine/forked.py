"""Run many `zoo` commands, each in a process of its own, at the cost of importing torch and Lightning once.

    python -m tests.engine.forked '[{"cwd": "...", "arguments": ["fit", ...]}, ...]'

prints one JSON line of exit statuses; a negative one is the signal that ended the process. Output goes to `log.txt` in
the job's directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run_jobs(jobs: list[tuple[Path, list[str]]]) -> list[int]:
    """Exit status of each (directory, arguments of `zoo`), run one after the other."""
    payload = json.dumps([{"cwd": str(cwd), "arguments": arguments} for cwd, arguments in jobs])
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.forked", payload],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _run(cwd: str, arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        os.chdir(cwd)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["zoo", *arguments]
        from zoo.cli import main

        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import zoo.engine.cli  # noqa: F401  what every job needs, imported before the first fork

    print(json.dumps([_run(job["cwd"], job["arguments"]) for job in json.loads(sys.argv[1])]))
