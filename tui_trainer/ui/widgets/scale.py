"""Axes: the window of steps and the range of values; both move in jumps, not all the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

APART_ROWS = 2
"""Rows from one label of an axis to the next, at least."""
MOST_TICKS = 6

_COARSE = (1.0, 2.0, 4.0, 10.0)
_NICE = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


def nice_above(value: float, nice: tuple[float, ...] = _NICE) -> float:
    """The next round number, at most a quarter above `value` (for positive, finite values), or
    the next that begins as one of `nice`."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((n * power for n in nice if n * power >= value * (1 - 1e-9)), 10 * power)


def window(
    step: int, shown: int | None, total: int | None = None, coarse: bool = False
) -> tuple[int, int]:
    """(start, stop) of the steps to show, start <= step < stop, when the run is at `step`.

    `shown` None: the whole run, in a window that grows in jumps of at most a quarter. Otherwise the
    last `shown` steps or a few less: the right edge fills up, then the window jumps by an eighth.
    `coarse`: it jumps less often and further, since with each jump all of a chart is sent anew.
    """
    if shown is None or step <= shown:
        size = int(nice_above(max(step, 40), _COARSE if coarse else _NICE))
        if total is not None and step <= total:
            size = min(size, max(total, 2))
        if shown is not None:
            size = min(size, shown)
        return 1, size + 1
    jump = max(1, shown // (3 if coarse else 8))
    stop = (step // jump + 1) * jump
    return max(1, stop - shown), stop


@dataclass(frozen=True)
class Scale:
    """A range of values on `rows` dots, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, values: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
        """0 at the bottom, 1 at the top; NaN stays NaN, what is not above 0 is NaN under log."""
        numbers = np.asarray(values, np.float64)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                numbers = np.where(numbers > 0, np.log10(numbers), np.nan)
            low, high = math.log10(low), math.log10(high)
        # Halves, so that the width of a range from -3e38 to 3e38 is not infinite.
        return (numbers / 2 - low / 2) / (high / 2 - low / 2)

    def dot_rows(self, values: NDArray[np.float32], rows: int) -> NDArray[np.float64]:
        """The dot row (0 at the top) of each value, on a grid of `rows` dots."""
        return (1.0 - self.place(values)) * (rows - 1)

    def ticks(self, rows: int) -> list[float]:
        """Round values inside the range, evenly spaced (on a log axis: 1, 2, 5 of each decade, or
        decades alone), as many as can be told apart on `rows` rows of cells; at most 6."""
        apart = APART_ROWS / max(rows - 0.25, APART_ROWS)
        found = self._log_ticks(apart) if self.log else self._linear_ticks(apart)
        return found if len(found) > 1 else [self.low, self.high]

    def _linear_ticks(self, apart: float) -> list[float]:
        """At least `apart` of the range between two of them."""
        width = self.high - self.low
        wanted = width * max(apart, 1 / MOST_TICKS)
        if wanted <= 0 or not math.isfinite(wanted):
            return []
        power = 10.0 ** math.floor(math.log10(wanted))
        spacing = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= wanted * (1 - 1e-9))
        first = math.ceil(self.low / spacing - 1e-9)
        last = math.floor(self.high / spacing + 1e-9)
        return [n * spacing for n in range(first, last + 1)]

    def _log_ticks(self, apart: float) -> list[float]:
        """The densest choice that leaves `apart` of the range between any two of them."""
        low, high = math.log10(self.low), math.log10(self.high)
        wanted = (high - low) * max(apart, 1 / MOST_TICKS)
        first, last = math.floor(low), math.ceil(high)
        for mantissas, closest in (((1, 2, 5), math.log10(2)), ((1, 3), math.log10(3))):
            if closest >= wanted:
                values = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
                return [v for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        every = max(1, math.ceil(wanted))
        first, last = math.ceil((low - 1e-9) / every), math.floor((high + 1e-9) / every)
        return [10.0 ** (n * every) for n in range(first, last + 1)]


def fit(low: float, high: float, log: bool, zero: bool = False, old: Scale | None = None) -> Scale:
    """A scale for values from `low` to `high` (NaN: there are none) with round ends.

    `old` is kept while the values fit and fill more than half of it, so that the axis stands still.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return old if old is not None and old.log == log else Scale(0.1 if log else 0.0, 1.0, log)
    if log:
        return _fit_log(low, high, old)
    if zero:
        low = min(low, 0.0)
    keeps = old is not None and not old.log and old.low <= low and high <= old.high
    if old is not None and keeps and (high - low) > 0.55 * (old.high - old.low):
        return old
    span = high - low
    if span <= abs(high) * 1e-6:
        span = abs(high) * 0.1 or 1.0
        low, high = low - span / 2, high + span / 2
    every = nice_above(span / 8)
    bottom, top = math.floor(low / every) * every, math.ceil(high / every) * every
    return Scale(bottom, top)


def _fit_log(low: float, high: float, old: Scale | None) -> Scale:
    low = max(low, 1e-45)
    high = max(high, low)
    if old is not None and old.log and old.low <= low and high <= old.high:
        used = math.log10(high / low) if high > low else 0.0
        if used > 0.55 * math.log10(old.high / old.low):
            return old
    bottom, top = math.floor(math.log10(low) * 2) / 2, math.ceil(math.log10(high) * 2) / 2
    if top - bottom < 0.5:
        top = bottom + 0.5
    return Scale(10.0**bottom, 10.0**top, True)
