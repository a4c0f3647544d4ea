"""What to send a viewer of a table's history: raw rows where they fit, else summaries."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tui_trainer.history.buckets import Entries
from tui_trainer.protocol.describe import Table
from tui_trainer.protocol.messages import Rows

CATCH_UP_VALUES = 32_768
"""Values (buckets × columns) in which a viewer that comes late gets the whole run at least, where
its budget would give it less."""
CATCH_UP_BUCKETS = (32, 4_096)
"""The fewest and the most buckets for that."""
LARGEST_PIECE = 8 * 2**20
"""Bytes; half of the largest frame."""


class Held(Protocol):
    """A table's history, wherever it is held."""

    @property
    def table(self) -> Table:
        """What was declared."""

    @property
    def columns(self) -> int:
        """How many there are."""

    @property
    def rows(self) -> int:
        """Measured so far."""

    def entries(self) -> list[Entries]:
        """See `Reading.entries`."""


def rows_since(history: Held, row: int, budget: int) -> Rows:
    """See `Reading.rows_since`."""
    if row > history.rows or row < 0:
        row = 0  # the viewer knows another run: all of it again
    if row == history.rows:
        return Rows(history.table.id, row, 0, b"", b"")
    ring = _choose(history, row, budget)
    first = row // ring.size
    most = max(1, min(budget, LARGEST_PIECE) // _entry_bytes(ring, history.columns))
    last = min(ring.stop, first + most)
    if ring.size == 1:
        raw = ring.buckets(first, last)
        return Rows(history.table.id, first, last - first, _bytes(raw.last), _bytes(raw.value))
    return _summary(history.table.id, ring, first, last)


def _choose(history: Held, row: int, budget: int) -> Entries:
    """The finest ring that has `row` and whose entries from there on fit."""
    backlog = history.rows - row
    low, high = CATCH_UP_BUCKETS
    whole = min(high, max(low, CATCH_UP_VALUES // max(1, history.columns)))
    floor = whole * backlog / history.rows
    chosen: Entries | None = None
    for ring in history.entries():
        if not ring.start <= row // ring.size < ring.stop:
            continue
        chosen = ring
        fitting = max(budget / _entry_bytes(ring, history.columns), floor)
        if backlog / ring.size <= fitting:
            break
    assert chosen is not None, "every row is in some ring"
    return chosen


def _entry_bytes(ring: Entries, columns: int) -> int:
    return 8 + 4 * columns if ring.size == 1 else 16 + 13 * columns


def _summary(table: int, level: Entries, first: int, last: int) -> Rows:
    buckets = level.buckets(first, last)
    return Rows(
        table,
        first * level.size,
        (last - first) * level.size,
        _bytes(buckets.last),
        _bytes(buckets.value),
        _bytes(buckets.low),
        _bytes(buckets.high),
        _bytes(buckets.first),
        _bytes(buckets.flags),
    )


def _bytes(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
