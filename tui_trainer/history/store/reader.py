"""The history of a recorded run, read from its store as it was at any step."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Buckets, Entries, Steps
from tui_trainer.history.history import History
from tui_trainer.history.store.database import Store
from tui_trainer.history.store.level import StoredLevel
from tui_trainer.history.table import TableHistory
from tui_trainer.protocol.describe import Table


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
        # Where the rows themselves cannot be read, summaries of them may.
        firsts = (level.bounds(0, min(1, level.stop))[0] for level in self._stored)
        self.first_step = next((int(found[0]) for found in firsts if len(found)), None)
        self.all_last_step = self.last_step = self._last_of(self.rows)

    def seek(self, step: int) -> None:
        """Show the table as it was when `step` had been made."""
        self.rows = min(self.all_rows, self._stored[0].find(step + 1))
        self.last_step = self._last_of(self.rows)

    def _last_of(self, rows: int) -> int | None:
        """The newest step among the first so many rows that can be read, or is summed up."""
        for level in self._stored:
            stop = min(level.stop, rows // level.size)
            found = level.bounds(max(0, stop - 1), stop)[1]
            if len(found):
                return int(found[-1])
        return None

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
            for known in self.tables.values():
                assert isinstance(known, RecordedTable)
                known.refresh()
            for table in store.declared(self.tables):
                self.tables[table.id] = RecordedTable(store, table)
        finally:
            if store.connection.in_transaction:
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
