"""Events, log lines and samples on their way into the store."""

from __future__ import annotations

import sqlite3
from collections import Counter

import msgspec

from tui_trainer.history.store import objects, told
from tui_trainer.protocol.messages import (
    Clip,
    ConfusionMatrix,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    TextSample,
)
from tui_trainer.recording.feed import size_of
from tui_trainer.recording.items import Item
from tui_trainer.recording.telling import artifact_bytes

MOST_WAITING_SAYINGS = 100_000

Statement = tuple[str, tuple[object, ...]]
Saying = Clip | NonFinite | Notice | LogLine | TextSample | ImageSample | ConfusionMatrix


class SayingsWriter:
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
                (item.id, item.step, kind, objects.encode(item)),
            )
        case _:
            return (
                "INSERT OR REPLACE INTO artifact VALUES (?, ?, ?, ?)",
                (item.id, item.step, type(item).__name__, msgspec.msgpack.encode(item)),
            )
