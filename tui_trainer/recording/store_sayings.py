"""Events, log lines and samples on their way into the store."""

from __future__ import annotations

import sqlite3

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

Saying = Clip | NonFinite | Notice | LogLine | TextSample | ImageSample | ConfusionMatrix


class SayingsWriter:
    """Sayings wait here until `write` and, when that was committed, `written`."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._waiting: list[tuple[str, tuple[object, ...]]] = []
        self._bytes = 0

    def add(self, item: Saying) -> bool:
        """Take one; whether there was room."""
        if self._bytes >= self._most_bytes or len(self._waiting) >= MOST_WAITING_SAYINGS:
            return False
        self._bytes += bytes_of(item)
        self._waiting.append(_statement(item))
        return True

    def write(self, connection: sqlite3.Connection) -> None:
        """Add what waits, inside the caller's transaction. Raises sqlite3.Error."""
        for statement, values in self._waiting:
            connection.execute(statement, values)

    def written(self) -> None:
        """What `write` added was committed."""
        self._waiting.clear()
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
