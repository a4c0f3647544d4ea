"""The database of a run, open for reading: queries, a cache, and notes of unreadable data."""

from __future__ import annotations

import math
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import msgspec

from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import sanitize_message
from tui_trainer.store import codec
from tui_trainer.store.codec import DECODE_ERRORS
from tui_trainer.store.schema import READ_ERRORS, error_text, open_for_reading

T = TypeVar("T")

CACHE_BYTES = 64 * 2**20
"""Memory of unpacked chunks, so that moving a window is cheap."""

DESCRIPTION, STATUS = "the run's description", "its last state"
TABLES, MEASUREMENTS, TIMES = "tables", "measurements", "times of steps"
EVENTS, SAMPLES, LINES = "events", "samples", "lines of output"


class Store:
    """One open database. Not thread-safe.

    No method raises for damaged data: unreadable data is left out, and `fault` names it.
    """

    def __init__(self, directory: str | os.PathLike[str], ended: bool = False) -> None:
        """`ended`: the run no longer writes. Raises StoreError."""
        self.connection = open_for_reading(directory, ended)
        self._unreadable: dict[str, None] = {}
        self._error = ""
        self._cache: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()
        self._cached_bytes = 0

    @property
    def fault(self) -> str:
        """A sentence about the data that could not be read; "" while everything could be."""
        if not self._unreadable and not self._error:
            return ""
        what = ", ".join(self._unreadable)
        if what and self._error:
            what = f"{what} ({self._error})"
        return f"part of the recording cannot be read: {what or self._error}"

    def unreadable(self, what: str) -> None:
        """Note that some of `what` (EVENTS, TABLES, …) cannot be read."""
        self._unreadable[what] = None

    # ------------------------------------------------------------ queries

    def stream(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """Rows of an SQL query, one at a time; in a damaged database those before the damage."""
        try:
            yield from self.connection.execute(query, values)
        except READ_ERRORS as error:
            self._error = self._error or error_text(error)

    def query(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of an SQL query, as `stream`."""
        return list(self.stream(query, *values))

    def numbers(self, what: str, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of finite numbers; others are left out, and noted as unreadable `what`."""
        rows = self.query(query, *values)
        valid = [row for row in rows if all(map(_is_number, row))]
        if len(valid) < len(rows):
            self.unreadable(what)
        return valid

    def decoded(
        self, what: str, decode: Callable[..., T], rows: Iterator[tuple[Any, ...]]
    ) -> Iterator[T]:
        """`decode(*row)` of each row; those that raise are left out, and noted as unreadable."""
        for row in rows:
            try:
                yield decode(*row)
            except DECODE_ERRORS:
                self.unreadable(what)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All queries inside see the same state, while the run keeps writing."""
        if self.connection.in_transaction:
            yield
            return
        self.query("BEGIN")
        try:
            yield
        finally:
            with suppress(sqlite3.Error):  # in a damaged database, BEGIN may have failed
                self.connection.execute("COMMIT")

    def close(self) -> None:
        self.connection.close()

    # ------------------------------------------------------------ cache

    def cached(self, key: tuple[Any, ...], size: int, read: Callable[[], T | None]) -> T | None:
        """The result of `read` for `key`, cached as `size` bytes; None is not cached."""
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
            value: T = found[0]
            return value
        fresh = read()
        if fresh is not None:
            self._cache[key] = fresh, size
            self._cached_bytes += size
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                _, (_, freed) = self._cache.popitem(last=False)
                self._cached_bytes -= freed
        return fresh

    def clear_cache(self) -> None:
        """Empty the cache, for a reader that passes over all rows once."""
        self._cache.clear()
        self._cached_bytes = 0

    # ------------------------------------------------------------ the run

    def info(self) -> RunInfo | None:
        """The newest description of the run that can be read."""
        rows = self.stream("SELECT data FROM description ORDER BY seq DESC")
        return next(self.decoded(DESCRIPTION, decode_info, rows), None)

    def status(self) -> Status | None:
        """The last state that was recorded."""
        rows = self.stream("SELECT value FROM meta WHERE key = 'status'")
        return next(self.decoded(STATUS, codec.decode_status, rows), None)


def decode_info(data: bytes) -> RunInfo:
    """Raises one of DECODE_ERRORS."""
    return sanitize_message(msgspec.json.decode(data, type=RunInfo))


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and math.isfinite(cell)
