"""A titled chart of one to three series of a table: what detail views are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting
from tui_trainer.ui.panels.base import note
from tui_trainer.ui.widgets.chart import Band, Chart, Layer
from tui_trainer.ui.widgets.lines import Lines, Row
from tui_trainer.ui.widgets.scale import window


@dataclass(frozen=True)
class ChartSeries:
    """One curve."""

    label: str
    style: str
    """A meaning of the palette: always `q`, `k` or `v` for what belongs to Wq, Wk, Wv."""
    column: int
    """Of the table's history."""


class SeriesChart(Lines):
    """Title with the newest values, then the curves; why there are none, where there are none."""

    DEFAULT_CSS = "SeriesChart { width: 1fr; height: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.chart = Chart()
        self.name_shown = ""
        self._series: tuple[ChartSeries, ...] = ()
        self._history: SeriesReader | None = None
        self._why = ""
        self._total: int | None = None
        self._selected = False

    def draw(
        self,
        name: str,
        history: SeriesReader | None,
        series: Sequence[ChartSeries],
        *,
        why: str = "",
        total: int | None = None,
        log: bool = False,
        selected: bool = False,
    ) -> None:
        """Show `series` of `history` under `name`; `why` stands where there is nothing to draw.

        `total` is the number of steps of the whole run, if known.
        """
        if (name, history, tuple(series)) != (self.name_shown, self._history, self._series):
            self.chart = Chart()
        self.chart.log = log
        self.name_shown, self._history, self._series = name, history, tuple(series)
        self._why, self._total, self._selected = why, total, selected
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        history = self._history
        if history is None or not history.rows or not self._series:
            lines = wrap(self._why, max(1, size.width - 1))
            said = [note(line, self.palette.dim) for line in lines]
            return [self._title(size.width, []), [], *said][: max(3, size.height)]
        steps = window(history.last_step or 0, None, self._total)
        columns = [each.column for each in self._series]
        buckets = 2 * self.chart.plot_width(size.width)
        seen = history.window(columns, *steps, buckets)
        layers: list[Layer] = [
            Band.of(seen, place, getattr(self.palette, each.style))
            for place, each in enumerate(self._series)
        ]
        latest = history.latest()
        values = latest[1][columns] if latest else np.full(len(columns), np.nan, np.float32)
        title = self._title(size.width, list(zip(self._series, values.tolist(), strict=True)))
        if size.height < 4:
            return [title]
        return [
            title,
            *self.chart.rows(size.width, size.height - 1, steps, layers, self.palette, self.glyphs),
        ]

    def _title(self, width: int, values: Sequence[tuple[ChartSeries, float]]) -> Row:
        """`drift q 0.276 k 0.245 v 0.138 ───`, in exactly `width` cells."""
        palette = self.palette
        name = self.name_shown[:width]
        row: Row = [Segment(name, palette.accent if self._selected else palette.title)]
        left = width - len(name)
        for series, value in values:
            label = f" {series.label}" if series.label else ""
            text = f" {compact(value, 6 if len(values) > 1 else 9)}"
            if len(label) + len(text) > left:
                break
            style = getattr(palette, series.style) if np.isfinite(value) else palette.error
            row += (Segment(label, palette.dim), Segment(text, style))
            left -= len(label) + len(text)
        row.append(Segment(f" {self.glyphs.rule * (left - 1)}" if left else "", palette.faint))
        return row


def compact(value: float, width: int) -> str:
    """`value` with as many digits as fit, four at most; small ones scientific if there is room."""
    if 0 < abs(value) < 0.01 and width >= 9:
        return formatting.scientific(value, width)
    for digits in (4, 3, 2):
        text = formatting.number(value, width, digits)
        if "#" not in text:
            return text
    return formatting.number(value, width, 1)
