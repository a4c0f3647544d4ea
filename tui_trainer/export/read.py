"""Reads a whole recording in order: single tables in blocks, or several joined by step."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import absent_mask
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.series import StoredSeries

PER_STEP = (
    schema.STEP,
    schema.CLIP,
    schema.PHASE_MS,
    schema.MEMORY,
    schema.OVERHEAD,
    schema.VALIDATION,
    schema.LOGGED,
)
"""Tables with few columns, which are exported as one row for each step."""


def measured(history: StoredHistory) -> list[StoredSeries]:
    """The tables that have rows."""
    return [table for table in history.tables.values() if table.columns and table.rows]


def per_step(history: StoredHistory) -> list[StoredSeries]:
    """The tables in PER_STEP that have rows, in that order."""
    found = [table for table in measured(history) if table.table.name in PER_STEP]
    return sorted(found, key=lambda table: PER_STEP.index(table.table.name))


def wide(history: StoredHistory) -> list[StoredSeries]:
    """The other tables, which are exported as a file each."""
    return [table for table in measured(history) if table.table.name not in PER_STEP]


def title(table: StoredSeries) -> str:
    """Name of a table, with its rank or optimizer if the run has several."""
    named = table.table
    if named.rank is not None:
        return f"{named.name}.{named.rank}"
    return f"{named.name}.{named.optimizer}" if named.optimizer else named.name


def column_names(table: StoredSeries) -> list[str]:
    """Names of a table's columns in a joined row: `loss` for table `step`, `clip.scale` for
    others."""
    bare = table.table.name == schema.STEP and not table.table.optimizer
    names = [column.name for column in table.table.columns]
    return names if bare else [f"{title(table)}.{name}" for name in names]


class Joined(NamedTuple):
    """The rows of several tables for one step."""

    step: int
    rows: dict[int, Floats]
    """Index of the table in the list that was joined, to its row of shape (columns,)."""


def joined(chosen: Sequence[StoredSeries]) -> Iterator[Joined]:
    """The rows of several tables, step by step; the later of two rows for the same step."""

    def rows(place: int, table: StoredSeries) -> Iterator[tuple[int, int, Floats]]:
        for block in table.blocks():
            for step, values in zip(block.step.tolist(), block.value, strict=True):
                yield step, place, values

    merged = heapq.merge(
        *(rows(place, table) for place, table in enumerate(chosen)), key=lambda row: row[:2]
    )
    current: Joined | None = None
    for step, place, values in merged:
        if current is None or current.step != step:
            if current is not None:
                yield current
            current = Joined(step, {})
        known = current.rows.get(place)
        if known is not None and (missing := absent_mask(values)).any():
            values = np.where(missing, known, values)  # values that were logged one by one
        current.rows[place] = values
    if current is not None:
        yield current


def shortest(values: Floats) -> list[str]:
    """Each float32 with the fewest digits that parse to the same value; "" where it is absent."""
    values = np.ascontiguousarray(values, np.float32)
    texts: list[str] = np.where(absent_mask(values), "", values.astype("U32")).tolist()
    return texts
