"""The data of a chart: a range of steps divided into bins that keep every extreme."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Buckets, Flags, Steps
from tui_trainer.history.records import Floats


@dataclass(frozen=True, slots=True)
class Window:
    """Some columns over `bins` ranges of steps.

    Bin i covers steps edges[i] <= step < edges[i+1]. Where only buckets are left of a part of the
    run, an edge moves to the first step of the bucket around it: a bin may then be empty and its
    neighbour wider, and the first and last edge may lie outside the requested range. The values of
    a bin are always exact for the steps between its edges.
    """

    edges: Steps
    """(bins + 1,)"""
    low: Floats
    """Smallest finite value, (bins, columns); nan where there is none."""
    high: Floats
    """Largest finite value, (bins, columns); nan where there is none."""
    last: Floats
    """Newest value, finite or not, (bins, columns); nan where nothing was measured."""
    filled: NDArray[np.bool_]
    """(bins,): whether anything was measured there."""
    nonfinite: NDArray[np.bool_]
    """(bins, columns): whether a nan or an infinity was measured there."""
    flags: Flags
    """(bins, columns): which kinds, as buckets.NAN, POSITIVE, NEGATIVE."""


def equal_edges(start: int, stop: int, bins: int) -> Steps:
    """Edges of `bins` equal ranges of start <= step < stop, (bins + 1,)."""
    return start + (stop - start) * np.arange(bins + 1, dtype=np.int64) // bins


def make_window(parts: list[Buckets], edges: Steps, columns: int) -> Window:
    """Fold buckets, oldest first, into the bins between `edges`, which are changed in place."""
    bins = len(edges) - 1
    blank = np.full((bins, columns), np.nan, np.float32)
    window = Window(
        edges,
        blank,
        blank.copy(),
        blank.copy(),
        np.zeros(bins, np.bool_),
        np.zeros((bins, columns), np.bool_),
        np.zeros((bins, columns), np.uint8),
    )
    if not parts:
        return window
    data = Buckets.join(parts)
    inside = slice(
        int(np.searchsorted(data.last, edges[0], "left")),
        int(np.searchsorted(data.first, edges[-1], "left")),
    )
    if inside.start < inside.stop:
        _fold(data.part(inside), window)
    return window


def _fold(data: Buckets, window: Window) -> None:
    edges = window.edges
    # A bucket that straddles an edge belongs to the bin of its last step, which begins with it.
    bins = np.searchsorted(edges[1:-1], data.last, "right")
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    targets = bins[starts]
    low = np.minimum.reduceat(data.low, starts, axis=0)
    high = np.maximum.reduceat(data.high, starts, axis=0)
    empty = low > high
    if empty.any():
        low[empty] = high[empty] = np.nan
    window.low[targets] = low
    window.high[targets] = high
    window.last[targets] = data.value[np.append(starts[1:], len(bins)) - 1]
    window.filled[targets] = True
    if data.flags.any():
        window.flags[targets] = np.bitwise_or.reduceat(data.flags, starts, axis=0)
        np.not_equal(window.flags, 0, out=window.nonfinite)
    _move_edges(data, edges)


def _move_edges(data: Buckets, edges: Steps) -> None:
    """Move each edge that a bucket straddles to the first step of that bucket."""
    inner = edges[:-1]
    at = np.minimum(np.searchsorted(data.last, inner, "left"), len(data.last) - 1)
    straddled = (data.first[at] < inner) & (inner <= data.last[at])
    inner[straddled] = data.first[at][straddled]
    edges[-1] = max(edges[-1], data.last[-1] + 1)
