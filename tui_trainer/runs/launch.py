"""Starts each run in its own process, which outlives the terminal: new runs, and branches that
continue from a checkpoint of another run."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tui_trainer.config.run_spec import RunSpec, find_socket, read_state, write_spec
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.messages import END_STATES
from tui_trainer.protocol.schema import Scalar
from tui_trainer.runs.boot_log import BOOT_LOG, last_output
from tui_trainer.runs.errors import NotListening, RunError, RunGone, Unreachable
from tui_trainer.runs.security import connect_unix

_OUT_OF_MEMORY = (
    "probably killed by the kernel when memory ran out (dmesg would show it): try a smaller batch, "
    "a smaller model or fewer workers"
)


@dataclass(frozen=True)
class LaunchRequest:
    """A training to start, as chosen on the start screen."""

    task: str
    """`gpt`, `vit`, a third party's task, or `script`."""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """Fields of the task's configuration that differ from its defaults (`preset` among them)."""
    script: str | None = None
    arguments: tuple[str, ...] = ()
    paused: bool = False
    demo: str = ""
    """Name of a guided run, a script that tui-trainer ships."""


class LaunchError(UserError):
    """The run could not be started."""


@dataclass(frozen=True)
class RunProcess:
    """A run process that this process has started."""

    spec: RunSpec
    process: subprocess.Popen[bytes]

    def connect(self) -> socket.socket:
        """One attempt to connect to the run. Raises NotListening while the process starts and
        RunGone, with the end of what it printed, when it died."""
        # Asked before the socket is tried: a process seen dead cannot start to listen.
        exit_status = self.process.poll()
        path = find_socket(self.spec.directory)
        try:
            if path is None:
                raise NotListening("starting the run process")
            return connect_unix(path)
        except (NotListening, Unreachable):
            if exit_status is None:
                raise
            raise self._why_gone(exit_status) from None

    def last_output(self) -> str:
        """The end of what the process printed before its log began; "" when it printed nothing."""
        return last_output(self.spec.directory)

    def _why_gone(self, exit_status: int) -> RunGone:
        reported = read_state(self.spec.directory)
        if reported is not None and reported.state in END_STATES:
            message = f"the run has {reported.state}"
            return RunGone(message, reported.reason, reported.state)
        message = f"the run process died: {_ending(exit_status)}"
        killed = exit_status == -signal.SIGKILL
        hint = self.last_output() or (_OUT_OF_MEMORY if killed else "")
        return RunGone(message, hint, "crashed")


def run_command(spec: RunSpec) -> list[str]:
    """The command line of a run process, or of the launcher of its processes."""
    # -P: a random.py in the user's directory must not stand in for Python's own.
    program = [sys.executable, "-P", "-m", "tui_trainer.run", spec.directory]
    return [*spec.launcher, *program]


def launch(spec: RunSpec, environment: dict[str, str] | None = None) -> RunProcess:
    """Write the spec and start its run process in a new session, which a hang-up of this terminal
    does not reach. Raises OSError."""
    write_spec(spec)
    log = os.open(
        Path(spec.directory) / BOOT_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )
    try:
        process = subprocess.Popen(
            run_command(spec),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=spec.working_directory or None,
            env=environment,
            start_new_session=True,
        )
    finally:
        os.close(log)
    return RunProcess(spec, process)


def _ending(exit_status: int) -> str:
    if exit_status >= 0:
        return f"exit status {exit_status}"
    try:
        return f"killed by {signal.Signals(-exit_status).name}"
    except ValueError:
        return f"killed by signal {-exit_status}"


def free_name(directory: Path, taken: Collection[str] = ()) -> str:
    """An unused name for a branch of the run in `directory`: the run's name and a number."""
    names = (f"{directory.name}-{number}" for number in itertools.count(2))
    return next(n for n in names if n not in taken and not directory.with_name(n).exists())


def start_branch(
    spec: RunSpec, step: int, name: str, changes: Sequence[str], paused: bool = False
) -> None:
    """Start a run `name` from the checkpoint of `step` of the run of `spec`, next to it and in a
    new process; returns once it trains. Raises RunError."""
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
