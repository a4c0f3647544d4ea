"""Reads a whole recording in order: single tables in blocks, or several joined by step."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tui_trainer.history.buckets import Steps
from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.store import told
from tui_trainer.store.codec import CHUNK
from tui_trainer.store.reader import StoredHistory, StoredSeries

PER_STEP = (
    schema.STEP,
    schema.CLIP,
    schema.PHASE_MS,
    schema.MEMORY,
    schema.OVERHEAD,
    schema.VALIDATION,
)
"""Tables with few columns, which are exported as one row for each step."""


class ExportBlock(NamedTuple):
    """Consecutive rows of a table."""

    steps: Steps
    """Shape (n,)."""
    values: Floats
    """Shape (n, columns)."""


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


def blocks(table: StoredSeries) -> Iterator[ExportBlock]:
    """All rows of a table, CHUNK at a time, without damaged ones."""
    level = table.levels()[0]
    for start in range(0, level.stop, CHUNK):
        found = level.buckets(start, min(start + CHUNK, level.stop))
        table.store.forget()
        yield ExportBlock(found.last, found.value)


def title(table: StoredSeries) -> str:
    """Name of a table, with its optimizer if the run has several."""
    named = table.table
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
        for block in blocks(table):
            for step, values in zip(block.steps.tolist(), block.values, strict=True):
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
        current.rows[place] = values
    if current is not None:
        yield current


class Times:
    """When steps were made, in seconds since the epoch, asked for in order of the steps."""

    def __init__(self, history: StoredHistory) -> None:
        self._entries = self._moments(history)
        self._now: tuple[int, float] | None = next(self._entries, None)

    @staticmethod
    def _moments(history: StoredHistory) -> Iterator[tuple[int, float]]:
        for number, data in history.store.pieces():
            for entry, _ in history.store.story(number, data):
                if entry.kind in (told.STEPPED, told.ROWED):
                    yield entry.step, entry.time

    def at(self, step: int) -> float:
        """NaN where it is not known."""
        while self._now is not None and self._now[0] < step:
            self._now = next(self._entries, None)
        return self._now[1] if self._now is not None and self._now[0] == step else float("nan")


def shortest(values: Floats) -> list[str]:
    """Each float32 with the fewest digits that parse to the same value."""
    texts: list[str] = np.asarray(values, np.float32).astype("U32").tolist()
    return texts
