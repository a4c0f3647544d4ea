"""Replays a recorded run as the items that its sinks received, in the same order.

A sink (JSON lines, plain lines) writes the same output for a recorded run as it did for the live
one. Memory is bounded: rows are read chunk by chunk.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

from tui_trainer.history.records import ClipRecord, Floats, StepRecord
from tui_trainer.protocol.events import Clip
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.sink_items import (
    InfoChanged,
    Item,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    StepRecorded,
)
from tui_trainer.store.database import DESCRIPTION, Store, decode_info
from tui_trainer.store.events import StoredEvents
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.series import StoredSeries


class _Measured(NamedTuple):
    """A step, or a row measured outside a step."""

    step: int
    time: float
    own_ms: float
    """nan for a row measured outside a step."""
    rows: tuple[tuple[int, Floats], ...]
    """(table, values)"""


def replay_items(history: StoredHistory, measured: bool = True) -> Iterator[Item]:
    """All items of the run so far, steps and rows only if `measured`. Refreshes `history`. Damaged
    items are left out, and `history.store.fault` names them."""
    store = history.store
    with store.snapshot():
        history.refresh()
        sources: list[Iterator[tuple[int, Any]]] = [
            _descriptions(history),
            _measurements(history) if measured else iter(()),
            *StoredEvents(store).in_order(),
            _dropped(store),
        ]
        in_order = heapq.merge(*sources, key=itemgetter(0))
        info = RunInfo("", "")
        for (_, item), (_, following) in pairwise(chain(in_order, [(0, None)])):
            match item:
                case InfoChanged():
                    info = item.info
                    yield item
                case _Measured():
                    yield from _measured(item, following, info)
                case _:
                    yield item
        status = store.status()
    if status is not None and status.ended:
        yield RunEnded(status)


def _measured(
    found: _Measured, following: object, info: RunInfo
) -> Iterator[StepRecorded | RowRecorded]:
    """The item of a step or a row, or nothing if none of its tables can be read.

    `info` declares the tables. `following` is the next item: a clipped step is followed by its
    clip.
    """
    declared = {table.id: table for table in info.tables}
    rows = tuple(
        (number, values)
        for number, values in found.rows
        if number in declared and len(declared[number].columns) == len(values)
    )
    if not rows:
        return
    if math.isnan(found.own_ms):
        for number, values in rows:
            yield RowRecorded(number, found.step, values, found.time)
        return
    optimizer = next((o for number, _ in rows if (o := declared[number].optimizer)), "")
    record = StepRecord(found.step, found.time, optimizer, rows, own_ms=found.own_ms)
    if isinstance(following, Clip) and following.step == found.step:
        clip = ClipRecord(
            following.max_norm,
            following.norm_before,
            following.scale,
            following.parameters,
            following.shares,
            following.kind,
        )
        record = replace(record, clip=clip)
    yield StepRecorded(record)


def _descriptions(history: StoredHistory) -> Iterator[tuple[int, InfoChanged]]:
    """Descriptions with their seq. The first precedes all other items; a damaged description is
    replaced by the next one, or by the declared tables."""
    store, found = history.store, []
    later: RunInfo | None = None
    for seq, data in store.query("SELECT seq, data FROM description ORDER BY seq DESC"):
        read = next(store.decoded(DESCRIPTION, decode_info, iter([(data,)])), None)
        later = read or later
        found.append((seq, later))
    known = [(seq, InfoChanged(info)) for seq, info in reversed(found) if info is not None]
    if known:
        yield -1, known[0][1]
        yield from known[1:]
    elif store.fault:
        tables = tuple(series.table for series in history.tables.values())
        dense = [table.id for table in tables] == list(range(len(tables)))
        yield -1, InfoChanged(RunInfo("", "", tables=tables if dense else ()))


def _measurements(history: StoredHistory) -> Iterator[tuple[int, _Measured]]:
    """Steps and rows with their seq. Those whose time is damaged are left out."""
    sources = [_times(history), *(_rows(series) for series in history.tables.values())]
    in_order = heapq.merge(*sources, key=itemgetter(0, 1))
    for seq, group in groupby(in_order, key=itemgetter(0)):
        (_, table, first), *rows = group
        if table < 0:
            step, time, own_ms = first
            yield seq, _Measured(step, time, own_ms, tuple((n, values) for _, n, values in rows))


def _times(history: StoredHistory) -> Iterator[tuple[int, int, Any]]:
    for piece in history.step_times.pieces():
        columns = (each.tolist() for each in piece)
        for seq, step, time, own_ms in zip(*columns, strict=True):
            yield seq, -1, (step, time, own_ms)


def _rows(series: StoredSeries) -> Iterator[tuple[int, int, Any]]:
    for block in series.blocks():
        for seq, values in zip(block.seq.tolist(), block.value, strict=True):
            yield seq, series.table.id, values


def _dropped(store: Store) -> Iterator[tuple[int, ItemsDropped]]:
    for seq, steps in store.numbers("steps", "SELECT seq, steps FROM dropped ORDER BY seq"):
        yield int(seq), ItemsDropped(int(steps))
