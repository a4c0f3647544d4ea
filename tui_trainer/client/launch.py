"""Starting a run in a process of its own, which outlives the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tui_trainer.client.api import Session
from tui_trainer.client.connection import NotReady, RunGone, Stream, Unreachable, open_unix_stream
from tui_trainer.config.run_spec import RunSpec, find_socket, write_spec
from tui_trainer.config.run_state import read_state
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.schema import Scalar
from tui_trainer.runs.boot_log import BOOT_LOG, last_output

_MEMORY = (
    "if nobody did that, memory ran out and the kernel did (dmesg says so): try a smaller batch, "
    "a smaller model or fewer workers"
)


@dataclass(frozen=True)
class Launched:
    """A run process that was started here."""

    spec: RunSpec
    process: subprocess.Popen[bytes]

    def connect(self) -> Stream:
        """For `LiveSession`: one attempt to connect. Raises NotYet while the process boots and
        RunGone, with the end of what it printed, when it died."""
        # Asked before the socket is tried: a process seen dead cannot start to listen.
        status = self.process.poll()
        path = find_socket(self.spec.directory)
        try:
            if path is None:
                raise NotReady("starting the run process")
            return open_unix_stream(path)
        except (NotReady, Unreachable):
            if status is None:
                raise
            said = read_state(self.spec.directory)
            if said is not None and said.ended:
                raise RunGone(f"the run has {said.state}", said.reason, said.state) from None
            message = f"the run process died: {_ending(status)}"
            hint = self.last_words() or (_MEMORY if status == -signal.SIGKILL else "")
            raise RunGone(message, hint, "crashed") from None

    def last_words(self) -> str:
        """The end of what the process printed, for people; "" when it printed nothing."""
        return last_output(self.spec.directory)


def launch(spec: RunSpec, environment: dict[str, str] | None = None) -> Launched:
    """Write the spec and start its run process: its own session, so that a hang-up of this terminal
    does not reach it, and no terminal. Raises OSError."""
    write_spec(spec)
    log = os.open(
        Path(spec.directory) / BOOT_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )
    try:
        process = subprocess.Popen(
            # -P: a random.py in the user's directory must not stand in for Python's own.
            [sys.executable, "-P", "-m", "tui_trainer.run", spec.directory],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=spec.working_directory or None,
            env=environment,
            start_new_session=True,
        )
    finally:
        os.close(log)
    return Launched(spec, process)


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


# ---- launch
# What the start screen asks for when Enter is pressed.


@dataclass(frozen=True)
class LaunchRequest:
    """A training to start."""

    task: str
    """`gpt`, `vit`, a third party's task, or `script`."""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """Fields of the task's configuration that differ from its defaults (`preset` among them)."""
    script: str | None = None
    arguments: tuple[str, ...] = ()
    paused: bool = False


OnLaunch = Callable[[LaunchRequest], Session]
"""Starts the run and returns a session to it; called on a thread of its own. Raises LaunchError."""


class LaunchError(UserError):
    """The run could not be started; `hint` says what to do about it."""
