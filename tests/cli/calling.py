"""Call the command as a shell does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests import processes

COMMAND = [sys.executable, "-m", "tui_trainer"]


def call(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 240,
    torch: bool = True,
    cold: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `tui-trainer arguments…` in `cwd`, with its runs there too; never on a terminal."""
    environment = {
        **os.environ,
        "TUI_TRAINER_RUNS_DIR": str(cwd / "runs"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        **(env or {}),
    }
    trains = (
        arguments[:1]
        and arguments[0] in ("gpt", "vit", "run", "check")
        and "--help" not in arguments
    )
    return processes.run(
        [*COMMAND, *map(str, arguments)],
        torch=torch and bool(trains),
        cold=cold,
        cwd=cwd,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def assert_refused(
    done: subprocess.CompletedProcess[str], *messages: str, status: int | None = None
) -> None:
    """One clear message on stderr, a non-zero exit, and no traceback of ours."""
    assert done.returncode == status if status is not None else done.returncode > 0, done
    for text in messages:
        assert text in done.stderr, f"{text!r} is missing in:\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    assert "tui-trainer: " in done.stderr, done.stderr
