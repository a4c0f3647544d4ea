"""One measured table in the store: rows are added to its tail, full chunks packed, summarised."""

from __future__ import annotations

import sqlite3

import msgspec
import numpy as np

from tui_trainer.history.buckets import FACTOR, Buckets, summarise, summarise_rows
from tui_trainer.history.records import Floats
from tui_trainer.history.store import packing
from tui_trainer.history.store.packing import CHUNK, GROUP
from tui_trainer.protocol.describe import Table


class SeriesWriter:
    """Rows wait here until `write` and, when that was committed, `written`."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._columns = len(table.columns)
        self._steps: list[int] = []
        self._values: list[Floats] = []
        self._last_step: int | None = None
        self._rows: int | None = None
        """Rows in the database; None: to be asked."""
        self._rows_after = 0

    def add(self, step: int, values: Floats) -> int:
        """Take a row; the bytes it holds while it waits, 0 when it does not fit."""
        if values.shape != (self._columns,):
            return 0
        if self._last_step is not None and step < self._last_step:
            return 0
        self._last_step = step
        self._steps.append(step)
        self._values.append(values)
        return values.nbytes + 64

    def forget_place(self) -> None:
        """The database is another one now, or may hold less than was written."""
        self._rows = None

    def write(self, connection: sqlite3.Connection) -> None:
        """Add what waits, inside the caller's transaction. Raises sqlite3.Error."""
        if self._rows is None:
            self._declare(connection)
        assert self._rows is not None
        count = len(self._steps)
        self._rows_after = self._rows + count
        if not count or not self._columns:
            return
        rows = packing.row_buckets(np.array(self._steps, np.int64), np.stack(self._values))
        _add_tail(connection, self.table.id, 0, self._rows, rows)
        _compact(connection, self.table.id, 0, self._columns, self._rows_after)
        connection.execute(
            "UPDATE series SET rows = ? WHERE id = ?", (self._rows_after, self.table.id)
        )

    def written(self) -> None:
        """What `write` added was committed."""
        self._rows = self._rows_after
        self._steps.clear()
        self._values.clear()

    def _declare(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO series (id, description) VALUES (?, ?) "
            "ON CONFLICT (id) DO UPDATE SET description = excluded.description",
            (self.table.id, msgspec.json.encode(self.table)),
        )
        question = "SELECT rows FROM series WHERE id = ?"
        self._rows = int(connection.execute(question, (self.table.id,)).fetchone()[0])


def _add_tail(
    connection: sqlite3.Connection, series: int, level: int, first: int, new: Buckets
) -> None:
    connection.execute(
        "INSERT INTO tail VALUES (?, ?, ?, ?, ?)",
        (series, level, first, len(new.last), packing.pack_tail(new, level)),
    )


def _compact(
    connection: sqlite3.Connection, series: int, level: int, columns: int, entries: int
) -> None:
    """Make chunks of what fills them, out of `entries` entries, and the next level's tail."""
    which = (series, level)
    question = "SELECT coalesce(min(first), 0) FROM tail WHERE series = ? AND level = ?"
    first = int(connection.execute(question, which).fetchone()[0])
    if entries - first < CHUNK:
        return
    question = "SELECT count, data FROM tail WHERE series = ? AND level = ? ORDER BY first"
    held = Buckets.join(
        [
            packing.unpack_tail(data, level, count, columns)
            for count, data in connection.execute(question, which)
        ]
    )
    connection.execute("DELETE FROM tail WHERE series = ? AND level = ?", which)
    full = len(held.last) // CHUNK * CHUNK
    for start in range(0, full, CHUNK):
        chunk = _part(held, level, slice(start, start + CHUNK))
        _add_chunk(connection, series, level, (first + start) // CHUNK, chunk)
    if full < len(held.last):
        _add_tail(
            connection, series, level, first + full, _part(held, level, slice(full, len(held.last)))
        )
    done = _part(held, level, slice(0, full))
    coarse = summarise(done) if level else summarise_rows(done.last, done.value)
    _add_tail(connection, series, level + 1, first // FACTOR, coarse)
    _compact(connection, series, level + 1, columns, (first + full) // FACTOR)


def _part(held: Buckets, level: int, chosen: slice) -> Buckets:
    if level:
        return held.part(chosen)
    return packing.row_buckets(held.last[chosen], held.value[chosen])


def _add_chunk(
    connection: sqlite3.Connection, series: int, level: int, number: int, chunk: Buckets
) -> None:
    steps = packing.pack_steps(chunk.last, chunk.first if level else None)
    added = connection.execute(
        "INSERT INTO chunk (series, level, number, last_step, steps) VALUES (?, ?, ?, ?, ?)",
        (series, level, number, int(chunk.last[-1]), steps),
    ).lastrowid
    columns = chunk.value.shape[1]
    connection.executemany(
        "INSERT INTO part VALUES (?, ?, ?)",
        (
            (added, start // GROUP, packing.pack_values(chunk, level, slice(start, start + GROUP)))
            for start in range(0, columns, GROUP)
        ),
    )
