"""What a chart draws: a stretch of steps cut into columns, with nothing lost in any of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Buckets, Flags, Steps
from tui_trainer.history.records import Floats


@dataclass(frozen=True, slots=True)
class Window:
    """Some series over `buckets` stretches of steps.

    Stretch i is steps edges[i] <= step < edges[i+1]. Where only summaries are left of a part of the
    run, edges move to the nearest summary's (so a stretch may be empty and its neighbour wider, and
    the first and last edge may lie outside what was asked for): what a stretch says of its steps
    is always exactly true.
    """

    edges: Steps
    """(buckets + 1,)"""
    low: Floats
    """Smallest finite value, (buckets, columns); NaN where there is none."""
    high: Floats
    last: Floats
    """The newest value, finite or not; NaN where nothing was measured."""
    filled: NDArray[np.bool_]
    """(buckets,): whether anything was measured there."""
    nonfinite: NDArray[np.bool_]
    """(buckets, columns): whether a NaN or an infinity was measured there."""
    flags: Flags
    """(buckets, columns): which, as buckets.NAN, POSITIVE, NEGATIVE."""


def nominal_edges(start: int, stop: int, buckets: int) -> Steps:
    """Edges of `buckets` equal stretches of start <= step < stop, (buckets + 1,)."""
    return start + (stop - start) * np.arange(buckets + 1, dtype=np.int64) // buckets


def draw(parts: list[Buckets], edges: Steps, columns: int) -> Window:
    """Fold buckets, oldest first, into the stretches between `edges`."""
    count = len(edges) - 1
    blank = np.full((count, columns), np.nan, np.float32)
    window = Window(
        edges,
        blank,
        blank.copy(),
        blank.copy(),
        np.zeros(count, np.bool_),
        np.zeros((count, columns), np.bool_),
        np.zeros((count, columns), np.uint8),
    )
    if not parts:
        return window
    data = Buckets.join(parts)
    inside = slice(
        int(np.searchsorted(data.last, edges[0], "left")),
        int(np.searchsorted(data.first, edges[-1], "left")),
    )
    if inside.start >= inside.stop:
        return window
    _fold(data.part(inside), window)
    return window


def _fold(data: Buckets, window: Window) -> None:
    edges = window.edges
    # A bucket that straddles an edge belongs to the stretch of its last step, which begins with it.
    stretch = np.searchsorted(edges[1:-1], data.last, "right")
    starts = np.flatnonzero(np.diff(stretch, prepend=-1))
    targets = stretch[starts]
    low = np.minimum.reduceat(data.low, starts, axis=0)
    high = np.maximum.reduceat(data.high, starts, axis=0)
    empty = low > high
    if empty.any():
        low[empty] = high[empty] = np.nan
    window.low[targets] = low
    window.high[targets] = high
    window.last[targets] = data.value[np.append(starts[1:], len(stretch)) - 1]
    window.filled[targets] = True
    if data.flags.any():
        window.flags[targets] = np.bitwise_or.reduceat(data.flags, starts, axis=0)
        np.not_equal(window.flags, 0, out=window.nonfinite)
    _snap(data, edges)


def _snap(data: Buckets, edges: Steps) -> None:
    inner = edges[:-1]
    at = np.minimum(np.searchsorted(data.last, inner, "left"), len(data.last) - 1)
    straddled = (data.first[at] < inner) & (inner <= data.last[at])
    inner[straddled] = data.first[at][straddled]
    edges[-1] = max(edges[-1], data.last[-1] + 1)
