"""Loss spikes: steps whose loss stands out from the steps before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.series import SeriesReader

BINS = 2048
"""A run of up to this many steps is searched step by step. A longer one is searched in this many
bins, each represented by its highest loss; the step is then looked up inside the bin."""
MEDIAN_BINS = 33
"""Bins (or steps) of the running median: those before the tested one."""
MIN_BINS = 5
"""Bins that must come before the first one tested."""
THRESHOLD = 4.0
"""Robust deviations above the median from which a loss counts as a spike."""


class Spike(NamedTuple):
    """A step whose loss stood out."""

    step: int
    loss: float
    deviations: float


def find_spikes(series: SeriesReader, name: str, count: int = 10) -> list[Spike]:
    """The `count` worst spikes of the column called `name`, worst first.

    A loss xₜ is (xₜ − m) / s deviations high, where m is the median of the MEDIAN_BINS bins before
    it and s is 1.4826 times the median of |x − m| over these bins (the robust standard deviation;
    at least 10⁻³ of |m|, so that rounding in a flat series is no spike). The loss is a spike if it
    is at least THRESHOLD deviations high and higher than both neighbours. nan and infinities do not
    count: they are reported as non-finite values.
    """
    column = series.column(name)
    if column is None or series.first_step is None or series.last_step is None:
        return []
    first, last = series.first_step, series.last_step
    window = series.window([column], first, last + 1, max(1, min(BINS, last + 1 - first)))
    kept = np.flatnonzero(window.filled & np.isfinite(window.high[:, 0]))
    high = window.high[kept, 0].astype(np.float64)
    score = robust_z_scores(high, (window.low[kept, 0].astype(np.float64) + high) / 2)
    peak = np.r_[True, high[1:] >= high[:-1]] & np.r_[high[:-1] > high[1:], True]
    worst = np.flatnonzero((score >= THRESHOLD) & peak)
    worst = worst[np.argsort(-score[worst], kind="stable")][:count]
    edges = window.edges
    return [
        Spike(
            _step_of(series, column, int(edges[kept[i]]), int(edges[kept[i] + 1]), float(high[i])),
            float(high[i]),
            float(score[i]),
        )
        for i in worst
    ]


def robust_z_scores(high: NDArray[np.float64], middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Robust deviations of each `high` (n,) from the median of the MEDIAN_BINS values of `middle`
    (n,) before it; 0 for the first MIN_BINS."""
    count = len(high)
    score = np.zeros(count)
    if count <= MIN_BINS:
        return score
    padded = np.r_[np.full(MEDIAN_BINS, np.nan), middle]
    before = np.lib.stride_tricks.sliding_window_view(padded, MEDIAN_BINS)[:count][MIN_BINS:]
    median = np.nanmedian(before, axis=1)
    spread = 1.4826 * np.nanmedian(np.abs(before - median[:, None]), axis=1)
    spread = np.maximum(np.maximum(spread, 1e-3 * np.abs(median)), 1e-300)
    score[MIN_BINS:] = (high[MIN_BINS:] - median) / spread
    return score


def _step_of(series: SeriesReader, column: int, start: int, stop: int, value: float) -> int:
    """The step in start <= step < stop at which the series had that value."""
    while stop - start > 1:
        window = series.window([column], start, stop, min(BINS, stop - start))
        at = np.flatnonzero(window.high[:, 0] == np.float32(value))
        if not len(at):
            break
        narrower = (int(window.edges[at[0]]), int(window.edges[at[0] + 1]))
        if narrower == (start, stop):
            break
        start, stop = narrower
    return start
