"""The order in which a run told its story: what came after what, and when.

Rows, events, output and samples lie in tables of their own; here is the thread that joins them, so
that a recorded run can be told again exactly as it was told while it was made.
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tui_trainer.protocol.schema import RunInfo
from tui_trainer.store import codec

DESCRIBED, STEPPED, ROWED, EVENT, ARTIFACT, LOG, LOST = range(7)
"""Kinds of entries. `ref` is the number of a description, the shape of a step (optimizer and
tables), a table, the id of an event, a sample or a log line, and the number of steps lost."""


class Entry(NamedTuple):
    """One thing that was told."""

    kind: int
    ref: int
    step: int
    time: float
    """Seconds since the epoch: steps and rows only."""
    own_ms: float
    """What measuring the step cost, rounded to float32: steps only."""


class Shape(NamedTuple):
    """What a step was measured in: rows of these tables, in this order."""

    optimizer: str
    tables: tuple[int, ...]


class Piece(msgspec.Struct, frozen=True):
    """Consecutive entries, as they were committed: one row of table `told`."""

    shapes: tuple[Shape, ...]
    count: int
    kinds: bytes
    refs: bytes
    steps: bytes
    """Differences."""
    times: bytes
    """Differences of the bit patterns of float64, so that times come back exactly."""
    own: bytes


_KINDS = ("u1", "<i8", "<i8", "<i8", "<f4")


def pack(entries: list[Entry], shapes: tuple[Shape, ...]) -> bytes:
    """The data of a row of table `told`. `ref` of a step counts in `shapes`."""
    kinds, refs, steps, times, own = zip(*entries, strict=True)
    patterns = np.array(times, "<f8").view("<i8")
    columns: list[Any] = [kinds, refs, np.diff(steps, prepend=0), np.diff(patterns, prepend=0), own]
    packed = (
        codec.pack(np.asarray(column, kind)) for column, kind in zip(columns, _KINDS, strict=True)
    )
    return msgspec.msgpack.encode(Piece(shapes, len(entries), *packed))


def unpack(data: bytes) -> tuple[list[Entry], tuple[Shape, ...]]:
    """The entries again. Raises ValueError for damaged data."""
    piece = msgspec.msgpack.decode(data, type=Piece)
    raw = (piece.kinds, piece.refs, piece.steps, piece.times, piece.own)
    kinds, refs, steps, times, own = (
        codec.unpack(each, kind, (piece.count,)) for each, kind in zip(raw, _KINDS, strict=True)
    )
    moments = np.cumsum(times, dtype=np.int64).view(np.float64)
    columns = (kinds, refs, np.cumsum(steps, dtype=np.int64), moments, own)
    found = [Entry(*each) for each in zip(*(c.tolist() for c in columns), strict=True)]
    return found, piece.shapes


def entries(data: bytes) -> list[tuple[Entry, Shape | None]]:
    """The entries of a row of table `told`, steps with their shape. Raises ValueError, TypeError or
    IndexError for damaged data."""
    found, shapes = unpack(data)
    return [(each, shapes[each.ref] if each.kind == STEPPED else None) for each in found]


# ---- store_told
# The thread of the story in the store: which row, event or sample came after which.


MOST_ENTRIES = 512
"""Of a piece, so that whoever reads the story holds little of it at a time. Until it has so many,
the newest piece is written anew with each commit: many small ones would be mostly overhead."""


class OrderWriter:
    """Entries wait here until `write` and, when that was committed, `written`."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        """Those of the newest piece, and after them those that wait."""
        self._shapes: dict[Shape, int] = {}
        self._committed = 0
        """How many of the entries are in the database already, in row `_row`."""
        self._row: int | None = None
        self._row_after: int | None = None
        self._said: RunInfo | None = None
        self._number = -1
        self._descriptions: dict[int, RunInfo] = {}

    def described(self, info: RunInfo) -> None:
        """A description, unless only the cadence of tables is another: that is not told."""
        tables = tuple(msgspec.structs.replace(table, every=1) for table in info.tables)
        said = msgspec.structs.replace(info, revision=0, tables=tables)
        if said == self._said:
            return
        self._said = said
        self._number += 1
        self._descriptions[self._number] = info
        self.add(DESCRIBED, self._number)

    def stepped(
        self, step: int, time: float, own_ms: float, optimizer: str, tables: tuple[int, ...]
    ) -> None:
        """A step, of which rows of these tables were taken."""
        shape = self._shapes.setdefault(Shape(optimizer, tables), len(self._shapes))
        self.add(STEPPED, shape, step, time, own_ms)

    def add(
        self, kind: int, ref: int, step: int = 0, time: float = 0.0, own_ms: float = 0.0
    ) -> None:
        """Anything else."""
        if not step and self._entries:
            step = self._entries[-1].step
        self._entries.append(Entry(kind, ref, step, time, own_ms))

    def forget_place(self) -> None:
        """The database may be another one now: what is not in it yet makes a piece of its own, and
        it shall know what the rows to come mean."""
        del self._entries[: self._committed]
        self._committed, self._row = 0, None
        if self._said is not None:
            self._descriptions.setdefault(self._number, self._said)

    def write(self, connection: sqlite3.Connection) -> None:
        """Add what waits, inside the caller's transaction. Raises sqlite3.Error."""
        for number, info in self._descriptions.items():
            connection.execute(
                "INSERT OR IGNORE INTO description VALUES (?, ?)",
                (number, msgspec.json.encode(info)),
            )
        self._row_after = self._row
        if len(self._entries) == self._committed:
            return
        shapes = tuple(self._shapes)
        for start in range(0, len(self._entries), MOST_ENTRIES):
            piece = pack(self._entries[start : start + MOST_ENTRIES], shapes)
            row = self._row if start == 0 else None  # the newest piece so far is replaced
            question = "INSERT OR REPLACE INTO told (id, data) VALUES (?, ?)"
            self._row_after = connection.execute(question, (row, piece)).lastrowid

    def written(self) -> None:
        """What `write` added was committed."""
        self._descriptions.clear()
        full = len(self._entries) // MOST_ENTRIES * MOST_ENTRIES
        del self._entries[:full]
        self._committed = len(self._entries)
        self._row = self._row_after if self._entries else None
        if not self._entries:
            self._shapes.clear()
