"""What the ui is given: a `Session` to pull snapshots from and send commands to.

The ui does not know whether the training is a thread of its own process, another process, another
machine or a recording.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from tui_trainer.history import History, MemoryHistory
from tui_trainer.protocol.messages import Ack, Action, Artifact, Event, LogLine, PhaseReport, Status
from tui_trainer.protocol.schema import RunInfo


@dataclass(frozen=True)
class Link:
    """How the connection to the run is."""

    state: str = "connecting"
    """`connecting`, `live`, `lost` (trying again), `closed` (no more will come) or `replay`."""
    message: str = ""
    """One line for people, such as `connection lost, trying again in 4 s`."""
    hint: str = ""
    bytes_received: int = 0
    latency_ms: float | None = None
    viewer_id: int | None = None
    read_only: bool = False


@dataclass(frozen=True)
class Snapshot:
    """All that is known at one pull. Immutable, but for `history`, which only `poll()` grows and
    which therefore is read on the thread that polls."""

    link: Link = field(default_factory=Link)
    status: Status = field(default_factory=Status)
    info: RunInfo | None = None
    history: History = field(default_factory=MemoryHistory)
    events: tuple[Event, ...] = ()
    """The last `EVENTS_KEPT` clips and as many of the other events, oldest first."""
    log: tuple[LogLine, ...] = ()
    """The last `LOG_LINES_KEPT` lines, oldest first."""
    artifacts: tuple[Artifact, ...] = ()
    """The last few of each kind, oldest first."""
    report: PhaseReport | None = None
    """What the phase that has just ended produced; None unless paused."""
    version: int = 0
    """Grows whenever anything in the snapshot changed: equal versions need no drawing."""


EVENTS_KEPT = 2_000
LOG_LINES_KEPT = 5_000
ARTIFACTS_KEPT = 20


class Session(Protocol):
    """A link to one run, live or recorded. All methods return at once."""

    def poll(self) -> Snapshot:
        """Take in what has arrived and return the present picture; never waits."""

    def send(self, action: Action) -> Future[Ack]:
        """Send a command; the future resolves with its acknowledgement (ok=False, with a reason,
        when refused or when the link is down)."""

    def watch(self, topics: frozenset[str]) -> None:
        """Say which on-request tables the screen shows now."""

    def set_rate(self, polls_per_second: float) -> None:
        """How often to pull from the run."""

    def on_arrival(self, callback: Callable[[], None] | None) -> None:
        """Call `callback`, from any thread, when something new is there to poll."""

    def close(self) -> None:
        """End the link; the run goes on."""
