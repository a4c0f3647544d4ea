"""How often to draw: by what frames cost the terminal, and by whether somebody is there.

A frame of `n` bytes is followed by a pause of at least n / budget seconds, so whatever a screen
shows, the terminal is sent no more than its budget while it is only watched. A key draws at once.
"""

from __future__ import annotations

from dataclasses import dataclass

IDLE = ((600.0, 4.0), (60.0, 2.0))
"""Seconds without a key or the mouse, and how many times rarer frames are from then on."""
EAGER_S = 1.5
"""After a key, what it brought about is fetched and drawn at full rate for so long."""
SLOWEST_S = 8.0
"""Frames are never further apart than this, whatever they cost."""
MOST_BACK_OFF = 16.0


@dataclass(frozen=True)
class TerminalLink:
    """What a line to a terminal bears."""

    frames_per_second: float
    bytes_per_second: float
    """To the terminal, while nobody presses a key."""
    frugal: bool = False
    """Whether to draw coarser, too: numbers and trends that change less often."""


FAST = TerminalLink(4.0, 8000.0)
SLOW = TerminalLink(0.5, 900.0, frugal=True)
"""`--slow-link`: a modem, a satellite, a train."""


class FrameScheduler:
    """Says when the next frame is due. Times are seconds of the caller's clock."""

    def __init__(self, link: TerminalLink, now: float = 0.0) -> None:
        self.link = link
        self._touched = now
        self._eager_until = 0.0
        self._at_once = False
        self._last = -SLOWEST_S
        self._mark = 0
        self._back_off = 1.0

    def touched(self, now: float) -> None:
        """A key was pressed, or the mouse."""
        self._touched = now
        self._eager_until = now + EAGER_S
        self._at_once = True
        self._back_off = 1.0

    def at_once(self) -> None:
        """What is known now must not wait: the next frame is due."""
        self._at_once = True

    def drawn(self, now: float, written: int) -> None:
        """A frame begins; `written` bytes have gone to the terminal before it."""
        self._last, self._mark = now, written
        self._at_once = False
        self._back_off = max(1.0, self._back_off / 2)

    def waits(self) -> None:
        """The terminal has not taken what it was sent: it gets less."""
        self._back_off = min(self._back_off * 2, MOST_BACK_OFF)

    def due(self, now: float, written: int) -> float:
        """Seconds until the next frame; 0 or less: now."""
        return 0.0 if self._at_once else self._last + self._interval(now, written) - now

    def polls_per_second(self, now: float) -> float:
        """How often the run needs to be asked: no more often than is drawn, but for a moment after
        a key."""
        if now < self._eager_until:
            return FAST.frames_per_second
        return self.link.frames_per_second / self._idle(now)

    def _interval(self, now: float, written: int) -> float:
        wanted = (written - self._mark) / self.link.bytes_per_second
        most = self.link.frames_per_second
        if now < self._eager_until and not self.link.frugal:
            wanted = 0.0
        interval = max(1 / most, min(wanted, SLOWEST_S))
        return interval * max(self._idle(now), self._back_off)

    def _idle(self, now: float) -> float:
        quiet = now - self._touched
        return next((rarer for seconds, rarer in IDLE if quiet >= seconds), 1.0)
