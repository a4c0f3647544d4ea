"""Call the command as a shell does."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests import processes
from tests.runs.starting import TRAINS

COMMAND = [sys.executable, "-m", "tui_trainer"]


def call(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 240,
    torch: bool = True,
    cold: bool = False,
    starts: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `tui-trainer arguments…` in `cwd`, with its runs there too; never on a terminal.
    `starts`: it starts a process."""
    environment = {
        **os.environ,
        "TUI_TRAINER_RUNS_DIR": str(cwd / "runs"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        **(env or {}),
    }
    command = arguments[0] if arguments and "--help" not in arguments else ""
    return processes.run(
        [*COMMAND, *map(str, arguments)],
        torch=torch and command in TRAINS,
        cold=cold,
        starts=starts,
        cwd=cwd,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class StartedRun:
    """A run that was started in its own process and goes on while commands are called."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def next_breakpoint(self) -> dict[str, Any]:
        """Wait for the next breakpoint; returns its line of `--json`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event.get("kind") == "breakpoint":
                return event
        raise AssertionError("no breakpoint was reached")

    def wait(self) -> str:
        """Wait until it has ended well; returns the rest of what it printed."""
        out, err = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, err
        return out + err


@contextlib.contextmanager
def started(*arguments: str, cwd: Path, starts: bool = False) -> Iterator[StartedRun]:
    """`tui-trainer arguments…`, with its runs in `cwd`; killed at the end. `starts`: it starts
    another run."""
    process = processes.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env={**os.environ, "TUI_TRAINER_RUNS_DIR": str(cwd / "runs"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        starts=starts,
    )
    try:
        yield StartedRun(process)
    finally:
        process.kill()
        process.communicate()


def assert_refused(
    done: subprocess.CompletedProcess[str], *messages: str, status: int | None = None
) -> None:
    """One clear message on stderr, a non-zero exit, and no traceback of ours."""
    assert done.returncode == status if status is not None else done.returncode > 0, done
    for text in messages:
        assert text in done.stderr, f"{text!r} is missing in:\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    assert "tui-trainer: " in done.stderr, done.stderr
