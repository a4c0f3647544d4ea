"""Writes a run's store: a sink of the recorder, on a thread of its own.

What happened is committed about twice a second, so that a killed process loses at most the last
second. When the disk refuses, the training goes on: what waits is kept, within bounds, the trouble
is said, and recording resumes as soon as it can.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from tui_trainer.history.buckets import FACTOR, Buckets, RawRows, summarise, summarise_rows
from tui_trainer.history.records import Floats
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
from tui_trainer.protocol.schema import RunInfo, Table
from tui_trainer.record.events import (
    InfoChanged,
    Item,
    RowRecorded,
    RunEnded,
    StepRecorded,
    StepsDropped,
    artifact_bytes,
)
from tui_trainer.record.sinks import size_of
from tui_trainer.store import codec, reader, told
from tui_trainer.store.codec import CHUNK, GROUP
from tui_trainer.store.schema import STORE_FILE, StoreError, open_for_writing
from tui_trainer.store.told import OrderWriter

# ---- store_series
# One measured table in the store: rows are added to its tail, full chunks packed, summarised.


class SeriesWriter:
    """Rows wait here until `write` and, when that was committed, `written`."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._columns = len(table.columns)
        self._steps: list[int] = []
        self._values: list[Floats] = []
        self._last_step: int | None = None
        self._rows: int | None = None
        """Rows in the database; None: to be asked."""
        self._rows_after = 0

    def add(self, step: int, values: Floats) -> int:
        """Take a row; the bytes it holds while it waits, 0 when it does not fit."""
        if values.shape != (self._columns,):
            return 0
        if self._last_step is not None and step < self._last_step:
            return 0
        self._last_step = step
        self._steps.append(step)
        self._values.append(values)
        return values.nbytes + 64

    def forget_place(self) -> None:
        """The database is another one now, or may hold less than was written."""
        self._rows = None

    def write(self, connection: sqlite3.Connection) -> None:
        """Add what waits, inside the caller's transaction. Raises sqlite3.Error."""
        if self._rows is None:
            self._declare(connection)
        assert self._rows is not None
        count = len(self._steps)
        self._rows_after = self._rows + count
        if not count or not self._columns:
            return
        rows = codec.row_buckets(np.array(self._steps, np.int64), np.stack(self._values))
        _add_tail(connection, self.table.id, 0, self._rows, rows)
        _compact(connection, self.table.id, 0, self._columns, self._rows_after)
        connection.execute(
            "UPDATE series SET rows = ? WHERE id = ?", (self._rows_after, self.table.id)
        )

    def written(self) -> None:
        """What `write` added was committed."""
        self._rows = self._rows_after
        self._steps.clear()
        self._values.clear()

    def _declare(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO series (id, description) VALUES (?, ?) "
            "ON CONFLICT (id) DO UPDATE SET description = excluded.description",
            (self.table.id, msgspec.json.encode(self.table)),
        )
        question = "SELECT rows FROM series WHERE id = ?"
        self._rows = int(connection.execute(question, (self.table.id,)).fetchone()[0])


def _add_tail(
    connection: sqlite3.Connection, series: int, level: int, first: int, new: Buckets
) -> None:
    connection.execute(
        "INSERT INTO tail VALUES (?, ?, ?, ?, ?)",
        (series, level, first, len(new.last), codec.pack_tail(new, level)),
    )


def _compact(
    connection: sqlite3.Connection, series: int, level: int, columns: int, entries: int
) -> None:
    """Make chunks of what fills them, out of `entries` entries, and the next level's tail."""
    which = (series, level)
    question = "SELECT coalesce(min(first), 0) FROM tail WHERE series = ? AND level = ?"
    first = int(connection.execute(question, which).fetchone()[0])
    if entries - first < CHUNK:
        return
    question = "SELECT count, data FROM tail WHERE series = ? AND level = ? ORDER BY first"
    held = Buckets.join(
        [
            codec.unpack_tail(data, level, count, columns)
            for count, data in connection.execute(question, which)
        ]
    )
    connection.execute("DELETE FROM tail WHERE series = ? AND level = ?", which)
    full = len(held.last) // CHUNK * CHUNK
    for start in range(0, full, CHUNK):
        chunk = _part(held, level, slice(start, start + CHUNK))
        _add_chunk(connection, series, level, (first + start) // CHUNK, chunk)
    if full < len(held.last):
        _add_tail(
            connection, series, level, first + full, _part(held, level, slice(full, len(held.last)))
        )
    done = _part(held, level, slice(0, full))
    coarse = summarise(done) if level else summarise_rows(RawRows(done.last, done.value))
    _add_tail(connection, series, level + 1, first // FACTOR, coarse)
    _compact(connection, series, level + 1, columns, (first + full) // FACTOR)


def _part(held: Buckets, level: int, chosen: slice) -> Buckets:
    if level:
        return held.part(chosen)
    return codec.row_buckets(held.last[chosen], held.value[chosen])


def _add_chunk(
    connection: sqlite3.Connection, series: int, level: int, number: int, chunk: Buckets
) -> None:
    steps = codec.pack_steps(chunk.last, chunk.first if level else None)
    added = connection.execute(
        "INSERT INTO chunk (series, level, number, last_step, steps) VALUES (?, ?, ?, ?, ?)",
        (series, level, number, int(chunk.last[-1]), steps),
    ).lastrowid
    columns = chunk.value.shape[1]
    connection.executemany(
        "INSERT INTO part VALUES (?, ?, ?)",
        (
            (added, start // GROUP, codec.pack_values(chunk, level, slice(start, start + GROUP)))
            for start in range(0, columns, GROUP)
        ),
    )


# ---- store_sayings
# Events, log lines and samples on their way into the store.


MOST_WAITING_SAYINGS = 100_000

Statement = tuple[str, tuple[object, ...]]
Saying = Clip | NonFinite | Notice | LogLine | TextSample | ImageSample | ConfusionMatrix


class EventWriter:
    """Sayings wait here until `write` and, when that was committed, `written`.

    Where too many wait, clips are given up first, the newest of them, then lines and samples; what
    somebody did or was told (a `Notice`) and what became non-finite are kept in any case.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._clips: list[tuple[int, Statement]] = []
        """With what each holds in memory."""
        self._waiting: list[Statement] = []
        self._bytes = 0
        self.lost: Counter[str] = Counter()
        """What there was no room for, by its name for people."""

    def add(self, item: Saying) -> bool:
        """Take one; whether there was room."""
        size = bytes_of(item)
        must = isinstance(item, Notice | NonFinite)
        while self._full():
            if isinstance(item, Clip) or not (self._clips or must):
                self.lost[_name_of(item)] += 1
                return False
            if not self._clips:
                break
            self._bytes -= self._clips.pop()[0]
            self.lost["clip"] += 1
        self._bytes += size
        if isinstance(item, Clip):
            self._clips.append((size, _statement(item)))
        else:
            self._waiting.append(_statement(item))
        return True

    def _full(self) -> bool:
        count = len(self._waiting) + len(self._clips)
        return self._bytes >= self._most_bytes or count >= MOST_WAITING_SAYINGS

    def write(self, connection: sqlite3.Connection) -> None:
        """Add what waits, inside the caller's transaction. Raises sqlite3.Error."""
        for _, (statement, values) in self._clips:
            connection.execute(statement, values)
        for statement, values in self._waiting:
            connection.execute(statement, values)

    def written(self) -> None:
        """What `write` added was committed."""
        self._waiting.clear()
        self._clips.clear()
        self._bytes = 0


def bytes_of(item: Item) -> int:
    """About what an item holds in memory."""
    match item:
        case LogLine():
            return 200 + 2 * len(item.text)
        case TextSample() | ImageSample() | ConfusionMatrix():
            return artifact_bytes(item)
        case _:
            return size_of(item)


def kind_of(item: Saying) -> int:
    """As the story has it."""
    match item:
        case LogLine():
            return told.LOG
        case Clip() | NonFinite() | Notice():
            return told.EVENT
        case _:
            return told.ARTIFACT


def _name_of(item: Saying) -> str:
    match item:
        case Clip():
            return "clip"
        case LogLine():
            return "line"
        case _:
            return "sample"


def _statement(item: Saying) -> Statement:
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
                (item.id, item.step, kind, reader.encode(item)),
            )
        case _:
            return (
                "INSERT OR REPLACE INTO artifact VALUES (?, ?, ?, ?)",
                (item.id, item.step, type(item).__name__, msgspec.msgpack.encode(item)),
            )


# ---- store_memory
# The newest of what was written: what a new database begins with in place of a damaged one.


KEPT_BYTES = 32 * 2**20


class PendingRows:
    """The newest KEPT_BYTES of the run's story, oldest first."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self.info_before: RunInfo | None = None
        """The description in force before what is kept."""

    def __iter__(self) -> Iterator[Item]:
        return (item for item, _ in self._kept)

    @property
    def first_step(self) -> int | None:
        """The oldest step that is kept."""
        return next((item.record.step for item in self if isinstance(item, StepRecorded)), None)

    def keep(self, item: Item) -> None:
        """Remember one more; the oldest make room."""
        size = bytes_of(item)
        self._kept.append((item, size))
        self._bytes += size
        while self._bytes > KEPT_BYTES:
            oldest, size = self._kept.popleft()
            self._bytes -= size
            if isinstance(oldest, InfoChanged):
                self.info_before = oldest.info


# ---- store_file
# The store as a file: which one it is, whether it is damaged, and setting it aside.


_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def identity(directory: Path) -> tuple[int, int]:
    """Which file the name leads to, (0, 0) for none. Raises OSError where the directory is gone as
    well."""
    try:
        found = os.stat(directory / STORE_FILE)
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def is_damage(fault: Exception) -> bool:
    """Whether the database cannot be trusted any more, as against a disk that refuses."""
    code: int = getattr(fault, "sqlite_errorcode", 0)
    return isinstance(fault, ValueError) or code & 0xFF in _CORRUPT


def set_aside(directory: Path) -> Path:
    """Keep a damaged database under another name, which is returned. Raises OSError."""
    path = directory / STORE_FILE
    kept = path.with_name(f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{STORE_FILE}")
    for ending in ("", "-wal", "-shm"):
        part = path.with_name(path.name + ending)
        if part.exists():
            part.rename(kept.with_name(kept.name + ending))
    return kept


def put(connection: sqlite3.Connection, key: str, value: RunInfo | Status) -> None:
    """Write the one description or status that there is. Raises sqlite3.Error."""
    data = reader.encode(value) if isinstance(value, Status) else msgspec.json.encode(value)
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, data))


COMMIT_EVERY_S = 0.4
LONGEST_BACK_OFF_S = 30.0
MOST_WAITING_BYTES = 64 * 2**20
"""Rows that wait for a disk that refuses, and again so much of what was said; with more, the newest
are given up and counted."""


class StoreWriter:
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
        self._told = OrderWriter()
        self._sayings = EventWriter(MOST_WAITING_BYTES)
        self._memory = PendingRows()
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
        if self._clock() >= self._next_commit or any(isinstance(i, RunEnded) for i in items):
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
        except (sqlite3.Error, OSError, StoreError, ValueError) as fault:
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
            case StepRecorded():
                record = item.record
                self._moment = (record.step, record.time)
                taken = tuple(t for t, values in record.rows if self._row(t, record.step, values))
                if taken:
                    self._told.stepped(
                        record.step, record.time, record.own_ms, record.optimizer, taken
                    )
            case RowRecorded():
                if self._row(item.table, item.step, item.values):
                    self._told.add(told.ROWED, item.table, item.step, item.time)
            case InfoChanged():
                self._describe(item.info)
            case RunEnded():
                self._status = item.status
            case StepsDropped():
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
        self._series, self._told = {}, OrderWriter()
        self._sayings = EventWriter(MOST_WAITING_BYTES)
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
