"""Runs the app on this terminal over a run, and prints the exit summary."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tui_trainer.cli.errors import FAULT, INTERRUPTED, USAGE, CommandError, notify
from tui_trainer.cli.run_setup import discard, discard_refused
from tui_trainer.cli.terminal import restored_terminal
from tui_trainer.client.api import Session, Snapshot
from tui_trainer.config.run_spec import RunSpec, RunState, read_state
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import number
from tui_trainer.protocol.messages import END_STATES, State
from tui_trainer.runs.errors import RunGone
from tui_trainer.runs.launch import LaunchError, LaunchRequest, RunProcess, launch

if TYPE_CHECKING:
    from tui_trainer.ui.screens import ScreenMode
    from tui_trainer.ui.screens.start import TaskForm


CRASH_FILE = "app-crash.txt"
EXIT_SUMMARY_TIMEOUT_S = 15.0
"""How long the summary waits for a run that is ending to finish its step and checkpoint."""


class ShownRun(Protocol):
    """A run that the app has shown."""

    @property
    def directory(self) -> Path:
        """Where to write the traceback if the app crashes."""

    def print_summary(self) -> int:
        """Print the exit summary and return the exit status."""


class OpenedRun:
    """A run started from this terminal, with the session that shows it."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        try:
            self.launched: RunProcess = launch(spec)
        except OSError as error:
            discard(spec)
            raise CommandError(f"cannot start the run process: {error}") from error
        from tui_trainer.client.connection import connector
        from tui_trainer.client.live import LiveSession

        self.session: Session = LiveSession(connector(self.launched.connect))

    @property
    def directory(self) -> Path:
        return Path(self.spec.directory)

    def abandon(self) -> None:
        """End a run whose screen never opened."""
        self.launched.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launched.process.wait(EXIT_SUMMARY_TIMEOUT_S)

    def print_summary(self) -> int:
        """Print the exit summary and return the exit status."""
        snapshot = self.session.poll()
        if self._is_ending(snapshot):
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                self.launched.process.wait(EXIT_SUMMARY_TIMEOUT_S)
        outcome = final_outcome(snapshot, status_on_disk(self.spec), self.launched.process)
        print(exit_summary(self.spec, outcome), flush=True)
        if outcome.state == "crashed" and outcome.hint:
            print(f"  hint: {outcome.hint}", file=sys.stderr)
        discard_refused(self.spec)
        return exit_status(self.spec, outcome)

    def _is_ending(self, snapshot: Snapshot) -> bool:
        on_disk = status_on_disk(self.spec)
        states = {snapshot.status.state, on_disk.state if on_disk else ""}
        return bool(states & {"stopping", "finished", "stopped", "crashed"})


class InApp:
    """A run on a worker thread of this process, connected by a socketpair."""

    def __init__(self, spec: RunSpec) -> None:
        from tui_trainer.client.connection import connector
        from tui_trainer.client.live import LiveSession
        from tui_trainer.run.host import Worker

        self._spec = spec
        self._worker = Worker(spec)
        self._unused: socket.socket | None = self._worker.viewer
        self.session = LiveSession(connector(self._connect))

    @property
    def directory(self) -> Path:
        return Path(self._spec.directory)

    def _connect(self) -> socket.socket:
        connected, self._unused = self._unused, None
        if connected is None:
            raise RunGone("the training thread has ended")
        return connected

    def print_summary(self) -> int:
        """End the training if it is still running, print its state and return the exit status."""
        self.session.close()
        if not self._worker.wait(0):
            print("finishing the step: a run with --in-app ends with the app", file=sys.stderr)
            self._worker.stop()
            self._worker.wait()
        state = status_on_disk(self._spec)
        if state is None:
            return FAULT
        if state.refused:
            print(f"{state.name} could not start: {state.reason}", flush=True)
            if state.hint:
                print(f"  hint: {state.hint}", file=sys.stderr)
            discard_refused(self._spec)
            return USAGE
        reason = f": {state.reason}" if state.state == "crashed" and state.reason else ""
        print(
            f"{state.name} {state.state} at step {state.step:,}, loss {number(state.loss, 0)}"
            f"{reason} · {self.directory}",
            flush=True,
        )
        return FAULT if state.state == "crashed" else 0


def show_run(
    spec: RunSpec,
    ascii: bool,
    slow_link: bool = False,
    *,
    pixels: bool = False,
    mode: ScreenMode = "dashboard",
    demo: str = "",
) -> int:
    """Start the run, show it until the user leaves, and return the exit status. `mode`: the screen
    to begin with; `demo`: the guided run to introduce there.

    The run process is started before Textual is imported, because it needs seconds to import torch.
    """
    opened = OpenedRun(spec)
    try:
        run_app = load_app()
    except KeyboardInterrupt:
        opened.abandon()
        raise
    return run_app_until_exit(
        lambda: run_app(
            opened.session,
            ascii=ascii,
            slow_link=slow_link,
            pixels=pixels,
            start_mode=mode,
            demo=demo,
        ),
        lambda: opened,
    )


def show_in_app(spec: RunSpec, ascii: bool, slow_link: bool = False, pixels: bool = False) -> int:
    """Train on a worker thread, show it until the user leaves, and return the exit status."""
    run_app = load_app()
    opened = InApp(spec)
    return run_app_until_exit(
        lambda: run_app(
            opened.session, ascii=ascii, slow_link=slow_link, pixels=pixels, ends_with_app=True
        ),
        lambda: opened,
    )


def show_start(
    start: Callable[[LaunchRequest], RunSpec],
    tasks: Sequence[TaskForm],
    ascii: bool,
    slow_link: bool = False,
    *,
    pixels: bool = False,
    mode: ScreenMode = "start",
    lesson: str = "",
) -> int:
    """Show the start screen (or that of another `mode`), then the run that is started on it; return
    the exit status."""
    run_app = load_app()
    from tui_trainer.ui.screens.start import Launcher

    opened: list[OpenedRun] = []

    def open_run(request: LaunchRequest) -> Session:
        try:
            opened.append(OpenedRun(start(request)))
        except CommandError as error:
            raise LaunchError(error.message, error.hint) from error
        return opened[-1].session

    launcher = Launcher(tuple(tasks), open_run)
    return run_app_until_exit(
        lambda: run_app(
            None,
            ascii=ascii,
            start_mode=mode,
            on_launch=launcher,
            slow_link=slow_link,
            pixels=pixels,
            lesson=lesson,
        ),
        lambda: opened[-1] if opened else None,
    )


def load_app() -> Callable[..., int]:
    """Import the app and return its `run_app`.

    The garbage collector is off until the first paint: imports leave hardly any garbage, and
    collections take an eighth of the time.
    """
    gc.disable()
    from tui_trainer.ui.app import run_app

    return run_app


def run_app_until_exit(run: Callable[[], int], opened: Callable[[], ShownRun | None]) -> int:
    """Run the app, restore the terminal, print the exit summary and return the exit status.

    SIGINT, SIGTERM and SIGHUP end the app only; the run continues unless the app trains it.
    """
    signal_status, crash = 0, ""
    try:
        with restored_terminal() as signalled:
            crash = _run_catching_crash(run)
    except KeyboardInterrupt:
        signal_status = INTERRUPTED
    finally:
        gc.enable()  # the app may have left before its first paint
    if signalled():
        signal_status = 128 + signalled()
    shown = opened()
    status = shown.print_summary() if shown else 0
    if crash:
        return _report_crash(crash, shown.directory if shown else Path(tempfile.gettempdir()))
    if not signal_status:
        _run_next_command()
    return signal_status or status


def _run_next_command() -> None:
    """Become the command that the user has chosen after the end of the run, if any."""
    leaving = sys.modules.get("tui_trainer.ui.leaving")
    command: tuple[str, ...] = leaving.Leaving.next_command if leaving is not None else ()
    if command:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "tui_trainer", *command])


def _run_catching_crash(run: Callable[[], int]) -> str:
    """Run the app and return the traceback of its crash; "" when it left in order.

    Textual prints the traceback to stderr once the terminal is restored. Here it goes to a file: a
    screen full of our source code does not help a user who is training.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            code = run()
    except Exception:
        return printed.getvalue() + traceback.format_exc()
    return (printed.getvalue() or "the app exited with an error") if code else ""


def _report_crash(crash: str, directory: Path) -> int:
    """Write the traceback of a crash of the app to a file and print one line about it."""
    path = directory / CRASH_FILE
    try:
        path.write_text(crash, encoding="utf-8", errors="replace")
    except OSError:
        print(crash, file=sys.stderr)
        notify("the screen crashed; the training is not affected")
        return FAULT
    notify("the screen crashed; the training is not affected", f"the traceback is in {path}")
    return FAULT


# ---------------------------------------------------------------- exit summary


@dataclass(frozen=True)
class ExitState:
    """The state of a run when its screen was closed."""

    state: State
    step: int = 0
    loss: float | None = None
    reason: str = ""
    hint: str = ""
    pid: int = 0
    refused: bool = False
    """See `Status.refused`."""
    exit_status: int | None = None
    """Exit status of the run process; None while it is running."""

    @property
    def ended(self) -> bool:
        return self.state in END_STATES


def final_outcome(
    snapshot: Snapshot, on_disk: RunState | None, process: subprocess.Popen[bytes]
) -> ExitState:
    """The newer of the session's last snapshot and the run's status file. A process that is gone
    without an end record has crashed."""
    status = snapshot.status
    code = process.poll()
    outcome = ExitState(status.state, status.step, _last_loss(snapshot))
    outcome = replace(outcome, reason=status.reason, hint=status.hint, refused=status.refused)
    if on_disk is not None and (on_disk.ended or on_disk.step > outcome.step) and not outcome.ended:
        outcome = ExitState(on_disk.state, on_disk.step, on_disk.loss)
        outcome = replace(
            outcome, reason=on_disk.reason, hint=on_disk.hint, refused=on_disk.refused
        )
    if code is not None and not outcome.ended:
        died = f"its process exited without writing its status ({_ending(code)})"
        outcome = replace(outcome, state="crashed", reason=outcome.reason or died)
    return replace(outcome, pid=process.pid, exit_status=_as_status(code))


def _last_loss(snapshot: Snapshot) -> float | None:
    table = snapshot.history.table(schema.STEP)
    return table.newest("loss") if table is not None else None


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _as_status(code: int | None) -> int | None:
    return 128 - code if code is not None and code < 0 else code


def exit_status(spec: RunSpec, outcome: ExitState) -> int:
    """The script's own exit status for `run`. For a task: 0, 1 after a crash or when the last loss
    is not finite, 2 when it could not start as requested."""
    if spec.is_script and outcome.ended and outcome.exit_status is not None:
        return outcome.exit_status
    if outcome.state == "finished":
        return outcome.exit_status or 0  # 1 when the last loss is not finite
    if outcome.state != "crashed":
        return 0
    return USAGE if outcome.exit_status == USAGE else FAULT


def exit_summary(spec: RunSpec, outcome: ExitState) -> str:
    """One line for the shell after the app has closed."""
    at = f"step {outcome.step:,}"
    if outcome.loss is not None:
        at += f", loss {number(outcome.loss, 0)}"
    match outcome.state:
        case "finished" | "stopped":
            text = f"{outcome.state} at {at}"
        case "crashed" if outcome.refused or (not outcome.step and outcome.reason):
            text = f"could not start: {outcome.reason}"
        case "crashed":
            text = f"crashed at {at}" + (f": {outcome.reason}" if outcome.reason else "")
        case "paused":
            text = f"paused at {at}; tui-trainer attach {spec.name} opens it again"
        case _:
            text = f"still training at {at}; tui-trainer attach {spec.name} opens it again"
    where = "" if outcome.refused else f" · {spec.directory}"
    return f"{spec.name} {' '.join(text.split())}{where}"


def status_on_disk(spec: RunSpec) -> RunState | None:
    """The run's status file; None without one."""
    return read_state(spec.directory)
