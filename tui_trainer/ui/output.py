"""What goes to the terminal, counted; and whether the terminal takes it."""

from __future__ import annotations

from functools import cache

from textual.driver import Driver


class Metered(Driver):
    """Mixed into a driver of Textual's: counts the bytes that were handed to it."""

    written = 0

    def write(self, data: str) -> None:
        """Write, and count."""
        self.written += len(data.encode("utf-8", "replace"))
        super().write(data)  # type: ignore[safe-super]


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
