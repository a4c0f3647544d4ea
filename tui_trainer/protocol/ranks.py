"""Messages between the training processes of one run: rank 0, which records and serves, and the
others, each connected to the socket of the run.

A process sends `Join` (see `messages`), and then its measurements, unasked. Rank 0 answers with
`Joined`, and tells the process where to stop and when to continue.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tui_trainer.protocol import Phase
from tui_trainer.protocol.events import Level, NoticeKind, Stream
from tui_trainer.protocol.inspection import Inspect, Inspected
from tui_trainer.protocol.messages import EndState, Refused

MAX_BYTES = 64 * 1024
"""Limit of a message in either direction, except for answers."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""Limit of an `InspectedThere`."""
ROWS_PER_MESSAGE = 200

Boundary = tuple[int, int]
"""A phase boundary: (step, number of the boundary within the step from 1); (0, 0) precedes all
others. All processes of a distributed training pass the same boundaries in the same order."""
SHARED = "<4q"
"""Layout of the shared memory in which a process keeps its position for rank 0: step, boundary,
index of the phase that ended, and when it ended (ns, monotonic). The descriptor of the memory
follows `Joined`, with one byte; a byte without a descriptor means that there is no such memory."""


class Joined(msgspec.Struct, tag="joined", frozen=True, array_like=True):
    """Rank 0 accepts the process."""

    rank: int


class RankRow(msgspec.Struct, frozen=True, array_like=True):
    """One optimizer step of the process."""

    step: int
    time: float
    values: bytes
    """float32 of `schema.RANK_COLUMNS`."""


class RankRows(msgspec.Struct, tag="rows", frozen=True, array_like=True):
    """Rows of at most ROWS_PER_MESSAGE steps."""

    rows: tuple[RankRow, ...]


class RankLine(msgspec.Struct, tag="line", frozen=True, array_like=True):
    """A line that the process printed."""

    stream: Stream
    text: str


class RankNotice(msgspec.Struct, tag="notice", frozen=True, array_like=True):
    """A line for the log of the run."""

    kind: NoticeKind
    text: str
    level: Level
    step: int


class RankAt(msgspec.Struct, tag="at", frozen=True, array_like=True):
    """Position of the process: sent when it stops, and in answer to `Hold`."""

    boundary: Boundary
    """The last boundary that the process has reached."""
    phase: Phase | Literal[""]
    """The phase that ended there."""
    held: bool
    """Whether the process is stopped there."""
    answers: int = 0
    """Number of the last `Hold` or `Go` that the process has obeyed."""


class RankPosition(msgspec.Struct, tag="position", frozen=True, array_like=True):
    """The position of a process on another machine, sent once a second in place of SHARED."""

    boundary: Boundary
    phase: Phase | Literal[""]
    for_s: float
    """Seconds since that phase ended."""
    time: float
    """When the message was sent, by the clock of that machine, as `RankRow.time`."""


class Leave(msgspec.Struct, tag="leave", frozen=True, array_like=True):
    """The last message: how the training ended."""

    state: EndState
    reason: str
    step: int


class StopWanted(msgspec.Struct, tag="stop_wanted", frozen=True, array_like=True):
    """The process has received a signal to end."""


class Hold(msgspec.Struct, tag="hold", frozen=True, array_like=True):
    """Stop at the first boundary that does not precede `boundary`, or at the end of step `step` if
    that is given. A process that is stopped earlier continues up to there."""

    number: int
    boundary: Boundary = (0, 0)
    step: int | None = None


class Go(msgspec.Struct, tag="go", frozen=True, array_like=True):
    """Run freely, or, if `stop` is set, end the training at this boundary."""

    number: int
    stop: bool = False


class InspectThere(msgspec.Struct, tag="inspect_there", frozen=True, array_like=True):
    """A viewer's request to inspect the tensors of the process."""

    viewer: int
    message: Inspect | None
    """None: the viewer has left."""


class InspectedThere(msgspec.Struct, tag="inspected_there", frozen=True, array_like=True):
    """The answer to one `InspectThere`."""

    viewer: int
    answer: Inspected


ToRankZero = (
    RankRows | RankLine | RankNotice | RankAt | RankPosition | StopWanted | Leave | InspectedThere
)
ToRank = Joined | Refused | Hold | Go | InspectThere

to_rank_zero: msgspec.msgpack.Decoder[ToRankZero] = msgspec.msgpack.Decoder(ToRankZero)
to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
