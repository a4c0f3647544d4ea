"""Writes the store of a run: a sink of the recorder, on a thread of its own.

Items are committed about twice a second, so that a killed process loses at most the last second.
When a write fails, the training continues: pending items are kept, within bounds, the problem is
reported, and recording resumes as soon as the disk can be written again.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from tui_trainer.history.records import Floats
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.sink_items import (
    InfoChanged,
    Item,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    StepRecorded,
    item_bytes,
)
from tui_trainer.store import codec
from tui_trainer.store.events import EventWriter
from tui_trainer.store.schema import STORE_FILE, DamageError, StoreError, open_for_writing
from tui_trainer.store.series import SeriesWriter, reading_back
from tui_trainer.store.step_times import StepTimesWriter

COMMIT_EVERY_S = 0.4
MAX_BACK_OFF_S = 30.0
MAX_WAITING_BYTES = 64 * 2**20
"""Maximum bytes of pending rows while writes fail, and as many of events, lines and samples; the
newest items beyond that are dropped and counted."""
RECENT_BYTES = 32 * 2**20
CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
MAX_SET_ASIDE = 8
"""Maximum number of damaged databases that a run renames; after that it records nothing more."""


class TableWriter(Protocol):
    """Writes some tables of the store. Items are kept until `write` has written them and `written`
    confirms the commit."""

    def reopened(self) -> None:
        """The database was opened again: it may be another one, or hold less than was written."""

    def write(self, connection: sqlite3.Connection, first_seq: int) -> None:
        """Write the pending items, inside the caller's transaction. `first_seq` is added to each
        seq, which counts from 0. Raises sqlite3.Error."""

    def written(self) -> None:
        """Called once the transaction of `write` is committed: forget the items."""


class DescriptionWriter:
    """Writes the run's description, and how many steps were dropped."""

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self._seq = -1
        """`seq` of the current description."""
        self._waiting: dict[int, RunInfo] = {}
        self._dropped: list[tuple[int, int]] = []

    def describe(self, seq: int, info: RunInfo) -> None:
        """Take a description. It replaces the last one if only the cadences of tables differ."""
        if self.info is None or _without_cadences(info) != _without_cadences(self.info):
            self._seq = seq
        self.info = self._waiting[self._seq] = info

    def drop(self, seq: int, steps: int) -> None:
        self._dropped.append((seq, steps))

    def reopened(self) -> None:
        if self.info is not None:
            self._waiting.setdefault(self._seq, self.info)

    def write(self, connection: sqlite3.Connection, first_seq: int) -> None:
        for seq, info in self._waiting.items():
            connection.execute(
                "INSERT OR REPLACE INTO description VALUES (?, ?)",
                (seq + first_seq, msgspec.json.encode(info)),
            )
        for seq, steps in self._dropped:
            values = (seq + first_seq, steps)
            connection.execute("INSERT OR REPLACE INTO dropped VALUES (?, ?)", values)

    def written(self) -> None:
        self._waiting.clear()
        self._dropped.clear()


def _without_cadences(info: RunInfo) -> RunInfo:
    tables = tuple(msgspec.structs.replace(table, every=1) for table in info.tables)
    return msgspec.structs.replace(info, revision=0, tables=tables)


class RecentItems:
    """The newest RECENT_BYTES of the run, oldest first. A new database that replaces a damaged one
    starts with these items."""

    def __init__(self) -> None:
        self._items: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self.info_before: RunInfo | None = None
        """The description in force before the oldest item."""

    def __iter__(self) -> Iterator[Item]:
        return (item for item, _ in self._items)

    @property
    def first_step(self) -> int | None:
        """The oldest step among the items."""
        return next((item.record.step for item in self if isinstance(item, StepRecorded)), None)

    def append(self, item: Item) -> None:
        size = item_bytes(item)
        self._items.append((item, size))
        self._bytes += size
        while self._bytes > RECENT_BYTES:
            oldest, size = self._items.popleft()
            self._bytes -= size
            if isinstance(oldest, InfoChanged):
                self.info_before = oldest.info


class StoreWriter:
    """The sink that writes the store. `report(text)` is called with each problem, and with "" once
    the problem is over, for `Status.recording`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        report: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = Path(directory)
        self._report = report
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)
        self._recent = RecentItems()
        self._status = Status()
        self._problem = ""
        self._damaged = ""
        self._set_aside_count = 0
        self._next_commit = 0.0
        self._back_off = 1.0
        self._start()

    def _start(self) -> None:
        """Reset to an empty database with nothing pending."""
        self._series: dict[int, SeriesWriter] = {}
        self._step_times = StepTimesWriter()
        self._events = EventWriter(MAX_WAITING_BYTES)
        self._description = DescriptionWriter()
        self._next_seq = self._committed_seq = self._first_seq = 0
        self._committed_status: Status | None = None
        self._waiting_bytes = 0
        self._dropped_rows = 0

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Keep the items; commit if a commit is due or the run has ended."""
        self._status = status
        for item in items:
            self._take(item)
            self._recent.append(item)
        if self._clock() >= self._next_commit or any(isinstance(i, RunEnded) for i in items):
            self.commit()

    def close(self) -> None:
        """Commit pending items, and empty the journal into the database."""
        self.commit()
        if self._connection is not None:
            try:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                self._failed(error)
            self._disconnect()

    def commit(self) -> bool:
        """Write pending items and return whether that succeeded. Nothing is written if nothing has
        changed since the last commit, as while the run is paused."""
        try:
            if self._connection is not None and file_identity(self._directory) != self._file:
                self._disconnect()
                self._damaged = "the recording was removed or replaced by another process"
                self._start_again()
            if self._connection is None:
                self._connect()
                self._write()
            elif self._next_seq > self._committed_seq or self._status != self._committed_status:
                self._write()
        except (sqlite3.Error, OSError, StoreError, ValueError) as error:
            self._failed(error)
            return False
        self._next_commit = self._clock() + COMMIT_EVERY_S
        self._back_off = 1.0
        self._set_problem("; ".join(text for text in (self._damaged, self._dropped()) if text))
        return True

    # ------------------------------------------------------------ items

    def _take(self, item: Item) -> None:
        seq = self._next_seq
        self._next_seq += 1
        match item:
            case StepRecorded():
                record = item.record
                taken = [self._row(t, seq, record.step, values) for t, values in record.rows]
                if any(taken):
                    self._step_times.add(seq, record.step, record.time, record.own_ms)
            case RowRecorded():
                if self._row(item.table, seq, item.step, item.values):
                    self._step_times.add(seq, item.step, item.time, float("nan"))
            case InfoChanged():
                self._describe(seq, item.info)
            case RunEnded():
                self._status = item.status
            case ItemsDropped():
                self._dropped_rows += item.steps
                if item.steps:
                    self._description.drop(seq, item.steps)
                others = {"event": item.events, "line": item.lines, "sample": item.samples}
                self._events.dropped.update(others)
            case _:
                self._events.add(seq, item, item_bytes(item))

    def _describe(self, seq: int, info: RunInfo) -> None:
        self._description.describe(seq, info)
        for table in info.tables:
            known = self._series.get(table.id)
            if known is None or known.table.columns != table.columns:
                self._series[table.id] = SeriesWriter(table)
            else:
                known.table = table

    def _row(self, table: int, seq: int, step: int, values: Floats) -> bool:
        """Keep a row; returns False if there is no room, or no table with as many columns."""
        series = self._series.get(table)
        if series is None or self._waiting_bytes > MAX_WAITING_BYTES:
            self._dropped_rows += 1
            return False
        size = series.add(seq, step, values)
        self._waiting_bytes += size
        self._dropped_rows += not size
        return bool(size)

    def _start_again(self) -> None:
        """Prepare all recent items for an empty database."""
        self._start()
        if self._recent.info_before is not None:
            self._take(InfoChanged(self._recent.info_before))
        for item in self._recent:
            self._take(item)

    def _dropped(self) -> str:
        counts = [("row", self._dropped_rows), *self._events.dropped.items()]
        parts = [counted(count, name) for name, count in counts if count]
        return f"{', '.join(parts)} could not be recorded" if parts else ""

    # ------------------------------------------------------------ the disk

    def _connect(self) -> None:
        self._connection = open_for_writing(self._directory)
        self._file = file_identity(self._directory)
        found = _next_seq(self._connection) - self._committed_seq
        self._first_seq = max(self._first_seq, found)
        for writer in self._writers():
            writer.reopened()

    def _writers(self) -> list[TableWriter]:
        return [self._description, self._step_times, self._events, *self._series.values()]

    def _write(self) -> None:
        connection = self._connection
        assert connection is not None
        writers = self._writers()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for writer in writers:
                writer.write(connection, self._first_seq)
            connection.execute(
                "INSERT OR REPLACE INTO meta VALUES ('status', ?)", (codec.encode(self._status),)
            )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        for writer in writers:
            writer.written()
        self._waiting_bytes, self._committed_seq = 0, self._next_seq
        self._committed_status = self._status

    def _failed(self, error: Exception) -> None:
        self._disconnect()
        if is_damage(error) and self._set_aside():
            self._next_commit = self._clock()
            return
        reason = getattr(error, "strerror", None) or str(error)
        self._set_problem(f"not recording: {reason}; the training continues, trying again")
        self._next_commit = self._clock() + self._back_off
        self._back_off = min(self._back_off * 2, MAX_BACK_OFF_S)

    def _set_aside(self) -> bool:
        """Rename a damaged database and start a new one; returns whether that succeeded."""
        if self._set_aside_count >= MAX_SET_ASIDE:
            return False
        try:
            kept = set_aside(self._directory)
        except OSError:
            return False
        self._set_aside_count += 1
        step = self._recent.first_step
        before = f" (steps before {step:,})" if step and step > 1 else ""
        self._damaged = f"the recording was damaged{before}: its old file is {kept.name}"
        self._set_problem(self._damaged)
        self._start_again()
        return True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error:
                return  # the connection is given up anyway

    def _set_problem(self, text: str) -> None:
        if text != self._problem:
            self._problem = text
            self._report(text)


def _next_seq(connection: sqlite3.Connection) -> int:
    """One past the last seq in the database."""
    last = (
        "SELECT max(seq) AS seq FROM description",
        "SELECT max(seq) FROM dropped",
        "SELECT last_seq FROM (SELECT last_seq FROM step_time ORDER BY id DESC LIMIT 1)",
        *(
            f"SELECT seq FROM (SELECT seq FROM {table} ORDER BY id DESC LIMIT 1)"
            for table in ("event", "log", "artifact")
        ),
    )
    sql = f"SELECT coalesce(max(seq), -1) FROM ({' UNION ALL '.join(last)})"
    with reading_back():
        return int(connection.execute(sql).fetchone()[0]) + 1


def file_identity(directory: Path) -> tuple[int, int]:
    """Device and inode of the store; (0, 0) where it does not exist. Raises OSError where the
    directory does not exist either."""
    try:
        found = os.stat(directory / STORE_FILE)
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def is_damage(error: Exception) -> bool:
    """Whether the database is damaged, rather than the disk full, locked or read-only."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return isinstance(error, DamageError | UnicodeDecodeError) or code & 0xFF in CORRUPT


def set_aside(directory: Path) -> Path:
    """Rename a damaged database; returns its new name. Raises OSError."""
    path = directory / STORE_FILE
    when = time.strftime("%Y%m%d-%H%M%S")
    kept = path.with_name(f"damaged-{when}-{STORE_FILE}")
    for number in itertools.count(2):
        if not kept.exists():
            break
        kept = path.with_name(f"damaged-{when}-{number}-{STORE_FILE}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(kept.with_name(kept.name + suffix))
    return kept
