"""What happens in a run besides its measured tables: events, lines of its log, and artifacts.

An event is a clipped step, a quantity that became nan or inf, an iteration that no optimizer used,
a finding or a notice. Artifacts are samples of what the model produces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from tui_trainer.protocol import Phase

Level = Literal["info", "warning", "error"]
NoticeKind = Literal[
    "branch",
    "breakpoint",
    "cadence",
    "checkpoint",
    "clip_after_step",
    "command",
    "control",
    "device",
    "edit",
    "evaluation",
    "fault",
    "mark",
    "rank",
    "recording",
    "skipped_step",
    "state",
    "threads",
    "unseen",
    "viewer",
]
NonFiniteQuantity = Literal["loss", "gradient", "weight"]
NonFiniteValue = Literal["nan", "inf", "-inf"]
ClipKind = Literal["norm", "value", "hand"]
"""`hand`: the script scaled the gradients by itself."""
Confidence = Literal["possible", "likely", "certain"]
"""How sure a finding is. `certain`: it follows from what was seen, without a threshold."""
SkipReason = Literal["hand", "scaler", "end"]
"""Why no optimizer used gradients: the script discarded them, a GradScaler found them not finite,
or the script ended before the step."""
Stream = Literal["stdout", "stderr"]


class Clip(msgspec.Struct, tag="clip", frozen=True, array_like=True):
    """A step whose gradient was clipped, with the parameters that contributed most."""

    id: int
    step: int
    time: float
    max_norm: float
    norm_before: float
    scale: float
    parameters: tuple[int, ...] = ()
    """Indices into `RunInfo.parameters`, largest share first."""
    shares: tuple[float, ...] = ()
    """‖gᵢ‖² / Σ‖g‖² of each."""
    kind: ClipKind = "norm"
    gradient_scale: float = 1.0
    """Loss scale that was still on the clipped gradients, and on `norm_before`."""


class NonFinite(msgspec.Struct, tag="nonfinite", frozen=True, array_like=True):
    """A quantity became nan or inf; sent again only after it has been finite."""

    id: int
    step: int
    time: float
    quantity: NonFiniteQuantity
    parameter: str = ""
    """The first parameter with such a value; "" for the loss."""
    value: NonFiniteValue = "nan"
    finite_at: int | None = None
    """The last step at which the quantity was measured and finite; None: never. The quantity was
    not measured between that step and this one."""

    @property
    def text(self) -> str:
        """`gradient became inf in blocks.0.mlp.weight, seen at step 7, finite at step 4`"""
        where = f" in {self.parameter}" if self.parameter else ""
        return f"{self.quantity} became {self.value}{where}{self.seen}"

    @property
    def seen(self) -> str:
        """The range of steps in which the value may have appeared, for a message; "" if the step is
        known."""
        if self.finite_at is None or self.finite_at >= self.step - 1:
            return ""
        return f", seen at step {self.step:,}, finite at step {self.finite_at:,}"


class Skipped(msgspec.Struct, tag="skipped", frozen=True, array_like=True):
    """An iteration whose gradients no optimizer used."""

    id: int
    step: int
    """The step that comes next."""
    time: float
    reason: SkipReason
    text: str
    """What happened, with loss and gradient norm."""
    optimizer: str = ""
    """Key of the (first) optimizer that the gradients were for, as in `Table.optimizer`."""
    rows: tuple[tuple[int, bytes], ...] = ()
    """(table id, float32 values of its columns) as those of a step."""
    loss_scale: float | None = None
    """The scale at which a GradScaler skipped."""


class Notice(msgspec.Struct, tag="notice", frozen=True, array_like=True):
    """A line in the log and, depending on its kind, a mark on the charts."""

    id: int
    step: int
    time: float
    kind: NoticeKind
    text: str
    level: Level = "info"
    who: str = ""
    """The viewer that caused the notice, for commands and marks."""


class Evidence(msgspec.Struct, frozen=True, array_like=True):
    """A number that a finding is based on, and the range in which it is healthy."""

    quantity: str
    """Name in words, such as `median update ratio`."""
    text: str
    """The value as it is shown, with its unit."""
    value: float | None = None
    """None if the value is not finite or not a number."""
    low: float | None = None
    """The healthy range; None: open on this side."""
    high: float | None = None
    table: str = ""
    """The table and column of the recorded series, for a chart; "" without one."""
    column: str = ""


class Finding(msgspec.Struct, tag="finding", frozen=True, array_like=True):
    """What a rule has found wrong. A later event with the same `number` replaces it."""

    id: int
    step: int
    """Step at which the rule reported it."""
    time: float
    number: int
    """Dense from 0, in order of discovery."""
    rule: str
    level: Level
    onset: int
    """The first step at which the problem was there."""
    title: str
    """The finding in a few words, without numbers."""
    text: str
    """What is wrong, in a sentence or two with numbers."""
    advice: str
    """What to look at or try."""
    confidence: Confidence = "likely"
    parameters: tuple[str, ...] = ()
    """Where: names of parameters (or layers), the most affected first."""
    phase: Phase | Literal[""] = ""
    """Where: the phase of the step; "" where it belongs to none."""
    optimizer: str = ""
    """Key of the optimizer, as in `Table.optimizer`."""
    evidence: tuple[Evidence, ...] = ()
    cause: int | None = None
    """Number of the finding that explains this one."""
    ranks: tuple[int, ...] = ()
    """Where: processes of a distributed training that differ from the others."""


Event = Clip | NonFinite | Skipped | Finding | Notice
EventKind = Literal["clip", "nonfinite", "skipped", "finding"] | NoticeKind
"""The tag of an event, or the kind of a notice."""


def event_kind(event: Event) -> EventKind:
    match event:
        case Clip():
            return "clip"
        case NonFinite():
            return "nonfinite"
        case Skipped():
            return "skipped"
        case Finding():
            return "finding"
        case Notice():
            return event.kind


class LogLine(msgspec.Struct, frozen=True, array_like=True):
    """A line that the script or a library printed."""

    id: int
    time: float
    step: int
    stream: Stream
    text: str


class TextSample(msgspec.Struct, tag="text", frozen=True):
    """A continuation sampled from a language model."""

    id: int
    step: int
    prompt: str
    text: str


class ImageSample(msgspec.Struct, tag="images", frozen=True):
    """Images with the model's predictions."""

    id: int
    step: int
    width: int
    height: int
    pixels: bytes
    """uint8 RGB of shape (n, height, width, 3); thumbnails, at most 64×64."""
    predictions: tuple[str, ...]
    confidences: tuple[float, ...]
    truths: tuple[str, ...]


class ConfusionMatrix(msgspec.Struct, tag="confusion", frozen=True):
    """Counts over the validation set; at most the 64 most frequent classes."""

    id: int
    step: int
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """counts[truth][prediction]."""


Artifact = TextSample | ImageSample | ConfusionMatrix


def newest_findings(events: Iterable[object]) -> list[Finding]:
    """The findings among events, each as it was last reported: worst first, effects after their
    causes."""
    by_number: Mapping[int, Finding] = {
        event.number: event for event in events if isinstance(event, Finding)
    }
    return in_order(by_number.values())


LEVEL_ORDER = {"error": 0, "warning": 1, "info": 2}


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first, then by onset; effects follow their cause."""
    by_number = {finding.number: finding for finding in findings}

    def rank(finding: Finding) -> tuple[int, int, int]:
        return LEVEL_ORDER[finding.level], finding.onset, finding.number

    causes = [f for f in by_number.values() if f.cause is None or f.cause not in by_number]
    effects: dict[int, list[Finding]] = {}
    for finding in by_number.values():
        if finding.cause is not None and finding.cause in by_number:
            effects.setdefault(finding.cause, []).append(finding)

    def worst(finding: Finding) -> tuple[int, int, int]:
        group = [finding, *effects.get(finding.number, ())]
        return min(map(rank, group))[0], finding.onset, finding.number

    ordered: list[Finding] = []
    for finding in sorted(causes, key=worst):
        ordered.append(finding)
        ordered += sorted(effects.get(finding.number, ()), key=rank)
    return ordered


def finding_object(finding: Finding) -> dict[str, Any]:
    """A finding for JSON."""
    return {
        "number": finding.number,
        "rule": finding.rule,
        "level": finding.level,
        "onset": finding.onset,
        "where": {
            "optimizer": finding.optimizer or None,
            "parameters": list(finding.parameters),
            "phase": finding.phase or None,
            "ranks": list(finding.ranks),
        },
        "title": finding.title,
        "text": finding.text,
        "next": finding.advice,
        "confidence": finding.confidence,
        "evidence": [
            {name: getattr(each, name) for name in each.__struct_fields__}
            for each in finding.evidence
        ],
        "cause": finding.cause,
    }
