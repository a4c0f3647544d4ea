"""Events, log lines and artifacts of a run: numbered densely, kept within bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import Table
from tui_trainer.protocol.messages import (
    Artifact,
    Clip,
    ConfusionMatrix,
    Event,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    TextSample,
)
from tui_trainer.recording.journal import Journal

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


class Tellings:
    """What a run has told in words and pictures. Used under the recorder's lock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.events: Journal[Event] = Journal(
            # A run may clip at every step; what somebody did must not be lost among that.
            EVENTS_KEPT,
            weigh=event_bytes,
            rare=lambda event: not isinstance(event, Clip),
        )
        self.log: Journal[LogLine] = Journal(LOG_LINES_KEPT, LOG_BYTES_KEPT, line_bytes)
        self.artifacts: Journal[Artifact] = Journal(
            ARTIFACTS_KEPT, ARTIFACT_BYTES_KEPT, artifact_bytes
        )

    def notice(self, kind: str, text: str, level: str, step: int, who: str, when: float) -> Notice:
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
        in_force = any(declared[table].name == tables.CLIP for table, _ in record.rows)
        return False if in_force else None
