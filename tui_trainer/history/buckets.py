"""Summaries of rows: what a bucket is, and how rows and finer buckets are folded into one.

Level k summarises 8ᵏ rows in one bucket, aligned to the row number, so that both ends of a
connection cut the same buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tui_trainer.protocol.messages import ClipKind, NonFiniteQuantity, NonFiniteValue

# ---- records
# What the training thread hands to the recorder: plain numpy, no torch, nothing shared.


Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """That a step's gradient was clipped (scale < 1)."""

    max_norm: float
    norm_before: float
    scale: float
    parameters: tuple[int, ...]
    shares: tuple[float, ...]
    kind: ClipKind = "norm"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything measured in one optimizer step."""

    step: int
    """Number of optimizer steps completed, this one included: the first has 1."""
    time: float
    """Seconds since the epoch at its end."""
    optimizer: str
    rows: tuple[tuple[int, Floats], ...]
    """(table id, values of its columns) for each table measured in this step."""
    clip: ClipRecord | None = None
    nonfinite: tuple[tuple[NonFiniteQuantity, str, NonFiniteValue, int | None], ...] = field(
        default=()
    )
    """(quantity, first parameter, value, last step at which it was seen to be finite) of what was
    found to be NaN or infinite."""
    own_ms: float = 0.0
    """What tracing this step cost on the training thread."""


FACTOR = 8
"""Rows (or buckets of the level below) that one bucket stands for."""

NAN, POSITIVE, NEGATIVE = 1, 2, 4
"""Flags of a bucket: it holds a NaN, a +Inf, a -Inf."""

Steps = NDArray[np.int64]
Flags = NDArray[np.uint8]


class Buckets(NamedTuple):
    """n buckets of some columns. Without a finite value `low` is +Inf and `high` is -Inf."""

    first: Steps
    """Step of the first row of each, (n,)."""
    last: Steps
    low: Floats
    """Smallest finite value, (n, columns)."""
    high: Floats
    value: Floats
    """Value of the last row, finite or not, (n, columns)."""
    flags: Flags

    def part(self, chosen: slice) -> Buckets:
        """Some of these buckets, as views."""
        return Buckets(
            self.first[chosen],
            self.last[chosen],
            self.low[chosen],
            self.high[chosen],
            self.value[chosen],
            self.flags[chosen],
        )

    def of_columns(self, columns: NDArray[np.intp]) -> Buckets:
        """Some columns of these buckets."""
        return self._replace(
            low=self.low.take(columns, axis=1),
            high=self.high.take(columns, axis=1),
            value=self.value.take(columns, axis=1),
            flags=self.flags.take(columns, axis=1),
        )

    @staticmethod
    def join(parts: list[Buckets]) -> Buckets:
        """One after the other; without a copy where there is only one."""
        if len(parts) == 1:
            return parts[0]
        return Buckets(
            np.concatenate([part.first for part in parts]),
            np.concatenate([part.last for part in parts]),
            np.concatenate([part.low for part in parts]),
            np.concatenate([part.high for part in parts]),
            np.concatenate([part.value for part in parts]),
            np.concatenate([part.flags for part in parts]),
        )


class BucketRows(Protocol):
    """A sequence of entries that each stand for `size` rows, in memory or on disk: where windows
    are drawn from. Index: row number // size."""

    size: int
    start: int
    """Oldest index held."""
    stop: int
    """One past the newest."""

    def find(self, step: int) -> int:
        """Index of the first entry held whose last step is `step` or later; `stop` for none."""

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """First and last step of entries start..stop."""

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """Entries start..stop as buckets, of all columns or of some."""


def extremes(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Lowest and highest finite value and last value of (n, rows, columns) along the rows."""
    last = values[:, -1]
    finite = np.isfinite(values)
    if finite.all():
        return values.min(axis=1), values.max(axis=1), last
    low = np.where(finite, values, np.float32(np.inf)).min(axis=1)
    high = np.where(finite, values, np.float32(-np.inf)).max(axis=1)
    return low, high, last


def flags_of(values: Floats) -> Flags:
    """Flags of each value, same shape."""
    flags = np.zeros(values.shape, np.uint8)
    if not np.isfinite(values).all():
        flags[np.isnan(values)] = NAN
        flags[np.isposinf(values)] = POSITIVE
        flags[np.isneginf(values)] = NEGATIVE
    return flags


def summarise_rows(steps: Steps, values: Floats) -> Buckets:
    """Buckets of FACTOR rows each; the number of rows is a multiple of FACTOR."""
    grouped = values.reshape(-1, FACTOR, values.shape[1])
    flags = np.bitwise_or.reduce(flags_of(grouped), axis=1)
    return Buckets(steps[::FACTOR], steps[FACTOR - 1 :: FACTOR], *extremes(grouped), flags)


def summarise(fine: Buckets) -> Buckets:
    """Buckets of the next level from a multiple of FACTOR of this one."""
    columns = fine.low.shape[1]
    shape = (-1, FACTOR, columns)
    return Buckets(
        fine.first[::FACTOR],
        fine.last[FACTOR - 1 :: FACTOR],
        fine.low.reshape(shape).min(axis=1),
        fine.high.reshape(shape).max(axis=1),
        fine.value[FACTOR - 1 :: FACTOR],
        np.bitwise_or.reduce(fine.flags.reshape(shape), axis=1),
    )


# ---- rings
# Where measurements are held in memory: a ring of the newest raw rows, and rings of summaries.
#
# Every ring keeps its newest `capacity` entries: the older a part of the run, the coarser the
# finest
# level that still has it, and the coarsest level has all of it.


T = TypeVar("T", bound=np.generic)


class Ring:
    """The newest `capacity` of a growing sequence, addressed by absolute index."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.start = 0
        """Oldest index held."""
        self.stop = 0
        """One past the newest."""

    def slices(self, start: int, stop: int) -> list[slice]:
        """The one or two runs of slots that hold indices start..stop."""
        if stop <= start:
            return []
        low, length = start % self.capacity, stop - start
        if low + length <= self.capacity:
            return [slice(low, low + length)]
        return [slice(low, self.capacity), slice(0, low + length - self.capacity)]

    def advance(self, count: int) -> list[tuple[slice, slice]]:
        """Make place for `count` more: pairs of (slots, which of the new ones go there)."""
        kept = min(count, self.capacity)
        self.stop += count
        self.start = max(self.start, self.stop - self.capacity)
        pairs, taken = [], count - kept
        for slots in self.slices(self.stop - kept, self.stop):
            length = slots.stop - slots.start
            pairs.append((slots, slice(taken, taken + length)))
            taken += length
        return pairs

    def cut(self, stop: int) -> None:
        """Forget everything from index `stop` on."""
        self.stop = min(self.stop, stop)
        self.start = min(self.start, self.stop)

    def clear(self, at: int) -> None:
        """Forget everything; the next index is `at`."""
        self.start = self.stop = at


class _Searched(Ring):
    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        raise NotImplementedError

    def find(self, step: int) -> int:
        """See `Entries.find`."""
        _, last = self.bounds(self.start, self.stop)
        return self.start + int(np.searchsorted(last, step, "left"))


class Raw(_Searched):
    """The newest rows as they were measured. Index: row number."""

    def __init__(self, capacity: int, columns: int) -> None:
        super().__init__(capacity)
        self.size = 1
        self.steps: Steps = np.empty(capacity, np.int64)
        self.values: Floats = np.empty((capacity, columns), np.float32)

    def push(self, steps: Steps, values: Floats) -> None:
        """Add n rows: steps (n,), values (n, columns)."""
        for slots, part in self.advance(len(steps)):
            self.steps[slots] = steps[part]
            self.values[slots] = values[part]

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """First and last step of each entry: the same one."""
        steps = _join(self.steps, self.slices(start, stop))
        return steps, steps

    def take(self, start: int, stop: int) -> Floats:
        """Values of rows start..stop, (n, columns)."""
        return _join(self.values, self.slices(start, stop))

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """Rows start..stop as buckets of one, of all columns or of some."""
        steps, _ = self.bounds(start, stop)
        slots = self.slices(start, stop)
        if columns is None:
            values = _join(self.values, slots)
        else:
            values = np.concatenate([self.values[s].take(columns, axis=1) for s in slots])
        low, high, last = extremes(values[:, None])
        return Buckets(steps, steps, low, high, last, flags_of(values))


class Level(_Searched):
    """Buckets of `size` rows. Index: row number // size."""

    def __init__(self, capacity: int, columns: int, size: int) -> None:
        super().__init__(capacity)
        self.size = size
        shape = (capacity, columns)
        # Pages of an array that were never written take no memory.
        self.held = Buckets(
            np.empty(capacity, np.int64),
            np.empty(capacity, np.int64),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(shape, np.uint8),
        )

    def push(self, buckets: Buckets) -> None:
        """Add n buckets."""
        for slots, part in self.advance(len(buckets.first)):
            place, new = self.held.part(slots), buckets.part(part)
            place.first[:], place.last[:] = new.first, new.last
            place.low[:], place.high[:] = new.low, new.high
            place.value[:], place.flags[:] = new.value, new.flags

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """First and last step of buckets start..stop."""
        slots = self.slices(start, stop)
        return _join(self.held.first, slots), _join(self.held.last, slots)

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """Buckets start..stop, of all columns or of some."""
        parts = [self.held.part(s) for s in self.slices(start, stop) or [slice(0, 0)]]
        if columns is not None:
            parts = [part.of_columns(columns) for part in parts]
        return Buckets.join(parts)


def _join(array: NDArray[T], slots: list[slice]) -> NDArray[T]:
    if len(slots) == 1:
        return array[slots[0]]
    return np.concatenate([array[s] for s in slots]) if slots else array[:0]


# ---- window
# What a chart draws: a stretch of steps cut into columns, with nothing lost in any of them.


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
