"""The thread of the story in the store: which row, event or sample came after which."""

from __future__ import annotations

import sqlite3

import msgspec

from tui_trainer.history.store import told
from tui_trainer.history.store.told import Entry, Shape
from tui_trainer.protocol.describe import RunInfo

MOST_ENTRIES = 512
"""Of a piece, so that whoever reads the story holds little of it at a time. Until it has so many,
the newest piece is written anew with each commit: many small ones would be mostly overhead."""


class ToldWriter:
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
        self.add(told.DESCRIBED, self._number)

    def stepped(
        self, step: int, time: float, own_ms: float, optimizer: str, tables: tuple[int, ...]
    ) -> None:
        """A step, of which rows of these tables were taken."""
        shape = self._shapes.setdefault(Shape(optimizer, tables), len(self._shapes))
        self.add(told.STEPPED, shape, step, time, own_ms)

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
            piece = told.pack(self._entries[start : start + MOST_ENTRIES], shapes)
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
