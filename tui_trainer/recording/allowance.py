"""How much of what is printed a viewer is sent: bursts whole, of a flood the newest."""

from __future__ import annotations

BACKLOG_BYTES = 512 * 1024
"""What was printed before a viewer came."""
BYTES_A_SECOND = 32 * 1024
"""More than anybody can read."""
BURST_BYTES = 128 * 1024
"""Such as a long traceback."""
ANSWERS = 4
"""A slow viewer, whose answers are small, is behind by at most so many of them."""


class Allowance:
    """Grows with time and is spent; times are seconds of the caller's clock."""

    def __init__(self, now: float) -> None:
        self._bytes = float(BACKLOG_BYTES)
        self._now = now

    def at(self, now: float, budget: int) -> int:
        """Bytes that may be sent now to a viewer whose answers hold `budget` bytes."""
        grown = self._bytes + (now - self._now) * min(BYTES_A_SECOND, budget)
        self._now = now
        # What is left of the backlog is not taken away again.
        self._bytes = max(self._bytes, min(grown, BURST_BYTES, ANSWERS * budget))
        return int(self._bytes)

    def spend(self, count: int) -> None:
        """So many were sent."""
        self._bytes = max(0.0, self._bytes - count)
