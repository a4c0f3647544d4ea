"""Brings a viewer's copy of a table up to date: entries encoded as `Rows` messages, and decoded.

The run store keeps entries that do not fill a chunk yet as the same messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import FACTOR, BucketLevel, Buckets, RawRows, Steps
from tui_trainer.history.series import MemorySeries, SeriesReader
from tui_trainer.protocol.messages import Rows

CATCH_UP_VALUES = 32_768
"""A viewer that connects late gets the whole run in at least this many values (buckets × columns),
even where its budget would give it fewer."""
CATCH_UP_BUCKETS = (32, 4_096)
"""Minimum and maximum number of buckets for catching up."""
MAX_MESSAGE_BYTES = 8 * 2**20
"""Half of the largest frame."""
MAX_STEP = 2**48
"""Larger step numbers are rejected: no training counts that far."""

# ---------------------------------------------------------------- sending


def rows_since(series: SeriesReader, row: int, budget: int) -> Rows:
    """The entries that a viewer with `row` rows lacks, in about `budget` bytes: raw rows where they
    fit, else buckets.

    A message that does not reach the newest row is continued by a call with `first + count`. It may
    begin before `row`, at the start of a bucket that replaces rows of the viewer.
    """
    if row > series.rows or row < 0:
        row = 0  # the viewer knows another run: send all of this one
    if row == series.rows:
        return Rows(series.table.id, row, 0, b"", b"")
    level = _choose_level(series, row, budget)
    first = row // level.size
    count = max(1, min(budget, MAX_MESSAGE_BYTES) // _entry_bytes(level, series.columns))
    entries = level.buckets(first, min(level.stop, first + count))
    if level.size == 1:
        return encode_rows(series.table.id, first, RawRows(entries.last, entries.value))
    return encode_rows(series.table.id, first * level.size, entries, level.size)


def _choose_level(series: SeriesReader, row: int, budget: int) -> BucketLevel:
    """The finest level that holds `row` and whose entries from `row` on fit."""
    backlog = series.rows - row
    low, high = CATCH_UP_BUCKETS
    whole_run = min(high, max(low, CATCH_UP_VALUES // max(1, series.columns)))
    least = whole_run * backlog / series.rows
    chosen: BucketLevel | None = None
    for level in series.levels():
        if not level.start <= row // level.size < level.stop:
            continue
        chosen = level
        fitting = max(budget / _entry_bytes(level, series.columns), least)
        if backlog / level.size <= fitting:
            break
    assert chosen is not None, "every row is in some level"
    return chosen


def _entry_bytes(level: BucketLevel, columns: int) -> int:
    return 8 + 4 * columns if level.size == 1 else 16 + 13 * columns


def encode_rows(table: int, first: int, entries: RawRows | Buckets, size: int = 1) -> Rows:
    """A message of entries that stand for `size` rows each, from row `first` on."""
    count = len(entries.last) * size
    last, value = _bytes(entries.last), _bytes(entries.value)
    if isinstance(entries, RawRows):
        return Rows(table, first, count, last, value)
    low, high, spans = _bytes(entries.low), _bytes(entries.high), _bytes(entries.first)
    return Rows(table, first, count, last, value, low, high, spans, _bytes(entries.flags))


def _bytes(array: NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


# ---------------------------------------------------------------- receiving


def apply_rows(series: MemorySeries, rows: Rows) -> None:
    """Add a message of `rows_since`. Raises ValueError if it does not fit: wrong sizes, or a gap
    after the last row held."""
    if rows.first > series.rows or rows.first < 0:
        raise ValueError(f"rows from {rows.first} on do not follow the {series.rows} held")
    if rows.count == 0:
        return
    entries = decode_rows(rows, series.columns)
    level = level_of(rows, len(entries.last))
    series.settle()
    if rows.first < series.rows:
        series.cut(rows.first)
    if not series.is_complete(level):
        raise ValueError(f"rows from {rows.first} on do not begin where a bucket ends")
    oldest = entries.last[0] if isinstance(entries, RawRows) else entries.first[0]
    if series.last_step is not None and oldest < series.last_step:
        raise ValueError(f"step {oldest} comes after step {series.last_step}")
    if isinstance(entries, RawRows):
        series.extend(*entries)
    else:
        series.append_buckets(level, entries)


def decode_rows(rows: Rows, columns: int) -> RawRows | Buckets:
    """The entries of a message, at least one. Raises ValueError for wrong sizes, steps that
    decrease or are out of range, and buckets that are not aligned."""
    last = np.frombuffer(rows.steps, "<i8").astype(np.int64)
    if not len(last) or (last[1:] < last[:-1]).any() or last[0] < 0 or last[-1] > MAX_STEP:
        raise ValueError("steps are missing or decrease")
    shape = (len(last), columns)
    value = _array(rows.values, "<f4", shape).astype(np.float32)
    level = level_of(rows, len(last))
    if not (rows.low or rows.high or rows.spans):
        if level:
            raise ValueError(f"{rows.count} rows were announced, {len(last)} came")
        return RawRows(last, value)
    if not level:
        raise ValueError(f"{len(last)} buckets cannot stand for {rows.count} rows")
    first: Steps = _array(rows.spans, "<i8", shape[:1]).astype(np.int64)
    if (first > last).any() or (first[1:] < last[:-1]).any() or first[0] < 0:
        raise ValueError("buckets overlap")
    low = _array(rows.low, "<f4", shape).astype(np.float32)
    high = _array(rows.high, "<f4", shape).astype(np.float32)
    return Buckets(first, last, low, high, value, _array(rows.flags, "u1", shape).astype(np.uint8))


def level_of(rows: Rows, entries: int) -> int:
    """The level whose entries a message holds. Raises ValueError when there is none."""
    size, rest = divmod(rows.count, entries)
    level = 0
    while FACTOR**level < size:
        level += 1
    if rest or FACTOR**level != size or rows.first % size:
        raise ValueError(f"{entries} entries cannot be {rows.count} rows from {rows.first}")
    return level


def _array(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.frombuffer(data, dtype)
    if array.size != np.prod(shape):
        raise ValueError(f"{len(data)} bytes are not an array of shape {shape}")
    return array.reshape(shape)
