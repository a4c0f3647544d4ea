"""A chart of values against steps, drawn in braille: the canvas that its layers are drawn on, with
the two axes. `SeriesChart` shows columns of a series with a title.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import RelatedRun
from tui_trainer.history.healthy_ranges import HealthyRange
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets import braille
from tui_trainer.ui.widgets.axes import (
    AXIS_WIDTH,
    Outliers,
    Scale,
    fit_layers,
    step_axis,
    step_window,
    value_labels,
)
from tui_trainer.ui.widgets.chart_layers import (
    Band,
    ChartMarker,
    Floats,
    Label,
    Layer,
    Line,
    Points,
    Threshold,
)
from tui_trainer.ui.widgets.lines import LineView, Row
from tui_trainer.ui.widgets.related import Figure, related_curves

SPACE = 0x20
MIN_NAME_WIDTH = 8
"""Minimum width of another run's name in the title of a chart."""


class Canvas:
    """The cells of a plot, `width` × `height`, that layers are drawn on."""

    def __init__(
        self, width: int, height: int, scale: Scale, palette: Palette, glyphs: Glyphs
    ) -> None:
        self.width, self.height = width, height
        self.scale = scale
        self._palette = palette
        self._glyphs = glyphs
        self._codes = np.full((height, width), SPACE, np.uint32)
        self._style_numbers = np.zeros((height, width), np.int64)
        self._styles: list[Style] = [palette.text]

    def draw(self, layers: Sequence[Layer]) -> None:
        """Draw thresholds, then bands and lines, points, and labels on top."""
        for layer in layers:
            if isinstance(layer, Threshold):
                self._draw_threshold(layer)
        self._draw_curves([layer for layer in layers if isinstance(layer, Band | Line)])
        for layer in layers:
            if isinstance(layer, Points):
                self._draw_points(layer)
        for layer in layers:
            if isinstance(layer, Label):
                self._draw_label(layer)

    def rows(self) -> list[Row]:
        """The cells as rows of segments."""
        return braille.styled_rows(self._codes, self._style_numbers, self._styles)

    def _add_style(self, style: Style) -> int:
        self._styles.append(style)
        return len(self._styles) - 1

    def _draw_threshold(self, layer: Threshold) -> None:
        y = self.scale.cell_row(layer.value, self.height)
        if y is not None:
            self._codes[y] = ord(self._glyphs.dash)
            self._style_numbers[y] = self._add_style(layer.style)

    def _draw_curves(self, layers: Sequence[Band | Line]) -> None:
        patterns = np.zeros(self._codes.shape, np.uint8)
        has_band = any(isinstance(layer, Band) for layer in layers)
        for layer in layers:
            drawn = braille.cell_patterns(self._dots(layer))
            self._style_numbers[drawn > 0] = self._add_style(layer.style)
            if isinstance(layer, Line) and has_band:
                # The line replaces the band in its cells, where the band would hide it.
                # The band is still drawn in other cells, so a spike is never hidden.
                patterns[drawn > 0] = 0
            patterns |= drawn
        filled = patterns > 0
        self._codes[filled] = braille.pattern_codes(patterns, self._glyphs.ascii)[filled]

    def _dots(self, layer: Band | Line) -> braille.Dots:
        dots, rows = braille.blank_dots(self.width, self.height), 4 * self.height
        if isinstance(layer, Line):
            braille.draw_line(dots, self.scale.dot_rows(layer.values, rows))
        else:
            top, bottom = (self.scale.dot_rows(v, rows) for v in (layer.high, layer.low))
            braille.draw_extents(dots, top, bottom)
        return dots

    def _draw_points(self, layer: Points) -> None:
        number = self._add_style(layer.style)
        rows = self.scale.dot_rows(layer.values, 4 * self.height)
        for x, row in zip(layer.columns // 2, rows, strict=True):
            if 0 <= x < self.width and np.isfinite(row):
                y = self._clamped_row(row)
                self._codes[y, x], self._style_numbers[y, x] = ord(layer.marker), number

    def _draw_label(self, layer: Label) -> None:
        """Draw in the row of the label's value, or in a row next to it if only that one is free."""
        rows = self.scale.dot_rows(np.array([layer.value], np.float32), 4 * self.height)
        start = min(layer.column // 2 + 2, self.width - len(layer.text))
        if not np.isfinite(rows[0]) or start < 0:
            return
        middle, cells = self._clamped_row(rows[0]), slice(start, start + len(layer.text))
        nearby = (y for y in (middle, middle + 1, middle - 1) if 0 <= y < self.height)
        y = next((y for y in nearby if (self._codes[y, cells] == SPACE).all()), middle)
        self._codes[y, cells] = [ord(character) for character in layer.text]
        self._style_numbers[y, cells] = self._add_style(layer.style)

    def draw_marker(self, layer: ChartMarker, steps: tuple[int, int]) -> None:
        """Draw a vertical line in the free cells of the marker's column."""
        start, stop = steps
        x = (layer.step - start) * self.width // max(1, stop - start)
        if 0 <= x < self.width:
            free = self._codes[:, x] == SPACE
            self._codes[free, x] = ord(self._glyphs.vertical_dash)
            self._style_numbers[free, x] = self._add_style(layer.style)

    def draw_outliers(self, outliers: Outliers, steps: tuple[int, int]) -> None:
        """Mark the columns whose values lie beyond the axis, with the largest value."""
        y = 0 if outliers.above else self.height - 1
        sign = self._glyphs.ascending if outliers.above else self._glyphs.descending
        number = self._add_style(self._palette.warning)
        at = np.unique(outliers.columns // 2)
        at = at[at < self.width]
        self._codes[y, at], self._style_numbers[y, at] = ord(sign), number
        start, stop = steps
        step = start + outliers.column * (stop - start) // (2 * self.width)
        value = f"{outliers.extreme:.4g}"
        texts = (f"{sign} {value} near step {step:,}", f"{sign} {value}")
        text = next((text for text in texts if len(text) < self.width), "")
        free = self._codes[y] == SPACE
        starts = [x for x in range(self.width - len(text), -1, -1) if free[x : x + len(text)].all()]
        x = starts[0] if starts else self.width - len(text)
        cells = slice(x, x + len(text))
        self._codes[y, cells] = [ord(character) for character in text]
        self._style_numbers[y, cells] = number

    def _clamped_row(self, dot_row: float) -> int:
        return min(max(round(dot_row) // 4, 0), self.height - 1)


@dataclass
class Chart:
    """Draws layers with their axes, and keeps its value axis from one frame to the next while the
    values still fit it."""

    log: bool | None = None
    """None: linear, unless a linear axis would flatten most values."""
    include_zero: bool = False
    """Whether a linear value axis always includes 0."""
    scale: Scale | None = None
    """The value axis as last drawn."""
    hidden: Sequence[Outliers] = ()
    """Outliers that the value axis as last drawn leaves out."""

    @property
    def drawn_log(self) -> bool:
        """Whether the axis as last drawn is logarithmic."""
        return self.scale.log if self.scale is not None else bool(self.log)

    def toggle_log(self) -> None:
        """Switch to the axis that is not drawn now, linear or logarithmic."""
        self.log = not self.drawn_log

    def plot_width(self, width: int) -> int:
        """Cells across the plot of a chart `width` cells wide; twice as many dot columns."""
        return max(1, width - AXIS_WIDTH)

    def rows(
        self,
        width: int,
        height: int,
        steps: tuple[int, int],
        layers: Sequence[Layer],
        palette: Palette,
        glyphs: Glyphs,
    ) -> list[Row]:
        """`height` rows of a chart of start <= step < stop: the plot, and the step axis below."""
        plot_height = max(1, height - 1)
        self.scale, self.hidden = fit_layers(layers, self.log, self.include_zero, self.scale)
        canvas = Canvas(self.plot_width(width), plot_height, self.scale, palette, glyphs)
        canvas.draw(layers)
        for layer in layers:
            if isinstance(layer, ChartMarker):
                canvas.draw_marker(layer, steps)
        for outliers in self.hidden:
            canvas.draw_outliers(outliers, steps)
        labels = value_labels(self.scale, plot_height) if layers else {}
        rows = []
        for y, plotted in enumerate(canvas.rows()):
            label = labels.get(y, "").rjust(AXIS_WIDTH - 1)
            axis = glyphs.tick if y in labels else glyphs.vertical
            rows.append([Segment(label, palette.dim), Segment(axis, palette.faint), *plotted])
        rows.append(step_axis(canvas.width, steps, layers, palette, glyphs))
        return rows


def put_message(rows: list[Row], text: str, style: Style) -> None:
    """Write a message into the middle of a chart that has nothing to show yet."""
    y = max(0, len(rows) // 2 - 1)
    rows[y] = [*rows[y][:2], Segment(f"  {text}", style)]


@dataclass(frozen=True)
class ChartCurve:
    """One curve of a chart."""

    label: str
    style: str
    """Name of a style of the palette."""
    column: int
    """Column of the series."""


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
        self._band: HealthyRange | None = None
        self._related: Sequence[RelatedRun] = ()

    def plot(
        self,
        title: str,
        series: SeriesReader | None,
        curves: Sequence[ChartCurve],
        *,
        placeholder: str = "",
        total_steps: int | None = None,
        log: bool | None = None,
        selected: bool = False,
        band: HealthyRange | None = None,
        related: Sequence[RelatedRun] = (),
    ) -> None:
        """Show `curves` of `series`, or `placeholder` where there is nothing to draw. The limits
        of a healthy `band` are drawn where values come near them; the same curves of `related` runs
        are drawn below."""
        curves = tuple(curves)
        if (title, series, curves) != (self._title, self._series, self._curves):
            self.chart = Chart()
        self.chart.log = log
        self._title, self._series, self._curves, self._band = title, series, curves, band
        self._placeholder, self._total_steps, self._selected = placeholder, total_steps, selected
        self._related = related
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
        shown = list(zip(curves, values.tolist(), strict=True))
        if size.height < 4:
            return [self._title_row(size.width, shown)]
        steps = step_window(series.last_step or 0, None, self._total_steps)
        dots = 2 * self.chart.plot_width(size.width)
        window = series.window(columns, *steps, dots)
        others, names = self._curves_of_related(series, columns, steps, dots)
        layers: list[Layer] = [
            *others,
            *(Band.from_window(window, number, self.style(curve.style))
              for number, curve in enumerate(curves)),
        ]  # fmt: skip
        if self._band is not None:
            limits = near_limits(self._band, window.low, window.high)
            layers += [Threshold(self.palette.good, limit) for limit in limits]
        chart_height = size.height - 1
        return [
            self._title_row(size.width, shown, names),
            *self.chart.rows(size.width, chart_height, steps, layers, self.palette, self.glyphs),
        ]

    def _curves_of_related(
        self, series: SeriesReader, columns: Sequence[int], steps: tuple[int, int], dots: int
    ) -> tuple[list[Layer], list[Figure]]:
        """Layers of these columns of the related runs, and a figure for each run for the title."""
        layers: list[Layer] = []
        names: dict[str, Figure] = {}
        for column in columns:
            name = series.table.columns[column].name
            drawn, figures = related_curves(
                self, self._related, series.table.name, name, steps, dots
            )
            layers += drawn
            names |= {figure[0]: figure for figure in figures}
        return layers, list(names.values())

    def _title_row(
        self,
        width: int,
        values: Sequence[tuple[ChartCurve, float]],
        related: Sequence[Figure] = (),
    ) -> Row:
        """`drift q 0.276 k 0.245 v 0.138 ■ gpt-2 ───`, in exactly `width` cells."""
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
            healthy = self._band is None or self._band.holds(value)
            style = self.style((curve.style if healthy else "warning") if finite else missing)
            row += (Segment(label, palette.dim), Segment(text, style))
            left -= len(label) + len(text)
        for name, _, dim in related:
            if left <= MIN_NAME_WIDTH + 1:
                break
            name = truncate_middle(strip_escapes(name), left - 1, self.glyphs.ellipsis)
            row.append(Segment(f" {name}", dim))
            left -= cell_len(name) + 1
        if self._band is not None and len(self._band.words) + 4 < left:
            row.append(Segment(f" {self._band.words}", palette.dim))
            left -= len(self._band.words) + 1
        row.append(Segment(f" {self.glyphs.rule * (left - 1)}" if left else "", palette.rule))
        return row


def near_limits(band: HealthyRange, low: Floats, high: Floats) -> list[float]:
    """The limits of a band within the drawn values or near them: a limit far away would flatten the
    curve."""
    known = np.concatenate([low[np.isfinite(low)], high[np.isfinite(high)]])
    if not len(known):
        return []
    least, most = float(known.min()), float(known.max())
    room = (most - least) / 2
    return [limit for limit in band.limits if least - room <= limit <= most + room]


def compact_number(value: float, width: int) -> str:
    """As many digits as fit, at most four; small values in scientific notation if they fit."""
    if 0 < abs(value) < 0.01 and width >= 9:
        return formatting.scientific(value, width)
    for digits in (4, 3, 2):
        text = formatting.number(value, width, digits)
        if "#" not in text:
            return text
    return formatting.number(value, width, 1)
