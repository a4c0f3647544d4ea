"""Starts a branch: a new run that continues from a checkpoint of another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.runs.errors import RunError


def free_name(directory: Path) -> str:
    """A name for a branch of the run in `directory`: its own and a number."""
    number = 2
    while (directory.parent / f"{directory.name}-{number}").exists():
        number += 1
    return f"{directory.name}-{number}"


def start_branch(
    spec: RunSpec, step: int, name: str, changes: Sequence[str], paused: bool = False
) -> None:
    """Start the run `name` next to that of `spec`, from its checkpoint of `step`, in a process of
    its own; returns once it trains. Raises RunError."""
    directory = Path(spec.directory)
    command = [sys.executable, "-m", "tui_trainer", spec.task, "--detach", "--name", name]
    command += ["--resume", f"{directory}@{step}", "--runs-dir", str(directory.parent)]
    command += ["--paused"] * paused
    command += ["--snapshots", str(spec.snapshots)] if spec.snapshots else []
    command += [part for change in changes for part in ("--set", change)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it could not be started"]
        raise RunError(lines[0].removeprefix("tui-trainer: "))
