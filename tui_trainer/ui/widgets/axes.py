"""The two axes of a chart: the window of steps and the range of values, their scales and labels.

Both ranges change in jumps, so that a chart does not move with every frame.
A linear axis leaves out a few values that would flatten all others, and becomes logarithmic by
itself where the largest value is a thousand times the median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style

from tui_trainer.protocol import formatting
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.chart_layers import AxisMarks, Band, Layer, Line, Points, Threshold
from tui_trainer.ui.widgets.lines import Row

MIN_ROWS_BETWEEN_TICKS = 2
MAX_TICKS = 6
FEWEST_STEPS = 40
"""Minimum number of steps in a window of the whole run."""
KEPT_SHARE = 0.55
"""A scale is kept while the values fill more than this share of it."""
SMALLEST_FLOAT32 = 1e-45

_NICE = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_NICE_COARSE = (1.0, 2.0, 4.0, 10.0)


def round_up(value: float, mantissas: tuple[float, ...] = _NICE) -> float:
    """The next number of the form mantissa × 10ⁿ: at most a quarter above `value` by default. 1 for
    values that are not positive and finite."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((m * power for m in mantissas if m * power >= value * (1 - 1e-9)), 10 * power)


def step_window(
    step: int, max_steps: int | None, total_steps: int | None = None, coarse: bool = False
) -> tuple[int, int]:
    """The steps start <= step < stop that a chart shows when the run is at `step`.

    Without `max_steps` the window holds the whole run and grows by at most a quarter at a time.
    Otherwise it holds up to the last `max_steps`: its right end fills up, then it moves on by an
    eighth. `coarse` windows move less often and further, because every move redraws the chart.
    """
    if max_steps is None or step <= max_steps:
        size = int(round_up(max(step, FEWEST_STEPS), _NICE_COARSE if coarse else _NICE))
        if total_steps is not None and step <= total_steps:
            size = min(size, max(total_steps, 2))
        if max_steps is not None:
            size = min(size, max_steps)
        return 1, size + 1
    jump = max(1, max_steps // (3 if coarse else 8))
    stop = (step // jump + 1) * jump
    return max(1, stop - max_steps), stop


@dataclass(frozen=True)
class Scale:
    """The range of a value axis, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def fraction(self, values: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
        """Position of each value between `low` (0) and `high` (1). nan stays nan; on a logarithmic
        axis values that are not positive become nan."""
        numbers = np.asarray(values, np.float64)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                numbers = np.where(numbers > 0, np.log10(numbers), np.nan)
            low, high = math.log10(low), math.log10(high)
        # Halves, so that the width of a range from -3e38 to 3e38 is not infinite.
        return (numbers / 2 - low / 2) / (high / 2 - low / 2)

    def dot_rows(self, values: NDArray[np.float32], rows: int) -> NDArray[np.float64]:
        """The dot row of each value, 0 at the top, on a grid of `rows` dots."""
        return (1.0 - self.fraction(values)) * (rows - 1)

    def cell_row(self, value: float, rows: int) -> int | None:
        """The cell row of a value, 0 at the top; None when it lies outside the range."""
        fraction = float(self.fraction(np.array([value], np.float64))[0])
        if not -1e-9 <= fraction <= 1 + 1e-9:
            return None
        return round((1 - fraction) * (4 * rows - 1)) // 4

    def ticks(self, rows: int) -> list[float]:
        """Round values within the range, evenly spaced (on a logarithmic axis 1, 2, 5 of each
        decade, or decades alone), as many as fit on `rows` rows of cells, MAX_TICKS at most."""
        spacing = MIN_ROWS_BETWEEN_TICKS / max(rows - 0.25, MIN_ROWS_BETWEEN_TICKS)
        spacing = max(spacing, 1 / MAX_TICKS)
        ticks = self._log_ticks(spacing) if self.log else self._linear_ticks(spacing)
        return ticks if len(ticks) > 1 else [self.low, self.high]

    def _linear_ticks(self, min_spacing: float) -> list[float]:
        """Ticks at least `min_spacing` of the range apart."""
        wanted = (self.high - self.low) * min_spacing
        if wanted <= 0 or not math.isfinite(wanted):
            return []
        spacing = round_up(wanted, (1, 2, 2.5, 5, 10))
        first = math.ceil(self.low / spacing - 1e-9)
        last = math.floor(self.high / spacing + 1e-9)
        return [n * spacing for n in range(first, last + 1)]

    def _log_ticks(self, min_spacing: float) -> list[float]:
        """The densest ticks that are at least `min_spacing` of the range apart."""
        low, high = math.log10(self.low), math.log10(self.high)
        wanted = (high - low) * min_spacing
        first, last = math.floor(low), math.ceil(high)
        for mantissas, closest in (((1, 2, 5), math.log10(2)), ((1, 3), math.log10(3))):
            if closest >= wanted:
                values = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
                return [v for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        decades = max(1, math.ceil(wanted))
        first, last = math.ceil((low - 1e-9) / decades), math.floor((high + 1e-9) / decades)
        return [10.0 ** (n * decades) for n in range(first, last + 1)]


def fit_scale(
    low: float,
    high: float,
    log: bool,
    include_zero: bool = False,
    previous: Scale | None = None,
) -> Scale:
    """A scale with round ends for values from `low` to `high` (nan when there are none).

    `previous` is kept while the values fit into it and fill more than half of it, so that the axis
    stands still.
    """
    if previous is not None and previous.log != log:
        previous = None
    if not (math.isfinite(low) and math.isfinite(high)):
        return previous or Scale(0.1 if log else 0.0, 1.0, log)
    if log:
        return _fit_log(low, high, previous)
    if include_zero:
        low = min(low, 0.0)
    if previous is not None and _fills(previous, low, high):
        return previous
    span = high - low
    if span <= abs(high) * 1e-6:
        span = abs(high) * 0.1 or 1.0
        low, high = low - span / 2, high + span / 2
    unit = round_up(span / 8)
    return Scale(math.floor(low / unit) * unit, math.ceil(high / unit) * unit)


def _fit_log(low: float, high: float, previous: Scale | None) -> Scale:
    low = max(low, SMALLEST_FLOAT32)
    high = max(high, low)
    if previous is not None and _fills(previous, low, high):
        return previous
    bottom, top = math.floor(math.log10(low) * 2) / 2, math.ceil(math.log10(high) * 2) / 2
    if top - bottom < 0.5:
        top = bottom + 0.5
    return Scale(10.0**bottom, 10.0**top, True)


def _fills(scale: Scale, low: float, high: float) -> bool:
    """Whether the values from `low` to `high` fit into a scale and fill more than half of it."""
    if low < scale.low or high > scale.high:
        return False
    if scale.log:
        return math.log10(high / low) > KEPT_SHARE * math.log10(scale.high / scale.low)
    return high - low > KEPT_SHARE * (scale.high - scale.low)


AXIS_WIDTH = 9
"""Cells left of the plot: a label of 8, right-aligned, and the axis itself."""
OUTLIER_QUANTILES = (0.02, 0.98)
OUTLIER_DISTANCE = 4.0
"""A linear axis leaves out values that are further outside the quantiles than this multiple of the
distance between the quantiles."""
MIN_VALUES_FOR_OUTLIERS = 60
AUTO_LOG_RATIO = 1000.0
"""Ratio of the largest value that is not left out to the median from which an axis becomes
logarithmic by itself."""
NEWEST_COLUMNS = 2
"""Dot columns at the end of the curves whose values are always shown."""


@dataclass(frozen=True)
class Outliers:
    """Values beyond the end of a linear axis, which would flatten all others."""

    above: bool
    edge: float
    extreme: float
    column: int
    """Dot column of `extreme`."""
    columns: NDArray[np.int64]
    """Dot columns of all outliers."""


def fit_layers(
    layers: Sequence[Layer], log: bool | None, include_zero: bool, previous: Scale | None
) -> tuple[Scale, list[Outliers]]:
    """A scale for the values of `layers`, and the few values that a linear scale leaves out because
    they would flatten all others. `log` None: linear, unless a linear scale would flatten most
    values."""
    automatic, log = log is None, bool(log)
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
    if automatic and _spans_thousands(kept, limits, previous):
        log, hidden = True, []
    elif len(kept):  # some may be small next to outliers on the other side that are shown
        far = OUTLIER_DISTANCE * float(kept.max() - kept.min())
        hidden = [each for each in hidden if abs(each.extreme - each.edge) > far]
        numbers = _without(numbers, hidden)
    ends = [*limits, *((float(numbers.min()), float(numbers.max())) if len(numbers) else ())]
    scale = fit_scale(min(ends), max(ends), log, include_zero, previous)
    # A scale that was kept may show values that a new scale would leave out.
    return scale, [each for each in hidden if not scale.low <= each.extreme <= scale.high]


def _spans_thousands(
    numbers: NDArray[np.float64], limits: Sequence[float], previous: Scale | None
) -> bool:
    """Whether a linear axis would flatten most values, such as those of a loss that explodes, so
    that the axis becomes logarithmic by itself."""
    if len(numbers) < MIN_VALUES_FOR_OUTLIERS or min([*limits, float(numbers.min())]) <= 0:
        return False
    kept = previous is not None and previous.log
    factor = AUTO_LOG_RATIO / 3 if kept else AUTO_LOG_RATIO
    return float(numbers.max()) > factor * float(np.median(numbers))


def _without(numbers: NDArray[np.float64], hidden: Sequence[Outliers]) -> NDArray[np.float64]:
    for each in hidden:
        numbers = numbers[numbers <= each.edge if each.above else numbers >= each.edge]
    return numbers


def _outliers(numbers: NDArray[np.float64], places: NDArray[np.int64]) -> list[Outliers]:
    """The few values that are so far from all others that they would flatten them. A side with the
    newest values has no outliers, since the run may be moving there."""
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
    """Labels by cell row: round values, evenly spaced."""
    ticks = scale.ticks(rows)
    placed = zip(ticks, _tick_texts(ticks, scale.log), strict=True)
    labels = {scale.cell_row(tick, rows): text for tick, text in placed}
    return {row: text for row, text in labels.items() if row is not None}


def _tick_texts(ticks: Sequence[float], log: bool) -> list[str]:
    """The ticks with as many decimals as are needed to tell them apart."""
    room = AXIS_WIDTH - 1
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if log:  # `0.1`, `1`, `1e-30`
        return [formatting.trim_exponent(formatting.short(tick, 3)) for tick in ticks]
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

    Where marks and numbers meet, a nan's mark displaces the number and any other mark only colours
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
