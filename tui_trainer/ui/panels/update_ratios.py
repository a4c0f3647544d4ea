"""How far each step moves the weights: update ratios with the parameters that move most, and the
learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.history.healthy_ranges import UPDATE_RATIO
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.text import fit
from tui_trainer.ui.panels.base import (
    NO_STEP_YET,
    Figure,
    Panel,
    message_row,
    newest_row,
    staleness,
    waiting_message,
)
from tui_trainer.ui.widgets.axes import step_window
from tui_trainer.ui.widgets.chart import Chart, put_message
from tui_trainer.ui.widgets.chart_layers import Band, Floats, Layer, Line, Threshold, fill_gaps
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.related import related_curves

MAX_CHARTED = 200
"""Maximum number of parameters of a table that the chart reads; of more, it reads every n-th."""
MIN_HEIGHT_FOR_MOVERS = 9
MOVERS_SHARE = 0.4
"""Share of the panel's height for the list of parameters."""
RATIO_WIDTH = 9


def chart_steps(panel: Panel) -> tuple[int, int]:
    """The window of steps that the loss panel shows by default."""
    table, info = panel.snapshot.history.table(schema.STEP), panel.snapshot.info
    last_step = (table.last_step or 0) if table is not None else 0
    return step_window(last_step, None, info.total_steps if info else None, panel.slow_link)


class UpdatesPanel(Panel):
    """A chart of the update ratios of all parameters with the healthy band, and below it the
    parameters that move most."""

    lessons = ("updates",)
    panel_title = "Updates"
    quantity = schema.UPDATE_RATIO

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart(log=True)

    def content(self, size: Size) -> Sequence[Row]:
        """Title, chart, list."""
        tables = [
            table
            for table in self.snapshot.history.tables_named(schema.UPDATE_RATIO)
            if table.rows or newest_row(self.snapshot, table)[0] is not None
        ]
        movers = self._movers(tables)
        list_height = 0
        if size.height >= MIN_HEIGHT_FOR_MOVERS:
            list_height = min(len(movers) + 1, max(3, int(size.height * MOVERS_SHARE)))
        steps = chart_steps(self)
        layers = self._layers(tables, steps, size.width)
        height = size.height - 1 - list_height
        rows = self.chart.rows(size.width, height, steps, layers, self.palette, self.glyphs)
        if not layers:
            started = bool(self.snapshot.status.step)
            text = waiting_message(self.snapshot) if started else NO_STEP_YET
            put_message(rows, text, self.palette.dim)
        figures = self._figures(movers)
        if age := staleness(self.snapshot, tables):
            figures.insert(1, ("", age, self.palette.dim))
        title = self.title_line(size.width, figures)
        return [title, *rows, *self._list(movers, size.width, list_height)]

    def _movers(self, tables: Sequence[SeriesReader]) -> list[tuple[float, str]]:
        """(newest update ratio, parameter): ratios that are not finite first, then the largest."""
        found: list[tuple[float, str]] = []
        for table in tables:
            row, _ = newest_row(self.snapshot, table)
            if row is None:
                continue
            names = (column.name for column in table.table.columns)
            pairs = zip(row.tolist(), names, strict=True)
            found += [(ratio, name) for ratio, name in pairs if why_absent(ratio) is None]
        return sorted(found, key=lambda pair: (np.isfinite(pair[0]), -pair[0]))

    def _figures(self, movers: Sequence[tuple[float, str]]) -> list[Figure]:
        known = [ratio for ratio, _ in movers if np.isfinite(ratio)]
        if not known:
            return []
        median = float(np.median(known))
        style = self.palette.good if UPDATE_RATIO.holds(median) else self.palette.warning
        return [
            ("median", formatting.scientific(median, 8), style),
        ]

    def _layers(
        self, tables: Sequence[SeriesReader], steps: tuple[int, int], width: int
    ) -> list[Layer]:
        """The band from the smallest to the largest ratio, the median, and the healthy limits."""
        lows: list[Floats] = []
        highs: list[Floats] = []
        middles: list[Floats] = []
        bad: list[NDArray[np.bool_]] = []
        for table in tables:
            if not table.rows or not table.columns:
                continue
            columns = list(range(0, table.columns, -(-table.columns // MAX_CHARTED)))
            window = table.window(columns, *steps, 2 * self.chart.plot_width(width))
            with np.errstate(invalid="ignore"):
                positive = [np.where(v > 0, v, np.nan) for v in (window.low, window.high)]
            low, high = (_row_extremes(values, least) for values, least in
                         zip(positive, (True, False), strict=True))  # fmt: skip
            low, high = fill_gaps(low, high, window.filled)
            middle = _row_medians(np.where(window.last > 0, window.last, np.nan))
            middle, _ = fill_gaps(middle, middle, window.filled)
            lows, highs, middles = [*lows, low], [*highs, high], [*middles, middle]
            bad.append(np.asarray(window.nonfinite.any(1), np.bool_))
        if not lows:
            return []
        layers: list[Layer] = [Threshold(self.palette.good, limit) for limit in UPDATE_RATIO.limits]
        low = _row_extremes(np.stack(lows, 1), True)
        high = _row_extremes(np.stack(highs, 1), False)
        nonfinite = np.asarray(np.stack(bad).any(0), np.bool_)
        layers.append(Band(self.palette.loss_raw, low, high, nonfinite))
        layers.append(Line(self.palette.loss, _row_medians(np.stack(middles, 1))))
        return layers

    def _list(self, movers: Sequence[tuple[float, str]], width: int, height: int) -> list[Row]:
        if height < 2:
            return []
        titles = f"{'‖Δw‖/‖w‖':>{RATIO_WIDTH}}  moved most"
        words = UPDATE_RATIO.words.rjust(max(0, width - cell_len(titles)))
        words = words if len(words) > len(UPDATE_RATIO.words) else ""
        rows: list[Row] = [[Segment(titles + words, self.palette.dim)]]
        if not movers:
            return [*rows, message_row("", self.palette.dim)]
        for ratio, name in movers[: height - 1]:
            style = "text" if UPDATE_RATIO.holds(ratio) else "warning"
            style = style if np.isfinite(ratio) else "error"
            value = formatting.scientific(ratio, RATIO_WIDTH)
            verdict = UPDATE_RATIO.describe(ratio).partition(" the ")[0]
            room = max(1, width - RATIO_WIDTH - 3 - len(verdict))
            text = fit(formatting.parameter_name(name), room, left=True)
            rows.append(self.styled([(value, style), (f"  {text}", "dim"), (f" {verdict}", style)]))
        return rows


class LearningRatePanel(Panel):
    """The learning rate over the run."""

    lessons = ("forward-backward", "updates")
    panel_title = "Learning rate"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart(include_zero=True)

    def content(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        steps = chart_steps(self)
        layers, value = self._layer(steps, size.width)
        figures: list[Figure] = []
        if value is not None:
            figures.append(("", formatting.scientific(value, 8), self.palette.accent))
        rows = self.chart.rows(
            size.width, size.height - 1, steps, layers, self.palette, self.glyphs
        )
        if not layers:
            put_message(rows, NO_STEP_YET, self.palette.dim)
        return [self.title_line(size.width, figures), *rows]

    def _layer(self, steps: tuple[int, int], width: int) -> tuple[list[Layer], float | None]:
        table = self.snapshot.history.table(schema.STEP)
        column = table.column("learning_rate") if table is not None else None
        if table is None or column is None or not table.rows:
            return [], None
        newest = table.newest("learning_rate")
        if newest is None or why_absent(newest) is not None:
            return [], None
        columns = 2 * self.chart.plot_width(width)
        window = table.window([column], *steps, columns)
        others, _ = related_curves(
            self, self.snapshot.related, schema.STEP, "learning_rate", steps, columns
        )
        return [*others, Band.from_window(window, 0, self.palette.accent)], newest


def _row_extremes(values: Floats, least: bool) -> Floats:
    """The smallest or largest value of each row; nan where there is none."""
    filler = np.inf if least else -np.inf
    replaced = np.where(np.isnan(values), filler, values)
    found = replaced.min(1) if least else replaced.max(1)
    return np.where(np.isfinite(found), found, np.nan).astype(np.float32)


def _row_medians(values: Floats) -> Floats:
    """The median of each row; nan where there is no value."""
    known = ~np.isnan(values)
    medians = np.full(len(values), np.nan, np.float32)
    rows = np.flatnonzero(known.any(1))
    if len(rows):
        medians[rows] = np.nanmedian(values[rows], axis=1)
    return medians
