"""Determines what this terminal can show, and restores the terminal after the app."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, TextIO

from tui_trainer.cli.options import RunOptions

try:
    import termios
except ImportError:  # pragma: no cover - there is none on Windows
    termios = None  # type: ignore[assignment]

RESET_MODES = (
    "\x1b[?2026l"  # end a synchronised update
    "\x1b[?1049l"  # leave the alternate screen
    "\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1015l\x1b[?1016l"  # mouse reports off
    "\x1b[?1004l\x1b[?2004l"  # focus reports and bracketed paste off
    "\x1b[<u"  # pop the keyboard protocol
    "\x1b[?25h\x1b[0m"  # show the cursor, reset colours
)
EXIT_TIMEOUT_S = 10.0
"""An app that has not left this long after a signal is killed."""


@contextlib.contextmanager
def restored_terminal() -> Iterator[Callable[[], int]]:
    """Restore the terminal's settings on exit, and reset its modes when an exception is raised.

    SIGTERM and SIGHUP (unless ignored) become an interrupt, so that the app leaves in order. The
    yielded function returns the signal that was received, or 0. After a hang-up the terminal is
    reset, in case it is still there, and output goes to the null device.
    """
    settings = _settings()
    received = 0

    def as_interrupt(number: int, _: FrameType | None) -> None:
        nonlocal received
        first = not received
        received = received or number
        if first:
            # A hang-up is followed by SIGCONT, on which the app would take the terminal again.
            signal.signal(signal.SIGCONT, signal.SIG_DFL)
            watchdog.start()
        if number == signal.SIGHUP:
            _reset_modes()  # of a terminal that is still there, as after kill -HUP
            _discard_output()
        if first:  # a second interrupt would abort the exit that is in progress
            signal.raise_signal(signal.SIGINT)

    def force_exit() -> None:
        _restore(settings)
        os._exit(128 + received)

    watchdog = threading.Timer(EXIT_TIMEOUT_S, force_exit)
    watchdog.daemon = True

    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, as_interrupt) for number in signals}
    try:
        yield lambda: received
    except BaseException:
        _reset_modes()
        raise
    finally:
        watchdog.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        _restore(settings)


def _reset_modes() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.__stdout__.fileno(), RESET_MODES.encode())  # type: ignore[union-attr]


def _discard_output() -> None:
    """Send output to the null device: writing to a terminal that is gone would raise before the run
    has been ended."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        os.close(null)


def _settings() -> list[Any] | None:
    with contextlib.suppress(Exception):
        return termios.tcgetattr(sys.__stdin__.fileno())  # type: ignore[union-attr]
    return None


def _restore(settings: list[Any] | None) -> None:
    if settings is not None:
        with contextlib.suppress(Exception):
            fileno = sys.__stdin__.fileno()  # type: ignore[union-attr]
            termios.tcsetattr(fileno, termios.TCSANOW, settings)


@dataclass(frozen=True)
class ScreenCheck:
    """How to show a run on this terminal."""

    kind: Literal["screen", "plain", "json"]
    note: str = ""
    """Why the app is not shown although a user may expect it."""


def screen_for(options: RunOptions) -> ScreenCheck:
    """The kind of display that the options ask for, or else what the terminal can show."""
    if options.json:
        return ScreenCheck("json")
    if options.plain or not _is_terminal(sys.stdout):
        return ScreenCheck("plain")
    if reason := why_no_screen():
        return ScreenCheck("plain", f"{reason}: printing plain progress lines instead")
    return ScreenCheck("screen")


def why_no_screen() -> str:
    """Why the app cannot run on this terminal; "" when it can."""
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
