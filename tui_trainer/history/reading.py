"""Reading a table's rows, wherever its entries are held: in memory or in a run's store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tui_trainer.history import sending
from tui_trainer.history.buckets import Entries, Steps
from tui_trainer.history.records import Floats
from tui_trainer.history.window import Window, draw, nominal_edges
from tui_trainer.protocol.describe import Table
from tui_trainer.protocol.messages import Rows


class Reading:
    """Everything that asks, given `entries`: raw rows and levels of 8, 64, 512, … rows."""

    table: Table
    columns: int
    rows: int
    """Rows measured so far, whether still held raw or not."""
    first_step: int | None
    last_step: int | None

    def entries(self) -> list[Entries]:
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
        return sending.rows_since(self, row, budget)

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

    def _pieces(self, first: int, last: int, buckets: int) -> list[tuple[Entries, int, int]]:
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
