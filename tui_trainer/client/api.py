"""The app's interface to a run: a `Session` to pull snapshots from and to send commands to.

The app does not know whether the training runs on a thread of its own process, in another process,
on another machine, or is a recording.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tui_trainer.history import History, MemoryHistory
from tui_trainer.history.window import Window
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.events import Artifact, Event, LogLine
from tui_trainer.protocol.inspection import Inspected, InspectionRequest
from tui_trainer.protocol.messages import Ack, PhaseReport, Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.runs.launch import LaunchRequest

LinkState = Literal["connecting", "live", "lost", "closed", "replay"]
"""`lost`: reconnecting; `closed`: nothing more will come."""


@dataclass(frozen=True)
class Link:
    """The state of the connection to the run."""

    state: LinkState = "connecting"
    message: str = ""
    """One line to show, such as `connection lost, trying again in 4 s`."""
    hint: str = ""
    bytes_received: int = 0
    latency_ms: float | None = None
    viewer_id: int | None = None
    read_only: bool = False


class RelatedRun(Protocol):
    """Another run of the same tree, whose line the charts show as well."""

    @property
    def name(self) -> str: ...

    def window(
        self, table: str, column: str, steps: tuple[int, int], buckets: int
    ) -> Window | None:
        """A column in equal buckets of steps; None where the run does not have it."""

    def newest(self, table: str, column: str) -> float | None:
        """The newest value of a column."""


@dataclass(frozen=True)
class Snapshot:
    """Everything known at one poll. Immutable, except that `poll()` adds to `history`, which is
    therefore to be read on the thread that polls."""

    link: Link = field(default_factory=Link)
    status: Status = field(default_factory=Status)
    info: RunInfo | None = None
    history: History = field(default_factory=MemoryHistory)
    events: tuple[Event, ...] = ()
    """The last `EVENTS_KEPT` clips and as many of the other events, oldest first."""
    log: tuple[LogLine, ...] = ()
    """The last `LOG_LINES_KEPT` lines, oldest first."""
    artifacts: tuple[Artifact, ...] = ()
    """The last `ARTIFACTS_KEPT` of each kind, oldest first."""
    report: PhaseReport | None = None
    """What the phase that has just ended produced; None unless paused."""
    related: tuple[RelatedRun, ...] = ()
    """The run that this one continues, and branches; set by the app."""
    version: int = 0
    """Grows with every change: snapshots of equal versions look the same."""


EVENTS_KEPT = 2_000
LOG_LINES_KEPT = 5_000
ARTIFACTS_KEPT = 20


class Session(Protocol):
    """A link to one run, live or recorded. No method waits for the run."""

    def poll(self) -> Snapshot:
        """Apply what has arrived and return the current snapshot."""

    def send(self, action: Action) -> Future[Ack]:
        """Send a command. The future resolves with its acknowledgement: `ok=False`, with a reason,
        when it is refused or the link is down."""

    def inspect(self, request: InspectionRequest) -> Future[Inspected]:
        """Request an inspection; only the latest request is answered, earlier ones are cancelled.
        An answer in state `failed` has the reason."""

    def watch(self, topics: frozenset[str]) -> None:
        """Set which of the tables that are measured on request are on the screen."""

    def set_rate(self, polls_per_second: float) -> None:
        """Set how often the run is polled."""

    def on_arrival(self, callback: Callable[[], None] | None) -> None:
        """Call `callback`, from any thread, when there is something new to poll."""

    def close(self) -> None:
        """Close the connection; the run continues."""


OnLaunch = Callable[[LaunchRequest], Session]
"""Starts a run and returns a session with it; called on a thread of its own. Raises LaunchError."""
