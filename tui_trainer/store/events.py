"""Events, log lines and artifacts of a run in the store."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, TypeVar

import msgspec

from tui_trainer.protocol.events import (
    Artifact,
    Clip,
    Event,
    EventKind,
    Finding,
    LogLine,
    NonFinite,
    Notice,
    Skipped,
)
from tui_trainer.store import codec
from tui_trainer.store.database import EVENTS, LINES, SAMPLES, Store

T = TypeVar("T")

MAX_WAITING = 100_000
"""Maximum number of items that wait to be written."""
MAX_MARKED = 200_000
"""Maximum number of events that `places` reads, from the first one on."""

# ---------------------------------------------------------------- writing

SqlStatement = tuple[str, tuple[object, ...]]


class EventWriter:
    """Writes events, log lines and artifacts.

    If too many items wait, the newest clips are dropped first, then lines and samples; notices,
    findings, skipped iterations and non-finite values are always kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._clips: list[tuple[int, Clip, int]] = []
        """(seq, clip, bytes in memory)"""
        self._others: list[tuple[int, Event | LogLine | Artifact]] = []
        self._bytes = 0
        self.dropped: Counter[str] = Counter()
        """Number of dropped items by kind: "clip", "event", "line", "sample"."""

    def add(self, seq: int, item: Event | LogLine | Artifact, size: int) -> None:
        """Take an item of about `size` bytes, if there is room."""
        required = isinstance(item, Notice | NonFinite | Skipped | Finding)
        while self._is_full():
            if isinstance(item, Clip) or not (self._clips or required):
                self.dropped[_kind_of(item)] += 1
                return
            if not self._clips:
                break
            self._bytes -= self._clips.pop()[2]
            self.dropped["clip"] += 1
        self._bytes += size
        if isinstance(item, Clip):
            self._clips.append((seq, item, size))
        else:
            self._others.append((seq, item))

    def _is_full(self) -> bool:
        count = len(self._others) + len(self._clips)
        return self._bytes >= self._max_bytes or count >= MAX_WAITING

    def reopened(self) -> None:
        """See `TableWriter.reopened`."""

    def write(self, connection: sqlite3.Connection, first_seq: int) -> None:
        for seq, clip, _ in self._clips:
            connection.execute(*_insert(seq + first_seq, clip))
        for seq, item in self._others:
            connection.execute(*_insert(seq + first_seq, item))

    def written(self) -> None:
        self._others.clear()
        self._clips.clear()
        self._bytes = 0


def _kind_of(item: Event | LogLine | Artifact) -> str:
    match item:
        case Clip():
            return "clip"
        case LogLine():
            return "line"
        case _:
            return "sample"


def _insert(seq: int, item: Event | LogLine | Artifact) -> SqlStatement:
    match item:
        case LogLine():
            return (
                "INSERT OR REPLACE INTO log VALUES (?, ?, ?, ?, ?, ?)",
                (item.id, seq, item.step, item.time, item.stream, item.text),
            )
        case Clip() | NonFinite() | Skipped() | Finding() | Notice():
            kind = item.kind if isinstance(item, Notice) else type(item).__name__.lower()
            return (
                "INSERT OR REPLACE INTO event VALUES (?, ?, ?, ?, ?)",
                (item.id, seq, item.step, kind, codec.encode(item)),
            )
        case _:
            return (
                "INSERT OR REPLACE INTO artifact VALUES (?, ?, ?, ?, ?)",
                (item.id, seq, item.step, type(item).__name__, msgspec.msgpack.encode(item)),
            )


# ---------------------------------------------------------------- reading


class StoredEvents:
    """Events, log lines and artifacts of a recorded run."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def events(self, step: int, count: int) -> tuple[Event, ...]:
        """The last `count` clips up to a step and the last `count` other events, oldest first: rare
        events are not lost among thousands of clips."""
        rows = [
            row
            for which in ("kind = 'clip'", "kind <> 'clip'")
            for row in self._store.query(
                f"SELECT id, data FROM event WHERE {which} AND step <= ? "
                "ORDER BY step DESC, id DESC LIMIT ?",
                step,
                count,
            )
        ]
        return self._decoded(EVENTS, rows, codec.decode_event)

    def first_events(self, count: int) -> tuple[Event, ...]:
        """The first events other than clips."""
        sql = "SELECT id, data FROM event WHERE kind <> 'clip' ORDER BY id LIMIT ?"
        return self._decoded(EVENTS, self._store.query(sql, count), codec.decode_event)

    def of_kind(self, kind: EventKind, count: int) -> tuple[Event, ...]:
        """The first events of a kind."""
        sql = "SELECT id, data FROM event WHERE kind = ? ORDER BY id LIMIT ?"
        return self._decoded(EVENTS, self._store.query(sql, kind, count), codec.decode_event)

    def log(self, step: int, count: int) -> tuple[LogLine, ...]:
        """The last `count` lines printed up to a step, oldest first."""
        sql = (
            "SELECT id, id, time, step, stream, text FROM log WHERE step <= ? "
            "ORDER BY id DESC LIMIT ?"
        )
        return self._decoded(LINES, self._store.query(sql, step, count), codec.decode_line)

    def artifacts(self, step: int, count: int) -> tuple[Artifact, ...]:
        """The last `count` artifacts of each kind up to a step, oldest first."""
        sql = (
            "SELECT id, data FROM artifact WHERE kind = ? AND step <= ? "
            "ORDER BY step DESC, id DESC LIMIT ?"
        )
        rows = [
            row
            for (kind,) in self._store.query("SELECT DISTINCT kind FROM artifact")
            for row in self._store.query(sql, kind, step, count)
        ]
        return self._decoded(SAMPLES, rows, codec.decode_artifact)

    def _decoded(
        self, what: str, rows: list[tuple[Any, ...]], decode: Callable[..., T]
    ) -> tuple[T, ...]:
        """Rows (id, …), decoded, in the order of the ids."""
        ordered = sorted(rows, key=itemgetter(0))
        return tuple(self._store.decoded(what, decode, (row[1:] for row in ordered)))

    def in_order(self) -> list[Iterator[tuple[int, Event | LogLine | Artifact]]]:
        """All events, all lines and all artifacts, each with its seq."""
        return [
            self._with_seq(EVENTS, "SELECT seq, data FROM event ORDER BY id", codec.decode_event),
            self._with_seq(
                LINES,
                "SELECT seq, id, time, step, stream, text FROM log ORDER BY id",
                codec.decode_line,
            ),
            self._with_seq(
                SAMPLES, "SELECT seq, data FROM artifact ORDER BY id", codec.decode_artifact
            ),
        ]

    def _with_seq(self, what: str, query: str, decode: Callable[..., T]) -> Iterator[tuple[int, T]]:
        def pair(seq: object, *row: object) -> tuple[int, T]:
            if not isinstance(seq, int):
                raise TypeError("a seq is a whole number")
            return seq, decode(*row)

        return self._store.decoded(what, pair, self._store.stream(query))

    # ------------------------------------------------------------ jumping

    def next_event(self, kind: EventKind, step: int, backwards: bool = False) -> int | None:
        """Step of the next event of a kind (`clip`, `nonfinite`, `mark`, …) after a step, or of the
        last one before it; None when there is none."""
        sql = (
            "SELECT step FROM event WHERE kind = ? AND step < ? ORDER BY step DESC LIMIT 1"
            if backwards
            else "SELECT step FROM event WHERE kind = ? AND step > ? ORDER BY step LIMIT 1"
        )
        found = self._store.numbers(EVENTS, sql, kind, step)
        return int(found[0][0]) if found else None

    def places(self, kind: EventKind, last_step: int, cells: int) -> list[int]:
        """Indices of the ranges that hold an event of a kind, among `cells` equal ranges of steps
        0..last_step."""
        sql = (
            "SELECT DISTINCT min(step * ?1 / (?2 + 1), ?1 - 1) FROM "
            "(SELECT step FROM event WHERE kind = ?3 AND step <= ?2 LIMIT ?4)"
        )
        values = (cells, max(0, last_step), kind, MAX_MARKED)
        return sorted(int(cell) for (cell,) in self._store.numbers(EVENTS, sql, *values))

    def count(self, kind: EventKind | None = None) -> int:
        """Number of events of a kind, or of all but clips."""
        which = "kind = ?" if kind else "kind <> ?"
        sql = f"SELECT count(*) FROM event WHERE {which}"
        found = self._store.numbers(EVENTS, sql, kind or "clip")
        return int(found[0][0]) if found else 0

    def steps_of(self, kind: EventKind, count: int) -> list[int]:
        """The first `count` steps with an event of a kind."""
        sql = "SELECT DISTINCT step FROM event WHERE kind = ? ORDER BY step LIMIT ?"
        return [int(step) for (step,) in self._store.numbers(EVENTS, sql, kind, count)]
