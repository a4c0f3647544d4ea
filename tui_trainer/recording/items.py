"""What a sink of the recorder is given: the run's whole story, in order, nothing summarised.

Besides these a sink gets the protocol's own `Clip`, `NonFinite`, `Notice`, `LogLine` and artifacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Artifact, Clip, LogLine, NonFinite, Notice, Status


@dataclass(frozen=True, slots=True)
class Described:
    """The description of the run, first or anew; comes before what needs it to be understood."""

    info: RunInfo


@dataclass(frozen=True, slots=True)
class Stepped:
    """One optimizer step."""

    record: StepRecord


@dataclass(frozen=True, slots=True)
class Rowed:
    """A row measured outside a step, such as a validation."""

    table: int
    step: int
    values: Floats
    time: float


@dataclass(frozen=True, slots=True)
class Lost:
    """So many steps are missing here, because the sink or the recorder could not keep up."""

    steps: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The run has ended; nothing comes after it."""

    status: Status


Item = Described | Stepped | Rowed | Lost | Ended | Clip | NonFinite | Notice | LogLine | Artifact


class Sink(Protocol):
    """Where a run's story goes: plain lines, JSON lines, the run store.

    Called on a thread of its own, so it may block; an exception ends its feed, and only that.
    """

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Write these. `status` is the state of the run now. Also called with no items, about
        every half second, so that a sink can go by the clock."""

    def close(self) -> None:
        """Nothing more will come."""
