"""The newest events, log lines and artifacts of a run, in bounded memory.

Each entry has an id, dense from 0, from which on a viewer asks for entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from tui_trainer.history.records import SkipRecord, StepRecord
from tui_trainer.protocol.events import (
    Artifact,
    Clip,
    Event,
    Finding,
    Level,
    LogLine,
    NonFinite,
    Notice,
    NoticeKind,
    Skipped,
)
from tui_trainer.record.sink_items import artifact_bytes, event_bytes, line_bytes

T = TypeVar("T")

RARE_KEPT = 5_000


class BoundedLog(Generic[T]):
    """A list whose entries are numbered densely from 0 and whose oldest entries are dropped.

    At most `limit` entries of at most `max_size` in all (0: any size, `size` gives an entry's).
    Of the dropped entries, the newest RARE_KEPT for which `rare` is true are kept.
    """

    def __init__(
        self,
        limit: int,
        max_size: int = 0,
        size: Callable[[T], int] = lambda entry: 0,
        rare: Callable[[T], bool] = lambda entry: False,
    ) -> None:
        self._limit = limit
        self._max_size = max_size
        self._size_of = size
        self._is_rare = rare
        self._rare: deque[tuple[int, T]] = deque(maxlen=RARE_KEPT)
        """(number, entry), all before the first of `_entries`."""
        self._entries: list[T] = []
        self._first = 0
        self._size = 0

    @property
    def next_id(self) -> int:
        """The number of the next entry."""
        return self._first + len(self._entries)

    def append(self, entry: T) -> None:
        """Add `entry`, whose number is `next_id`. The oldest entries are dropped in batches."""
        self._entries.append(entry)
        self._size += self._size_of(entry)
        too_large = self._max_size and self._size > self._max_size
        if len(self._entries) > self._limit + self._limit // 4 or too_large:
            self._trim()

    def since(self, number: int, limit: int, max_size: int = 0) -> tuple[tuple[T, ...], bool]:
        """Entries from `number` on, oldest first, and whether there are more than these.

        At most `limit` entries of at most `max_size` in all (at least one). Numbers that are no
        longer held are skipped.
        """
        kept = [entry for position, entry in self._rare if position >= number]
        start = max(0, number - self._first)
        available = len(kept) + max(0, len(self._entries) - start)
        found = [*kept, *self._entries[start : start + limit]][:limit]
        if max_size:
            total = 0
            for index, entry in enumerate(found):
                total += self._size_of(entry)
                if total > max_size and index:
                    found = found[:index]
                    break
        return tuple(found), len(found) < available

    def first_within(self, number: int, max_size: int) -> int:
        """The smallest number, at least `number`, for which all entries from it on together have at
        most `max_size`; at most that of the newest entry."""
        position = len(self._entries)
        first = max(0, number - self._first)
        while position > first:
            max_size -= self._size_of(self._entries[position - 1])
            if max_size < 0 and position < len(self._entries):
                break
            position -= 1
        return self._first + position if position > first else number

    def _trim(self) -> None:
        surplus = max(0, len(self._entries) - self._limit)
        size = self._size - sum(map(self._size_of, self._entries[:surplus]))
        while self._max_size and size > self._max_size * 3 // 4:
            if surplus == len(self._entries) - 1:
                break
            size -= self._size_of(self._entries[surplus])
            surplus += 1
        for position, entry in enumerate(self._entries[:surplus], self._first):
            if self._is_rare(entry):
                self._rare.append((position, entry))
        del self._entries[:surplus]
        self._first += surplus
        self._size = size


EVENTS_KEPT = 20_000
LOG_LINES_KEPT = 20_000
LOG_BYTES_KEPT = 8_000_000
ARTIFACTS_KEPT = 200
ARTIFACT_BYTES_KEPT = 32_000_000


class EventLog:
    """The events, log lines and artifacts of a run. Used under the recorder's lock."""

    def __init__(self) -> None:
        # A run may clip at every step, and those events must not displace commands and notices.
        self.events: BoundedLog[Event] = BoundedLog(
            EVENTS_KEPT, size=event_bytes, rare=lambda event: not isinstance(event, Clip)
        )
        self.log: BoundedLog[LogLine] = BoundedLog(LOG_LINES_KEPT, LOG_BYTES_KEPT, line_bytes)
        self.artifacts: BoundedLog[Artifact] = BoundedLog(
            ARTIFACTS_KEPT, ARTIFACT_BYTES_KEPT, artifact_bytes
        )

    def add_notice(
        self, kind: NoticeKind, text: str, level: Level, step: int, who: str, when: float
    ) -> Notice:
        notice = Notice(self.events.next_id, step, when, kind, text, level, who)
        self.events.append(notice)
        return notice

    def add_finding(self, finding: Finding) -> Finding:
        """Add and return `finding` with its id set."""
        numbered = msgspec.structs.replace(finding, id=self.events.next_id)
        self.events.append(numbered)
        return numbered

    def add_artifact(self, artifact: Artifact) -> Artifact:
        """Add and return `artifact` with its id set."""
        numbered = msgspec.structs.replace(artifact, id=self.artifacts.next_id)
        self.artifacts.append(numbered)
        return numbered

    def add_step(self, record: StepRecord) -> list[Event]:
        """Add and return the events of one step: a clip that scaled the gradient, and non-finite
        quantities."""
        added: list[Event] = []
        if (clip := record.clip) is not None and clip.scale < 1.0:
            event = Clip(
                self.events.next_id,
                record.step,
                record.time,
                clip.max_norm,
                clip.norm_before,
                clip.scale,
                clip.parameters,
                clip.shares,
                clip.kind,
                clip.gradient_scale,
            )
            self.events.append(event)
            added.append(event)
        return [*added, *self._add_nonfinite(record)]

    def add_skip(self, record: SkipRecord) -> list[Event]:
        """Add and return the events of an iteration without a step."""
        skipped = Skipped(
            self.events.next_id,
            record.step,
            record.time,
            record.reason,
            record.text,
            record.optimizer,
            tuple((table, values.tobytes()) for table, values in record.rows),
            record.loss_scale,
        )
        self.events.append(skipped)
        return [skipped, *self._add_nonfinite(record)]

    def _add_nonfinite(self, record: StepRecord | SkipRecord) -> list[Event]:
        added: list[Event] = []
        for found in record.nonfinite:
            nonfinite = NonFinite(self.events.next_id, record.step, record.time, *found)
            self.events.append(nonfinite)
            added.append(nonfinite)
        return added
