"""What goes to the terminal, counted; and whether the terminal takes it."""

from __future__ import annotations

import contextlib
import signal
from functools import cache
from threading import Event, Thread, current_thread, main_thread

from textual.driver import Driver

try:
    import termios
except ImportError:  # pragma: no cover - there is none on Windows
    termios = None  # type: ignore[assignment]

PATIENCE_S = 1.0
"""How long leaving waits for a terminal that takes nothing …"""
AGAIN_S = 0.1
"""… and how often what it has not taken is then thrown away."""


class Metered(Driver):
    """Mixed into a driver of Textual's: counts the bytes that were handed to it, and closes whether
    the terminal takes them or not."""

    written = 0

    def write(self, data: str) -> None:
        """Write, and count."""
        self.written += len(data.encode("utf-8", "replace"))
        super().write(data)  # type: ignore[safe-super]

    def close(self) -> None:
        """Wait for the terminal to take what is left, but not for ever: somebody wants to leave."""
        writer = getattr(self, "_writer_thread", None)
        if termios is None or writer is None or current_thread() is not main_thread():
            super().close()
            return
        closed = Event()
        Thread(target=self._throw_away, args=(writer, closed), daemon=True).start()
        before = signal.signal(signal.SIGWINCH, lambda *_: None)  # one that interrupts a write
        try:
            super().close()
        finally:
            closed.set()
            signal.signal(signal.SIGWINCH, before or signal.SIG_DFL)

    def _throw_away(self, writer: Thread, closed: Event) -> None:
        """Empty what the terminal has not taken, and let the writer notice that there is room."""
        patience = PATIENCE_S
        while not closed.wait(patience):
            with contextlib.suppress(OSError, ValueError, termios.error):
                termios.tcflush(writer.fileno(), termios.TCOFLUSH)  # type: ignore[attr-defined]
                if writer.ident is not None and writer.is_alive():
                    signal.pthread_kill(writer.ident, signal.SIGWINCH)
            patience = AGAIN_S


@cache
def metered(driver: type[Driver]) -> type[Driver]:
    """The driver, with its output counted."""
    return type(f"Metered{driver.__name__}", (Metered, driver), {})


def written(driver: Driver | None) -> int:
    """Bytes handed to the terminal so far; 0 where there is none."""
    return driver.written if isinstance(driver, Metered) else 0


def waiting(driver: Driver | None) -> int:
    """Pieces of output that the terminal has not taken yet.

    Textual writes on a thread from a queue that holds 30 of them; when it is full, whoever draws is
    kept waiting, and that is the event loop. There is no public way to see how full it is.
    """
    queue = getattr(getattr(driver, "_writer_thread", None), "_queue", None)
    return queue.qsize() if queue is not None else 0
