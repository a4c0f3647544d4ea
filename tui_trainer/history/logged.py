"""The scalars of `tui_trainer.log` in a history, by their names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tui_trainer.history.history import History
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, why_absent

SEARCHED_ROWS = 256
"""Newest rows of a table that are searched for a value: names that were first logged together may
be logged one by one."""


class LoggedSeries(NamedTuple):
    """Where the values of one name are."""

    name: str
    series: SeriesReader
    column: int

    @property
    def better(self) -> str:
        """`lower`, `higher` or "", as `Column.better`."""
        return self.series.table.columns[self.column].better

    def newest(self) -> tuple[int, float] | None:
        """Step and value of the newest entry; None where none is among the newest rows."""
        latest = self.series.latest()
        if latest is None:
            return None
        if why_absent(value := float(latest[1][self.column])) is not Absent.NOT_MEASURED:
            return latest[0], value
        steps, rows = self.series.tail(SEARCHED_ROWS)
        for step, value in zip(steps[::-1].tolist(), rows[::-1, self.column].tolist(), strict=True):
            if why_absent(value) is not Absent.NOT_MEASURED:
                return step, value
        return None

    def best(self) -> float | None:
        """The best value of the whole run; None where no direction is better, or none is finite."""
        series = self.series
        if not self.better or series.first_step is None or series.last_step is None:
            return None
        window = series.window([self.column], series.first_step, series.last_step + 1, 1)
        chosen = window.low if self.better == "lower" else window.high
        best = float(chosen[0, 0])
        return best if np.isfinite(best) else None


def logged_series(history: History, table: str = schema.LOGGED) -> list[LoggedSeries]:
    """Every name that was logged and has rows, in the order in which they first came. `table`: also
    for the results of evaluations, whose tables are of the same kind."""
    return [
        LoggedSeries(column.name, series, number)
        for series in history.tables_named(table)
        if series.rows
        for number, column in enumerate(series.table.columns)
    ]
