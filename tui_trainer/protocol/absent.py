"""Values that are absent, and why.

A row has a float32 for every column. An absent value is a nan whose payload is a reason of
`Absent`: rows, stores, messages and conversions between float32 and float64 keep the payload bit by
bit, and no arithmetic produces it. A measured nan has another payload.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MARK = 0x7FD55500
"""A quiet nan in float32; the lowest byte is the reason."""
_MASK = 0x7FFFFF00


class Absent(IntEnum):
    """Why there is no value. Numbers are stored: they never change their meaning."""

    NOT_MEASURED = 1
    NOT_REACHED = 2
    FROZEN = 3
    NOT_IN_MODEL = 4
    EMPTY = 5
    ZERO_WEIGHTS = 6
    LOSS_NOT_SEEN = 7
    NO_LOSS = 8
    NO_LEARNING_RATE = 9
    NO_GRADIENTS = 10
    CHANGED_BY_HAND = 11
    OUT_OF_RANGE = 12
    NO_PHASE = 13
    SHARED = 14
    NO_CLOSURE = 15
    NO_LIMIT = 16
    NOT_COMPARABLE = 17
    NO_DEVICE = 18
    OVERFLOW = 19
    SHARDED = 20
    CHANGED_BY_FRAMEWORK = 21
    NO_OPTIMIZER = 22

    @property
    def reason(self) -> str:
        """The reason as shown to the user."""
        return _REASONS[self]


_REASONS = {
    Absent.NOT_MEASURED: "not measured at this step",
    Absent.NOT_REACHED: "not reached by backward",
    Absent.FROZEN: "frozen",
    Absent.NOT_IN_MODEL: "no longer in the model",
    Absent.EMPTY: "no elements",
    Absent.ZERO_WEIGHTS: "the weights were zero",
    Absent.LOSS_NOT_SEEN: "the loss is not visible: backward was not called on a scalar",
    Absent.NO_LOSS: "no backward since the last step of this optimizer",
    Absent.NO_LEARNING_RATE: "no optimizer, no learning rate",
    Absent.NO_GRADIENTS: "no gradients",
    Absent.CHANGED_BY_HAND: "changed by the script before it was measured",
    Absent.OUT_OF_RANGE: "outside the range of float32",
    Absent.NO_PHASE: "the step had no such phase",
    Absent.SHARED: "counted in another optimizer's step",
    Absent.NO_CLOSURE: "no closure",
    Absent.NO_LIMIT: "clipped by the script, without a limit",
    Absent.NOT_COMPARABLE: "not comparable",
    Absent.NO_DEVICE: "no accelerator",
    Absent.OVERFLOW: "overflowed in float32 while it was computed",
    Absent.CHANGED_BY_FRAMEWORK: "unscaled and clipped by the framework before it was measured",
    Absent.NO_OPTIMIZER: "in no optimizer",
    Absent.SHARDED: "only this process's shards are known",
}


_VALUES = {why: float(np.uint32(_MARK | why).view(np.float32)) for why in Absent}


def absent(why: Absent) -> float:
    """The nan that stands for an absent value in a row."""
    return _VALUES[why]


def absent_mask(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of float32 `values` are absent."""
    mask: NDArray[np.bool_] = (values.view(np.uint32) & _MASK) == _MARK
    return mask


def why_absent(value: float) -> Absent | None:
    """The reason of an absent value; None for any other value, also for a measured nan."""
    if not math.isnan(value):
        return None
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if bits & _MASK != _MARK:
        return None
    try:
        return Absent(bits & 0xFF)
    except ValueError:  # a reason of a later version
        return Absent.NOT_MEASURED


LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)


def to_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Values for a row; those that float32 cannot hold are absent instead of infinite or zero."""
    # A fast path for norms, the usual values. `fmin` and `fmax` ignore nan.
    if not values.size or (
        np.fmin.reduce(values) >= SMALLEST and np.fmax.reduce(values) <= LARGEST
    ):
        return values.astype(np.float32)
    size = np.abs(values)
    if np.fmin.reduce(size) >= SMALLEST and np.fmax.reduce(size) <= LARGEST:
        return values.astype(np.float32)
    outside = ((size > LARGEST) & (size < math.inf)) | ((size < SMALLEST) & (size > 0))
    if outside.any():
        values = np.where(outside, absent(Absent.OUT_OF_RANGE), values)
    return values.astype(np.float32)


def float32_row(values: Iterable[float]) -> NDArray[np.float32]:
    """`to_float32` of a few numbers."""
    return np.array(
        [v if SMALLEST <= v <= LARGEST or v == 0 or v != v else _held(v) for v in values],
        np.float32,
    )


def _held(value: float) -> float:
    size = abs(value)
    return value if SMALLEST <= size <= LARGEST or size == math.inf else absent(Absent.OUT_OF_RANGE)
