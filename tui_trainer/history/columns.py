"""Finds the columns of attention layers and of logged scalars in a history.

`RunInfo.attention` lists the layers of all optimizers; a table has only those of its optimizer.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from tui_trainer.history.history import History
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, why_absent

STATISTICS = {
    schema.ATTENTION: schema.ATTENTION_STATISTICS,
    schema.ATTENTION_SPECTRUM: schema.SPECTRUM_STATISTICS,
    schema.ATTENTION_HEALTH: schema.HEALTH_STATISTICS,
    schema.ATTENTION_HEADS: schema.HEAD_STATISTICS,
}
"""Attention table → the statistics of each layer, or of each head of each layer."""
_indexes: WeakKeyDictionary[SeriesReader, dict[str, range]] = WeakKeyDictionary()
SEARCHED_ROWS = 256
"""Newest rows that are searched for a value of a name: names that were first logged together may be
logged one by one later."""


class LayerLocation(NamedTuple):
    """The columns of a layer in a table."""

    history: SeriesReader
    columns: range
    """The statistics of the layer, or those of its heads one after the other."""


def attention_tables(history: History, name: str) -> list[SeriesReader]:
    """The tables called `name`, one for each optimizer that has attention layers.

    Tables without rows come first, then the others in order of declaration. Where two tables have
    the same layer, because an optimizer was created again, the last one counts.
    """
    return sorted(history.tables_named(name), key=lambda series: bool(series.rows))


def layers_in(series: SeriesReader) -> dict[str, range]:
    """Columns of each layer in an attention table, cached."""
    known = _indexes.get(series)
    if known is None:
        known = _indexes[series] = _index_layers(series)
    return known


def location_of(history: History, name: str, layer: str) -> LayerLocation | None:
    """The columns of `layer` in the tables called `name`; None if no table has the layer."""
    for series in reversed(attention_tables(history, name)):
        columns = layers_in(series).get(layer)
        if columns is not None:
            return LayerLocation(series, columns)
    return None


def _index_layers(series: SeriesReader) -> dict[str, range]:
    """Layer → columns, read from the first name of each block of statistics only: 10,000 layers
    have 220,000 columns."""
    names = STATISTICS[series.table.name]
    columns, width = series.table.columns, len(names)
    first = tuple(column.name.rpartition(".")[2] for column in columns[:width])
    if first != names or len(columns) % width:
        return {}  # recorded by a version that measured other statistics
    suffixes = 2 if series.table.name == schema.ATTENTION_HEADS else 1  # layer.head.statistic
    found: dict[str, range] = {}
    for start in range(0, len(columns), width):
        layer = columns[start].name.rsplit(".", suffixes)[0]
        begun = found.get(layer)
        found[layer] = range(begun.start if begun else start, start + width)
    return found


class LoggedSeries(NamedTuple):
    """The column with the values of one logged name."""

    name: str
    series: SeriesReader
    column: int

    @property
    def better(self) -> schema.Better:
        return self.series.table.columns[self.column].better

    def newest(self) -> tuple[int, float] | None:
        """Step and value of the newest entry; None if the newest SEARCHED_ROWS rows have none."""
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
    """Every logged name whose table has rows, in the order in which names were first logged.
    `table`: `logged`, or `validation` for the results of evaluations."""
    return [
        LoggedSeries(column.name, series, number)
        for series in history.tables_named(table)
        if series.rows
        for number, column in enumerate(series.table.columns)
    ]
