"""A table of the values that the script logs with `tui_trainer.log`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tui_trainer.client.api import Snapshot
from tui_trainer.history.columns import LoggedSeries, logged_series
from tui_trainer.protocol import formatting
from tui_trainer.protocol.absent import why_absent
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable


class LoggedTable(VirtualTable):
    """Rows are names, in the order in which they were first logged."""

    DEFAULT_CSS = "LoggedTable { height: 1fr; min-height: 4; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.columns = (
            TableColumn("name", "logged by the script", 0, self._name_of, left=True),
            TableColumn("value", "newest", 10, self._value),
            TableColumn("best", "best", 10, self._best, tooltip="Over the whole run"),
            TableColumn("step", "at step", 9, self._step, formatting.count, style="dim"),
        )
        self.descending = False
        self._logged: Sequence[LoggedSeries] = ()
        self._newest: list[tuple[int, float] | None] = []

    def show(self, snapshot: Snapshot) -> int:
        """Show the names of a snapshot; returns how many there are."""
        self._logged = logged_series(snapshot.history)
        self._newest = [each.newest() for each in self._logged]
        if len(self.order) != len(self._logged):
            self.set_order(np.arange(len(self._logged)))
        self.update_rows()
        return len(self._logged)

    @property
    def selected(self) -> LoggedSeries | None:
        """The one under the cursor."""
        row = self.current_row
        return self._logged[row] if row is not None and row < len(self._logged) else None

    def _name_of(self, row: int) -> CellValue:
        return self._logged[row].name

    def _value(self, row: int) -> CellValue:
        newest = self._newest[row]
        if newest is None:
            return None
        why = why_absent(newest[1])
        return newest[1] if why is None else Cell(None, "dim")

    def _best(self, row: int) -> CellValue:
        return self._logged[row].best()

    def _step(self, row: int) -> CellValue:
        newest = self._newest[row]
        return None if newest is None else f"{newest[0]:,}".rjust(9)
