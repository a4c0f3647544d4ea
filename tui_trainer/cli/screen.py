"""Runs the app on this terminal over a run, and prints the exit summary."""

from __future__ import annotations

import contextlib
import gc
import io
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tui_trainer.cli.errors import FAULT, INTERRUPTED, CommandError, say
from tui_trainer.cli.exit_summary import exit_status, exit_summary, final_outcome, status_on_disk
from tui_trainer.cli.run_setup import discard, discard_refused
from tui_trainer.cli.terminal import restored_terminal
from tui_trainer.client.api import Session, Snapshot
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.runs.launch import LaunchError, LaunchRequest, RunProcess, launch

if TYPE_CHECKING:
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
        except OSError as fault:
            discard(spec)
            raise CommandError(f"cannot start the run process: {fault}") from fault
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


def show_run(spec: RunSpec, ascii: bool, slow_link: bool = False) -> int:
    """Start the run, show it until the user leaves, and return the exit status.

    The run process is started before Textual is imported, because it needs seconds to import torch.
    """
    opened = OpenedRun(spec)
    try:
        run_app = load_app()
    except KeyboardInterrupt:
        opened.abandon()
        raise
    return run_app_until_exit(
        lambda: run_app(opened.session, ascii=ascii, slow_link=slow_link), lambda: opened
    )


def show_start(
    start: Callable[[LaunchRequest], RunSpec],
    tasks: Sequence[TaskForm],
    ascii: bool,
    slow_link: bool = False,
) -> int:
    """Show the start screen, then the run that is started on it; return the exit status."""
    run_app = load_app()
    from tui_trainer.ui.screens.start import Launcher

    opened: list[OpenedRun] = []

    def open_run(request: LaunchRequest) -> Session:
        try:
            opened.append(OpenedRun(start(request)))
        except CommandError as fault:
            raise LaunchError(fault.message, fault.hint) from fault
        return opened[-1].session

    launcher = Launcher(tuple(tasks), open_run)
    return run_app_until_exit(
        lambda: run_app(
            None, ascii=ascii, start_mode="start", on_launch=launcher, slow_link=slow_link
        ),
        lambda: opened[-1] if opened else None,
    )


def load_app() -> Callable[..., int]:
    """Import the app and return its `run_app`.

    The garbage collector is off until the first paint: imports leave hardly any garbage, and
    looking for it takes an eighth of the time.
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
    return signal_status or status


def _run_catching_crash(run: Callable[[], int]) -> str:
    """Run the app and return the traceback of its crash; "" when it left in order.

    Textual prints the traceback to stderr once the terminal is restored. It goes to a file instead,
    because a screen full of our source code does not help a user who is training.
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
        say("the screen crashed; the training is not affected")
        return FAULT
    say("the screen crashed; the training is not affected", f"the traceback is in {path}")
    return FAULT
