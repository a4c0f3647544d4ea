"""The history of a recorded run, read from its store as it was at any step."""

from __future__ import annotations

import os

import msgspec

from tui_trainer.history.history import History
from tui_trainer.protocol.schema import Table
from tui_trainer.protocol.text import sanitize_message
from tui_trainer.store.database import TABLES, Store
from tui_trainer.store.series import StoredSeries
from tui_trainer.store.step_times import StepTimesReader


class StoredHistory(History):
    """The history of a recorded run, at its last step until `seek` is called."""

    tables: dict[int, StoredSeries]

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        """`ended`: the run no longer writes, and reading leaves no trace in its directory. Raises
        StoreError."""
        self.tables = {}
        self.version = 0
        self.store = Store(directory, ended)
        self.step_times = StepTimesReader(self.store)
        self.refresh()

    def refresh(self) -> None:
        """Read what is stored now, and show all of it."""
        with self.store.snapshot():
            for series in self.tables.values():
                series.refresh()
            for table in self._new_tables():
                self.tables[table.id] = StoredSeries(self.store, table)
            self.step_times.refresh()
        self.version += 1

    def _new_tables(self) -> list[Table]:
        """Measured tables that were declared since the last refresh. One whose declaration cannot
        be read is taken from the description of the run."""
        found: dict[int, Table] = {}
        numbers = [row[0] for row in self.store.stream("SELECT id FROM series ORDER BY id")]
        new = [number for number in numbers if number not in self.tables]
        for number in new:
            rows = self.store.stream("SELECT id, description FROM series WHERE id = ?", number)
            found |= {t.id: t for t in self.store.decoded(TABLES, _decode_table, rows)}
        if len(found) < len(new) or (self.store.fault and not self.tables):
            info = self.store.info()
            for table in info.tables if info is not None else ():
                if table.id not in self.tables:
                    found.setdefault(table.id, table)
        return [found[number] for number in sorted(found)]

    def seek(self, step: int) -> None:
        """Show every table as it was when `step` was done."""
        for series in self.tables.values():
            series.seek(step)
        self.version += 1

    @property
    def last_step(self) -> int:
        """The newest step of any table; 0 when nothing was measured."""
        return max((series.newest_step or 0 for series in self.tables.values()), default=0)

    def close(self) -> None:
        self.store.close()


def _decode_table(number: int, data: bytes) -> Table:
    table = msgspec.json.decode(data, type=Table)
    if table.id != number:
        raise ValueError("the declaration of another table")
    return sanitize_message(table)
