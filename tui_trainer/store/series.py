"""The rows of one measured table in the store (tables `series`, `chunk`, `part` and `tail`).

Rows are appended to a tail. Once the tail of a level has 512 rows or buckets, they are packed into
a chunk and summarised in the tail of the level above.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec
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
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol.schema import Table
from tui_trainer.store import codec
from tui_trainer.store.codec import CHUNK, DECODE_ERRORS, GROUP, Part
from tui_trainer.store.database import MEASUREMENTS, Store
from tui_trainer.store.schema import DamageError

T = TypeVar("T", bound=np.generic)

# ---------------------------------------------------------------- writing


@contextmanager
def reading_back() -> Iterator[None]:
    """Raise `DamageError` if entries that were written before cannot be decoded."""
    try:
        yield
    except DECODE_ERRORS as error:
        raise DamageError(f"what was recorded cannot be decoded: {error}") from error


class SeriesWriter:
    """Appends rows to one table."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._columns = len(table.columns)
        self._seqs: list[int] = []
        self._steps: list[int] = []
        self._values: list[Floats] = []
        self._last_step: int | None = None
        self._rows: int | None = None
        """Number of rows in the database; None: not yet known."""
        self._rows_after = 0

    def add(self, seq: int, step: int, values: Floats) -> int:
        """Take a row; returns its bytes in memory, 0 if it does not fit the table."""
        if values.shape != (self._columns,):
            return 0
        if self._last_step is not None and step < self._last_step:
            return 0
        self._last_step = step
        self._seqs.append(seq)
        self._steps.append(step)
        self._values.append(values)
        return values.nbytes + 72

    def reopened(self) -> None:
        self._rows = None

    def write(self, connection: sqlite3.Connection, first_seq: int) -> None:
        if self._rows is None:
            self._rows = self._declare(connection)
        count = len(self._steps)
        self._rows_after = self._rows + count
        if not count or not self._columns:
            return
        rows = RawRows(np.array(self._steps, np.int64), np.stack(self._values))
        self._add_rows(connection, self._rows, rows, np.array(self._seqs, np.int64) + first_seq)
        sql = "UPDATE series SET rows = ? WHERE id = ?"
        connection.execute(sql, (self._rows_after, self.table.id))

    def written(self) -> None:
        self._rows = self._rows_after
        self._seqs.clear()
        self._steps.clear()
        self._values.clear()

    def _declare(self, connection: sqlite3.Connection) -> int:
        connection.execute(
            "INSERT INTO series (id, description) VALUES (?, ?) "
            "ON CONFLICT (id) DO UPDATE SET description = excluded.description",
            (self.table.id, msgspec.json.encode(self.table)),
        )
        sql = "SELECT rows FROM series WHERE id = ?"
        with reading_back():
            return int(connection.execute(sql, (self.table.id,)).fetchone()[0])

    def _add_rows(
        self, connection: sqlite3.Connection, first: int, new: RawRows, seqs: Steps
    ) -> None:
        """Append rows to the tail of level 0, and move full chunks out of the tail."""
        self._add_tail(connection, 0, first, new, seqs)
        start = self._tail_start(connection, 0)
        if first + len(new.last) - start < CHUNK:
            return
        found = self._take_tail(connection, 0)
        with reading_back():
            rows = RawRows.join([codec.decode_raw_tail(data, self._columns) for data, _ in found])
            seqs = np.concatenate([np.frombuffer(data, "<i8") for _, data in found])
        full = len(rows.last) // CHUNK * CHUNK
        for at in range(0, full, CHUNK):
            chunk = slice(at, at + CHUNK)
            packed = codec.pack_integers(seqs[chunk])
            self._add_chunk(connection, 0, (start + at) // CHUNK, rows.part(chunk), packed)
        if full < len(rows.last):
            rest = slice(full, None)
            self._add_tail(connection, 0, start + full, rows.part(rest), seqs[rest])
        done = summarise_rows(rows.part(slice(0, full)))
        self._add_buckets(connection, 1, start // FACTOR, done)

    def _add_buckets(
        self, connection: sqlite3.Connection, level: int, first: int, new: Buckets
    ) -> None:
        """Append buckets to the tail of a level, and move full chunks out of the tail."""
        self._add_tail(connection, level, first, new)
        start = self._tail_start(connection, level)
        if first + len(new.last) - start < CHUNK:
            return
        found = self._take_tail(connection, level)
        with reading_back():
            buckets = Buckets.join(
                [codec.decode_bucket_tail(data, level, self._columns) for data, _ in found]
            )
        full = len(buckets.last) // CHUNK * CHUNK
        for at in range(0, full, CHUNK):
            chunk = buckets.part(slice(at, at + CHUNK))
            self._add_chunk(connection, level, (start + at) // CHUNK, chunk, None)
        if full < len(buckets.last):
            self._add_tail(connection, level, start + full, buckets.part(slice(full, None)))
        done = summarise(buckets.part(slice(0, full)))
        self._add_buckets(connection, level + 1, start // FACTOR, done)

    def _add_tail(
        self,
        connection: sqlite3.Connection,
        level: int,
        first: int,
        entries: RawRows | Buckets,
        seqs: Steps | None = None,
    ) -> None:
        data = codec.encode_tail(self.table.id, first, entries, FACTOR**level)
        raw_seqs = None if seqs is None else seqs.astype("<i8").tobytes()
        connection.execute(
            "INSERT INTO tail VALUES (?, ?, ?, ?, ?)", (self.table.id, level, first, data, raw_seqs)
        )

    def _tail_start(self, connection: sqlite3.Connection, level: int) -> int:
        sql = "SELECT min(first) FROM tail WHERE series = ? AND level = ?"
        with reading_back():
            return int(connection.execute(sql, (self.table.id, level)).fetchone()[0])

    def _take_tail(self, connection: sqlite3.Connection, level: int) -> list[tuple[bytes, bytes]]:
        """Delete the tail of a level and return its (data, seqs)."""
        which = "FROM tail WHERE series = ? AND level = ?"
        key = (self.table.id, level)
        found = connection.execute(f"SELECT data, seqs {which} ORDER BY first", key).fetchall()
        connection.execute(f"DELETE {which}", key)
        return found

    def _add_chunk(
        self,
        connection: sqlite3.Connection,
        level: int,
        number: int,
        chunk: RawRows | Buckets,
        seqs: bytes | None,
    ) -> None:
        steps = [chunk.last, chunk.first] if isinstance(chunk, Buckets) else [chunk.last]
        values = (
            *(self.table.id, level, number, int(chunk.last[-1])),
            *(codec.pack_integers(*steps), seqs),
        )
        added = connection.execute(
            "INSERT INTO chunk (series, level, number, last_step, steps, seqs) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            values,
        ).lastrowid
        connection.executemany(
            "INSERT INTO part VALUES (?, ?, ?)",
            (
                (added, at // GROUP, codec.pack_values(chunk, slice(at, at + GROUP)))
                for at in range(0, self._columns, GROUP)
            ),
        )


# ---------------------------------------------------------------- reading


class RowBlock(NamedTuple):
    """n consecutive rows."""

    seq: NDArray[np.int64]
    """Place in the order of everything that the run produced, (n,)."""
    step: Steps
    """(n,)"""
    value: Floats
    """(n, columns)"""


class StoredSeries(SeriesReader):
    """A table of a recorded run as it was at a step; later rows are hidden."""

    def __init__(self, store: Store, table: Table) -> None:
        self.table = table
        self.columns = len(table.columns)
        self._store = store
        self._levels: list[StoredLevel] = []
        self._all_rows = 0
        self.newest_step: int | None = None
        """The last step stored, regardless of the cursor."""
        self.refresh()

    def refresh(self) -> None:
        """Read what is stored now, and show all of it."""
        levels = [StoredLevel(self._store, self.table.id, 0, self.columns)]
        while levels[-1].stop:
            levels.append(StoredLevel(self._store, self.table.id, len(levels), self.columns))
        self._levels = levels[:-1] or levels
        self._all_rows = self.rows = levels[0].stop
        # If the rows themselves cannot be read, their buckets may be readable.
        firsts = (level.bounds(0, min(1, level.stop))[0] for level in self._levels)
        self.first_step = next((int(found[0]) for found in firsts if len(found)), None)
        self.newest_step = self.last_step = self._last_step()

    def seek(self, step: int) -> None:
        """Show the table as it was when `step` was done."""
        self.rows = min(self._all_rows, self._levels[0].find(step + 1))
        self.last_step = self._last_step()

    def _last_step(self) -> int | None:
        for level in self.levels():
            found = level.bounds(max(0, level.stop - 1), level.stop)[1]
            if len(found):
                return int(found[-1])
        return None

    def levels(self) -> Sequence[BucketLevel]:
        return [_LevelAtCursor(level, self.rows) for level in self._levels]

    def blocks(self) -> Iterator[RowBlock]:
        """All rows stored, CHUNK at a time, without filling the cache; damaged chunks are left
        out."""
        level = self._levels[0]
        for start in range(0, level.stop, CHUNK):
            block = level.rows(start)
            self._store.clear_cache()
            if block is not None:
                yield block


class StoredLevel:
    """One level of one table: chunks on disk, the tail in memory."""

    def __init__(self, store: Store, series: int, level: int, columns: int) -> None:
        self.start = 0
        self.size: int = FACTOR**level
        self._store, self._series, self._level, self._columns = store, series, level, columns
        # Chunks are numbered from 0 without a gap. (Damage may change a number: count the chunks
        # instead of asking for the largest.)
        sql = "SELECT count(*) FROM chunk WHERE series = ? AND level = ?"
        count = store.numbers(MEASUREMENTS, sql, series, level)
        self._chunks = int(count[0][0]) if count else 0
        self._tail: RawRows | Buckets | None = None
        self._tail_seqs: Steps = np.zeros(0, np.int64)
        self._read_tail()
        in_tail = 0 if self._tail is None else len(self._tail.last)
        self.stop: int = self._chunks * CHUNK + in_tail

    def _read_tail(self) -> None:
        sql = (
            "SELECT data, seqs FROM tail WHERE series = ? AND level = ? AND first >= ? "
            "ORDER BY first"
        )
        rows: list[RawRows] = []
        seqs: list[Steps] = []
        buckets: list[Buckets] = []
        newest = 0
        where = (self._series, self._level, self._chunks * CHUNK)
        for data, raw_seqs in self._store.stream(sql, *where):
            try:
                piece: RawRows | Buckets
                if self._level:
                    piece = codec.decode_bucket_tail(data, self._level, self._columns)
                else:
                    piece = codec.decode_raw_tail(data, self._columns)
                if piece.last[0] < newest:
                    raise ValueError("steps decrease")
                if isinstance(piece, Buckets):
                    buckets.append(piece)
                else:
                    seqs.append(_decode_seqs(raw_seqs, len(piece.last)))
                    rows.append(piece)
            except DECODE_ERRORS:
                self._store.unreadable(MEASUREMENTS)
                continue
            newest = int(piece.last[-1])
        if buckets:
            self._tail = Buckets.join(buckets)
        elif rows:
            self._tail, self._tail_seqs = RawRows.join(rows), np.concatenate(seqs)

    def find(self, step: int) -> int:
        """See `BucketLevel.find`."""
        sql = (
            "SELECT number FROM chunk WHERE series = ? AND level = ? AND last_step >= ? "
            "ORDER BY last_step LIMIT 1"
        )
        where = (self._series, self._level, step)
        for (number,) in self._store.numbers(MEASUREMENTS, sql, *where):
            chunk = int(number)
            if not 0 <= chunk < self._chunks:
                break  # written since, or damaged
            steps = self._steps(chunk)
            # In a damaged chunk, single entries cannot be located.
            inside = 0 if steps is None else int(np.searchsorted(steps[0], step))
            return min(self.stop, chunk * CHUNK + inside)
        if self._tail is None:
            return self.stop
        found = self._chunks * CHUNK + int(np.searchsorted(self._tail.last, step))
        return min(self.stop, found)

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """See `BucketLevel.bounds`."""
        found = self.buckets(start, stop, np.zeros(0, np.intp))
        return found.first, found.last

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """See `BucketLevel.buckets`; damaged chunks are left out."""
        chosen = np.arange(self._columns) if columns is None else columns
        parts = []
        for number in range(start // CHUNK, -(-min(stop, self._chunks * CHUNK) // CHUNK)):
            low = max(start, number * CHUNK) - number * CHUNK
            high = min(stop, (number + 1) * CHUNK) - number * CHUNK
            if low < high and (part := self._chunk(number, slice(low, high), chosen)) is not None:
                parts.append(part)
        begin = self._chunks * CHUNK
        if self._tail is not None and stop > begin:
            tail = self._tail.part(slice(max(0, start - begin), stop - begin))
            if isinstance(tail, RawRows):
                parts.append(RawRows(tail.last, tail.value.take(chosen, axis=1)).as_buckets())
            else:
                parts.append(tail.of_columns(chosen))
        if not parts:
            none = np.zeros(0, np.int64)
            empty = np.zeros((0, len(chosen)), np.float32)
            return Buckets(none, none, empty, empty, empty, empty.astype(np.uint8))
        return Buckets.join(parts)

    def rows(self, start: int) -> RowBlock | None:
        """The rows (level 0) of the chunk or of the part of the tail that begins at `start`; None
        where they cannot be read."""
        number = start // CHUNK
        if number >= self._chunks:
            tail, offset = self._tail, start - self._chunks * CHUNK
            if tail is None:
                return None
            part = slice(offset, offset + CHUNK)
            return RowBlock(self._tail_seqs[part], tail.last[part], tail.value[part])
        entries = self._chunk(number, slice(0, CHUNK), np.arange(self._columns))
        sql = "SELECT seqs FROM chunk WHERE series = ? AND level = 0 AND number = ?"
        found = self._store.stream(sql, self._series, number)
        seqs = next(self._store.decoded(MEASUREMENTS, _unpack_seqs, found), None)
        if entries is None or seqs is None:
            return None
        return RowBlock(seqs, entries.last, entries.value)

    def _chunk(self, number: int, inside: slice, chosen: NDArray[np.intp]) -> Buckets | None:
        steps = self._steps(number)
        if steps is None:
            return None
        last, first = steps[0][inside], steps[-1][inside]
        groups = np.unique(chosen // GROUP)
        found: list[Part] = []
        for group in groups.tolist():
            part = self._part(number, group)
            if part is None:
                return None
            found.append(part)
        if not found:
            empty = np.zeros((len(last), 0), np.float32)
            return Buckets(first, last, empty, empty, empty, empty.astype(np.uint8))
        places = np.searchsorted(groups, chosen // GROUP) * GROUP + chosen % GROUP
        value = _take([part.value[inside] for part in found], places)
        if self._level == 0:
            return RawRows(last, value).as_buckets()
        low = _take([part.low[inside] for part in found], places)
        high = _take([part.high[inside] for part in found], places)
        return Buckets(
            first, last, low, high, value, _take([part.flags[inside] for part in found], places)
        )

    def _steps(self, number: int) -> NDArray[np.int64] | None:
        """(1 or 2, CHUNK): last and, above level 0, first step of each entry; None where they
        cannot be read."""
        kinds = 2 if self._level else 1

        def read() -> NDArray[np.int64] | None:
            sql = "SELECT steps FROM chunk WHERE series = ? AND level = ? AND number = ?"
            rows = self._store.stream(sql, self._series, self._level, number)
            return next(
                self._store.decoded(
                    MEASUREMENTS, lambda data: codec.unpack_integers(data, kinds, CHUNK), rows
                ),
                None,
            )

        key = ("steps", self._series, self._level, number)
        return self._store.cached(key, kinds * CHUNK * 8, read)

    def _part(self, number: int, group: int) -> Part | None:
        """GROUP columns of a chunk; None where they cannot be read."""
        columns = min(GROUP, self._columns - group * GROUP)

        def read() -> Part | None:
            sql = (
                "SELECT data FROM part JOIN chunk ON chunk.id = part.chunk "
                "WHERE series = ? AND level = ? AND number = ? AND columns = ?"
            )
            rows = self._store.stream(sql, self._series, self._level, number, group)
            return next(
                self._store.decoded(
                    MEASUREMENTS,
                    lambda data: codec.unpack_values(data, self._level, columns),
                    rows,
                ),
                None,
            )

        size = CHUNK * columns * (13 if self._level else 4)
        return self._store.cached(("part", self._series, self._level, number, group), size, read)


class _LevelAtCursor:
    """The entries of a level that were complete when the table had `rows` rows."""

    def __init__(self, level: StoredLevel, rows: int) -> None:
        self._level = level
        self.start, self.size = 0, level.size
        self.stop = min(level.stop, rows // level.size)

    def find(self, step: int) -> int:
        """See `BucketLevel.find`."""
        return min(self.stop, self._level.find(step))

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """See `BucketLevel.bounds`."""
        return self._level.bounds(start, stop)

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """See `BucketLevel.buckets`."""
        return self._level.buckets(start, stop, columns)


def _decode_seqs(data: Any, count: int) -> Steps:
    seqs = np.frombuffer(data, "<i8").astype(np.int64)
    if len(seqs) != count:
        raise ValueError("a seq is missing")
    return seqs


def _unpack_seqs(data: bytes) -> NDArray[np.int64]:
    seqs: NDArray[np.int64] = codec.unpack_integers(data, 1, CHUNK)[0]
    return seqs


def _take(groups: list[NDArray[T]], places: NDArray[np.intp]) -> NDArray[T]:
    joined = groups[0] if len(groups) == 1 else np.concatenate(groups, axis=1)
    return joined.take(places, axis=1)
