"""Every message between a run and its viewers, as typed structs. Decoding executes nothing.

Their contents have modules of their own: `events`, `actions`, `schema`, `inspection`, …

The viewer leads: it sends `Hello`, then *pulls* (`Poll` → `Update`) at its own rate and sends
`Command`s, each answered by one `Ack`. The run sends nothing unasked, so a viewer that stops
reading costs it nothing, and one that reconnects continues from its own cursor without a gap.

Frequent messages are encoded as arrays (`array_like`): a new field of such a struct goes to its end
with a default, and no field is ever removed.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from tui_trainer.protocol import Phase
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.events import Artifact, Event, LogLine
from tui_trainer.protocol.inspection import Inspect, Inspected
from tui_trainer.protocol.schema import RunInfo

State = Literal["starting", "running", "paused", "stopping", "finished", "stopped", "crashed"]
"""The states of a run; a decoder refuses any other."""
EndState = Literal["finished", "stopped", "crashed"]
"""The states in which no further step comes."""
END_STATES: tuple[EndState, ...] = get_args(EndState)
EntryState = Literal["live", "paused", "finished", "stopped", "crashed", "refused"]
"""State of a run as seen from its directory; `refused`: the directory cannot be trusted."""

# ---------------------------------------------------------------- greeting


class Hello(msgspec.Struct, tag="hello", frozen=True, array_like=True):
    """The first message of a viewer."""

    protocol: int
    product: str
    """Version of tui-trainer, for messages."""
    viewer: str
    """`user@host` and the terminal if known; shown to the other viewers."""
    read_only: bool = False


class Join(msgspec.Struct, tag="join", frozen=True, array_like=True):
    """The first message of a training process that belongs to the run (see `protocol.ranks`)."""

    protocol: int
    product: str
    rank: int
    """-1: a child process of a script, to which the run assigns a number."""
    world_size: int
    pid: int
    label: str = ""
    """Name of a child process."""
    host: str = ""
    """The machine that the process runs on; "" for rank 0's."""


class Welcome(msgspec.Struct, tag="welcome", frozen=True, array_like=True):
    """The run accepts the viewer."""

    protocol: int
    product: str
    run: str
    viewer_id: int


class Refused(msgspec.Struct, tag="refused", frozen=True, array_like=True):
    """The run refuses this viewer; the connection is closed after this message."""

    reason: str
    hint: str = ""


# ---------------------------------------------------------------- state


class ProcessAt(msgspec.Struct, frozen=True, array_like=True):
    """Where one of several training processes is."""

    rank: int
    step: int
    phase: Phase | Literal[""]
    """The phase that ended last, and its step."""
    for_s: float
    """Seconds since that phase ended."""
    held: bool = False
    """Whether it is paused."""


class Breakpoint(msgspec.Struct, frozen=True):
    """A condition at which the run pauses."""

    number: int
    """From 1, never used again in the run."""
    condition: str
    """Condition in the language of `breakpoints.expression`."""
    enabled: bool = True
    hits: int = 0
    """How often the condition was met, ignored hits included."""
    ignore: int = 0
    """Number of first hits without effect."""
    once: bool = False
    """Whether the breakpoint is disabled after its first effect."""
    log_only: bool = False
    """Whether the breakpoint writes a line to the log instead of pausing."""
    fault: str = ""
    """Why the run has disabled the breakpoint."""

    @property
    def properties(self) -> list[str]:
        """`once`, `ignores 3 more`, `log only`, and the fault, as far as they apply."""
        left = self.ignore - self.hits
        return [
            *(["once"] if self.once else []),
            *([f"ignores {left:,} more"] if left > 0 else []),
            *(["log only"] if self.log_only else []),
            *([self.fault] if self.fault else []),
        ]


class BreakpointStop(msgspec.Struct, frozen=True, array_like=True):
    """The breakpoint at which the run has paused."""

    number: int
    condition: str
    step: int
    phase: Phase
    text: str = ""
    """The values that met the condition, such as `loss 7.1`."""
    parameter: str = ""
    """The parameter (or layer) that the values belong to."""
    table: str = ""
    """The table that the values are recorded in."""

    @property
    def reason(self) -> str:
        """`breakpoint 2: loss > 5 (loss 7.1)`"""
        values = f" ({self.text})" if self.text else ""
        return f"breakpoint {self.number}: {self.condition}{values}"


class Status(msgspec.Struct, frozen=True, array_like=True):
    """The state of the run now: the few fields that change all the time."""

    state: State = "starting"
    step: int = 0
    """Optimizer steps completed."""
    epoch: float = 0.0
    phase: Phase | Literal[""] = ""
    """The phase now running, or, when paused, the phase that has just ended."""
    waiting_for: str = ""
    """What a run is busy with before its first step: `importing torch`, …"""
    reason: str = ""
    """Why the run is paused or has ended, as a sentence."""
    hint: str = ""
    throttle: float | None = None
    """Maximum steps per second; None: full speed."""
    run_to: int | None = None
    """The step at which the run will pause."""
    steps_per_second: float | None = None
    items_per_second: float | None = None
    elapsed_s: float = 0.0
    """Seconds since the first step began, without pauses."""
    remaining_s: float | None = None
    cost_share: float | None = None
    """Overhead: our time on the training thread as a share of step time (0.01 is 1 %)."""
    clipped_share: float | None = None
    """Share of the last `clip_window` steps that were clipped; None where nothing clips."""
    clip_window: int = 100
    viewers: tuple[str, ...] = ()
    controller: int | None = None
    """`viewer_id` of the viewer that may command; None: no viewer."""
    recording: str = ""
    """The problem with recording to disk; "" without one."""
    refused: bool = False
    """The run could not start as requested, and nothing was measured; `reason` and `hint` say
    why."""
    processes: tuple[ProcessAt, ...] = ()
    """Position of each training process, in a run with several."""
    breakpoints: tuple[Breakpoint, ...] = ()
    stopped_at: BreakpointStop | None = None
    """Set while the run is paused at a breakpoint."""
    ahead: int | None = None
    """The newest recorded step, while the run is rewound to an earlier one."""

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.state in END_STATES

    @property
    def within_step(self) -> bool:
        """Whether the run is paused between two phases of a step."""
        return self.state == "paused" and self.phase not in ("", "step")


class Quantity(msgspec.Struct, frozen=True, array_like=True):
    """One line of a phase report, ready to show."""

    name: str
    value: float | str
    unit: str = ""


class PhaseReport(msgspec.Struct, frozen=True, array_like=True):
    """The results of the phase that has just ended; made only while the run is paused at its
    boundary."""

    step: int
    """The optimizer step in progress (completed only when phase is `step`)."""
    phase: Phase
    duration_ms: float
    summary: str
    """One sentence, such as `gradients of 27 parameters, total norm 1.84`."""
    quantities: tuple[Quantity, ...] = ()
    rows: tuple[Rows, ...] = ()
    """Provisional rows of the step in progress (fresh gradients after `backward`, …), shown on the
    panels while paused; not part of the history, which gets the final rows with the step."""


class Rows(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive rows of one table, as raw little-endian arrays.

    `steps` is int64 of shape (n,). `values` is float32 of shape (n, columns), C order: the last
    value of each bucket. If a row stands for several steps, `low` and `high` (same shape) are the
    extremes over these steps and `spans` (int64, (n,)) the first step of each row; all three are
    empty for raw rows, which stand for one step each. Extremes are of finite values (low inf and
    high -inf without one); `flags` (uint8, same shape) has a bit for each kind of other value:
    1 nan, 2 inf, 4 -inf.
    """

    table: int
    first: int
    """Number of raw rows of this table before these."""
    count: int
    """Number of raw rows that these rows summarise (n when raw)."""
    steps: bytes
    values: bytes
    low: bytes = b""
    high: bytes = b""
    spans: bytes = b""
    flags: bytes = b""


# ---------------------------------------------------------------- pull


class Poll(msgspec.Struct, tag="poll", frozen=True, array_like=True):
    """Asks for everything since the viewer's cursor."""

    revision: int = -1
    """The `RunInfo.revision` that the viewer has."""
    rows: tuple[int, ...] = ()
    """Number of raw rows of each table that the viewer has, by table id; 0 beyond the end."""
    event: int = 0
    """Id of the first event that the viewer lacks; ids are dense from 0."""
    log: int = 0
    artifact: int = 0
    report: tuple[int, Phase] | None = None
    """(step, phase) of the phase report that the viewer has."""
    watch: tuple[str, ...] = ()
    """Topics on the viewer's screen that are measured only while they are watched
    (`attention_heads`, `attention_spectrum`, `attention_health`)."""
    budget: int = 262_144
    """Maximum bytes of the answer; rows that do not fit are summarised."""


class Update(msgspec.Struct, tag="update", frozen=True, array_like=True):
    """The answer to a `Poll`."""

    status: Status
    info: RunInfo | None = None
    """None if the viewer has the current description."""
    rows: tuple[Rows, ...] = ()
    events: tuple[Event, ...] = ()
    log: tuple[LogLine, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    report: PhaseReport | None = None
    more: bool = False
    """Whether the viewer should poll again at once because not everything fitted."""
    cadences: tuple[int, ...] = ()
    """Current `Table.every` of each table, by table id. Cadences change often, and therefore do not
    raise the revision of the description."""


# ---------------------------------------------------------------- commands


class Command(msgspec.Struct, tag="command", frozen=True, array_like=True):
    """One action, numbered by the viewer to match the answer."""

    id: int
    action: Action


class Ack(msgspec.Struct, tag="ack", frozen=True, array_like=True):
    """The answer to one command, sent when it is accepted or refused."""

    id: int
    ok: bool
    status: Status
    """The status after the command, so that the screen can show it at once."""
    message: str = ""
    hint: str = ""


ToRun = Hello | Poll | Command | Inspect | Join
ToViewer = Welcome | Refused | Update | Ack | Inspected
