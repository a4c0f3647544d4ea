"""On a terminal: start the run process, open the app over it, and say what became of it."""

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

from tui_trainer.cli.directory import discard, discard_refused
from tui_trainer.cli.errors import FAULT, INTERRUPTED, CommandError, say
from tui_trainer.cli.farewell import exit_status, farewell, last_told, outcome_of
from tui_trainer.cli.terminal import given_back
from tui_trainer.config.spec import RunSpec
from tui_trainer.session.api import Session, Snapshot
from tui_trainer.session.launch import Launched, launch
from tui_trainer.ui.launch import LaunchError, LaunchRequest

if TYPE_CHECKING:
    from tui_trainer.ui.screens.start_model import TaskForm

CRASH_FILE = "app-crash.txt"
_END_WITHIN_S = 15.0
"""How long the last line waits for a run that is ending: a step and a checkpoint to finish."""


class Shown(Protocol):
    """A run that was on the screen."""

    @property
    def directory(self) -> Path:
        """Where to leave the traceback of a crash of the app."""

    def say_goodbye(self) -> int:
        """Print the last line; returns the exit status."""


class Opened:
    """A run that was started from this terminal, and the session that shows it."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        try:
            self.launched: Launched = launch(spec)
        except OSError as fault:
            discard(spec)
            raise CommandError(f"cannot start the run process: {fault}") from fault
        from tui_trainer.session.live import LiveSession

        self.session: Session = LiveSession(self.launched.connect)

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.spec.directory)

    def abandon(self) -> None:
        """End a run whose screen never opened: nobody has seen it, nobody would look for it."""
        self.launched.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launched.process.wait(_END_WITHIN_S)

    def say_goodbye(self) -> int:
        """Print the last line; returns the exit status."""
        snapshot = self.session.poll()
        if self._is_ending(snapshot):
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                self.launched.process.wait(_END_WITHIN_S)
        outcome = outcome_of(snapshot, last_told(self.spec), self.launched.process)
        print(farewell(self.spec, outcome), flush=True)
        if outcome.state == "crashed" and outcome.hint:
            print(f"  hint: {outcome.hint}", file=sys.stderr)
        discard_refused(self.spec)
        return exit_status(self.spec, outcome)

    def _is_ending(self, snapshot: Snapshot) -> bool:
        kept = last_told(self.spec)
        states = {snapshot.status.state, kept.state if kept else ""}
        return bool(states & {"stopping", "finished", "stopped", "crashed"})


def show_run(spec: RunSpec, ascii: bool, slow_link: bool = False) -> int:
    """Start the run and show it until the user leaves; returns the exit status.

    The run process is started before Textual is imported: it needs seconds to import torch, and the
    app a quarter of one to paint.
    """
    opened = Opened(spec)
    try:
        run_app = load_app()
    except KeyboardInterrupt:
        opened.abandon()
        raise
    return until_left(
        lambda: run_app(opened.session, ascii=ascii, slow_link=slow_link), lambda: opened
    )


def show_start(
    start: Callable[[LaunchRequest], RunSpec],
    tasks: Sequence[TaskForm],
    ascii: bool,
    slow_link: bool = False,
) -> int:
    """The start screen, and then the run that is started on it."""
    run_app = load_app()
    from tui_trainer.ui.screens.start_model import Launcher

    opened: list[Opened] = []

    def open_run(request: LaunchRequest) -> Session:
        try:
            opened.append(Opened(start(request)))
        except CommandError as fault:
            raise LaunchError(fault.message, fault.hint) from fault
        return opened[-1].session

    launcher = Launcher(tuple(tasks), open_run)
    return until_left(
        lambda: run_app(
            None, ascii=ascii, start_mode="start", on_launch=launcher, slow_link=slow_link
        ),
        lambda: opened[-1] if opened else None,
    )


def load_app() -> Callable[..., int]:
    """Import the app; returns its `run_app`. Until it has painted no garbage is looked for: there
    is hardly any among all that is imported, and looking takes an eighth of the time."""
    gc.disable()
    from tui_trainer.ui.app import run_app

    return run_app


def until_left(run: Callable[[], int], opened: Callable[[], Shown | None]) -> int:
    """Run the app in a terminal that is given back, then say what became of the run.

    An interrupt from outside (SIGINT, SIGTERM, SIGHUP) ends the app alone: the run goes on, unless
    it is trained by the app.
    """
    outside, crash = 0, ""
    try:
        with given_back() as signalled:
            crash = _guarded(run)
    except KeyboardInterrupt:
        outside = INTERRUPTED
    finally:
        gc.enable()  # left before its first paint
    if signalled():
        outside = 128 + signalled()
    shown = opened()
    status = shown.say_goodbye() if shown else 0
    if crash:
        return _report(crash, shown.directory if shown else Path(tempfile.gettempdir()))
    return outside or status


def _guarded(run: Callable[[], int]) -> str:
    """Run the app; returns what is to be said of its crash, "" when it left in order.

    Textual prints the traceback of a fault in the app to stderr once the terminal is restored; it
    is kept from there, because a screen full of our own source helps nobody who is training.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            code = run()
    except Exception:
        return printed.getvalue() + traceback.format_exc()
    return (printed.getvalue() or "the app left with an error") if code else ""


def _report(crash: str, directory: Path) -> int:
    """One line about a crash of the app, its traceback in a file."""
    path = directory / CRASH_FILE
    try:
        path.write_text(crash, encoding="utf-8", errors="replace")
    except OSError:
        print(crash, file=sys.stderr)
        say("the screen failed; the training was not touched by it")
        return FAULT
    say("the screen failed; the training was not touched by it", f"the fault is in {path}")
    return FAULT
