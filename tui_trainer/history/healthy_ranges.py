"""The ranges in which values are healthy: values outside are coloured, and the range is given in
words next to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema


@dataclass(frozen=True)
class HealthyRange:
    """A range of healthy values; None leaves it open on that side."""

    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value is healthy. Non-finite values are marked elsewhere and count as healthy
        here."""
        if not math.isfinite(value):
            return True
        below = self.low is not None and value < self.low
        return not below and not (self.high is not None and value > self.high)

    @property
    def words(self) -> str:
        """`healthy 1e-4 to 0.1`"""
        low, high = (None if x is None else limit_text(x) for x in (self.low, self.high))
        if low is not None and high is not None:
            return f"healthy {low} to {high}"
        return f"healthy up to {high}" if high is not None else f"healthy from {low}"

    @property
    def limits(self) -> tuple[float, ...]:
        """The lower and upper limit, where there is one."""
        return tuple(limit for limit in (self.low, self.high) if limit is not None)

    def describe(self, value: float) -> str:
        """`above the healthy 1e-4 to 0.1`; "" for a healthy value."""
        if self.holds(value):
            return ""
        side = "below" if self.low is not None and value < self.low else "above"
        return f"{side} the {self.words}"


def limit_text(value: float) -> str:
    """`0.1`, `1e-4`"""
    if value == 0 or abs(value) >= 0.01:
        return formatting.short(value, 3)
    return formatting.trim_exponent(f"{value:.0e}")


UPDATE_RATIO = HealthyRange(*schema.HEALTHY_UPDATE_RATIO)
CLIP_SCALE = HealthyRange(low=schema.SMALLEST_CLIP_SCALE)


class GradientNormRange:
    """The range of the total gradient norm: up to EXPLODING_NORM times the median of its first
    values. Above it, gradients count as exploding."""

    def __init__(self) -> None:
        self._table: SeriesReader | None = None
        self._range = HealthyRange()

    def of(self, table: SeriesReader) -> HealthyRange:
        """The range, open while there are too few values."""
        if table is not self._table:
            self._table, self._range = table, HealthyRange()
        first = table.first_step
        if self._range.high is None and first is not None and table.rows >= schema.FIRST_NORMS:
            column = table.column("grad_norm_preclip")
            stop = min((table.last_step or 0) + 1, first + 8 * schema.FIRST_NORMS)
            if column is not None:
                norms = table.window([column], first, stop, 8 * schema.FIRST_NORMS).last[:, 0]
                norms = norms[np.isfinite(norms) & (norms > 0)][: schema.FIRST_NORMS]
                if len(norms) == schema.FIRST_NORMS:
                    high = schema.EXPLODING_NORM * float(np.median(norms))
                    self._range = HealthyRange(high=high)
        return self._range
