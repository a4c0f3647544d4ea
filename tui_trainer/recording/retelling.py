"""Telling a recorded run again: the items that its sinks were given, in the same order.

What writes the story of a living run (JSON lines, plain lines) can so write that of a recorded one,
word for word. Memory stays bounded: rows are read chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tui_trainer.history.records import ClipRecord, Floats, StepRecord
from tui_trainer.history.store import told
from tui_trainer.history.store.database import Store
from tui_trainer.history.store.objects import decode_event
from tui_trainer.history.store.packing import CHUNK
from tui_trainer.history.store.reader import RecordedHistory, RecordedTable
from tui_trainer.history.store.schema import StoreFault, schema_version
from tui_trainer.history.store.told import Entry, Shape
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Artifact, Clip, Event, LogLine
from tui_trainer.recording.items import Described, Ended, Item, Lost, Rowed, Stepped

AT_ONCE = 16
"""Pieces of the story read in one question."""


class RowReader:
    """The rows of one table, first to last."""

    def __init__(self, table: RecordedTable) -> None:
        self._store = table.store
        self._level = table.entries()[0]
        self._place = self._start = 0
        self._values: Floats | None = None

    def next(self) -> Floats | None:
        """Values (columns,) of the next row; None after the last and where it cannot be read."""
        if self._place >= self._level.stop:
            return None
        if self._values is None or self._place >= self._start + CHUNK:
            self._start = self._place // CHUNK * CHUNK
            stop = min(self._start + CHUNK, self._level.stop)
            values = self._level.buckets(self._start, stop).value
            self._store.forget()
            # Of a damaged chunk nothing is left, and none of its rows can be told from the others.
            self._values = values if len(values) == stop - self._start else values[:0]
        at = self._place - self._start
        self._place += 1
        return self._values[at].copy() if at < len(self._values) else None


def retell(history: RecordedHistory) -> Iterator[Item]:
    """The story of the run so far; `history` is brought up to date. Raises StoreFault."""
    store = history.store
    if schema_version(store.connection) < 2:
        raise StoreFault("this run was recorded by a tui-trainer that did not keep its story")
    # Read before the rows: of a living run they may then be more than is told, never less.
    newest = store.ask("SELECT id, data FROM told ORDER BY id DESC LIMIT 1")
    history.refresh()
    tables = history.tables.items()
    rows = {n: RowReader(table) for n, table in tables if isinstance(table, RecordedTable)}
    descriptions = dict(_described(store))
    if descriptions:
        yield Described(descriptions[min(descriptions)])
    ahead = _Ahead(_joined(store, newest))
    for entry, shape in ahead:
        if entry.kind == told.DESCRIBED:
            if entry.ref in descriptions:
                yield Described(descriptions[entry.ref])
        else:
            yield from _items(entry, shape, store, rows, ahead)
    status = store.status()
    if status is not None and status.ended:
        yield Ended(status)


def _items(
    entry: Entry, shape: Shape | None, store: Store, rows: dict[int, RowReader], ahead: _Ahead
) -> Iterator[Item]:
    match entry.kind:
        case told.STEPPED:
            assert shape is not None
            values = ((n, rows[n].next()) for n in shape.tables if n in rows)
            known = tuple((n, row) for n, row in values if row is not None)
            clip = _clip_after(entry, store, ahead)
            yield Stepped(
                StepRecord(
                    entry.step, entry.time, shape.optimizer, known, clip, own_ms=entry.own_ms
                )
            )
        case told.ROWED:
            row = rows[entry.ref].next() if entry.ref in rows else None
            if row is not None:
                yield Rowed(entry.ref, entry.step, row, entry.time)
        case told.LOST:
            yield Lost(entry.ref)
        case told.EVENT:
            if (event := _event(store, entry.ref)) is not None:
                yield event
        case told.LOG:
            question = "SELECT id, time, step, stream, text FROM log WHERE id = ?"
            for found in store.ask(question, entry.ref):
                yield LogLine(*found)
        case told.ARTIFACT:
            for (data,) in store.ask("SELECT data FROM artifact WHERE id = ?", entry.ref):
                artifact: Artifact = msgspec.msgpack.decode(data, type=Artifact)
                yield artifact


def _clip_after(step: Entry, store: Store, ahead: _Ahead) -> ClipRecord | None:
    """A step's clip is told right after it."""
    found = ahead.peek()
    if found is None or found[0].kind != told.EVENT:
        return None
    event = _event(store, found[0].ref)
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


def _event(store: Store, number: int) -> Event | None:
    for (data,) in store.ask("SELECT data FROM event WHERE id = ?", number):
        return decode_event(data)
    return None


def _described(store: Store) -> Iterator[tuple[int, RunInfo]]:
    for number, data in store.ask("SELECT id, data FROM description ORDER BY id"):
        yield int(number), msgspec.json.decode(data, type=RunInfo)


def _joined(store: Store, newest: list[tuple[int, bytes]]) -> Iterator[tuple[Entry, Shape | None]]:
    def pieces() -> Iterator[bytes]:
        done = 0
        question = "SELECT id, data FROM told WHERE id > ? AND id < ? ORDER BY id LIMIT ?"
        for last, newest_data in newest:
            while found := store.ask(question, done, last, AT_ONCE):
                for number, data in found:
                    done = int(number)
                    yield data
            yield newest_data

    try:
        yield from told.join(pieces())
    except (ValueError, msgspec.DecodeError) as fault:
        raise StoreFault(f"the recording is damaged: {fault}") from fault


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
