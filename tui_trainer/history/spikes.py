"""Where the loss jumped up: the steps worth a look."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.reading import Reading

STRETCHES = 2048
"""A run of up to so many rows is searched row by row, a longer one in so many stretches, of which
each counts with its highest loss; the step is then looked up in the rows of that stretch."""
SPAN = 33
"""Stretches (or rows) that the running median is taken over: those before, not the one judged."""
FEWEST = 5
"""Losses that there must be before one can be judged."""
LEAST = 4.0
"""Deviations above the median from which on a loss counts as a spike."""


class Spike(NamedTuple):
    """One step whose loss stood out."""

    step: int
    loss: float
    deviations: float


def find_spikes(table: Reading, column: int, count: int = 10) -> list[Spike]:
    """The `count` worst spikes of a series, worst first.

    How bad a loss xₜ is: (xₜ − m) / s, where m is the median of the SPAN stretches before it and s
    is 1.4826 times the median of |x − m| over the same (the robust standard deviation; at least
    10⁻³ of |m|, so that a flat series has no spikes of rounding). Only a loss above m by LEAST
    times s and higher than both neighbours counts. NaN and infinities are no spikes: they are found
    as non-finite values.
    """
    if table.first_step is None or table.last_step is None:
        return []
    first, last = table.first_step, table.last_step
    stretches = max(1, min(STRETCHES, last + 1 - first))
    seen = table.window([column], first, last + 1, stretches)
    kept = np.flatnonzero(seen.filled & np.isfinite(seen.high[:, 0]))
    high = seen.high[kept, 0].astype(np.float64)
    score = deviations(high, (seen.low[kept, 0].astype(np.float64) + high) / 2)
    peak = np.r_[True, high[1:] >= high[:-1]] & np.r_[high[:-1] > high[1:], True]
    worst = np.flatnonzero((score >= LEAST) & peak)
    worst = worst[np.argsort(-score[worst], kind="stable")][:count]
    edges = seen.edges
    return [
        Spike(
            _step_of(table, column, int(edges[kept[i]]), int(edges[kept[i] + 1]), float(high[i])),
            float(high[i]),
            float(score[i]),
        )
        for i in worst
    ]


def deviations(high: NDArray[np.float64], middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many robust deviations each of `high` (n,) is above the median of those `middle` (n,)
    that come before it; 0 where fewer than FEWEST do."""
    count = len(high)
    score = np.zeros(count)
    if count <= FEWEST:
        return score
    padded = np.r_[np.full(SPAN, np.nan), middle]
    before = np.lib.stride_tricks.sliding_window_view(padded, SPAN)[:count][FEWEST:]
    median = np.nanmedian(before, axis=1)
    spread = 1.4826 * np.nanmedian(np.abs(before - median[:, None]), axis=1)
    spread = np.maximum(np.maximum(spread, 1e-3 * np.abs(median)), 1e-300)
    score[FEWEST:] = (high[FEWEST:] - median) / spread
    return score


def _step_of(table: Reading, column: int, start: int, stop: int, value: float) -> int:
    """The step in start <= step < stop at which the series had that value."""
    while stop - start > 1:
        parts = min(STRETCHES, stop - start)
        seen = table.window([column], start, stop, parts)
        at = np.flatnonzero(seen.high[:, 0] == np.float32(value))
        if not len(at):
            break
        narrower = (int(seen.edges[at[0]]), int(seen.edges[at[0] + 1]))
        if narrower == (start, stop):
            break
        start, stop = narrower
    return start
