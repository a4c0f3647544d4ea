"""One open store, for reading: its questions, and the chunks that were unpacked of late."""

from __future__ import annotations

import os
import sqlite3
from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.buckets import Steps
from tui_trainer.history.store import packing, told
from tui_trainer.history.store.objects import decode_status
from tui_trainer.history.store.schema import open_for_reading
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.text import harmless_all

CACHE_BYTES = 64 * 2**20
"""What unpacked chunks may take, so that moving a window is cheap."""


class Part(NamedTuple):
    """Some columns of a chunk, (entries, columns) each; low, high and flags may be empty."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    value: NDArray[np.float32]
    flags: NDArray[np.uint8]


class Store:
    """One open database. Not safe for use from several threads."""

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        """`ended`: nobody writes to it any more. Raises StoreFault."""
        self.connection = open_for_reading(directory, ended)
        self.fault = ""
        """What could not be read, for people; the rest is shown all the same."""
        self._steps: OrderedDict[tuple[int, int, int], tuple[Steps, Steps]] = OrderedDict()
        self._parts: OrderedDict[tuple[int, int, int, int], Part] = OrderedDict()
        self._cached_bytes = 0

    def ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of an SQL question; none, with `fault` set, where the database is damaged."""
        try:
            return self.connection.execute(question, values).fetchall()
        except sqlite3.Error as fault:
            self.fault = f"part of the recording cannot be read: {fault}"
            return []

    def info(self) -> RunInfo | None:
        """The description of the run."""
        for (value,) in self.ask("SELECT value FROM meta WHERE key = 'info'"):
            info: RunInfo = msgspec.json.decode(value, type=RunInfo)
            return harmless_all(info)
        return None

    def status(self) -> Status | None:
        """The last state that was recorded."""
        for (value,) in self.ask("SELECT value FROM meta WHERE key = 'status'"):
            return decode_status(value)
        return None

    def first_moment(self) -> tuple[int, float] | None:
        """The first step recorded, and when it was made; None where that was not kept."""
        for (data,) in self.ask("SELECT data FROM told ORDER BY id LIMIT 8"):
            try:
                entries, _ = told.unpack(data)
            except (ValueError, msgspec.DecodeError):
                return None
            for entry in entries:
                if entry.kind == told.STEPPED:
                    return entry.step, entry.time
        return None

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
                except ValueError as fault:
                    self.fault = f"part of the recording cannot be read: {fault}"
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
            except ValueError as fault:
                self.fault = f"part of the recording cannot be read: {fault}"
                return None
            self._parts[key] = found
            self._cached_bytes += found.value.nbytes * 3
            while self._cached_bytes > CACHE_BYTES and len(self._parts) > 1:
                _, old = self._parts.popitem(last=False)
                self._cached_bytes -= old.value.nbytes * 3
        return found
