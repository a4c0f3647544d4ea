"""Telling a recorded run again: the items that its sinks were given, in the same order.

What writes the story of a living run (JSON lines, plain lines) can so write that of a recorded one,
word for word. Memory stays bounded: rows are read chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tui_trainer.history.buckets import Steps
from tui_trainer.history.records import ClipRecord, Floats, StepRecord
from tui_trainer.protocol.messages import Clip
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.events import (
    InfoChanged,
    Item,
    RowRecorded,
    RunEnded,
    StepRecorded,
    StepsDropped,
)
from tui_trainer.store import told
from tui_trainer.store.codec import CHUNK
from tui_trainer.store.reader import StoredEvents, StoredHistory, StoredSeries
from tui_trainer.store.told import Entry, Shape


class RowReader:
    """The rows of one table, first to last."""

    def __init__(self, table: StoredSeries) -> None:
        self.table = table.table
        self._store = table.store
        self._level = table.levels()[0]
        self._place = self._start = 0
        self._steps: Steps | None = None
        self._values: Floats = np.zeros((0, 0), np.float32)

    def next(self, step: int) -> Floats | None:
        """Values (columns,) of the next row of this step; None where it cannot be read. Rows of
        earlier steps are passed over: what told of them is damaged."""
        while self._place < self._level.stop:
            if self._steps is None or self._place >= self._start + CHUNK:
                self._read()
            assert self._steps is not None
            at = self._place - self._start
            if at >= len(self._steps):  # of a damaged chunk nothing is left
                self._place = self._start + CHUNK
                continue
            if self._steps[at] > step:
                break
            self._place += 1
            if self._steps[at] == step:
                row: Floats = self._values[at].copy()
                return row
        return None

    def _read(self) -> None:
        self._start = self._place // CHUNK * CHUNK
        stop = min(self._start + CHUNK, self._level.stop)
        found = self._level.buckets(self._start, stop)
        self._store.forget()
        self._steps, self._values = found.last, found.value


def replay_items(history: StoredHistory) -> Iterator[Item]:
    """The story of the run so far; `history` is brought up to date. What is damaged is left out,
    and `history.store.fault` says so."""
    store = history.store
    # Read before the rows: of a living run they may then be more than is told, never less.
    newest = store.ask("SELECT id, data FROM told ORDER BY id DESC LIMIT 1")
    history.refresh()
    return _Teller(history).tell(newest)


class _Teller:
    """Tells one story."""

    def __init__(self, history: StoredHistory) -> None:
        self._store = history.store
        self._moments = StoredEvents(history.store)
        tables = history.tables.items()
        self._rows = {n: RowReader(t) for n, t in tables}
        found = self._store.ask("SELECT id, data FROM description ORDER BY id")
        read = ((number, self._store.description(number, data)) for number, data in found)
        self._descriptions = {number: info for number, info in read if info is not None}
        self._info: RunInfo | None = None

    def tell(self, newest: list[tuple[Any, ...]]) -> Iterator[Item]:
        if self._descriptions or self._store.fault:
            yield self._described(min(self._descriptions, default=0))
        ahead = _Ahead(self._joined(newest))
        for entry, shape in ahead:
            yield from self._items(entry, shape, ahead)
        status = self._store.status()
        if status is not None and status.ended:
            yield RunEnded(status)

    def _described(self, number: int) -> InfoChanged:
        """A description; for one that is damaged the next that is not, which tells more rather than
        less, or what else is known of the run."""
        known = self._descriptions
        later = min((n for n in known if n >= number), default=max(known, default=None))
        if later is not None:
            info = known[later]
        else:
            tables = tuple(reader.table for reader in self._rows.values())
            dense = [table.id for table in tables] == list(range(len(tables)))
            info = self._store.info() or RunInfo("", "", tables=tables if dense else ())
        self._info = info
        return InfoChanged(info)

    def _row(self, table: int, step: int) -> Floats | None:
        """The next row, where what was described has such a table."""
        reader, declared = self._rows.get(table), self._info.tables if self._info else ()
        row = reader.next(step) if reader is not None else None
        if row is None or table >= len(declared) or len(declared[table].columns) != len(row):
            return None
        return row

    def _items(self, entry: Entry, shape: Shape | None, ahead: _Ahead) -> Iterator[Item]:
        match entry.kind:
            case told.DESCRIBED:
                yield self._described(entry.ref)
            case told.STEPPED:
                assert shape is not None
                values = ((n, self._row(n, entry.step)) for n in shape.tables)
                known = tuple((n, row) for n, row in values if row is not None)
                clip = self._clip_after(entry, ahead)
                yield StepRecorded(
                    StepRecord(
                        entry.step, entry.time, shape.optimizer, known, clip, own_ms=entry.own_ms
                    )
                )
            case told.ROWED:
                if (row := self._row(entry.ref, entry.step)) is not None:
                    yield RowRecorded(entry.ref, entry.step, row, entry.time)
            case told.LOST:
                yield StepsDropped(entry.ref)
            case told.EVENT:
                if (event := self._moments.event(entry.ref)) is not None:
                    yield event
            case told.LOG:
                if (line := self._moments.line(entry.ref)) is not None:
                    yield line
            case told.ARTIFACT:
                if (artifact := self._moments.artifact(entry.ref)) is not None:
                    yield artifact

    def _clip_after(self, step: Entry, ahead: _Ahead) -> ClipRecord | None:
        """A step's clip is told right after it."""
        found = ahead.peek()
        if found is None or found[0].kind != told.EVENT:
            return None
        event = self._moments.event(found[0].ref)
        if not isinstance(event, Clip) or event.step != step.step:
            return None
        return ClipRecord(
            event.max_norm,
            event.norm_before,
            event.scale,
            event.parameters,
            event.shares,
            event.kind,
        )

    def _joined(self, newest: list[tuple[Any, ...]]) -> Iterator[tuple[Entry, Shape | None]]:
        """The entries of all pieces, in order."""
        for last, newest_data in newest:
            for number, data in self._store.pieces(last):
                yield from self._store.story(number, data)
            yield from self._store.story(last, newest_data)


class _Ahead:
    """Entries, with a look at the one after."""

    def __init__(self, entries: Iterator[tuple[Entry, Shape | None]]) -> None:
        self._entries = entries
        self._next: tuple[Entry, Shape | None] | None = None

    def __iter__(self) -> Iterator[tuple[Entry, Shape | None]]:
        while (found := self.peek()) is not None:
            self._next = None
            yield found

    def peek(self) -> tuple[Entry, Shape | None] | None:
        """The next entry, which stays the next; None at the end."""
        if self._next is None:
            self._next = next(self._entries, None)
        return self._next
