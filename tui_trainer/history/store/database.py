"""One open store, for reading: its questions, and the chunks that were unpacked of late."""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Steps
from tui_trainer.history.store import packing, told
from tui_trainer.history.store.damage import INFO, STATE, STORY, STRETCH, TABLE, Damage
from tui_trainer.history.store.objects import decode_status
from tui_trainer.history.store.schema import REFUSALS, open_for_reading, reason_of
from tui_trainer.protocol.describe import RunInfo, Table
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.text import harmless_all

CACHE_BYTES = 64 * 2**20
"""What unpacked chunks may take, so that moving a window is cheap."""
LEAST_CHUNK_BYTES = 64
"""What a chunk takes at the least: its key alone is there three times."""
PIECES_AT_ONCE = 16
"""Pieces of the story read in one question."""
UNREADABLE = (ValueError, TypeError, IndexError, OverflowError)
"""What decoding damaged data raises: SQLite puts a value of any type into any column."""


class Part(NamedTuple):
    """Some columns of a chunk, (entries, columns) each; low, high and flags may be empty."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    value: NDArray[np.float32]
    flags: NDArray[np.uint8]


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and math.isfinite(cell)


class Store:
    """One open database. Not safe for use from several threads."""

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        """`ended`: nobody writes to it any more. Raises StoreFault."""
        self.connection = open_for_reading(directory, ended)
        self.damage = Damage()
        self._most_chunks = 0
        self._steps: OrderedDict[tuple[int, int, int], tuple[Steps, Steps]] = OrderedDict()
        self._parts: OrderedDict[tuple[int, int, int, int], Part] = OrderedDict()
        self._cached_bytes = 0

    @property
    def fault(self) -> str:
        """What could not be read, for people; the rest is shown all the same."""
        return str(self.damage)

    def ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of an SQL question; where the database is damaged, with `fault` set, those before
        the damage."""
        rows: list[tuple[Any, ...]] = []
        try:
            rows.extend(self.connection.execute(question, values))
        except REFUSALS as fault:
            self.damage.refused(reason_of(fault))
        return rows

    def numbers(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """The same, of rows that hold finite numbers alone; others are damaged, and left out."""
        rows = self.ask(question, *values)
        sound = [row for row in rows if all(map(_is_number, row))]
        if len(sound) < len(rows):
            self.damage.note(STRETCH, question)
        return sound

    def info(self) -> RunInfo | None:
        """The description of the run; where that cannot be read, the newest of the story's that
        can."""
        for question in (
            "SELECT 'info', value FROM meta WHERE key = 'info'",
            "SELECT id, data FROM description ORDER BY id DESC",
        ):
            for number, value in self.ask(question):
                if (info := self.description(number, value)) is not None:
                    return info
            if not self.fault:
                return None  # nothing was described yet
        return None

    def description(self, number: object, data: bytes) -> RunInfo | None:
        """One description, with every text harmless; None where it cannot be read."""
        try:
            info: RunInfo = msgspec.json.decode(data, type=RunInfo)
        except UNREADABLE:
            self.damage.note(INFO)
            return None
        return harmless_all(info)

    def status(self) -> Status | None:
        """The last state that was recorded."""
        for (value,) in self.ask("SELECT value FROM meta WHERE key = 'status'"):
            try:
                return decode_status(value)
            except UNREADABLE:
                self.damage.note(STATE)
        return None

    def declared(self, known: Collection[int] = ()) -> list[Table]:
        """The measured tables that are not `known`, by number; one whose own description cannot be
        read as the run's description has it."""
        found: dict[int, Table] = {}
        numbers = [number for (number,) in self.ask("SELECT id FROM series ORDER BY id")]
        fresh = [number for number in numbers if number not in known]
        for number in fresh:
            if (table := self._table(number)) is not None:
                found[number] = table
        if len(found) < len(fresh) or (self.fault and not known):
            info = self.info()
            for table in info.tables if info is not None else ():
                if table.id not in known:
                    found.setdefault(table.id, table)
        return [found[number] for number in sorted(found)]

    def _table(self, number: int) -> Table | None:
        for (description,) in self.ask("SELECT description FROM series WHERE id = ?", number):
            try:
                table = msgspec.json.decode(description, type=Table)
            except UNREADABLE:
                break
            if table.id == number:
                return harmless_all(table)
        self.damage.note(TABLE, number)
        return None

    def pieces(self, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(id, data) of the story's pieces before `stop`, or of all, in order; past those that
        cannot be read."""
        newest = self.numbers("SELECT max(id) FROM told") if stop is None else [(stop - 1,)]
        last = min(int(newest[0][0]), self.most_chunks()) if newest else 0
        question = "SELECT id, data FROM told WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
        done = 0
        while done < last:
            found = self.ask(question, done, last, PIECES_AT_ONCE)
            for number, data in found:
                done = max(done + 1, number)
                yield number, data
            if not found:
                if not self.fault:
                    return
                done += 1

    def first_moment(self) -> tuple[int, float] | None:
        """The first step recorded, and when it was made; None where that was not kept."""
        for number, data in self.ask("SELECT id, data FROM told ORDER BY id LIMIT 8"):
            for entry, _ in self.story(number, data):
                if entry.kind == told.STEPPED:
                    return entry.step, entry.time
        return None

    def story(self, number: object, data: bytes) -> list[tuple[told.Entry, told.Shape | None]]:
        """The entries of one piece of the story; none where it cannot be read."""
        try:
            return told.entries(data)
        except UNREADABLE:
            self.damage.note(STORY, number)
            return []

    def most_chunks(self, wanted: int = sys.maxsize) -> int:
        """More chunks than a database of this size can hold; asked anew where `wanted` is more than
        it could hold when it was last asked."""
        if wanted >= self._most_chunks:
            pages, size = (self.ask(f"PRAGMA {what}") for what in ("page_count", "page_size"))
            known = bool(pages and size)
            self._most_chunks = pages[0][0] * size[0][0] // LEAST_CHUNK_BYTES if known else 0
        return self._most_chunks

    def forget(self) -> None:
        """Let unpacked chunks go: who reads once from front to back comes to none of them again."""
        self._steps.clear()
        self._parts.clear()
        self._cached_bytes = 0

    def close(self) -> None:
        """Give the file back."""
        self.connection.close()

    # ------------------------------------------------------------ chunks

    def steps(self, series: int, level: int, number: int) -> tuple[Steps, Steps] | None:
        """(first, last) steps of a chunk's entries; None where they cannot be read."""
        key = (series, level, number)
        if key not in self._steps:
            question = "SELECT steps FROM chunk WHERE series = ? AND level = ? AND number = ?"
            for (data,) in self.ask(question, *key):
                try:
                    self._steps[key] = packing.unpack_steps(data, level)
                except UNREADABLE:
                    self.damage.note(STRETCH, key)
            if len(self._steps) > 4096:
                self._steps.popitem(last=False)
        return self._steps.get(key)

    def part(self, series: int, level: int, number: int, group: int, width: int) -> Part | None:
        """Some columns of a chunk; None where they cannot be read."""
        key = (series, level, number, group)
        found = self._parts.get(key)
        if found is not None:
            self._parts.move_to_end(key)
            return found
        question = (
            "SELECT data FROM part JOIN chunk ON chunk.id = part.chunk "
            "WHERE series = ? AND level = ? AND number = ? AND columns = ?"
        )
        for (data,) in self.ask(question, *key):
            try:
                found = Part(*packing.unpack_values(data, level, width))
            except UNREADABLE:
                self.damage.note(STRETCH, key[:3])
                return None
            self._parts[key] = found
            self._cached_bytes += found.value.nbytes * 3
            while self._cached_bytes > CACHE_BYTES and len(self._parts) > 1:
                _, old = self._parts.popitem(last=False)
                self._cached_bytes -= old.value.nbytes * 3
        return found
