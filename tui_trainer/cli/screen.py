"""On a terminal: start the run process, open the app over it, and say what became of it."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

from tui_trainer.cli.directory import discard, discard_refused
from tui_trainer.cli.errors import FAULT, INTERRUPTED, USAGE, CommandError, say
from tui_trainer.cli.options import RunOptions
from tui_trainer.client.api import Session, Snapshot
from tui_trainer.client.launch import Launched, LaunchError, LaunchRequest, launch
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.run_state import RunState, read_state
from tui_trainer.protocol import schema

if TYPE_CHECKING:
    from tui_trainer.ui.screens.start import TaskForm


# ---- farewell
# After the screen has closed: what became of the run, in one line, and the exit status.


@dataclass(frozen=True)
class Outcome:
    """How a run stood when its screen closed."""

    state: str
    """As `Status.state`."""
    step: int = 0
    loss: float | None = None
    reason: str = ""
    hint: str = ""
    pid: int = 0
    refused: bool = False
    """As `Status.refused`."""
    exit_status: int | None = None
    """Of the run process; None while it lives."""

    @property
    def ended(self) -> bool:
        """Whether no further step will come."""
        return self.state in ("finished", "stopped", "crashed")


def outcome_of(
    snapshot: Snapshot, kept: RunState | None, process: subprocess.Popen[bytes]
) -> Outcome:
    """The newest of what the session showed last and what the run left on disk; a process that is
    gone without having said so has crashed."""
    status = snapshot.status
    code = process.poll()
    told = Outcome(status.state, status.step, _last_loss(snapshot))
    told = replace(told, reason=status.reason, hint=status.hint, refused=status.refused)
    if kept is not None and (kept.ended or kept.step > told.step) and not told.ended:
        told = Outcome(kept.state, kept.step, kept.loss)
        told = replace(told, reason=kept.reason, hint=kept.hint, refused=kept.refused)
    if code is not None and not told.ended:
        died = f"its process ended without a word ({_ending(code)})"
        told = replace(told, state="crashed", reason=told.reason or died)
    return replace(told, pid=process.pid, exit_status=_as_status(code))


def _last_loss(snapshot: Snapshot) -> float | None:
    table = snapshot.history.table(schema.STEP)
    latest = table.latest() if table is not None else None
    return float(latest[1][0]) if latest is not None else None


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _as_status(code: int | None) -> int | None:
    return 128 - code if code is not None and code < 0 else code


def exit_status(spec: RunSpec, outcome: Outcome) -> int:
    """The script's own for `run`. For a task 0, 1 where it crashed or its last loss was not finite,
    2 where it could not be run as asked."""
    if spec.task == "script" and outcome.ended and outcome.exit_status is not None:
        return outcome.exit_status
    if outcome.state == "finished":
        return outcome.exit_status or 0  # its loss may not have been finite
    if outcome.state != "crashed":
        return 0
    return USAGE if outcome.exit_status == USAGE else FAULT


def exit_summary(spec: RunSpec, outcome: Outcome) -> str:
    """One line for the shell's screen."""
    at = f"step {outcome.step:,}"
    if outcome.loss is not None:
        at += (
            f", loss {outcome.loss:.4g}"
            if math.isfinite(outcome.loss)
            else f", loss {outcome.loss}"
        )
    match outcome.state:
        case "finished" | "stopped":
            said = f"{outcome.state} at {at}"
        case "crashed" if outcome.refused or (not outcome.step and outcome.reason):
            said = f"could not start: {outcome.reason}"
        case "crashed":
            said = f"crashed at {at}" + (f": {outcome.reason}" if outcome.reason else "")
        case "paused":
            said = f"still paused at {at}; tui-trainer attach {spec.name} comes back to it"
        case _:
            said = f"still training at {at}; tui-trainer attach {spec.name} comes back to it"
    kept = "" if outcome.refused else f" · {spec.directory}"
    return f"{spec.name} {' '.join(said.split())}{kept}"


def last_reported(spec: RunSpec) -> RunState | None:
    """What the run last left on disk about itself."""
    return read_state(spec.directory)


# ---- terminal
# Giving the terminal back as it was, whatever happened on the way.


try:
    import termios
except ImportError:  # pragma: no cover - there is none on Windows
    termios = None  # type: ignore[assignment]

LEAVE = (
    "\x1b[?2026l"  # end a synchronised update that was being written
    "\x1b[?1049l"  # leave the alternate screen
    "\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1015l\x1b[?1016l"  # mouse reports off
    "\x1b[?1004l\x1b[?2004l"  # focus reports and bracketed paste off
    "\x1b[<u"  # the keyboard protocol that was pushed, popped
    "\x1b[?25h\x1b[0m"  # the cursor back, no colour
)
LEAVES_WITHIN_S = 10.0
"""An app that was asked to end and is still there after so long is ended."""


@contextlib.contextmanager
def restored_terminal() -> Iterator[Callable[[], int]]:
    """Around everything that draws: on a fault, modes are reset; settings are restored always.

    A request to end (SIGTERM) and a hang-up (SIGHUP, unless it is ignored) become an interrupt, so
    that they too leave in order; what is yielded gives the signal that came, 0 for none. After a
    hang-up there is nobody to print to, and printing goes nowhere.
    """
    settings = _settings()
    came = 0

    def as_interrupt(number: int, _: FrameType | None) -> None:
        nonlocal came
        if number == signal.SIGHUP:
            _print_to_nobody()
        if came:
            return  # it is leaving: a second interrupt would break off the leaving itself
        came = number
        # A hang-up comes with SIGCONT, on which the app would take the terminal anew.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        insist.start()
        signal.raise_signal(signal.SIGINT)

    def break_off() -> None:
        _restore(settings)
        os._exit(128 + came)

    insist = threading.Timer(LEAVES_WITHIN_S, break_off)
    insist.daemon = True

    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, as_interrupt) for number in heard}
    try:
        yield lambda: came
    except BaseException:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.__stdout__.fileno(), LEAVE.encode())  # type: ignore[union-attr]
        raise
    finally:
        insist.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        _restore(settings)


def _print_to_nobody() -> None:
    """Writing to a terminal that is gone would raise where the run is still to be ended."""
    with contextlib.suppress(OSError):
        nobody = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nobody, descriptor)
        os.close(nobody)


def _settings() -> list[Any] | None:
    with contextlib.suppress(Exception):
        return termios.tcgetattr(sys.__stdin__.fileno())  # type: ignore[union-attr]
    return None


def _restore(settings: list[Any] | None) -> None:
    if settings is not None:
        with contextlib.suppress(Exception):
            fileno = sys.__stdin__.fileno()  # type: ignore[union-attr]
            termios.tcsetattr(fileno, termios.TCSANOW, settings)


CRASH_FILE = "app-crash.txt"
_END_WITHIN_S = 15.0
"""How long the last line waits for a run that is ending: a step and a checkpoint to finish."""


class ShownRun(Protocol):
    """A run that was on the screen."""

    @property
    def directory(self) -> Path:
        """Where to leave the traceback of a crash of the app."""

    def say_goodbye(self) -> int:
        """Print the last line; returns the exit status."""


class OpenedRun:
    """A run that was started from this terminal, and the session that shows it."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        try:
            self.launched: Launched = launch(spec)
        except OSError as fault:
            discard(spec)
            raise CommandError(f"cannot start the run process: {fault}") from fault
        from tui_trainer.client.live import LiveSession

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
        outcome = outcome_of(snapshot, last_reported(self.spec), self.launched.process)
        print(exit_summary(self.spec, outcome), flush=True)
        if outcome.state == "crashed" and outcome.hint:
            print(f"  hint: {outcome.hint}", file=sys.stderr)
        discard_refused(self.spec)
        return exit_status(self.spec, outcome)

    def _is_ending(self, snapshot: Snapshot) -> bool:
        kept = last_reported(self.spec)
        states = {snapshot.status.state, kept.state if kept else ""}
        return bool(states & {"stopping", "finished", "stopped", "crashed"})


def show_run(spec: RunSpec, ascii: bool, slow_link: bool = False) -> int:
    """Start the run and show it until the user leaves; returns the exit status.

    The run process is started before Textual is imported: it needs seconds to import torch, and the
    app a quarter of one to paint.
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
    """The start screen, and then the run that is started on it."""
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
    """Import the app; returns its `run_app`. Until it has painted no garbage is looked for: there
    is hardly any among all that is imported, and looking takes an eighth of the time."""
    gc.disable()
    from tui_trainer.ui.app import run_app

    return run_app


def run_app_until_exit(run: Callable[[], int], opened: Callable[[], ShownRun | None]) -> int:
    """Run the app in a terminal that is given back, then say what became of the run.

    An interrupt from outside (SIGINT, SIGTERM, SIGHUP) ends the app alone: the run goes on, unless
    it is trained by the app.
    """
    outside, crash = 0, ""
    try:
        with restored_terminal() as signalled:
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


# ---- showing
# Whether this is a terminal to open the screen on, or one for plain lines.


@dataclass(frozen=True)
class ScreenCheck:
    """How a run is shown."""

    kind: Literal["screen", "plain", "json"]
    note: str = ""
    """Why it is not the screen, where a person at a terminal would have expected it."""


def screen_for(options: RunOptions) -> ScreenCheck:
    """What was asked for, or else what the terminal can do."""
    if options.json:
        return ScreenCheck("json")
    if options.plain or not _is_terminal(sys.stdout):
        return ScreenCheck("plain")
    if reason := why_no_screen():
        return ScreenCheck("plain", f"{reason}: plain progress lines instead of the screen")
    return ScreenCheck("screen")


def why_no_screen() -> str:
    """Why the screen cannot be opened here, for people; "" when it can."""
    if not _is_terminal(sys.stdout):
        return "the output is not a terminal"
    if not _is_terminal(sys.stdin):
        return "the input is not a terminal, so no key would arrive"
    term = os.environ.get("TERM", "")
    if term in ("", "dumb", "unknown"):
        return f"this terminal cannot move its cursor (TERM={term or 'is not set'})"
    return ""


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
