"""Where the loss jumped up: the steps worth a look."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.history import History
from tui_trainer.history.series import MemorySeries, SeriesReader
from tui_trainer.protocol import schema

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


def find_spikes(table: SeriesReader, column: int, count: int = 10) -> list[Spike]:
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


def _step_of(table: SeriesReader, column: int, start: int, stop: int, value: float) -> int:
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


# ---- layers
# Where each attention layer has its columns: every optimizer has attention tables of its own.
#
# `RunInfo.attention` lists the layers of all optimizers together, a table only those of its own.


STATISTICS = {
    schema.ATTENTION: schema.ATTENTION_STATISTICS,
    schema.ATTENTION_SPECTRUM: schema.SPECTRUM_STATISTICS,
    schema.ATTENTION_HEALTH: schema.HEALTH_STATISTICS,
    schema.ATTENTION_HEADS: schema.HEAD_STATISTICS,
}
"""What an attention table has of each layer, or of each head of each layer."""

_known: WeakKeyDictionary[MemorySeries, dict[str, range]] = WeakKeyDictionary()


class LayerLocation(NamedTuple):
    """A layer in a table."""

    history: MemorySeries
    columns: range
    """All that it has there: its statistics, or those of its heads one after the other."""


def attention_tables(history: History, name: str) -> list[MemorySeries]:
    """The tables of this name, one for each optimizer that has attention layers; those without
    rows first, then in order of declaration: where two have the same layer, the last one counts (an
    optimizer that is made anew has tables of its own)."""
    found = [each for each in history.tables.values() if each.table.name == name]
    return sorted(found, key=lambda each: bool(each.rows))


def layers_in(table: MemorySeries) -> dict[str, range]:
    """Layer to its columns in an attention table; found out once for each table."""
    known = _known.get(table)
    if known is None:
        known = _known[table] = _index(table)
    return known


def location_of(history: History, name: str, layer: str) -> LayerLocation | None:
    """Where `layer` is among the tables of this name; None: in none of them."""
    for table in reversed(attention_tables(history, name)):
        columns = layers_in(table).get(layer)
        if columns is not None:
            return LayerLocation(table, columns)
    return None


def _index(table: MemorySeries) -> dict[str, range]:
    """Reads only the first name of each block of statistics: 10,000 layers have 220,000 columns."""
    names = STATISTICS[table.table.name]
    columns, width = table.table.columns, len(names)
    first = tuple(column.name.rpartition(".")[2] for column in columns[:width])
    if first != names or len(columns) % width:
        return {}  # recorded by a version that measured other statistics
    after = 2 if table.table.name == schema.ATTENTION_HEADS else 1  # layer.head.statistic
    found: dict[str, range] = {}
    for start in range(0, len(columns), width):
        layer = columns[start].name.rsplit(".", after)[0]
        begun = found.get(layer)
        found[layer] = range(begun.start if begun else start, start + width)
    return found
