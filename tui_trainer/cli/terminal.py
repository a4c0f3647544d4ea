"""Giving the terminal back as it was, whatever happened on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

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
def given_back() -> Iterator[Callable[[], int]]:
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
