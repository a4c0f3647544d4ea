"""Writes a run's store: a sink of the recorder, on a thread of its own.

What happened is committed about twice a second, so that a killed process loses at most the last
second. When the disk refuses, the training goes on: what waits is kept, within bounds, the trouble
is said, and recording resumes as soon as it can.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tui_trainer.history.records import Floats
from tui_trainer.history.store import objects, told
from tui_trainer.history.store.schema import STORE_FILE, StoreFault, open_for_writing
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import (
    Clip,
    ConfusionMatrix,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    Status,
    TextSample,
)
from tui_trainer.recording.feed import size_of
from tui_trainer.recording.items import Described, Ended, Item, Lost, Rowed, Stepped
from tui_trainer.recording.store_series import SeriesWriter
from tui_trainer.recording.store_told import ToldWriter
from tui_trainer.recording.telling import artifact_bytes

COMMIT_EVERY_S = 0.4
LONGEST_BACK_OFF_S = 30.0
MOST_WAITING_BYTES = 64 * 2**20
"""Rows that wait for a disk that refuses; with more, the newest are given up and counted."""
MOST_WAITING_SAYINGS = 100_000
KEPT_BYTES = 32 * 2**20
"""The newest of what was written is remembered, so that a database that takes the place of a
damaged one does not begin empty."""
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class StoreSink:
    """Implements `recording.items.Sink`. `say(text)` is told what is wrong, and "" when it is over:
    meant for `Status.recording`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = Path(directory)
        self._say = say
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._place = (0, 0)
        self._info: RunInfo | None = None
        self._info_written = False
        self._status = Status()
        self._series: dict[int, SeriesWriter] = {}
        self._told = ToldWriter()
        self._kept: deque[tuple[Item, int]] = deque()
        self._kept_bytes = 0
        self._kept_info: RunInfo | None = None
        """The description in force before what is kept."""
        self._sayings: list[tuple[str, tuple[object, ...]]] = []
        self._sayings_bytes = 0
        self._moment: tuple[int, float] | None = None
        self._waiting_bytes = 0
        self._lost = 0
        self._trouble = ""
        self._damaged = ""
        self._next_commit = 0.0
        self._back_off = 1.0

    # ------------------------------------------------------------ the sink

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Keep these; commit when it is time."""
        self._status = status
        for item in items:
            self._take(item)
            self._keep(item)
        if self._clock() >= self._next_commit or any(isinstance(i, Ended) for i in items):
            self.commit()

    def close(self) -> None:
        """Commit what waits and leave the file in order."""
        self.commit()
        if self._connection is not None:
            try:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as fault:
                self._refused(fault)
            self._disconnect()

    def commit(self) -> bool:
        """Write all that waits; whether the disk took it."""
        try:
            if self._connection is not None and self._identity() != self._place:
                self._disconnect()
                self._damaged = "the recording was removed or replaced by somebody else"
                self._begin_anew()
            if self._connection is None:
                self._connect()
            self._write()
        except (sqlite3.Error, OSError, StoreFault, ValueError) as fault:
            self._refused(fault)
            return False
        self._next_commit = self._clock() + COMMIT_EVERY_S
        self._back_off = 1.0
        lost = f"{self._lost:,} rows could not be recorded" if self._lost else ""
        self._tell("; ".join(text for text in (self._damaged, lost) if text))
        return True

    # ------------------------------------------------------------ taking in

    def _take(self, item: Item) -> None:
        match item:
            case Stepped():
                record = item.record
                self._moment = (record.step, record.time)
                taken = tuple(t for t, values in record.rows if self._row(t, record.step, values))
                if taken:
                    self._told.stepped(
                        record.step, record.time, record.own_ms, record.optimizer, taken
                    )
            case Rowed():
                if self._row(item.table, item.step, item.values):
                    self._told.add(told.ROWED, item.table, item.step, item.time)
            case Described():
                self._describe(item.info)
            case Ended():
                self._status = item.status
            case Lost():
                self._lost += item.steps
                self._told.add(told.LOST, item.steps)
            case _:
                roomy = self._sayings_bytes < MOST_WAITING_BYTES
                if roomy and len(self._sayings) < MOST_WAITING_SAYINGS:
                    self._sayings_bytes += _bytes_of(item)
                    self._sayings.append(_statement(item))
                    self._told.add(_kind(item), item.id)

    def _describe(self, info: RunInfo) -> None:
        self._info, self._info_written = info, False
        self._told.described(info)
        for table in info.tables:
            known = self._series.get(table.id)
            if known is None or known.table.columns != table.columns:
                self._series[table.id] = SeriesWriter(table)
            else:
                known.table = table

    def _row(self, table: int, step: int, values: Floats) -> bool:
        """Keep a row; whether it was taken."""
        series = self._series.get(table)
        if series is None or self._waiting_bytes > MOST_WAITING_BYTES:
            self._lost += 1
            return False
        taken = series.add(step, values)
        self._waiting_bytes += taken
        self._lost += not taken
        return bool(taken)

    def _keep(self, item: Item) -> None:
        size = _bytes_of(item)
        self._kept.append((item, size))
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES:
            oldest, size = self._kept.popleft()
            self._kept_bytes -= size
            if isinstance(oldest, Described):
                self._kept_info = oldest.info

    def _begin_anew(self) -> None:
        """Into an empty database goes all that is remembered, in its order."""
        self._series, self._told = {}, ToldWriter()
        self._sayings.clear()
        self._sayings_bytes = self._waiting_bytes = self._lost = 0
        if self._kept_info is not None:
            self._describe(self._kept_info)
        for item, _ in self._kept:
            self._take(item)

    # ------------------------------------------------------------ the disk

    def _connect(self) -> None:
        self._connection = open_for_writing(self._directory)
        self._place = self._identity()
        self._info_written = False
        self._told.forget_place()
        for series in self._series.values():
            series.forget_place()

    def _identity(self) -> tuple[int, int]:
        """Which file the name leads to. Raises OSError where the directory is gone as well."""
        try:
            found = os.stat(self._directory / STORE_FILE)
        except FileNotFoundError:
            return 0, 0
        return found.st_dev, found.st_ino

    def _write(self) -> None:
        connection = self._connection
        assert connection is not None
        connection.execute("BEGIN IMMEDIATE")
        try:
            if self._info is not None and not self._info_written:
                _put(connection, "info", self._info)
            for series in self._series.values():
                series.write(connection)
            self._told.write(connection)
            for statement, values in self._sayings:
                connection.execute(statement, values)
            if self._moment is not None:
                connection.execute("INSERT OR REPLACE INTO clock VALUES (?, ?)", self._moment)
            _put(connection, "status", self._status)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._told.written()
        for series in self._series.values():
            series.written()
        self._sayings.clear()
        self._sayings_bytes = 0
        self._info_written, self._moment, self._waiting_bytes = True, None, 0

    def _refused(self, fault: Exception) -> None:
        self._disconnect()
        code = getattr(fault, "sqlite_errorcode", 0)
        damaged = isinstance(fault, ValueError) or code & 0xFF in _CORRUPT
        if damaged and self._set_aside():
            self._next_commit = self._clock()
            return
        reason = getattr(fault, "strerror", None) or str(fault)
        self._tell(f"not recording: {reason}; training goes on, trying again")
        self._next_commit = self._clock() + self._back_off
        self._back_off = min(self._back_off * 2, LONGEST_BACK_OFF_S)

    def _set_aside(self) -> bool:
        """Keep a damaged database under another name and begin a new one."""
        path = self._directory / STORE_FILE
        kept = path.with_name(f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{STORE_FILE}")
        try:
            for ending in ("", "-wal", "-shm"):
                part = path.with_name(path.name + ending)
                if part.exists():
                    part.rename(kept.with_name(kept.name + ending))
        except OSError:
            return False
        steps = [item.record.step for item, _ in self._kept if isinstance(item, Stepped)]
        since = f" (what is before step {steps[0]:,})" if steps and steps[0] > 1 else ""
        self._damaged = f"the recording was damaged{since}: its old file is {kept.name}"
        self._tell(self._damaged)
        self._begin_anew()
        return True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error:
                return  # nothing more can be done with it

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._say(trouble)


def _put(connection: sqlite3.Connection, key: str, value: RunInfo | Status) -> None:
    data = objects.encode(value) if isinstance(value, Status) else msgspec.json.encode(value)
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, data))


Saying = Clip | NonFinite | Notice | LogLine | TextSample | ImageSample | ConfusionMatrix


def _bytes_of(item: Item) -> int:
    """About what an item holds in memory."""
    match item:
        case LogLine():
            return 200 + 2 * len(item.text)
        case TextSample() | ImageSample() | ConfusionMatrix():
            return artifact_bytes(item)
        case _:
            return size_of(item)


def _kind(item: Saying) -> int:
    match item:
        case LogLine():
            return told.LOG
        case Clip() | NonFinite() | Notice():
            return told.EVENT
        case _:
            return told.ARTIFACT


def _statement(item: Saying) -> tuple[str, tuple[object, ...]]:
    match item:
        case LogLine():
            return (
                "INSERT OR REPLACE INTO log VALUES (?, ?, ?, ?, ?)",
                (item.id, item.step, item.time, item.stream, item.text),
            )
        case Clip() | NonFinite() | Notice():
            kind = item.kind if isinstance(item, Notice) else type(item).__name__.lower()
            return (
                "INSERT OR REPLACE INTO event VALUES (?, ?, ?, ?)",
                (item.id, item.step, kind, objects.encode(item)),
            )
        case _:
            return (
                "INSERT OR REPLACE INTO artifact VALUES (?, ?, ?, ?)",
                (item.id, item.step, type(item).__name__, msgspec.msgpack.encode(item)),
            )
