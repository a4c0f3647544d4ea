"""The history of one table: its newest rows raw, all of it at levels of 8, 64, 512, … rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tui_trainer.history import sync
from tui_trainer.history.buckets import (
    FACTOR,
    BucketRows,
    Buckets,
    Floats,
    Level,
    Raw,
    Steps,
    Window,
    draw,
    nominal_edges,
    summarise,
    summarise_rows,
)
from tui_trainer.protocol.messages import Rows
from tui_trainer.protocol.schema import Table

# ---- reading
# Reading a table's rows, wherever its entries are held: in memory or in a run's store.


class SeriesReader:
    """Everything that asks, given `entries`: raw rows and levels of 8, 64, 512, … rows."""

    table: Table
    columns: int
    rows: int
    """Rows measured so far, whether still held raw or not."""
    first_step: int | None
    last_step: int | None

    def entries(self) -> list[BucketRows]:
        """Where rows are held, finest (raw) first. Every row is in some of them."""
        raise NotImplementedError

    def latest(self) -> tuple[int, Floats] | None:
        """Step and values (columns,) of the newest row; None before the first. Where that cannot be
        read, of the newest summary that can."""
        for held in self.entries():
            if held.stop > held.start:
                newest = held.buckets(held.stop - 1, held.stop)
                if len(newest.last):
                    return int(newest.last[-1]), newest.value[-1].copy()
        return None

    def at(self, step: int) -> Floats | None:
        """Values (columns,) of the last row at or before `step`; None when there is none.

        In a part of the run of which only summaries are left, or can be read: of the last summary
        that ends at or before it."""
        for held in self.entries():
            index = held.find(step + 1) - 1
            if held.start <= index:
                values: Floats = held.buckets(index, index + 1).value
                if len(values):
                    newest: Floats = values[-1].copy()
                    return newest
        return None

    def tail(self, count: int) -> tuple[Steps, Floats]:
        """Steps (n,) and values (n, columns) of the newest rows still held raw, n <= count."""
        raw = self.entries()[0]
        newest = raw.buckets(max(raw.start, raw.stop - count), raw.stop)
        return newest.last.copy(), newest.value.copy()

    def window(self, columns: Sequence[int], start: int, stop: int, buckets: int) -> Window:
        """The chosen columns over steps start <= step < stop in `buckets` stretches."""
        chosen = np.asarray(columns, np.intp)
        edges = nominal_edges(start, max(start, stop), max(1, buckets))
        first, last = self._row_near(start), self._row_near(stop) + 1
        parts = [
            held.buckets(low, high, chosen)
            for held, low, high in self._pieces(first, last, max(1, buckets))
        ]
        return draw(parts, edges, len(chosen))

    def rows_since(self, row: int, budget: int) -> Rows:
        """What a viewer that has `row` rows lacks, in about `budget` bytes: raw when it fits, else
        summarised; perhaps not all of it, then ask again from `first + count`. A piece may begin
        before `row`, at the boundary of a summary that replaces what the viewer had."""
        return sync.rows_since(self, row, budget)

    def _row_near(self, step: int) -> int:
        """First row at or after `step`, or that of the summary which has it."""
        row = 0
        for held in self.entries():
            if held.stop == held.start:
                continue
            index = held.find(step)
            row = min(index * held.size, self.rows)
            if index > held.start or held.start == 0:
                return row
        return row

    def _pieces(self, first: int, last: int, buckets: int) -> list[tuple[BucketRows, int, int]]:
        """Entries and index ranges that together cover rows first..last, oldest first: two to
        sixteen entries a stretch where the levels held allow it."""
        levels = self.entries()
        wanted = 0
        while wanted + 1 < len(levels) and levels[wanted + 1].size * buckets * 2 <= last - first:
            wanted += 1
        pieces, row = [], first
        for k in range(len(levels) - 1, -1, -1):
            held = levels[k]
            low, high = max(row // held.size, held.start), min(held.stop, -(-last // held.size))
            if k > wanted:
                # A coarser level only for what the finer ones no longer have.
                finer = levels[k - 1]
                high = min(high, -(-finer.start * finer.size // held.size))
            if low < high:
                pieces.append((held, low, high))
                row = high * held.size
        return pieces


MOST_ENTRIES = 8_192
LEAST_ENTRIES = 64
TABLE_BYTES = 64 * 2**20
"""What one table may grow to, before LEAST_ENTRIES is reached (at about 15,000 columns)."""
LEVELS_RECKONED = 5
"""Full levels of a run of a hundred million rows, for the reckoning of sizes."""


def ring_entries(columns: int) -> int:
    """Entries per ring for a table of so many columns: a power of two, so that a table stays
    within TABLE_BYTES. 8,192 up to 118 columns, 4,096 at 200, 64 from 7,600 on."""
    entry_bytes = max(1, columns) * (4 + 13 * LEVELS_RECKONED)
    fitting = max(1, TABLE_BYTES // entry_bytes)
    return int(min(MOST_ENTRIES, max(LEAST_ENTRIES, 1 << (fitting.bit_length() - 1))))


class MemorySeries(SeriesReader):
    """All rows of one table in bounded memory.

    `ring_entries(columns)` raw rows (4 bytes a value) and as many buckets of each level (13 bytes a
    value: low, high, last, flags) are kept, so memory grows with the logarithm of the run's length:
    at most 67 MB a table up to 15,000 columns (97 MB at 22,000) and 0.57 MB a series; 10 million
    steps of 200 series, in tables of any width, take less than 115 MB.

    Row numbers count this table's rows from 0; steps never decrease but may leave gaps. Not safe
    for use from several threads.
    """

    def __init__(self, table: Table, entries: int | None = None) -> None:
        self.table = table
        self.columns = len(table.columns)
        self.rows = 0
        """Rows measured so far, whether still held raw or not."""
        self.first_step: int | None = None
        self.last_step: int | None = None
        self._entries = entries or ring_entries(self.columns)
        self.raw = Raw(self._entries, self.columns)
        self.levels: list[Level] = []
        # Summaries are made of several buckets at once: the cost of numpy calls is shared.
        self._batch = FACTOR * FACTOR if self._entries > FACTOR * FACTOR else FACTOR

    def entries(self) -> list[BucketRows]:
        """See `Reading.entries`."""
        return [self.raw, *self.levels]

    # ------------------------------------------------------------ taking in

    def append(self, step: int, values: Floats) -> None:
        """Add the newest row, values (columns,). Raises ValueError for a wrong number of columns
        or a step before the newest one."""
        if self.last_step is not None and step < self.last_step:
            raise ValueError(f"step {step} of {self.table.name} comes after step {self.last_step}")
        if values.shape != (self.columns,):
            raise ValueError(f"{self.table.name} has {self.columns} columns, got {values.shape}")
        raw = self.raw
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
        if self.rows - (self.levels[0].stop * FACTOR if self.levels else 0) >= self._batch:
            self.settle()

    def apply(self, rows: Rows) -> None:
        """Take in what `rows_since` gave on the other side. Raises ValueError when it does not fit
        (wrong sizes, or a gap after the last row held)."""
        sync.apply(self, rows)

    def extend(self, steps: Steps, values: Floats) -> None:
        """Add n raw rows, values (n, columns)."""
        # In pieces: no row may leave the ring before it is in a summary.
        piece = self._entries // 2
        for start in range(0, len(steps), piece):
            part = steps[start : start + piece]
            self.raw.push(part, values[start : start + piece])
            self.rows += len(part)
            self._saw(int(part[0]), int(part[-1]))
            self.settle()

    def append_summary(self, level: int, buckets: Buckets) -> None:
        """Add n buckets of 8**level rows each; the rows so far are a multiple of 8**level.

        What is held at finer levels is given up: they cannot have a hole."""
        self.settle()
        self._make_levels(level)
        taken = self.levels[level - 1]
        self.rows += len(buckets.first) * taken.size
        piece = self._entries // 2
        for start in range(0, len(buckets.first), piece):
            taken.push(buckets.part(slice(start, start + piece)))
            self._cascade(level)
        self._saw(int(buckets.first[0]), int(buckets.last[-1]))
        self.raw.clear(self.rows)
        for finer in self.levels[: level - 1]:
            finer.clear(self.rows // finer.size)

    def cut(self, rows: int) -> None:
        """Forget every row from number `rows` on."""
        self.settle()
        self.rows = min(self.rows, rows)
        rings: list[Raw | Level] = [self.raw, *self.levels]
        for ring in rings:
            ring.cut(self.rows // ring.size)
        newest = self.latest()
        self.last_step = None if newest is None else newest[0]
        if newest is None:
            self.first_step = None

    def whole(self, level: int) -> bool:
        """Whether the rings from `level` on lack no row: false after a cut inside a summary."""
        rings = self.entries()[level:]
        joined = all(
            fine.start * fine.size <= coarse.stop * coarse.size <= fine.stop * fine.size
            for fine, coarse in itertools.pairwise(rings)
        )
        return joined and (not rings or rings[0].stop * rings[0].size == self.rows)

    def _saw(self, first: int, last: int) -> None:
        if self.first_step is None:
            self.first_step = first
        self.last_step = last

    def _make_levels(self, count: int) -> None:
        while len(self.levels) < count:
            self.levels.append(Level(self._entries, self.columns, FACTOR ** (len(self.levels) + 1)))

    def settle(self) -> None:
        """Bring the summaries up to date: fewer than FACTOR rows in none."""
        self._make_levels(1)
        done = self.levels[0].stop * FACTOR
        ready = (self.raw.stop - done) // FACTOR * FACTOR
        if ready > 0:
            steps, _ = self.raw.bounds(done, done + ready)
            self.levels[0].push(summarise_rows(steps, self.raw.take(done, done + ready)))
            self._cascade(1)

    def _cascade(self, level: int) -> None:
        fine = self.levels[level - 1]
        coarse_stop = self.levels[level].stop if len(self.levels) > level else 0
        ready = (fine.stop - coarse_stop * FACTOR) // FACTOR * FACTOR
        if ready > 0:
            self._make_levels(level + 1)
            done = coarse_stop * FACTOR
            self.levels[level].push(summarise(fine.buckets(done, done + ready)))
            self._cascade(level + 1)
