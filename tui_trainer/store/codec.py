"""How steps and values lie in the store: byte planes, compressed.

The bytes of a float32 series differ in kind: sign and exponent hardly change, the low mantissa bits
are noise. Planes of equal bytes side by side compress well where there is anything to compress.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Buckets, Flags, Steps
from tui_trainer.history.records import Floats

CHUNK = 512
"""Entries of a chunk: a power of 8, so that a full chunk of rows ends in full buckets."""
GROUP = 16
"""Columns of a part: drawing one series unpacks no more than its neighbours."""
LAST_STEP = 2**48
"""A greater number is no step: nothing counts so far."""
_LEVEL = 1


def pack(array: NDArray[np.generic]) -> bytes:
    """Byte planes, compressed."""
    raw = np.ascontiguousarray(array)
    planes = raw.view(np.uint8).reshape(-1, raw.itemsize).T
    return zlib.compress(planes.tobytes(), _LEVEL)


def unpack(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """The array again. Raises ValueError for damaged data."""
    try:
        raw = np.frombuffer(zlib.decompress(data), np.uint8)
        planes = raw.reshape(np.dtype(dtype).itemsize, -1)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)
    except zlib.error as fault:
        raise ValueError(f"damaged values: {fault}") from fault


def pack_steps(last: Steps, first: Steps | None) -> bytes:
    """Steps as differences, which are all alike."""
    arrays = [last] if first is None else [last, first]
    return pack(np.stack([np.diff(steps, prepend=0) for steps in arrays]).astype("<i8"))


def unpack_steps(data: bytes, level: int) -> tuple[Steps, Steps]:
    """(first, last) steps of a chunk's entries."""
    stacked = unpack(data, "<i8", (1 if level == 0 else 2, CHUNK)).cumsum(axis=1)
    return stacked[-1].astype(np.int64), stacked[0].astype(np.int64)


def pack_values(buckets: Buckets, level: int, columns: slice) -> bytes:
    """The values of CHUNK entries and some columns, column after column."""
    fields = [buckets.value] if level == 0 else [buckets.low, buckets.high, buckets.value]
    planes = np.stack([field[:, columns].T for field in fields]).astype("<f4")
    if level == 0:
        return pack(planes)
    flags = buckets.flags[:, columns]
    marks = pack(flags.T) if flags.any() else b""
    return len(marks).to_bytes(4, "little") + marks + pack(planes)


def unpack_values(data: bytes, level: int, columns: int) -> tuple[Floats, Floats, Floats, Flags]:
    """(low, high, value, flags) of a part, each (CHUNK, columns). For rows only `value` counts."""
    if level == 0:
        value = unpack(data, "<f4", (columns, CHUNK)).T.astype(np.float32)
        return value, value, value, np.zeros((0, columns), np.uint8)
    size = int.from_bytes(data[:4], "little")
    low, high, value = unpack(data[4 + size :], "<f4", (3, columns, CHUNK)).astype(np.float32)
    if size:
        flags = unpack(data[4 : 4 + size], "u1", (columns, CHUNK)).T.astype(np.uint8)
    else:
        flags = np.zeros((CHUNK, columns), np.uint8)
    return low.T, high.T, value.T, flags


def pack_tail(buckets: Buckets, level: int) -> bytes:
    """Some entries of all columns as they are."""
    arrays: list[NDArray[np.generic]] = [buckets.last.astype("<i8"), buckets.value.astype("<f4")]
    if level:
        arrays += [buckets.first.astype("<i8"), buckets.low.astype("<f4")]
        arrays += [buckets.high.astype("<f4"), buckets.flags]
    return b"".join(array.tobytes() for array in arrays)


def unpack_tail(data: bytes, level: int, count: int, columns: int) -> Buckets:
    """The entries again. Raises ValueError when the size is wrong, or what are no steps stands in
    their place (there is no checksum)."""
    if count < 0:
        raise ValueError("a piece of the tail has the wrong size")
    kinds = [("<i8", 1), ("<f4", columns)]
    if level:
        kinds += [("<i8", 1), ("<f4", columns), ("<f4", columns), ("u1", columns)]
    arrays, offset = [], 0
    for kind, width in kinds:
        array = np.frombuffer(data, kind, count * width, offset)
        offset += array.nbytes
        arrays.append(array if kind == "<i8" else array.reshape(count, columns))
    if offset != len(data):
        raise ValueError("a piece of the tail has the wrong size")
    last, value = arrays[0].astype(np.int64), arrays[1].astype(np.float32)
    _check_steps(last)
    if not level:
        return row_buckets(last, value)
    first, low, high, flags = arrays[2:]
    _check_steps(first)
    if (first > last).any():
        raise ValueError("a piece of the tail has steps that run backwards")
    return Buckets(first.astype(np.int64), last, low, high, value, flags)


def _check_steps(steps: NDArray[np.generic]) -> None:
    if len(steps) and (steps[0] < 0 or steps[-1] > LAST_STEP or (np.diff(steps) < 0).any()):
        raise ValueError("a piece of the tail has steps that run backwards")


def row_buckets(steps: Steps, values: Floats) -> Buckets:
    """Rows as buckets of one, whose extremes are worked out by whoever draws them."""
    return Buckets(steps, steps, values, values, values, np.zeros((0, values.shape[1]), np.uint8))
