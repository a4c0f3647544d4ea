"""The history of one table: its newest rows raw, all rows in buckets of 8, 64, 512, … rows.

`SeriesReader` answers questions about the rows of a table, wherever they are held: `MemorySeries`
holds them in rings, `store.reader.StoredSeries` reads them from disk.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import (
    FACTOR,
    BucketLevel,
    Buckets,
    RawRows,
    Steps,
    summarise,
    summarise_rows,
)
from tui_trainer.history.records import Floats
from tui_trainer.history.window import Window, equal_edges, make_window
from tui_trainer.protocol.absent import absent_mask
from tui_trainer.protocol.schema import Table

T = TypeVar("T", bound=np.generic)
RECENT = 512
"""Newest steps that are searched for a value that is not measured at every step."""


class SeriesReader(ABC):
    """Reads the rows of one table from its levels."""

    table: Table
    columns: int
    """Number of columns."""
    rows: int
    """Rows measured so far, whether they are still held raw or not."""
    first_step: int | None
    last_step: int | None

    def column(self, name: str) -> int | None:
        """Index of the column called `name`; None when there is none."""
        names = (column.name for column in self.table.columns)
        return next((index for index, known in enumerate(names) if known == name), None)

    @abstractmethod
    def levels(self) -> Sequence[BucketLevel]:
        """All levels, finest (raw rows) first. Every row is in at least one level."""

    def latest(self) -> tuple[int, Floats] | None:
        """Step and values (columns,) of the newest row, or of the newest bucket where that row
        cannot be read; None before the first row."""
        for level in self.levels():
            if level.stop > level.start:
                newest = level.buckets(level.stop - 1, level.stop)
                if len(newest.last):
                    return int(newest.last[-1]), newest.value[-1].copy()
        return None

    def newest(self, name: str) -> float | None:
        """The newest value of the column called `name`; None before the first row or without such
        a column."""
        column = self.column(name)
        latest = self.latest() if column is not None else None
        return None if column is None or latest is None else float(latest[1][column])

    def newest_measured(self, name: str) -> float | None:
        """The newest value that was measured in the last RECENT steps, since a row may lack it;
        None where there is none."""
        column, last = self.column(name), self.last_step
        if column is None or last is None:
            return None
        window = self.window([column], max(0, last - RECENT + 1), last + 1, RECENT)
        known = np.flatnonzero(window.filled & ~absent_mask(window.last[:, 0]))
        return float(window.last[known[-1], 0]) if len(known) else None

    def value_at(self, name: str, step: int) -> float | None:
        """The value of the column called `name` in the last row at or before `step`, which is the
        newest row unless the training was rewound. None where there is none."""
        column = self.column(name)
        row = self.at(step) if column is not None else None
        return None if column is None or row is None else float(row[column])

    def at(self, step: int) -> Floats | None:
        """Values (columns,) of the last row at or before `step`; None when there is none."""
        found = self.row_at(step)
        return None if found is None else found[1]

    def row_at(self, step: int) -> tuple[int, Floats] | None:
        """Step and values (columns,) of the last row at or before `step`; None when there is none.

        Where only buckets are left or readable, those of the last bucket that ends by `step`.
        """
        for level in self.levels():
            index = level.find(step + 1) - 1
            if level.start <= index:
                found = level.buckets(index, index + 1)
                if len(found.value):
                    return int(found.last[-1]), found.value[-1].copy()
        return None

    def tail(self, count: int) -> tuple[Steps, Floats]:
        """Steps (n,) and values (n, columns) of the newest rows still held raw, n <= count."""
        raw = self.levels()[0]
        newest = raw.buckets(max(raw.start, raw.stop - count), raw.stop)
        return newest.last.copy(), newest.value.copy()

    def window(self, columns: Sequence[int], start: int, stop: int, bins: int) -> Window:
        """The chosen columns over steps start <= step < stop in `bins` bins."""
        chosen = np.asarray(columns, np.intp)
        bins = max(1, bins)
        edges = equal_edges(start, max(start, stop), bins)
        first, last = self._row_near(start), self._row_near(stop) + 1
        parts = [
            level.buckets(low, high, chosen) for level, low, high in self._cover(first, last, bins)
        ]
        return make_window(parts, edges, len(chosen))

    def _row_near(self, step: int) -> int:
        """Number of the first row at or after `step`, or of the bucket that holds it."""
        row = 0
        for level in self.levels():
            if level.stop == level.start:
                continue
            index = level.find(step)
            row = min(index * level.size, self.rows)
            if index > level.start or level.start == 0:
                return row
        return row

    def _cover(self, first: int, last: int, bins: int) -> list[tuple[BucketLevel, int, int]]:
        """Levels and index ranges that together cover rows first..last, oldest first: two to
        sixteen entries a bin where the levels allow it."""
        levels = self.levels()
        wanted = 0
        while wanted + 1 < len(levels) and levels[wanted + 1].size * bins * 2 <= last - first:
            wanted += 1
        pieces, row = [], first
        for k in range(len(levels) - 1, -1, -1):
            level = levels[k]
            low, high = max(row // level.size, level.start), min(level.stop, -(-last // level.size))
            if k > wanted:
                # Use a coarser level only for rows that the finer levels no longer hold.
                finer = levels[k - 1]
                high = min(high, -(-finer.start * finer.size // level.size))
            if low < high:
                pieces.append((level, low, high))
                row = high * level.size
        return pieces


# ---------------------------------------------------------------- rings


class Ring:
    """Slots for the newest `capacity` entries of a growing sequence, addressed by index."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.start = 0
        """Oldest index held."""
        self.stop = 0
        """One past the newest index held."""

    def slices(self, start: int, stop: int) -> list[slice]:
        """The one or two ranges of slots that hold indices start..stop."""
        if stop <= start:
            return []
        low, length = start % self.capacity, stop - start
        if low + length <= self.capacity:
            return [slice(low, low + length)]
        return [slice(low, self.capacity), slice(0, low + length - self.capacity)]

    def advance(self, count: int) -> list[tuple[slice, slice]]:
        """Make room for `count` new entries; returns pairs (slots, new entries that go there)."""
        kept = min(count, self.capacity)
        self.stop += count
        self.start = max(self.start, self.stop - self.capacity)
        pairs, taken = [], count - kept
        for slots in self.slices(self.stop - kept, self.stop):
            length = slots.stop - slots.start
            pairs.append((slots, slice(taken, taken + length)))
            taken += length
        return pairs

    def cut(self, stop: int) -> None:
        """Remove everything from index `stop` on."""
        self.stop = min(self.stop, stop)
        self.start = min(self.start, self.stop)

    def clear(self, at: int) -> None:
        """Remove everything; the next index is `at`."""
        self.start = self.stop = at


class RowRing(Ring):
    """The newest rows, as they were measured. The index is the row number."""

    size = 1

    def __init__(self, capacity: int, columns: int) -> None:
        super().__init__(capacity)
        self.steps: Steps = np.empty(capacity, np.int64)
        self.values: Floats = np.empty((capacity, columns), np.float32)

    def push(self, rows: RawRows) -> None:
        for slots, part in self.advance(len(rows.last)):
            self.steps[slots] = rows.last[part]
            self.values[slots] = rows.value[part]

    def rows(self, start: int, stop: int) -> RawRows:
        """Rows start..stop."""
        slots = self.slices(start, stop)
        return RawRows(_join(self.steps, slots), _join(self.values, slots))

    def find(self, step: int) -> int:
        """See `BucketLevel.find`."""
        steps = _join(self.steps, self.slices(self.start, self.stop))
        return self.start + int(np.searchsorted(steps, step, "left"))

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """See `BucketLevel.bounds`."""
        steps = _join(self.steps, self.slices(start, stop))
        return steps, steps

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """See `BucketLevel.buckets`."""
        if columns is None:
            return self.rows(start, stop).as_buckets()
        slots = self.slices(start, stop)
        values = [self.values[s].take(columns, axis=1) for s in slots]
        joined = np.concatenate(values) if values else np.zeros((0, len(columns)), np.float32)
        return RawRows(_join(self.steps, slots), joined).as_buckets()


class BucketRing(Ring):
    """The newest buckets of `size` rows."""

    def __init__(self, capacity: int, columns: int, size: int) -> None:
        super().__init__(capacity)
        self.size = size
        shape = (capacity, columns)
        # Pages of an array that were never written take no memory.
        self._slots = Buckets(
            np.empty(capacity, np.int64),
            np.empty(capacity, np.int64),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(shape, np.uint8),
        )

    def push(self, buckets: Buckets) -> None:
        for slots, part in self.advance(len(buckets.first)):
            target, new = self._slots.part(slots), buckets.part(part)
            target.first[:], target.last[:] = new.first, new.last
            target.low[:], target.high[:] = new.low, new.high
            target.value[:], target.flags[:] = new.value, new.flags

    def find(self, step: int) -> int:
        """See `BucketLevel.find`."""
        _, last = self.bounds(self.start, self.stop)
        return self.start + int(np.searchsorted(last, step, "left"))

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """See `BucketLevel.bounds`."""
        slots = self.slices(start, stop)
        return _join(self._slots.first, slots), _join(self._slots.last, slots)

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """See `BucketLevel.buckets`."""
        parts = [self._slots.part(s) for s in self.slices(start, stop) or [slice(0, 0)]]
        if columns is not None:
            parts = [part.of_columns(columns) for part in parts]
        return Buckets.join(parts)


def _join(array: NDArray[T], slots: list[slice]) -> NDArray[T]:
    if len(slots) == 1:
        return array[slots[0]]
    return np.concatenate([array[s] for s in slots]) if slots else array[:0]


# ---------------------------------------------------------------- in memory

MAX_ENTRIES = 8_192
MIN_ENTRIES = 64
TABLE_BYTES = 64 * 2**20
"""Memory of one table at most, unless MIN_ENTRIES is reached first (at about 15,000 columns)."""
ASSUMED_LEVELS = 5
"""Full levels of a run of a hundred million rows, for `ring_entries`."""


def ring_entries(columns: int) -> int:
    """Entries per ring for a table of this many columns: the power of two that keeps the table
    within TABLE_BYTES. 8,192 up to 118 columns, 4,096 at 200, 64 from 7,600 on."""
    entry_bytes = max(1, columns) * (4 + 13 * ASSUMED_LEVELS)
    fitting = max(1, TABLE_BYTES // entry_bytes)
    return int(min(MAX_ENTRIES, max(MIN_ENTRIES, 1 << (fitting.bit_length() - 1))))


class MemorySeries(SeriesReader):
    """All rows of one table in bounded memory.

    Each ring keeps its newest entries: the older a part of the run, the coarser the finest level
    that still holds it, and the coarsest level holds all of it. `ring_entries(columns)` raw rows
    (4 bytes a value) and as many buckets of each level (13 bytes a value: low, high, last, flags)
    are kept, so memory grows with the logarithm of the run's length: at most 67 MB a table up to
    15,000 columns (97 MB at 22,000) and 0.57 MB a series; 10 million steps of 200 series, in tables
    of any width, take less than 115 MB.

    Row numbers count the rows of this table from 0; steps never decrease but may have gaps. Not
    thread-safe.
    """

    def __init__(self, table: Table, entries: int | None = None) -> None:
        self.table = table
        self.columns = len(table.columns)
        self.rows = 0
        self.first_step: int | None = None
        self.last_step: int | None = None
        self._entries = entries or ring_entries(self.columns)
        self._raw = RowRing(self._entries, self.columns)
        self._rings: list[BucketRing] = []
        # Several buckets are made at once, to share the cost of numpy calls.
        self._batch = FACTOR * FACTOR if self._entries > FACTOR * FACTOR else FACTOR

    def levels(self) -> Sequence[BucketLevel]:
        return [self._raw, *self._rings]

    def append(self, step: int, values: Floats) -> None:
        """Add the newest row, values (columns,). Raises ValueError for a wrong number of columns
        or a step before the newest one."""
        if self.last_step is not None and step < self.last_step:
            raise ValueError(f"step {step} of {self.table.name} comes after step {self.last_step}")
        if values.shape != (self.columns,):
            raise ValueError(f"{self.table.name} has {self.columns} columns, got {values.shape}")
        raw = self._raw
        slot = raw.stop % raw.capacity
        raw.steps[slot] = step
        raw.values[slot] = values
        raw.stop += 1
        if raw.stop - raw.start > raw.capacity:
            raw.start += 1
        self.rows += 1
        if self.first_step is None:
            self.first_step = step
        self.last_step = step
        if self.rows - (self._rings[0].stop * FACTOR if self._rings else 0) >= self._batch:
            self.settle()

    def extend(self, steps: Steps, values: Floats) -> None:
        """Add n raw rows, values (n, columns)."""
        # Add rows in pieces: no row may leave the ring before it is in a bucket.
        piece = self._entries // 2
        for start in range(0, len(steps), piece):
            part = RawRows(steps, values).part(slice(start, start + piece))
            self._raw.push(part)
            self.rows += len(part.last)
            self._set_steps(int(part.last[0]), int(part.last[-1]))
            self.settle()

    def append_buckets(self, level: int, buckets: Buckets) -> None:
        """Add n buckets of 8**level rows each; the rows so far are a multiple of 8**level.

        Finer levels are cleared, since they cannot have a gap."""
        self.settle()
        self._make_rings(level)
        ring = self._rings[level - 1]
        self.rows += len(buckets.first) * ring.size
        piece = self._entries // 2
        for start in range(0, len(buckets.first), piece):
            ring.push(buckets.part(slice(start, start + piece)))
            self._summarise_ring(level)
        self._set_steps(int(buckets.first[0]), int(buckets.last[-1]))
        self._raw.clear(self.rows)
        for finer in self._rings[: level - 1]:
            finer.clear(self.rows // finer.size)

    def cut(self, rows: int) -> None:
        """Remove every row from number `rows` on."""
        self.settle()
        self.rows = min(self.rows, rows)
        rings: list[RowRing | BucketRing] = [self._raw, *self._rings]
        for ring in rings:
            ring.cut(self.rows // ring.size)
        newest = self.latest()
        self.last_step = None if newest is None else newest[0]
        if newest is None:
            self.first_step = None

    def is_complete(self, level: int) -> bool:
        """Whether the levels from `level` on hold all rows: false after a cut inside a bucket."""
        levels = self.levels()[level:]
        joined = all(
            fine.start * fine.size <= coarse.stop * coarse.size <= fine.stop * fine.size
            for fine, coarse in itertools.pairwise(levels)
        )
        return joined and (not levels or levels[0].stop * levels[0].size == self.rows)

    def settle(self) -> None:
        """Bring the buckets up to date; fewer than FACTOR rows remain without a bucket."""
        self._make_rings(1)
        done = self._rings[0].stop * FACTOR
        ready = (self._raw.stop - done) // FACTOR * FACTOR
        if ready > 0:
            self._rings[0].push(summarise_rows(self._raw.rows(done, done + ready)))
            self._summarise_ring(1)

    def _set_steps(self, first: int, last: int) -> None:
        if self.first_step is None:
            self.first_step = first
        self.last_step = last

    def _make_rings(self, count: int) -> None:
        while len(self._rings) < count:
            size = FACTOR ** (len(self._rings) + 1)
            self._rings.append(BucketRing(self._entries, self.columns, size))

    def _summarise_ring(self, level: int) -> None:
        """Bring all levels above `level` up to date."""
        fine = self._rings[level - 1]
        coarse_stop = self._rings[level].stop if len(self._rings) > level else 0
        ready = (fine.stop - coarse_stop * FACTOR) // FACTOR * FACTOR
        if ready > 0:
            self._make_rings(level + 1)
            done = coarse_stop * FACTOR
            self._rings[level].push(summarise(fine.buckets(done, done + ready)))
            self._summarise_ring(level + 1)
