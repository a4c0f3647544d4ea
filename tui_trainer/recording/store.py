"""Writes a run's store: a sink of the recorder, on a thread of its own.

What happened is committed about twice a second, so that a killed process loses at most the last
second. When the disk refuses, the training goes on: what waits is kept, within bounds, the trouble
is said, and recording resumes as soon as it can.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tui_trainer.history.records import Floats
from tui_trainer.history.store import told
from tui_trainer.history.store.schema import StoreFault, open_for_writing
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import (
    Status,
)
from tui_trainer.recording.items import Described, Ended, Item, Lost, Rowed, Stepped
from tui_trainer.recording.store_file import identity, is_damage, put, set_aside
from tui_trainer.recording.store_memory import Memory
from tui_trainer.recording.store_sayings import SayingsWriter, kind_of
from tui_trainer.recording.store_series import SeriesWriter
from tui_trainer.recording.store_told import ToldWriter

COMMIT_EVERY_S = 0.4
LONGEST_BACK_OFF_S = 30.0
MOST_WAITING_BYTES = 64 * 2**20
"""Rows that wait for a disk that refuses, and again so much of what was said; with more, the newest
are given up and counted."""


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
        self._sayings = SayingsWriter(MOST_WAITING_BYTES)
        self._memory = Memory()
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
            self._memory.keep(item)
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
            if self._connection is not None and identity(self._directory) != self._place:
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
        self._tell("; ".join(text for text in (self._damaged, self._lost_so_far()) if text))
        return True

    def _lost_so_far(self) -> str:
        counts = [("row", self._lost), *self._sayings.lost.items()]
        parts = [f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts if count]
        return f"{', '.join(parts)} could not be recorded" if parts else ""

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
                if self._sayings.add(item):
                    self._told.add(kind_of(item), item.id)

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

    def _begin_anew(self) -> None:
        """Into an empty database goes all that is remembered, in its order."""
        self._series, self._told = {}, ToldWriter()
        self._sayings = SayingsWriter(MOST_WAITING_BYTES)
        self._waiting_bytes = self._lost = 0
        if self._memory.info_before is not None:
            self._describe(self._memory.info_before)
        for item in self._memory:
            self._take(item)

    # ------------------------------------------------------------ the disk

    def _connect(self) -> None:
        self._connection = open_for_writing(self._directory)
        self._place = identity(self._directory)
        self._info_written = False
        self._told.forget_place()
        for series in self._series.values():
            series.forget_place()

    def _write(self) -> None:
        connection = self._connection
        assert connection is not None
        connection.execute("BEGIN IMMEDIATE")
        try:
            if self._info is not None and not self._info_written:
                put(connection, "info", self._info)
            for series in self._series.values():
                series.write(connection)
            self._told.write(connection)
            self._sayings.write(connection)
            if self._moment is not None:
                connection.execute("INSERT OR REPLACE INTO clock VALUES (?, ?)", self._moment)
            put(connection, "status", self._status)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._told.written()
        for series in self._series.values():
            series.written()
        self._sayings.written()
        self._info_written, self._moment, self._waiting_bytes = True, None, 0

    def _refused(self, fault: Exception) -> None:
        self._disconnect()
        if is_damage(fault) and self._set_aside():
            self._next_commit = self._clock()
            return
        reason = getattr(fault, "strerror", None) or str(fault)
        self._tell(f"not recording: {reason}; training goes on, trying again")
        self._next_commit = self._clock() + self._back_off
        self._back_off = min(self._back_off * 2, LONGEST_BACK_OFF_S)

    def _set_aside(self) -> bool:
        """Keep a damaged database under another name and begin a new one."""
        try:
            kept = set_aside(self._directory)
        except OSError:
            return False
        step = self._memory.first_step
        since = f" (what is before step {step:,})" if step and step > 1 else ""
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
