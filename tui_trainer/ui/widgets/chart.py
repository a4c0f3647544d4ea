"""A chart of values against steps, drawn in braille: layers (bands, lines, points, …), the canvas
that they are drawn on, and the two axes. `SeriesChart` shows columns of a series with a title.

A band reaches exactly from the smallest to the largest value of each column of dots, so that no
spike is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.history.series import SeriesReader
from tui_trainer.history.window import Window
from tui_trainer.protocol import formatting
from tui_trainer.protocol.absent import why_absent
from tui_trainer.ui.bands import HealthyBand
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets import braille
from tui_trainer.ui.widgets.lines import LineView, Row
from tui_trainer.ui.widgets.scale import Scale, fit_scale, step_window

Floats = NDArray[np.float32]

AXIS_WIDTH = 9
"""Cells left of the plot: a label of 8, right-aligned, and the axis itself."""
SMOOTHING_SHARE = 1 / 24
"""A smoothed line averages over about this share of the chart's width."""
SPACE = 0x20
OUTLIER_QUANTILES = (0.02, 0.98)
OUTLIER_DISTANCE = 4.0
"""A linear axis does not reach values further from those between the quantiles than so many times
the distance between the two."""
MIN_VALUES_FOR_OUTLIERS = 60
LOG_BY_ITSELF = 1000.0
"""Times the median, from which a largest value that is not left out makes an axis logarithmic."""
NEWEST_COLUMNS = 2
"""Dot columns at the end of the curves whose values are always shown."""


@dataclass(frozen=True)
class Band:
    """The smallest to the largest value of each dot column, two to a cell; NaN leaves a gap."""

    style: Style
    low: Floats
    high: Floats
    nonfinite: NDArray[np.bool_] | None = None
    """Dot columns in which a NaN or an infinity was measured; they are marked on the step axis."""

    @staticmethod
    def from_window(window: Window, column: int, style: Style) -> Band:
        """A band from a column of a history window with two buckets to a cell."""
        low, high = fill_gaps(window.low[:, column], window.high[:, column], window.filled)
        return Band(style, low, high, window.nonfinite[:, column])


@dataclass(frozen=True)
class Line:
    """A line through one value a dot column; NaN interrupts it."""

    style: Style
    values: Floats
    nonfinite: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Points:
    """Single values, each drawn as a marker in its cell."""

    style: Style
    columns: NDArray[np.int64]
    """Dot columns."""
    values: Floats
    marker: str


@dataclass(frozen=True)
class Label:
    """The name of a curve at its end, which tells curves apart without colour too."""

    style: Style
    column: int
    """Dot column of the curve's end; the name stands right of it."""
    value: float
    text: str


@dataclass(frozen=True)
class Threshold:
    """A dashed horizontal line, such as the limit of gradient clipping."""

    style: Style
    value: float


@dataclass(frozen=True)
class AxisMarks:
    """Dot columns that are marked on the step axis, such as those of clipped steps."""

    style: Style
    columns: NDArray[np.int64]
    marker: str

    @staticmethod
    def at_steps(
        marked: Sequence[int], steps: tuple[int, int], columns: int, style: Style, marker: str
    ) -> AxisMarks:
        """Marks at some of the steps of a chart of start <= step < stop, `columns` dots wide."""
        start, stop = steps
        found = np.array([step for step in marked if start <= step < stop], np.int64)
        return AxisMarks(style, (found - start) * columns // max(1, stop - start), marker)


@dataclass(frozen=True)
class Moment:
    """A dashed vertical line at a step, such as the onset of a finding."""

    style: Style
    step: int


Layer = Band | Line | Points | Label | Threshold | AxisMarks | Moment


@dataclass(frozen=True)
class Outliers:
    """Values beyond the end of a linear axis, which would flatten all others."""

    above: bool
    edge: float
    extreme: float
    column: int
    """Dot column of the extreme."""
    columns: NDArray[np.int64]
    """Dot columns of all of them."""


def fill_gaps(low: Floats, high: Floats, filled: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Interpolate dot columns without a measurement between two that have one (where there are
    fewer steps than dots). A measured NaN stays a gap."""
    at = np.flatnonzero(filled)
    if len(at) < 2 or len(at) == at[-1] - at[0] + 1:
        return low, high
    inner = np.arange(at[0], at[-1] + 1)
    low, high = low.copy(), high.copy()
    for values in (low, high):
        values[inner] = np.interp(inner, at, values[at]).astype(np.float32)
    return low, high


def smooth(low: Floats, high: Floats) -> Floats:
    """The middle of each dot column's extent, averaged with a Gaussian over SMOOTHING_SHARE of the
    width; NaN where nothing was measured."""
    middle = low / 2 + high / 2
    known = np.isfinite(middle)
    if not known.any():
        return np.full(len(low), np.nan, np.float32)
    width = max(2.0, len(low) * SMOOTHING_SHARE)
    reach = int(2 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (width / 2)) ** 2)
    largest = float(np.abs(middle[known]).max()) or 1.0
    scaled = np.where(known, middle / largest, 0.0)
    total = np.convolve(scaled, kernel)[reach : reach + len(middle)]
    weight = np.convolve(known.astype(float), kernel)[reach : reach + len(middle)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, total / weight * largest, np.nan), np.float32)


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
                # The line replaces the band in its cells, or it would drown in it. What reaches
                # beyond these cells is still drawn, so a spike is never hidden.
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
        """In the row of its value, or in the next one where that is taken."""
        rows = self.scale.dot_rows(np.array([layer.value], np.float32), 4 * self.height)
        start = min(layer.column // 2 + 2, self.width - len(layer.text))
        if not np.isfinite(rows[0]) or start < 0:
            return
        middle, cells = self._clamped_row(rows[0]), slice(start, start + len(layer.text))
        nearby = (y for y in (middle, middle + 1, middle - 1) if 0 <= y < self.height)
        y = next((y for y in nearby if (self._codes[y, cells] == SPACE).all()), middle)
        self._codes[y, cells] = [ord(character) for character in layer.text]
        self._style_numbers[y, cells] = self._add_style(layer.style)

    def draw_moment(self, layer: Moment, steps: tuple[int, int]) -> None:
        """In the cells that are free."""
        start, stop = steps
        x = (layer.step - start) * self.width // max(1, stop - start)
        if 0 <= x < self.width:
            free = self._codes[:, x] == SPACE
            self._codes[free, x] = ord(self._glyphs.vertical_dash)
            self._style_numbers[free, x] = self._add_style(layer.style)

    def draw_outliers(self, outliers: Outliers, steps: tuple[int, int]) -> None:
        """Mark the columns whose values lie beyond the axis, and say how far they reach."""
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

    log: bool = False
    include_zero: bool = False
    """Whether a linear value axis always includes 0."""
    scale: Scale | None = None
    """The value axis as last drawn."""
    hidden: Sequence[Outliers] = ()
    """What lay beyond it."""

    @property
    def drawn_log(self) -> bool:
        """Whether the axis as last drawn is logarithmic."""
        return self.scale.log if self.scale is not None else self.log

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
        self.scale, self.hidden = _fit_layers(layers, self.log, self.include_zero, self.scale)
        canvas = Canvas(self.plot_width(width), plot_height, self.scale, palette, glyphs)
        canvas.draw(layers)
        for layer in layers:
            if isinstance(layer, Moment):
                canvas.draw_moment(layer, steps)
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


def _fit_layers(
    layers: Sequence[Layer], log: bool, include_zero: bool, previous: Scale | None
) -> tuple[Scale, list[Outliers]]:
    """A scale for the values of some layers; on a linear axis without a few that would flatten all
    others, which are returned."""
    columns: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    values: list[NDArray[np.floating]] = [np.empty(0)]
    limits: list[float] = []
    for layer in layers:
        if isinstance(layer, Band):
            values += [layer.low, layer.high]
            columns += [np.arange(len(layer.low)), np.arange(len(layer.high))]
        elif isinstance(layer, Line):
            values.append(layer.values)
            columns.append(np.arange(len(layer.values)))
        elif isinstance(layer, Points):
            values.append(layer.values)
            columns.append(layer.columns)
        elif isinstance(layer, Threshold):
            limits.append(layer.value)
    numbers, places = np.concatenate(values).astype(np.float64), np.concatenate(columns)
    shown = np.isfinite(numbers) & ((numbers > 0) | (not log))
    numbers, places = numbers[shown], places[shown]
    limits = [limit for limit in limits if np.isfinite(limit) and (limit > 0 or not log)]
    if not len(numbers) and not limits:
        return fit_scale(np.nan, np.nan, log, include_zero, previous), []
    hidden = [] if log else _outliers(numbers, places)
    kept = _without(numbers, hidden)
    if not log and _spans_thousands(kept, limits, previous):
        log, hidden = True, []
    elif len(kept):  # beside outliers that are shown, those on the other side may be small
        far = OUTLIER_DISTANCE * float(kept.max() - kept.min())
        hidden = [each for each in hidden if abs(each.extreme - each.edge) > far]
        numbers = _without(numbers, hidden)
    ends = [*limits, *((float(numbers.min()), float(numbers.max())) if len(numbers) else ())]
    scale = fit_scale(min(ends), max(ends), log, include_zero, previous)
    # A scale that was kept may show what a new one would hide.
    return scale, [each for each in hidden if not scale.low <= each.extreme <= scale.high]


def _spans_thousands(
    numbers: NDArray[np.float64], limits: Sequence[float], previous: Scale | None
) -> bool:
    """Whether a linear axis would show nothing of most values, as of a loss that explodes: then it
    is logarithmic by itself."""
    if len(numbers) < MIN_VALUES_FOR_OUTLIERS or min([*limits, float(numbers.min())]) <= 0:
        return False
    kept = previous is not None and previous.log
    factor = LOG_BY_ITSELF / 3 if kept else LOG_BY_ITSELF
    return float(numbers.max()) > factor * float(np.median(numbers))


def _without(numbers: NDArray[np.float64], hidden: Sequence[Outliers]) -> NDArray[np.float64]:
    for each in hidden:
        numbers = numbers[numbers <= each.edge if each.above else numbers >= each.edge]
    return numbers


def _outliers(numbers: NDArray[np.float64], places: NDArray[np.int64]) -> list[Outliers]:
    """The few values that are so far from all others that they would flatten them: none where the
    newest values are among them, since then the run is on its way there."""
    if len(numbers) < MIN_VALUES_FOR_OUTLIERS:
        return []
    low, high = np.quantile(numbers, OUTLIER_QUANTILES)
    newest = places >= places.max() - NEWEST_COLUMNS
    found = []
    for above, edge in ((True, high), (False, low)):
        beyond = numbers > edge if above else numbers < edge
        far = float(numbers.max() - high if above else low - numbers.min())
        if far <= OUTLIER_DISTANCE * (high - low) or (beyond & newest).any():
            continue
        extreme = int(numbers.argmax() if above else numbers.argmin())
        found.append(
            Outliers(above, float(edge), float(numbers[extreme]), int(places[extreme]),
                     np.unique(places[beyond]))
        )  # fmt: skip
    return found


def value_labels(scale: Scale, rows: int) -> dict[int, str]:
    """Cell row to its label: round values, evenly spaced."""
    ticks = scale.ticks(rows)
    placed = zip(ticks, _tick_texts(ticks, scale.log), strict=True)
    labels = {scale.cell_row(tick, rows): text for tick, text in placed}
    return {row: text for row, text in labels.items() if row is not None}


def _tick_texts(ticks: Sequence[float], log: bool) -> list[str]:
    """The ticks with as many decimals as are needed to tell them apart."""
    room = AXIS_WIDTH - 1
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if log:  # `0.1`, `1`, `1e-30`
        return [f"{tick:.3g}".replace("e+", "e").replace("e-0", "e-") for tick in ticks]
    if len(ticks) < 2 or not 1e-5 < largest < 1e6:
        return [formatting.number(tick, room, 3).strip() if tick else "0" for tick in ticks]
    for decimals in range(7):
        texts = [f"{tick:.{decimals}f}" for tick in ticks]
        exact = all(
            abs(float(text) - tick) < 1e-3 * largest
            for text, tick in zip(texts, ticks, strict=True)
        )
        if exact and len(set(texts)) == len(texts):
            break
    return [
        text if len(text) <= room else formatting.number(float(text), room, 3) for text in texts
    ]


def step_axis(
    width: int, steps: tuple[int, int], layers: Sequence[Layer], palette: Palette, glyphs: Glyphs
) -> Row:
    """The step axis: a rule with step numbers in it and the marks of the layers.

    Where marks and numbers meet, a NaN's mark displaces the number and any other mark only colours
    the digit under it.
    """
    cells = [(glyphs.axis, palette.faint)] * width
    for layer in layers:
        if isinstance(layer, Band | Line) and layer.nonfinite is not None:
            for x in np.unique(np.flatnonzero(layer.nonfinite) // 2):
                cells[x] = (glyphs.failed, palette.error)
    _write_step_numbers(cells, steps, palette)
    for layer in layers:
        if isinstance(layer, AxisMarks):
            for x in np.unique(layer.columns // 2):
                if 0 <= x < width and cells[x][1] is not palette.error:
                    is_digit = cells[x][1] is palette.dim
                    cells[x] = (cells[x][0] if is_digit else layer.marker, layer.style)
    label = Segment("step ".rjust(AXIS_WIDTH - 1), palette.dim)
    return [label, Segment(glyphs.corner, palette.faint), *_joined(cells)]


def _joined(cells: Sequence[tuple[str, Style]]) -> Row:
    """Cells as segments, neighbours of one style in one segment."""
    row: Row = []
    text, style = "", cells[0][1]
    for character, next_style in cells:
        if next_style is not style:
            row.append(Segment(text, style))
            text, style = "", next_style
        text += character
    return [*row, Segment(text, style)]


def _write_step_numbers(
    cells: list[tuple[str, Style]], steps: tuple[int, int], palette: Palette
) -> None:
    (start, stop), width = steps, len(cells)
    for tick in _step_ticks(start, stop, max(1, width // 10)):
        text = f"{tick:,}"
        x = int((tick - start) * width / max(1, stop - start)) - len(text) // 2
        x = min(max(x, 0), width - len(text))
        around = cells[max(0, x - 1) : x + len(text) + 1]
        if x >= 0 and all(style is palette.faint for _, style in around):
            cells[x : x + len(text)] = [(character, palette.dim) for character in text]


def _step_ticks(start: int, stop: int, max_count: int) -> list[int]:
    spacing = max(1, -(-(stop - start) // max(1, max_count)))
    power = 10 ** (len(str(spacing)) - 1)
    spacing = next(n * power for n in (1, 2, 5, 10) if n * power >= spacing)
    first = -(-start // spacing) * spacing
    return list(range(first, stop + 1, spacing))


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
        self._band: HealthyBand | None = None

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
        band: HealthyBand | None = None,
    ) -> None:
        """Show `curves` of `series`, or `placeholder` where there is nothing to draw. The limits
        of a healthy `band` are drawn where values come near them."""
        curves = tuple(curves)
        if (title, series, curves) != (self._title, self._series, self._curves):
            self.chart = Chart()
        self.chart.log = log
        self._title, self._series, self._curves, self._band = title, series, curves, band
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
        if self._band is not None:
            limits = near_limits(self._band, window.low, window.high)
            layers += [Threshold(self.palette.good, limit) for limit in limits]
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
            healthy = self._band is None or self._band.holds(value)
            style = self.style((curve.style if healthy else "warning") if finite else missing)
            row += (Segment(label, palette.dim), Segment(text, style))
            left -= len(label) + len(text)
        if self._band is not None and len(self._band.words) + 4 < left:
            row.append(Segment(f" {self._band.words}", palette.dim))
            left -= len(self._band.words) + 1
        row.append(Segment(f" {self.glyphs.rule * (left - 1)}" if left else "", palette.rule))
        return row


def near_limits(band: HealthyBand, low: Floats, high: Floats) -> list[float]:
    """The limits of a band within the drawn values, or not far from them: a limit that is far away
    would flatten the curve."""
    known = np.concatenate([low[np.isfinite(low)], high[np.isfinite(high)]])
    if not len(known):
        return []
    least, most = float(known.min()), float(known.max())
    room = (most - least) / 2
    return [limit for limit in band.limits if least - room <= limit <= most + room]


def compact_number(value: float, width: int) -> str:
    """As many digits as fit, four at most; small values in scientific notation if they fit."""
    if 0 < abs(value) < 0.01 and width >= 9:
        return formatting.scientific(value, width)
    for digits in (4, 3, 2):
        text = formatting.number(value, width, digits)
        if "#" not in text:
            return text
    return formatting.number(value, width, 1)
