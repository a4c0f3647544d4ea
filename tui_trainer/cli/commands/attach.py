"""`tui-trainer attach`: opens the screen over a live run, on this machine or another one."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.commands.common import RunsDir, choose_run_by_name, cli_errors, flag
from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.client.connection import Connector, connector
from tui_trainer.client.ssh import (
    REMOTE_COMMAND_VARIABLE,
    SCHEME,
    SshConnector,
    parse_address,
)
from tui_trainer.config.run_spec import RunState
from tui_trainer.protocol.formatting import number, rough_duration, step_of
from tui_trainer.protocol.framing import RemoteRun
from tui_trainer.protocol.text import sanitize
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run
from tui_trainer.runs.registry import connect_run, live_socket

HEADINGS = ("", "RUN", "STATE", "STEP", "LOSS", "AGE", "WHAT")


def attach(
    run: Annotated[
        str | None,
        Parameter(
            help="the run: its name, a prefix of it, or its directory (default: the newest live "
            "one); or ssh://[user@]host[:port][/RUN], with your own ssh",
            show_default=False,
        ),
    ] = None,
    *,
    read_only: Annotated[bool, flag("watch only, without control")] = False,
    ascii: Annotated[bool, flag("draw with ASCII characters only")] = False,
    slow_link: Annotated[
        bool,
        flag("send less to the terminal: one frame in 2 s, and at once after a key"),
    ] = False,
    pixels: Annotated[
        bool, flag("draw heat maps with real pixels where the terminal has them")
    ] = False,
    remote_command: Annotated[
        str,
        Parameter(
            help="the command of tui-trainer on the other machine, if it is not found "
            f"(also ${REMOTE_COMMAND_VARIABLE})",
            show_default=False,
            metavar="COMMAND",
        ),
    ] = "",
    runs_dir: RunsDir = None,
) -> int:
    """open the screen over a live run, here or over ssh"""
    if reason := why_no_screen():
        raise UsageError(reason, "tui-trainer show RUN prints the run as text, --json as an object")
    view = _ViewOptions(read_only, ascii, slow_link, pixels)
    with cli_errors():
        if run is not None and run.startswith(SCHEME):
            return _attach_remote(run, view, remote_command, runs_dir)
        found = choose_run_by_name(run, runs_dir)
        live_socket(found)
    connect = connector(lambda: connect_run(found.directory))
    return _open(connect, view, found.name, found)


@dataclass(frozen=True)
class _ViewOptions:
    """How to show the run."""

    read_only: bool
    ascii: bool
    slow_link: bool
    pixels: bool


def _attach_remote(address: str, view: _ViewOptions, command: str, runs_dir: Path | None) -> int:
    where = parse_address(address)
    connect = SshConnector(where, command, str(runs_dir) if runs_dir else "")
    print(f"connecting to {where.destination} …", end="\r", file=sys.stderr, flush=True)
    try:
        name = connect.begin(choose_run)
    finally:
        print("\x1b[2K", end="\r", file=sys.stderr, flush=True)
    return _open(connect, view, f"{name} on {where.destination}", None)


def _open(connect: Connector, view: _ViewOptions, name: str, run: RunEntry | None) -> int:
    from tui_trainer.cli.screen import load_app, run_app_until_exit
    from tui_trainer.client.live import LiveSession

    run_app = load_app()
    session = LiveSession(connect, read_only=view.read_only)
    attached = AttachResult(session, name, run)
    return run_app_until_exit(
        lambda: run_app(session, ascii=view.ascii, slow_link=view.slow_link, pixels=view.pixels),
        lambda: attached,
    )


class AttachResult:
    """The run that was shown, for the exit summary."""

    def __init__(self, session: object, name: str, run: RunEntry | None) -> None:
        from tui_trainer.client.live import LiveSession

        assert isinstance(session, LiveSession)
        self._session = session
        self._name = name
        self._run = run
        self.directory = run.directory if run else Path(tempfile.gettempdir())

    def print_summary(self) -> int:
        """Print the state of the run and return the exit status."""
        snapshot = self._session.poll()
        status = snapshot.status
        stopping = self._run if status.state == "stopping" else None
        ended = _wait_for_end(stopping) if stopping is not None else None
        state, step = (ended.state, ended.step) if ended else (status.state, status.step)
        still = "still " if state in ("running", "paused", "starting") else ""
        if status.refused:
            print(f"{self._name} could not start: {status.reason}", flush=True)
        else:
            print(f"{self._name} {still}{state} at step {step:,}", flush=True)
        return 0


def _wait_for_end(run: RunEntry, seconds: float = 15.0) -> RunState | None:
    """Wait until a run that is stopping has ended, with its step and perhaps a checkpoint."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = inspect_run(run.directory)
        if now is not None and not now.live:
            return now.reported
        time.sleep(0.1)
    return None


# ---------------------------------------------------------------- which of several


def choose_run(runs: Sequence[RemoteRun]) -> str:
    """Ask on the terminal which run to open."""
    now = time.time()
    table = new_table(HEADINGS, right=("", "STEP", "LOSS", "AGE"))
    for place, run in enumerate(runs, 1):
        cells = (
            str(place),
            run.name,
            run.state,
            step_of(run.step, run.total_steps),
            number(run.loss, 0),
            rough_duration(now - run.started_at),
            run.title,
        )
        table.add_row(*(Text(" ".join(sanitize(cell).split())) for cell in cells))
    console = Console(highlight=False, stderr=True)
    for row in table_lines(table):
        console.print(row, soft_wrap=True)
    names = [run.name for run in runs]
    while True:
        print(f"which run? [1-{len(runs)}, Enter for 1] ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise RunError("several runs are live there", "name one: ssh://host/RUN")
        given = line.strip() or "1"
        if given.isascii() and given.isdigit() and 1 <= int(given) <= len(runs):
            return names[int(given) - 1]
        if given in names:
            return given
        print("enter a number or a name from the list", file=sys.stderr)
