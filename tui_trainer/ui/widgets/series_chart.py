"""A titled chart of one to three columns of a series, as the detail screens show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting
from tui_trainer.protocol.absent import why_absent
from tui_trainer.ui.widgets.chart import Band, Chart, Layer
from tui_trainer.ui.widgets.lines import LineView, Row
from tui_trainer.ui.widgets.scale import step_window


@dataclass(frozen=True)
class ChartCurve:
    """One curve of a chart."""

    label: str
    style: str
    """Name of a style of the palette."""
    column: int
    """Of the series."""


class SeriesChart(LineView):
    """A title with the newest values, and the curves below it."""

    DEFAULT_CSS = "SeriesChart { width: 1fr; height: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.chart = Chart()
        self._title = ""
        self._series: SeriesReader | None = None
        self._curves: tuple[ChartCurve, ...] = ()
        self._placeholder = ""
        self._total_steps: int | None = None
        self._selected = False

    def plot(
        self,
        title: str,
        series: SeriesReader | None,
        curves: Sequence[ChartCurve],
        *,
        placeholder: str = "",
        total_steps: int | None = None,
        log: bool = False,
        selected: bool = False,
    ) -> None:
        """Show `curves` of `series`, or `placeholder` where there is nothing to draw."""
        curves = tuple(curves)
        if (title, series, curves) != (self._title, self._series, self._curves):
            self.chart = Chart()
        self.chart.log = log
        self._title, self._series, self._curves = title, series, curves
        self._placeholder, self._total_steps, self._selected = placeholder, total_steps, selected
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        series, curves = self._series, self._curves
        if series is None or not series.rows or not curves:
            lines = wrap(self._placeholder, max(1, size.width - 1))
            message = [[Segment(f" {line}", self.palette.dim)] for line in lines]
            return [self._title_row(size.width, []), [], *message][: max(3, size.height)]
        columns = [curve.column for curve in curves]
        newest = series.latest()
        values = newest[1][columns] if newest else np.full(len(columns), np.nan, np.float32)
        title = self._title_row(size.width, list(zip(curves, values.tolist(), strict=True)))
        if size.height < 4:
            return [title]
        steps = step_window(series.last_step or 0, None, self._total_steps)
        window = series.window(columns, *steps, 2 * self.chart.plot_width(size.width))
        layers: list[Layer] = [
            Band.from_window(window, number, self.style(curve.style))
            for number, curve in enumerate(curves)
        ]
        chart_height = size.height - 1
        return [
            title,
            *self.chart.rows(size.width, chart_height, steps, layers, self.palette, self.glyphs),
        ]

    def _title_row(self, width: int, values: Sequence[tuple[ChartCurve, float]]) -> Row:
        """`drift q 0.276 k 0.245 v 0.138 ───`, in exactly `width` cells."""
        palette = self.palette
        title = self._title[:width]
        row: Row = [Segment(title, palette.accent if self._selected else palette.title)]
        left = width - len(title)
        for curve, value in values:
            label = f" {curve.label}" if curve.label else ""
            text = f" {compact_number(value, 6 if len(values) > 1 else 9)}"
            if len(label) + len(text) > left:
                break
            finite = np.isfinite(value)
            missing = "dim" if why_absent(value) is not None else "error"
            style = self.style(curve.style if finite else missing)
            row += (Segment(label, palette.dim), Segment(text, style))
            left -= len(label) + len(text)
        row.append(Segment(f" {self.glyphs.rule * (left - 1)}" if left else "", palette.faint))
        return row


def compact_number(value: float, width: int) -> str:
    """As many digits as fit, four at most; small values in scientific notation if they fit."""
    if 0 < abs(value) < 0.01 and width >= 9:
        return formatting.scientific(value, width)
    for digits in (4, 3, 2):
        text = formatting.number(value, width, digits)
        if "#" not in text:
            return text
    return formatting.number(value, width, 1)
