"""How a viewer takes in what it is sent of a table, and refuses what does not fit."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tui_trainer.history.buckets import FACTOR, BucketRows, Buckets, Floats, Steps
from tui_trainer.protocol.messages import Rows
from tui_trainer.protocol.schema import Table


class Growing(Protocol):
    """A table's history that can be added to, as `TableHistory` is."""

    columns: int
    rows: int
    last_step: int | None

    def settle(self) -> None:
        """Bring the summaries up to date."""

    def cut(self, rows: int) -> None:
        """Forget every row from number `rows` on."""

    def whole(self, level: int) -> bool:
        """Whether no row is missing from `level` on."""

    def extend(self, steps: Steps, values: Floats) -> None:
        """Add raw rows."""

    def append_summary(self, level: int, buckets: Buckets) -> None:
        """Add buckets of 8**level rows each."""


def apply(history: Growing, rows: Rows) -> None:
    """See `TableHistory.apply`."""
    if rows.first > history.rows or rows.first < 0:
        raise ValueError(f"rows from {rows.first} on do not follow the {history.rows} held")
    if rows.count == 0:
        return
    steps = _read(rows.steps, "<i8", -1, 0).astype(np.int64)
    if not len(steps) or not _ascending(steps):
        raise ValueError("steps are missing or run backwards")
    values = _read(rows.values, "<f4", len(steps), history.columns).astype(np.float32)
    summary: tuple[int, Buckets] | None = None
    if rows.low or rows.high or rows.spans:
        summary = _read_summary(rows, steps, values)
    elif rows.count != len(steps):
        raise ValueError(f"{rows.count} rows were announced, {len(steps)} came")
    level = 0 if summary is None else summary[0]
    history.settle()
    if rows.first < history.rows:
        history.cut(rows.first)
    if not history.whole(level):
        raise ValueError(f"rows from {rows.first} on do not begin where a summary ends")
    oldest = steps[0] if summary is None else summary[1].first[0]
    if history.last_step is not None and oldest < history.last_step:
        raise ValueError(f"step {oldest} comes after step {history.last_step}")
    if summary is None:
        history.extend(steps, values)
    else:
        history.append_summary(*summary)


def _read_summary(
    rows: Rows, steps: Steps, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> tuple[int, Buckets]:
    count, columns = values.shape
    size, rest = divmod(rows.count, count)
    level = 0
    while FACTOR**level < size:
        level += 1
    if rest or level == 0 or FACTOR**level != size or rows.first % size:
        raise ValueError(f"{count} summaries cannot stand for {rows.count} rows from {rows.first}")
    spans = _read(rows.spans, "<i8", count, 0).astype(np.int64)
    if (spans > steps).any() or (spans[1:] < steps[:-1]).any():
        raise ValueError("summaries overlap")
    low = _read(rows.low, "<f4", count, columns).astype(np.float32)
    high = _read(rows.high, "<f4", count, columns).astype(np.float32)
    flags = _read(rows.flags, "u1", count, columns).astype(np.uint8)
    return level, Buckets(spans, steps, low, high, values, flags)


def _read(
    data: bytes, dtype: str, count: int, columns: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    size = np.dtype(dtype).itemsize * max(1, columns)
    if count < 0:
        count, rest = divmod(len(data), size)
        if rest:
            raise ValueError("an array is cut short")
    width = columns if columns or dtype != "<i8" else 1
    if len(data) != count * np.dtype(dtype).itemsize * width:
        raise ValueError(f"{len(data)} bytes are not {count} rows of {width} values")
    array = np.frombuffer(data, dtype)
    return array if dtype == "<i8" else array.reshape(count, columns)


def _ascending(steps: Steps) -> bool:
    return bool((steps[1:] >= steps[:-1]).all())


# ---- sending
# What to send a viewer of a table's history: raw rows where they fit, else summaries.


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

    def entries(self) -> list[BucketRows]:
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


def _choose(history: Held, row: int, budget: int) -> BucketRows:
    """The finest ring that has `row` and whose entries from there on fit."""
    backlog = history.rows - row
    low, high = CATCH_UP_BUCKETS
    whole = min(high, max(low, CATCH_UP_VALUES // max(1, history.columns)))
    floor = whole * backlog / history.rows
    chosen: BucketRows | None = None
    for ring in history.entries():
        if not ring.start <= row // ring.size < ring.stop:
            continue
        chosen = ring
        fitting = max(budget / _entry_bytes(ring, history.columns), floor)
        if backlog / ring.size <= fitting:
            break
    assert chosen is not None, "every row is in some ring"
    return chosen


def _entry_bytes(ring: BucketRows, columns: int) -> int:
    return 8 + 4 * columns if ring.size == 1 else 16 + 13 * columns


def _summary(table: int, level: BucketRows, first: int, last: int) -> Rows:
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
