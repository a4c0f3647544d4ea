"""Giving the terminal back as it was, whatever happened on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
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


@contextlib.contextmanager
def given_back() -> Iterator[Callable[[], bool]]:
    """Around everything that draws: on a fault, modes are reset; settings are restored always.

    A polite request to end (SIGTERM) becomes an interrupt, so that it too leaves in order; what is
    yielded says whether there was one.
    """
    settings = _settings()
    terminated = False

    def as_interrupt(_: int, __: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, as_interrupt)
    try:
        yield lambda: terminated
    except BaseException:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.__stdout__.fileno(), LEAVE.encode())  # type: ignore[union-attr]
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        _restore(settings)


def _settings() -> list[Any] | None:
    with contextlib.suppress(Exception):
        return termios.tcgetattr(sys.__stdin__.fileno())  # type: ignore[union-attr]
    return None


def _restore(settings: list[Any] | None) -> None:
    if settings is not None:
        with contextlib.suppress(Exception):
            fileno = sys.__stdin__.fileno()  # type: ignore[union-attr]
            termios.tcsetattr(fileno, termios.TCSANOW, settings)
