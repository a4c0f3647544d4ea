"""Rows of a measured table, and buckets that summarise 8, 64, 512, … of them.

A bucket of level k stands for 8ᵏ rows, aligned to the row number, so that the training process and
every viewer form the same buckets. Level 0 is the rows themselves.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.protocol.absent import absent_mask

FACTOR = 8
"""Entries of the level below that one bucket stands for."""

NAN, POSITIVE, NEGATIVE = 1, 2, 4
"""Flags of a bucket: it holds a nan, an inf, a -inf."""

Steps = NDArray[np.int64]
Flags = NDArray[np.uint8]


class Buckets(NamedTuple):
    """n buckets of some columns. Without a finite value `low` is inf and `high` is -inf."""

    first: Steps
    """Step of the first row of each bucket, (n,)."""
    last: Steps
    """Step of the last row of each bucket, (n,)."""
    low: Floats
    """Smallest finite value, (n, columns)."""
    high: Floats
    """Largest finite value, (n, columns)."""
    value: Floats
    """Value of the last row, finite or not, (n, columns)."""
    flags: Flags
    """Bitwise or of NAN, POSITIVE and NEGATIVE, (n, columns)."""

    def part(self, chosen: slice) -> Buckets:
        """Views of some of the buckets."""
        return Buckets(
            self.first[chosen],
            self.last[chosen],
            self.low[chosen],
            self.high[chosen],
            self.value[chosen],
            self.flags[chosen],
        )

    def of_columns(self, columns: NDArray[np.intp]) -> Buckets:
        return self._replace(
            low=self.low.take(columns, axis=1),
            high=self.high.take(columns, axis=1),
            value=self.value.take(columns, axis=1),
            flags=self.flags.take(columns, axis=1),
        )

    @staticmethod
    def join(parts: list[Buckets]) -> Buckets:
        """Concatenate; a single part is not copied."""
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


class RawRows(NamedTuple):
    """n rows as they were measured."""

    last: Steps
    """Step of each row, (n,); named as in `Buckets`."""
    value: Floats
    """(n, columns)"""

    def part(self, chosen: slice) -> RawRows:
        """Views of some of the rows."""
        return RawRows(self.last[chosen], self.value[chosen])

    @staticmethod
    def join(parts: list[RawRows]) -> RawRows:
        """Concatenate; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        return RawRows(
            np.concatenate([part.last for part in parts]),
            np.concatenate([part.value for part in parts]),
        )

    def as_buckets(self) -> Buckets:
        """Each row as a bucket of one row."""
        low, high, last = extremes(self.value[:, None])
        return Buckets(self.last, self.last, low, high, last, flags_of(self.value))


class BucketLevel(Protocol):
    """The entries of one level, in memory or on disk: rows (`size` 1) or buckets of `size` rows.

    The index of an entry is the number of its first row // size.
    """

    size: int
    start: int
    """Oldest index held."""
    stop: int
    """One past the newest index held."""

    def find(self, step: int) -> int:
        """Index of the first entry whose last step is `step` or later; `stop` if there is none."""

    def bounds(self, start: int, stop: int) -> tuple[Steps, Steps]:
        """First and last step of entries start..stop."""

    def buckets(self, start: int, stop: int, columns: NDArray[np.intp] | None = None) -> Buckets:
        """Entries start..stop as buckets, with the given `columns` only."""


def extremes(values: Floats) -> tuple[Floats, Floats, Floats]:
    """(lowest finite, highest finite, last) value along the rows of (n, rows, columns)."""
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
        flags[np.isnan(values) & ~absent_mask(values)] = NAN
        flags[np.isposinf(values)] = POSITIVE
        flags[np.isneginf(values)] = NEGATIVE
    return flags


def summarise_rows(rows: RawRows) -> Buckets:
    """Buckets of FACTOR rows each; the number of rows is a multiple of FACTOR."""
    grouped = rows.value.reshape(len(rows.value) // FACTOR, FACTOR, rows.value.shape[1])
    flags = np.bitwise_or.reduce(flags_of(grouped), axis=1)
    return Buckets(rows.last[::FACTOR], rows.last[FACTOR - 1 :: FACTOR], *extremes(grouped), flags)


def summarise(fine: Buckets) -> Buckets:
    """Buckets of the next level; the number of buckets is a multiple of FACTOR."""
    columns = fine.low.shape[1]
    shape = (len(fine.low) // FACTOR, FACTOR, columns)
    return Buckets(
        fine.first[::FACTOR],
        fine.last[FACTOR - 1 :: FACTOR],
        fine.low.reshape(shape).min(axis=1),
        fine.high.reshape(shape).max(axis=1),
        fine.value[FACTOR - 1 :: FACTOR],
        np.bitwise_or.reduce(fine.flags.reshape(shape), axis=1),
    )
