"""The items that sinks take: everything that happens in a run, in order; and their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Protocol

import numpy as np

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol.events import (
    Artifact,
    Clip,
    ConfusionMatrix,
    Event,
    Finding,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    Skipped,
    TextSample,
)
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo


@dataclass(frozen=True, slots=True)
class InfoChanged:
    """The first or a changed description of the run; precedes the items that depend on it."""

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
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class ItemsDropped:
    """Items are missing here because the sink or the recorder could not keep up."""

    steps: int = 0
    """Steps, and rows measured outside a step."""
    events: int = 0
    lines: int = 0
    samples: int = 0


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run has ended; the last item."""

    status: Status


Item = (
    InfoChanged
    | StepRecorded
    | RowRecorded
    | ItemsDropped
    | RunEnded
    | Clip
    | NonFinite
    | Skipped
    | Finding
    | Notice
    | LogLine
    | Artifact
)


class Sink(Protocol):
    """An output of a run: plain lines, JSON lines, the run store.

    Each sink is called on its own thread, so it may block; an exception closes this sink only.
    """

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Write `items`; `status` is the current status. Also called without items, about every
        half second, for sinks that act on the clock."""

    def close(self) -> None:
        """Called once, after the last item."""


ITEM_BYTES = 512
"""Assumed size of any item without its values and texts."""


def item_bytes(item: Item) -> int:
    """Approximate size in memory."""
    match item:
        case StepRecorded():
            return ITEM_BYTES + sum(values.nbytes + 64 for _, values in item.record.rows)
        case RowRecorded():
            return ITEM_BYTES + item.values.nbytes
        case LogLine():
            return 200 + 2 * len(item.text)
        case TextSample() | ImageSample() | ConfusionMatrix():
            return ITEM_BYTES + artifact_bytes(item)
        case InfoChanged() | ItemsDropped() | RunEnded():
            return ITEM_BYTES
        case _:
            return ITEM_BYTES + event_bytes(item)


def artifact_bytes(artifact: Artifact) -> int:
    """Approximate size on the wire."""
    match artifact:
        case ImageSample():
            return len(artifact.pixels) + 40 * len(artifact.predictions) + 100
        case TextSample():
            return 4 * (len(artifact.prompt) + len(artifact.text)) + 100
        case ConfusionMatrix():
            return 5 * len(artifact.labels) ** 2 + 40 * len(artifact.labels) + 100


def event_bytes(event: Event) -> int:
    """Approximate size on the wire."""
    match event:
        case Clip():
            return 60 + 12 * len(event.parameters)
        case NonFinite():
            return 50 + len(event.parameter)
        case Skipped():
            return 60 + len(event.text) + sum(len(values) + 8 for _, values in event.rows)
        case Finding():
            words = len(event.text) + len(event.advice) + len(event.title)
            return 200 + 2 * words + sum(len(name) + 2 for name in event.parameters)
        case Notice():
            return 40 + _utf8_length(event.text) + _utf8_length(event.who)


def line_bytes(line: LogLine) -> int:
    """Approximate size on the wire."""
    return 30 + _utf8_length(line.text)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


SHARE_STEPS = 4096
"""Shares of a clipped gradient are rounded to 1/4096, which is 0.02 %."""


def rounded_for_storage(record: StepRecord) -> StepRecord:
    """`record` with its times and clip rounded as the store keeps them, and its rows sorted by
    table.

    Live viewers, sinks and a replay then show the same digits, and the digits of noise, which are
    most of what a clip costs on a slow line, are not sent.
    """
    record = replace(
        record,
        time=round(record.time, 6),
        rows=tuple(sorted(record.rows, key=itemgetter(0))),
        own_ms=float(np.float32(record.own_ms)),
    )
    clip = record.clip
    if clip is None:
        return record
    rounded = np.round(np.array(clip.shares) * SHARE_STEPS) / SHARE_STEPS
    before, scale = (float(np.float32(value)) for value in (clip.norm_before, clip.scale))
    clip = replace(clip, norm_before=before, scale=scale, shares=tuple(rounded.tolist()))
    return replace(record, clip=clip)
