"""Where measurements are held in memory: a ring of the newest raw rows, and rings of summaries.

Every ring keeps its newest `capacity` entries: the older a part of the run, the coarser the finest
level that still has it, and the coarsest level has all of it.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Buckets, Steps, extremes, flags_of
from tui_trainer.history.records import Floats

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
