"""Reading a run's store: a `History` whose tables lie on disk, of a finished or a living run."""

from __future__ import annotations

import os
import sqlite3
from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.history import History
from tui_trainer.history.levels import FACTOR, Buckets, Entries, Steps, T, extremes, flags_of
from tui_trainer.history.store import packing, told
from tui_trainer.history.store.objects import decode_status
from tui_trainer.history.store.packing import CHUNK, GROUP
from tui_trainer.history.store.schema import StoreFault, open_for_reading
from tui_trainer.history.table import TableHistory
from tui_trainer.protocol.describe import RunInfo, Table
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.text import harmless_all

CACHE_BYTES = 64 * 2**20
"""What unpacked chunks may take, so that moving a window is cheap."""


class _Part(NamedTuple):
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    value: NDArray[np.float32]
    flags: NDArray[np.uint8]


class Store:
    """One open database. Not safe for use from several threads."""

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        """`ended`: nobody writes to it any more. Raises StoreFault."""
        self.connection = open_for_reading(directory, ended)
        self.fault = ""
        """What could not be read, for people; the rest is shown all the same."""
        self._steps: OrderedDict[tuple[int, int, int], tuple[Steps, Steps]] = OrderedDict()
        self._parts: OrderedDict[tuple[int, int, int, int], _Part] = OrderedDict()
        self._cached_bytes = 0

    def ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of an SQL question; none, with `fault` set, where the database is damaged."""
        try:
            return self.connection.execute(question, values).fetchall()
        except sqlite3.Error as fault:
            self.fault = f"part of the recording cannot be read: {fault}"
            return []

    def info(self) -> RunInfo | None:
        """The description of the run."""
        for (value,) in self.ask("SELECT value FROM meta WHERE key = 'info'"):
            info: RunInfo = msgspec.json.decode(value, type=RunInfo)
            return harmless_all(info)
        return None

    def status(self) -> Status | None:
        """The last state that was recorded."""
        for (value,) in self.ask("SELECT value FROM meta WHERE key = 'status'"):
            return decode_status(value)
        return None

    def first_moment(self) -> tuple[int, float] | None:
        """The first step recorded, and when it was made; None where that was not kept."""
        for (data,) in self.ask("SELECT data FROM told ORDER BY id LIMIT 8"):
            try:
                entries, _ = told.unpack(data)
            except (ValueError, msgspec.DecodeError):
                return None
            for entry in entries:
                if entry.kind == told.STEPPED:
                    return entry.step, entry.time
        return None

    def forget(self) -> None:
        """Let unpacked chunks go: who reads once from front to back comes to none of them again."""
        self._steps.clear()
        self._parts.clear()
        self._cached_bytes = 0

    def close(self) -> None:
        """Give the file back."""
        self.connection.close()

    # ------------------------------------------------------------ chunks

    def steps(self, series: int, level: int, number: int) -> tuple[Steps, Steps] | None:
        """(first, last) steps of a chunk's entries; None where they cannot be read."""
        key = (series, level, number)
        if key not in self._steps:
            question = "SELECT steps FROM chunk WHERE series = ? AND level = ? AND number = ?"
            for (data,) in self.ask(question, *key):
                try:
                    self._steps[key] = packing.unpack_steps(data, level)
                except ValueError as fault:
                    self.fault = f"part of the recording cannot be read: {fault}"
            if len(self._steps) > 4096:
                self._steps.popitem(last=False)
        return self._steps.get(key)

    def part(self, series: int, level: int, number: int, group: int, width: int) -> _Part | None:
        """Some columns of a chunk; None where they cannot be read."""
        key = (series, level, number, group)
        found = self._parts.get(key)
        if found is not None:
            self._parts.move_to_end(key)
            return found
        question = (
            "SELECT data FROM part JOIN chunk ON chunk.id = part.chunk "
            "WHERE series = ? AND level = ? AND number = ? AND columns = ?"
        )
        for (data,) in self.ask(question, *key):
            try:
                found = _Part(*packing.unpack_values(data, level, width))
            except ValueError as fault:
                self.fault = f"part of the recording cannot be read: {fault}"
                return None
            self._parts[key] = found
            self._cached_bytes += found.value.nbytes * 3
            while self._cached_bytes > CACHE_BYTES and len(self._parts) > 1:
                _, old = self._parts.popitem(last=False)
                self._cached_bytes -= old.value.nbytes * 3
        return found


class StoredLevel:
    """One level of one measured table: whole chunks on disk, the tail in memory."""

    def __init__(self, store: Store, series: int, level: int, columns: int) -> None:
        self.start, self.stop = 0, 0
        self.size: int = FACTOR**level
        self._store, self._series, self._level, self._columns = store, series, level, columns
        self._chunks = 0
        self._tail: Buckets | None = None

    def refresh(self) -> int:
        """See what is stored now; how many entries there are."""
        which = (self._series, self._level)
        question = "SELECT max(number) FROM chunk WHERE series = ? AND level = ?"
        found = self._store.ask(question, *which)
        newest = found[0][0] if found else None
        self._chunks = 0 if newest is None else int(newest) + 1
        question = (
            "SELECT count, data FROM tail WHERE series = ? AND level = ? AND first >= ? "
            "ORDER BY first"
        )
        pieces = [
            packing.unpack_tail(data, self._level, count, self._columns)
            for count, data in self._store.ask(question, *which, self._chunks * CHUNK)
        ]
        self._tail = Buckets.join(pieces) if pieces else None
        self.stop = self._chunks * CHUNK + (len(self._tail.last) if self._tail else 0)
        return self.stop

    def find(self, step: int) -> int:
        """See `Entries.find`."""
        question = (
            "SELECT number FROM chunk WHERE series = ? AND level = ? AND last_step >= ? "
            "ORDER BY last_step LIMIT 1"
        )
        for (number,) in self._store.ask(question, self._series, self._level, step):
            chunk = int(number)
            steps = self._store.steps(self._series, self._level, chunk)
            if chunk < self._chunks and steps is not None:
                return min(self.stop, chunk * CHUNK + int(np.searchsorted(steps[1], step)))
        if self._tail is None:
            return self.stop
        found = self._chunks * CHUNK + int(np.searchsorted(self._tail.last, step))
        return min(self.stop, found)

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """See `Entries.bounds`."""
        found = self.buckets(start, stop, np.zeros(0, np.intp))
        return found.first, found.last

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """See `Entries.buckets`; a damaged chunk gives none."""
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
            parts.append(self._finish(tail, chosen))
        if not parts:
            none = np.zeros(0, np.int64)
            empty = np.zeros((0, len(chosen)), np.float32)
            return Buckets(none, none, empty, empty, empty, empty.astype(np.uint8))
        return Buckets.join(parts)

    def _chunk(self, number: int, inside: slice, chosen: NDArray[np.intp]) -> Buckets | None:
        steps = self._store.steps(self._series, self._level, number)
        if steps is None:
            return None
        groups = np.unique(chosen // GROUP)
        found: list[_Part] = []
        for group in groups.tolist():
            width = min(GROUP, self._columns - group * GROUP)
            part = self._store.part(self._series, self._level, number, group, width)
            if part is None:
                return None
            found.append(part)
        count = inside.stop - inside.start
        if not found:
            empty = np.zeros((count, 0), np.float32)
            flags = np.zeros((count, 0), np.uint8)
            return Buckets(steps[0][inside], steps[1][inside], empty, empty, empty, flags)
        places = np.searchsorted(groups, chosen // GROUP) * GROUP + chosen % GROUP
        value = _pick([p.value[inside] for p in found], places)
        if self._level == 0:
            rows = Buckets(steps[0][inside], steps[1][inside], value, value, value, NO_FLAGS)
            return self._rows(rows)
        return Buckets(
            steps[0][inside],
            steps[1][inside],
            _pick([p.low[inside] for p in found], places),
            _pick([p.high[inside] for p in found], places),
            value,
            _pick([p.flags[inside] for p in found], places),
        )

    def _finish(self, tail: Buckets, chosen: NDArray[np.intp]) -> Buckets:
        if self._level:
            return tail.of_columns(chosen)
        return self._rows(tail._replace(value=tail.value.take(chosen, axis=1)))

    def _rows(self, rows: Buckets) -> Buckets:
        low, high, last = extremes(rows.value[:, None])
        return Buckets(rows.first, rows.last, low, high, last, flags_of(rows.value))


NO_FLAGS = np.zeros((0, 0), np.uint8)


def _pick(groups: list[NDArray[T]], places: NDArray[np.intp]) -> NDArray[T]:
    joined = groups[0] if len(groups) == 1 else np.concatenate(groups, axis=1)
    return joined.take(places, axis=1)


class RecordedTable(TableHistory):
    """A table of a recorded run, as it was at a step: rows after `cursor` are not seen."""

    def __init__(self, store: Store, table: Table) -> None:
        super().__init__(table, entries=1)
        self.store = store
        self._stored: list[StoredLevel] = []
        self.all_rows = 0
        self.all_last_step: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """See what is stored now, all of it."""
        levels: list[StoredLevel] = []
        while not levels or levels[-1].stop:
            level = StoredLevel(self.store, self.table.id, len(levels), self.columns)
            level.refresh()
            levels.append(level)
        self._stored = levels[:-1] if len(levels) > 1 else levels
        self.all_rows = self.rows = levels[0].stop
        first = levels[0].bounds(0, min(1, self.rows))[0]
        last = levels[0].bounds(max(0, self.rows - 1), self.rows)[1]
        self.first_step = int(first[0]) if len(first) else None
        self.all_last_step = self.last_step = int(last[0]) if len(last) else None

    def seek(self, step: int) -> None:
        """Show the table as it was when `step` had been made."""
        raw = self._stored[0]
        self.rows = min(self.all_rows, raw.find(step + 1))
        last = raw.bounds(max(0, self.rows - 1), self.rows)[1]
        self.last_step = int(last[0]) if len(last) else None

    def entries(self) -> list[Entries]:
        """See `Reading.entries`."""
        return [_Cut(level, self.rows) for level in self._stored]


class _Cut:
    """The entries of a level that were whole when so many rows had been measured."""

    def __init__(self, level: StoredLevel, rows: int) -> None:
        self._level = level
        self.start, self.size = 0, level.size
        self.stop = min(level.stop, rows // level.size)

    def find(self, step: int) -> int:
        """See `Entries.find`."""
        return min(self.stop, self._level.find(step))

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        return self._level.bounds(start, stop)

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        return self._level.buckets(start, stop, columns)


class RecordedHistory(History):
    """The history of a recorded run. Raises StoreFault when it cannot be opened.

    `ended`: nobody writes to it any more, and reading shall leave no trace in its directory.
    """

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        super().__init__()
        self.store = Store(directory, ended)
        self.refresh()

    def refresh(self) -> None:
        """See what is stored now."""
        store = self.store
        store.ask("BEGIN")  # one moment's picture, while the run goes on writing
        try:
            for number, description in store.ask("SELECT id, description FROM series ORDER BY id"):
                known = self.tables.get(int(number))
                if isinstance(known, RecordedTable):
                    known.refresh()
                else:
                    table = msgspec.json.decode(description, type=Table)
                    self.tables[table.id] = RecordedTable(store, table)
        except (ValueError, msgspec.DecodeError) as fault:
            raise StoreFault(f"the recording is damaged: {fault}") from fault
        finally:
            store.ask("COMMIT")
        self.version += 1

    def seek(self, step: int) -> None:
        """Show every table as it was when `step` had been made."""
        for table in self.tables.values():
            assert isinstance(table, RecordedTable)
            table.seek(step)
        self.version += 1

    @property
    def last_step(self) -> int:
        """The newest step of any table; 0 when nothing was measured."""
        steps = [t.all_last_step or 0 for t in self.tables.values() if isinstance(t, RecordedTable)]
        newest: int = max(steps, default=0)
        return newest

    def close(self) -> None:
        """Give the file back."""
        self.store.close()
