"""Events, log lines and artifacts of a run: numbered densely, kept within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import msgspec
import numpy as np

from tui_trainer.history.buckets import Floats, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.messages import (
    Artifact,
    Clip,
    ConfusionMatrix,
    Event,
    ImageSample,
    Level,
    LogLine,
    NonFinite,
    Notice,
    NoticeKind,
    Status,
    TextSample,
)
from tui_trainer.protocol.schema import RunInfo, Table

# ---- journal
# A bounded list whose entries are numbered densely from 0: a viewer asks for the rest.


T = TypeVar("T")


RARE_KEPT = 5_000


class BoundedLog(Generic[T]):
    """Keeps the newest entries, at most `limit` of them and at most `weight` units in all; of
    those that must make room, the newest RARE_KEPT that are `rare` stay."""

    def __init__(
        self,
        limit: int,
        weight: int = 0,
        weigh: Callable[[T], int] = lambda entry: 0,
        rare: Callable[[T], bool] = lambda entry: False,
    ) -> None:
        self._limit = limit
        self._is_rare = rare
        self._rare: deque[tuple[int, T]] = deque(maxlen=RARE_KEPT)
        """(number, entry) of what stays from before the first of `_entries`."""
        self._weight_limit = weight
        self._weigh = weigh
        self._entries: list[T] = []
        self._first = 0
        self._weight = 0

    @property
    def next_id(self) -> int:
        """The number that the next entry gets."""
        return self._first + len(self._entries)

    def append(self, entry: T) -> None:
        """Keep `entry`, which carries the number `next_id`; the oldest make room, in batches."""
        self._entries.append(entry)
        self._weight += self._weigh(entry)
        over_weight = self._weight_limit and self._weight > self._weight_limit
        if len(self._entries) > self._limit + self._limit // 4 or over_weight:
            self._trim()

    def since(self, number: int, limit: int, weight: int = 0) -> tuple[tuple[T, ...], bool]:
        """Entries from `number` on, oldest first, and whether there are more than these.

        At most `limit` entries; with `weight`, as many as weigh no more than that (at least one).
        Numbers that are no longer held are skipped.
        """
        before = [entry for place, entry in self._rare if place >= number]
        start = max(0, number - self._first)
        all_there = len(before) + max(0, len(self._entries) - start)
        found = [*before, *self._entries[start : start + limit]][:limit]
        if weight:
            total = 0
            for index, entry in enumerate(found):
                total += self._weigh(entry)
                if total > weight and index:
                    found = found[:index]
                    break
        return tuple(found), len(found) < all_there

    def within(self, number: int, weight: int) -> int:
        """The first number, from `number` on, after which all entries together weigh no more than
        `weight`; the newest entry's at the latest."""
        place = len(self._entries)
        first = max(0, number - self._first)
        while place > first:
            weight -= self._weigh(self._entries[place - 1])
            if weight < 0 and place < len(self._entries):
                break
            place -= 1
        return self._first + place if place > first else number

    def _trim(self) -> None:
        surplus = max(0, len(self._entries) - self._limit)
        weight = self._weight - sum(map(self._weigh, self._entries[:surplus]))
        while self._weight_limit and weight > self._weight_limit * 3 // 4:
            if surplus == len(self._entries) - 1:
                break
            weight -= self._weigh(self._entries[surplus])
            surplus += 1
        for place, entry in enumerate(self._entries[:surplus], self._first):
            if self._is_rare(entry):
                self._rare.append((place, entry))
        del self._entries[:surplus]
        self._first += surplus
        self._weight = weight


EVENTS_KEPT = 20_000
LOG_LINES_KEPT = 20_000
LOG_BYTES_KEPT = 8_000_000
ARTIFACTS_KEPT = 200
ARTIFACT_BYTES_KEPT = 32_000_000
SHARE_PARTS = 4096
"""A parameter's share of a clipped gradient is told in so many parts, 0.02 % each."""


def artifact_bytes(artifact: Artifact) -> int:
    """About how many bytes an artifact takes on the wire."""
    match artifact:
        case ImageSample():
            return len(artifact.pixels) + 40 * len(artifact.predictions) + 100
        case TextSample():
            return 4 * (len(artifact.prompt) + len(artifact.text)) + 100
        case ConfusionMatrix():
            return 5 * len(artifact.labels) ** 2 + 40 * len(artifact.labels) + 100


def event_bytes(event: Event) -> int:
    """About how many bytes an event takes on the wire."""
    match event:
        case Clip():
            return 60 + 12 * len(event.parameters)
        case NonFinite():
            return 50 + len(event.parameter)
        case Notice():
            return 40 + _utf8(event.text) + _utf8(event.who)


def line_bytes(line: LogLine) -> int:
    """About how many bytes a printed line takes on the wire."""
    return 30 + _utf8(line.text)


def _utf8(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def in_short(record: StepRecord) -> StepRecord:
    """The record with no more digits than were measured, are kept and are ever shown: a run may
    clip at every step, and digits of noise are most of what that costs on a thin line."""
    # As the store keeps it, so that a run's story told again is the same to the last digit.
    record = replace(record, own_ms=float(np.float32(record.own_ms)))
    clip = record.clip
    if clip is None:
        return record
    parts = np.round(np.array(clip.shares) * SHARE_PARTS)  # a share may be no number
    shares = tuple((parts / SHARE_PARTS).tolist())
    before, scale = (float(np.float32(value)) for value in (clip.norm_before, clip.scale))
    return replace(record, clip=replace(clip, norm_before=before, scale=scale, shares=shares))


class EventLog:
    """What a run has told in words and pictures. Used under the recorder's lock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.events: BoundedLog[Event] = BoundedLog(
            # A run may clip at every step; what somebody did must not be lost among that.
            EVENTS_KEPT,
            weigh=event_bytes,
            rare=lambda event: not isinstance(event, Clip),
        )
        self.log: BoundedLog[LogLine] = BoundedLog(LOG_LINES_KEPT, LOG_BYTES_KEPT, line_bytes)
        self.artifacts: BoundedLog[Artifact] = BoundedLog(
            ARTIFACTS_KEPT, ARTIFACT_BYTES_KEPT, artifact_bytes
        )

    def notice(
        self, kind: NoticeKind, text: str, level: Level, step: int, who: str, when: float
    ) -> Notice:
        """Keep and return a notice."""
        notice = Notice(self.events.next_id, step, when, kind, text, level, who)
        self.events.append(notice)
        return notice

    def artifact(self, artifact: Artifact) -> Artifact:
        """Number, keep and return an artifact."""
        numbered = msgspec.structs.replace(artifact, id=self.artifacts.next_id)
        self.artifacts.append(numbered)
        return numbered

    def events_of(self, record: StepRecord) -> list[Event]:
        """Keep and return the events that a step's record holds."""
        made: list[Event] = []
        if record.clip is not None and record.clip.scale < 1.0:
            clip = record.clip
            self._keep(
                made,
                Clip(
                    self.events.next_id,
                    record.step,
                    record.time,
                    clip.max_norm,
                    clip.norm_before,
                    clip.scale,
                    clip.parameters,
                    clip.shares,
                    clip.kind,
                ),
            )
        for found in record.nonfinite:
            self._keep(made, NonFinite(self.events.next_id, record.step, record.time, *found))
        return made

    def _keep(self, made: list[Event], event: Event) -> None:
        self.events.append(event)
        made.append(event)

    @staticmethod
    def clip_in_force(record: StepRecord, declared: Sequence[Table]) -> bool | None:
        """Whether the step's gradient was clipped; None when no clip was in force."""
        if record.clip is not None and record.clip.scale < 1.0:
            return True
        in_force = any(declared[table].name == schema.CLIP for table, _ in record.rows)
        return False if in_force else None


# ---- items
# What a sink of the recorder is given: the run's whole story, in order, nothing summarised.
#
# Besides these a sink gets the protocol's own `Clip`, `NonFinite`, `Notice`, `LogLine` and
# artifacts.


@dataclass(frozen=True, slots=True)
class InfoChanged:
    """The description of the run, first or anew; comes before what needs it to be understood."""

    info: RunInfo


@dataclass(frozen=True, slots=True)
class StepRecorded:
    """One optimizer step."""

    record: StepRecord


@dataclass(frozen=True, slots=True)
class RowRecorded:
    """A row measured outside a step, such as a validation."""

    table: int
    step: int
    values: Floats
    time: float


@dataclass(frozen=True, slots=True)
class StepsDropped:
    """So many steps are missing here, because the sink or the recorder could not keep up."""

    steps: int


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run has ended; nothing comes after it."""

    status: Status


Item = (
    InfoChanged
    | StepRecorded
    | RowRecorded
    | StepsDropped
    | RunEnded
    | Clip
    | NonFinite
    | Notice
    | LogLine
    | Artifact
)


class Sink(Protocol):
    """Where a run's story goes: plain lines, JSON lines, the run store.

    Called on a thread of its own, so it may block; an exception ends its feed, and only that.
    """

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Write these. `status` is the state of the run now. Also called with no items, about
        every half second, so that a sink can go by the clock."""

    def close(self) -> None:
        """Nothing more will come."""
