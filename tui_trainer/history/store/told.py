"""The order in which a run told its story: what came after what, and when.

Rows, events, output and samples lie in tables of their own; here is the thread that joins them, so
that a recorded run can be told again exactly as it was told while it was made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np

from tui_trainer.history.store import packing

DESCRIBED, STEPPED, ROWED, EVENT, ARTIFACT, LOG, LOST = range(7)
"""Kinds of entries. `ref` is the number of a description, the shape of a step (optimizer and
tables), a table, the id of an event, a sample or a log line, and the number of steps lost."""


class Entry(NamedTuple):
    """One thing that was told."""

    kind: int
    ref: int
    step: int
    time: float
    """Seconds since the epoch: steps and rows only."""
    own_ms: float
    """What measuring the step cost, rounded to float32: steps only."""


class Shape(NamedTuple):
    """What a step was measured in: rows of these tables, in this order."""

    optimizer: str
    tables: tuple[int, ...]


class Piece(msgspec.Struct, frozen=True):
    """Consecutive entries, as they were committed: one row of table `told`."""

    shapes: tuple[Shape, ...]
    count: int
    kinds: bytes
    refs: bytes
    steps: bytes
    """Differences."""
    times: bytes
    """Differences of the bit patterns of float64, so that times come back exactly."""
    own: bytes


_KINDS = ("u1", "<i8", "<i8", "<i8", "<f4")


def pack(entries: list[Entry], shapes: tuple[Shape, ...]) -> bytes:
    """The data of a row of table `told`. `ref` of a step counts in `shapes`."""
    kinds, refs, steps, times, own = zip(*entries, strict=True)
    patterns = np.array(times, "<f8").view("<i8")
    columns: list[Any] = [kinds, refs, np.diff(steps, prepend=0), np.diff(patterns, prepend=0), own]
    packed = (
        packing.pack(np.asarray(column, kind)) for column, kind in zip(columns, _KINDS, strict=True)
    )
    return msgspec.msgpack.encode(Piece(shapes, len(entries), *packed))


def unpack(data: bytes) -> tuple[list[Entry], tuple[Shape, ...]]:
    """The entries again. Raises ValueError for damaged data."""
    piece = msgspec.msgpack.decode(data, type=Piece)
    raw = (piece.kinds, piece.refs, piece.steps, piece.times, piece.own)
    kinds, refs, steps, times, own = (
        packing.unpack(each, kind, (piece.count,)) for each, kind in zip(raw, _KINDS, strict=True)
    )
    moments = np.cumsum(times, dtype=np.int64).view(np.float64)
    columns = (kinds, refs, np.cumsum(steps, dtype=np.int64), moments, own)
    found = [Entry(*each) for each in zip(*(c.tolist() for c in columns), strict=True)]
    return found, piece.shapes


def entries(data: bytes) -> list[tuple[Entry, Shape | None]]:
    """The entries of a row of table `told`, steps with their shape. Raises ValueError, TypeError or
    IndexError for damaged data."""
    found, shapes = unpack(data)
    return [(each, shapes[each.ref] if each.kind == STEPPED else None) for each in found]
