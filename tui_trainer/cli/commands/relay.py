"""`tui-trainer relay [RUN]`: the remote end of an ssh connection.

The relay greets with one line, then copies bytes between its standard streams and the run's socket
without decoding them. It exits when either side closes.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tui_trainer.cli.commands.common import RunName, RunsDir
from tui_trainer.config.ranks import find_run
from tui_trainer.config.run_spec import find_socket
from tui_trainer.protocol.framing import RelayGreeting, RemoteRun, encode_greeting
from tui_trainer.runs.errors import NotListening, RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import list_runs, live_socket, newest, resolve
from tui_trainer.runs.security import connect_unix

LaunchFlag = Annotated[
    str | None,
    Parameter(help="connect a rank of this launch to its run, once it listens", show=False),
]
LAUNCH_S = 50.0
"""How long rank 0 of a launch may take to create its run; less than `rank_client.FIND_S`."""
SILENT_S = 180.0
"""A viewer that has sent nothing for this long has disconnected, even if sshd has not noticed.
Viewers poll every few seconds at least, and reconnect when they wake up."""
LONGEST_ANSWER = 4096
_BLOCK = 1 << 16


def relay(run: RunName = None, *, launch: LaunchFlag = None, runs_dir: RunsDir = None) -> int:
    """connect standard input and output to a run (for ssh)"""
    found = None
    try:
        if launch is not None:
            return _relay_rank(launch, runs_dir)
        found = _find(run, runs_dir)
        connection = connect_unix(live_socket(found))
    except RunError as error:
        ended = found.end_state if found and not found.live else ""
        _greet(RelayGreeting("error", message=error.message, hint=error.hint, state=ended))
        return 1
    except (OSError, EOFError):
        return 1
    _greet(RelayGreeting("connected", run=found.name))
    _copy_both_ways(connection, SILENT_S)
    return 0


def _relay_rank(launch: str, runs_dir: Path | None) -> int:
    """Connect a training process on another machine to the run of its launch, once that run
    listens. The connection may be silent for days. Raises RunError."""
    deadline = time.monotonic() + LAUNCH_S
    while True:
        directory = find_run(launch, runs_dir)
        path = find_socket(directory) if directory is not None else None
        if directory is not None and path is not None:
            with contextlib.suppress(NotListening):
                connection = connect_unix(path)
                break
        if time.monotonic() > deadline:
            raise RunError(
                "rank 0 of this launch records no run here",
                "is this the machine of rank 0, and is $TUI_TRAINER_RUNS_DIR set there for logins "
                "without a terminal?",
            )
        time.sleep(0.1)
    _greet(RelayGreeting("connected", run=directory.name))
    _copy_both_ways(connection, math.inf)
    return 0


def _find(run: str | None, runs_dir: Path | None) -> RunEntry:
    if run is not None:
        return resolve(run, runs_dir)
    runs = list_runs(runs_dir)
    live = [each for each in runs if each.live]
    if len(live) < 2:
        return newest(runs)
    _greet(RelayGreeting("choose", runs=tuple(_offered(each) for each in live)))
    return resolve(_read_line(), runs_dir)


def _offered(run: RunEntry) -> RemoteRun:
    status = run.reported
    return RemoteRun(
        run.name,
        run.state,
        status.step,
        status.total_steps,
        status.loss,
        status.title or status.task,
        status.started_at,
    )


def _greet(greeting: RelayGreeting) -> None:
    _write(encode_greeting(greeting))


def _read_line() -> str:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1)  # no byte after the end of the line may be consumed
        if not part or len(line) > LONGEST_ANSWER:
            raise EOFError
        line += part
    return line.decode("utf-8", "replace").strip()


def _write(data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _copy_both_ways(connection: socket.socket, silent_s: float) -> None:
    """Copy until either side ends, or the viewer has sent nothing for `silent_s`."""
    received_at = [time.monotonic()]
    ended = threading.Event()

    def to_run() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(0, _BLOCK):
                received_at[0] = time.monotonic()
                connection.sendall(data)
        ended.set()

    def to_viewer() -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(_BLOCK):
                _write(data)
        ended.set()

    for work in (to_run, to_viewer):
        threading.Thread(target=work, daemon=True).start()
    while not ended.wait(min(3600.0, max(0.1, received_at[0] + silent_s - time.monotonic()))):
        if time.monotonic() - received_at[0] >= silent_s:
            break
    # The other thread may be blocked forever on a stream whose reader is gone: exit without it.
    os._exit(0)
