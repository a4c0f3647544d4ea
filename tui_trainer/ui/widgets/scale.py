"""Axes: the window of steps and the range of values of a chart. Both change in jumps, so that a
chart does not move with every frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_ROWS_BETWEEN_TICKS = 2
MAX_TICKS = 6
FEWEST_STEPS = 40
"""A window of the whole run is never narrower."""
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
        """Position of each value between `low` (0) and `high` (1). NaN stays NaN; on a logarithmic
        axis values that are not positive become NaN."""
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
    """A scale with round ends for values from `low` to `high` (NaN when there are none).

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
