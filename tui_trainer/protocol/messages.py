"""Every message that crosses, as typed structs. Nothing here can execute on decoding.

The viewer leads: it greets (`Hello`), then *pulls* (`Poll` → `Update`) at its own rate and sends
`Command`s, each answered by one `Ack`. The run never sends what was not asked for, so a viewer that
stops reading costs it nothing, and a reconnecting viewer goes on from its own cursor without a gap.

What crosses all the time is sent by place and not by name (`array_like`): a new field of such a
struct goes to its end, with a default, and no field is ever taken away.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from tui_trainer.protocol import Phase
from tui_trainer.protocol.schema import RunInfo

State = Literal["starting", "running", "paused", "stopping", "finished", "stopped", "crashed"]
"""The states of a run; a decoder refuses any other."""
EndState = Literal["finished", "stopped", "crashed"]
"""The states in which no further step comes."""
END_STATES: tuple[EndState, ...] = get_args(EndState)
Level = Literal["info", "warning", "error"]
NoticeKind = Literal[
    "cadence",
    "checkpoint",
    "command",
    "device",
    "evaluation",
    "fault",
    "mark",
    "recording",
    "skipped_step",
    "state",
    "threads",
    "unseen",
    "viewer",
]
NonFiniteQuantity = Literal["loss", "gradient", "weight"]
NonFiniteValue = Literal["nan", "inf", "-inf"]
ClipKind = Literal["norm", "value"]
Stream = Literal["stdout", "stderr"]

# ---------------------------------------------------------------- greeting


class Hello(msgspec.Struct, tag="hello", frozen=True, array_like=True):
    """First frame from a viewer."""

    protocol: int
    product: str
    """Version of tui-trainer, for messages to people."""
    viewer: str
    """Who looks, as `user@host` plus terminal if known; shown to the other viewers."""
    read_only: bool = False


class Welcome(msgspec.Struct, tag="welcome", frozen=True, array_like=True):
    """The run accepts the viewer."""

    protocol: int
    product: str
    run: str
    viewer_id: int


class Refused(msgspec.Struct, tag="refused", frozen=True, array_like=True):
    """The run does not talk to this viewer, and why; the connection closes after it."""

    reason: str
    hint: str = ""


# ---------------------------------------------------------------- state


class Status(msgspec.Struct, frozen=True, array_like=True):
    """The state of the run at one moment: the little that changes all the time."""

    state: State = "starting"
    step: int = 0
    """Optimizer steps completed."""
    epoch: float = 0.0
    phase: Phase | Literal[""] = ""
    """The phase now running, or, when paused, the phase that has just ended."""
    waiting_for: str = ""
    """What a run that shows nothing yet is busy with: `importing torch`, `building the model`, …"""
    reason: str = ""
    """Why it is paused or ended, for people."""
    hint: str = ""
    throttle: float | None = None
    """At most so many steps a second; None: full speed."""
    run_to: int | None = None
    """The step at which it will pause by itself."""
    steps_per_second: float | None = None
    items_per_second: float | None = None
    elapsed_s: float = 0.0
    """Since the first step began, pauses not counted."""
    remaining_s: float | None = None
    cost_share: float | None = None
    """Our own cost on the training thread, as a share of step time (0.01 is 1 %)."""
    clipped_share: float | None = None
    """Share of the last `clip_window` steps that clipped; None where nothing clips."""
    clip_window: int = 100
    viewers: tuple[str, ...] = ()
    controller: int | None = None
    """`viewer_id` of the viewer that holds control; None: nobody."""
    recording: str = ""
    """What is wrong with recording to disk, "" while all is well."""
    refused: bool = False
    """It crashed because it could not start as asked, with nothing measured; `reason` and `hint`
    say all there is to say."""

    @property
    def ended(self) -> bool:
        """Whether no further step will come."""
        return self.state in END_STATES


class Quantity(msgspec.Struct, frozen=True, array_like=True):
    """One line of what a phase has just produced, ready to show."""

    name: str
    value: float | str
    unit: str = ""


class PhaseReport(msgspec.Struct, frozen=True, array_like=True):
    """What the phase that has just ended produced: made only while stopped at its boundary."""

    step: int
    """The optimizer step being made (the one that has not completed, unless phase is `step`)."""
    phase: Phase
    duration_ms: float
    summary: str
    """One sentence in plain words, such as `gradients of 27 parameters, total norm 1.84`."""
    quantities: tuple[Quantity, ...] = ()
    rows: tuple[Rows, ...] = ()
    """Provisional rows of the step in the making (fresh gradients after `backward`, …): shown on
    the panels while paused, not part of the history; the final ones come with the step."""


class Rows(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive rows of one table, column-compressed as raw little-endian arrays.

    `steps` is int64 of shape (n,). `values` is float32 of shape (n, columns), C order: the last
    value of each bucket. Where a row stands for several steps, `low` and `high` (same shape) are
    the extremes over them and `spans` (int64, (n,)) the first step of each; they are empty for raw
    rows, where every row is one step and nothing was left out. Extremes are of finite values (low
    +Inf and high -Inf where there is none); `flags` (uint8, same shape) says what else there was:
    1 a NaN, 2 a +Inf, 4 a -Inf.
    """

    table: int
    first: int
    """Number of raw rows of this table that come before these."""
    count: int
    """Number of raw rows that these stand for (n when raw)."""
    steps: bytes
    values: bytes
    low: bytes = b""
    high: bytes = b""
    spans: bytes = b""
    flags: bytes = b""


# ---------------------------------------------------------------- events, logs, artifacts


class Clip(msgspec.Struct, tag="clip", frozen=True, array_like=True):
    """A step whose gradient was clipped, with the parameters that dominated."""

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


class NonFinite(msgspec.Struct, tag="nonfinite", frozen=True, array_like=True):
    """A NaN or infinity appeared (said once when it appears, again only after it had gone)."""

    id: int
    step: int
    time: float
    quantity: NonFiniteQuantity
    parameter: str = ""
    """The first parameter in which it was seen."""
    value: NonFiniteValue = "nan"
    finite_at: int | None = None
    """The last step at which the quantity was measured and finite; None: at none. Between that step
    and this one it was not measured."""

    @property
    def seen(self) -> str:
        """What to add where it may have appeared before the step at which it was seen; else ""."""
        if self.finite_at is None or self.finite_at >= self.step - 1:
            return ""
        return f", seen at step {self.step:,}, finite at step {self.finite_at:,}"


class Notice(msgspec.Struct, tag="notice", frozen=True, array_like=True):
    """Anything else worth a line in the log and perhaps a mark on the charts."""

    id: int
    step: int
    time: float
    kind: NoticeKind
    text: str
    level: Level = "info"
    who: str = ""
    """The viewer who caused it, for commands and marks."""


Event = Clip | NonFinite | Notice


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
    """Images with what the model made of them."""

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

# ---------------------------------------------------------------- pull


class Poll(msgspec.Struct, tag="poll", frozen=True, array_like=True):
    """The viewer asks for everything since its cursor."""

    revision: int = -1
    """`RunInfo.revision` it has."""
    rows: tuple[int, ...] = ()
    """Raw rows it has of each table, by table id; tables beyond the end: none."""
    event: int = 0
    """Id of the next event it lacks; ids are dense from 0."""
    log: int = 0
    artifact: int = 0
    report: tuple[int, Phase] | None = None
    """(step, phase) of the phase report it has."""
    watch: tuple[str, ...] = ()
    """Topics on its screen now that are measured only while someone looks (`attention_heads`,
    `attention_spectrum`, `attention_health`)."""
    budget: int = 262_144
    """Bytes of rows it wants at most; the run summarises what does not fit."""


class Update(msgspec.Struct, tag="update", frozen=True, array_like=True):
    """The answer to a `Poll`."""

    status: Status
    info: RunInfo | None = None
    """None when the viewer's is current."""
    rows: tuple[Rows, ...] = ()
    events: tuple[Event, ...] = ()
    log: tuple[LogLine, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    report: PhaseReport | None = None
    more: bool = False
    """Whether the viewer should poll again at once: there was more than one answer holds."""
    cadences: tuple[int, ...] = ()
    """`Table.every` of each table as it is now, by table id. The governor changes them often, which
    is no reason to send the whole description again: its revision does not grow with them."""


# ---------------------------------------------------------------- commands


class Pause(msgspec.Struct, tag="pause", frozen=True):
    """Stop at the next phase boundary."""


class Resume(msgspec.Struct, tag="resume", frozen=True):
    """Run freely."""


class Step(msgspec.Struct, tag="step", frozen=True):
    """Run `count` optimizer steps, then pause after the `step` phase of the last."""

    count: int = 1


class StepPhase(msgspec.Struct, tag="step_phase", frozen=True):
    """Run to the next phase boundary, then pause."""


class RunToEpochEnd(msgspec.Struct, tag="run_to_epoch_end", frozen=True):
    """Run to the last step of the current epoch, then pause."""


class Throttle(msgspec.Struct, tag="throttle", frozen=True):
    """At most so many steps a second, for watching; None lifts it."""

    steps_per_second: float | None = None


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Finish the running step, then end; with a checkpoint if asked."""

    checkpoint: bool = False


class Checkpoint(msgspec.Struct, tag="checkpoint", frozen=True):
    """Write a checkpoint at the next step boundary and go on."""


TAKEN = "take control"
"""What is said of it in the log, with who."""


class TakeControl(msgspec.Struct, tag="take_control", frozen=True):
    """Become the viewer that may command; the others are told."""


class Mark(msgspec.Struct, tag="mark", frozen=True):
    """Put a note at the current step, shown in the log and on the charts."""

    text: str


Action = (
    Pause
    | Resume
    | Step
    | StepPhase
    | RunToEpochEnd
    | Throttle
    | Stop
    | Checkpoint
    | TakeControl
    | Mark
)


class Command(msgspec.Struct, tag="command", frozen=True, array_like=True):
    """One action, numbered by the viewer so that its answer can be told apart."""

    id: int
    action: Action


class Ack(msgspec.Struct, tag="ack", frozen=True, array_like=True):
    """The answer to one command, sent as soon as it is accepted or refused."""

    id: int
    ok: bool
    status: Status
    """The state after accepting it, so that the screen can show it at once."""
    message: str = ""
    hint: str = ""


ToRun = Hello | Poll | Command
ToViewer = Welcome | Refused | Update | Ack
