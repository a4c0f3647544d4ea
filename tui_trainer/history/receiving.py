"""How a viewer takes in what it is sent of a table, and refuses what does not fit."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tui_trainer.history.buckets import FACTOR, Buckets, Steps
from tui_trainer.history.records import Floats
from tui_trainer.protocol.messages import Rows


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
