"""The app's interface to a run: a `Session` to pull snapshots from and to send commands to.

The app does not know whether the training runs on a thread of its own process, in another process,
on another machine, or is a recording. A `SnapshotBuilder` builds the snapshots of a live run from
its updates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from tui_trainer.history import History, MemoryHistory
from tui_trainer.history.window import Window
from tui_trainer.protocol.actions import Action
from tui_trainer.protocol.events import Artifact, Clip, Event, LogLine
from tui_trainer.protocol.inspection import Inspected, InspectionRequest
from tui_trainer.protocol.messages import Ack, PhaseReport, Status, Update
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
    """Another run of the same tree of branches, which the charts draw as well."""

    @property
    def name(self) -> str: ...

    def window(
        self, table: str, column: str, steps: tuple[int, int], buckets: int
    ) -> Window | None:
        """A column in equal buckets of steps; None when the run has no such column."""

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
"""Starts a run and returns a session with it; called on a separate thread. Raises LaunchError."""


class SnapshotBuilder:
    """Builds the snapshots of a live run from its updates. Not thread-safe."""

    def __init__(self) -> None:
        self.history = MemoryHistory()
        self.snapshot = Snapshot(history=self.history)
        # Kept apart: a run may clip at every step, and the few other events must not be lost
        # among thousands of clips.
        self._clips: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._others: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._newest_event = -1
        self._log: deque[LogLine] = deque(maxlen=LOG_LINES_KEPT)
        self._artifacts: dict[str, deque[Artifact]] = {}

    def apply(self, update: Update) -> None:
        """Add an update. Raises ValueError when rows belong to no declared table or do not continue
        theirs; everything before the first such rows is kept."""
        known = self.snapshot
        changes: dict[str, object] = {}
        info = update.info
        if info is None and known.info is not None and update.cadences:
            info = known.info.with_cadences(update.cadences)
        if info is not None and info is not known.info:
            for table in info.tables:
                self.history.declare(table)
            changes["info"] = info
        if update.status != known.status:
            changes["status"] = update.status
        if self._add_events(update.events):
            both = (*self._others, *self._clips)
            changes["events"] = tuple(sorted(both, key=lambda event: event.id))
        if self._add_log(update.log):
            changes["log"] = tuple(self._log)
        if update.artifacts:
            changes["artifacts"] = self._add_artifacts(update.artifacts)
        if update.report is not None:
            changes["report"] = update.report
        elif update.status.state != "paused" and known.report is not None:
            changes["report"] = None
        if update.rows or changes:
            self.snapshot = replace(known, version=known.version + 1, **changes)  # type: ignore[arg-type]
        for rows in update.rows:
            self.history.apply(rows)

    def set_status(self, status: Status) -> None:
        """Set a status that came without an update."""
        known = self.snapshot
        if status != known.status:
            report = known.report if status.state == "paused" else None
            self.snapshot = replace(known, status=status, report=report, version=known.version + 1)

    def set_link(self, link: Link) -> None:
        """Set the state of the link. A change of latency and bytes received alone does not raise
        the version."""
        known = self.snapshot
        if link == known.link:
            return
        figures = {"bytes_received": 0, "latency_ms": None}
        redraw = replace(link, **figures) != replace(known.link, **figures)  # type: ignore[arg-type]
        self.snapshot = replace(known, link=link, version=known.version + redraw)

    def _add_events(self, events: tuple[Event, ...]) -> bool:
        fresh = [event for event in events if event.id > self._newest_event]
        for event in fresh:
            (self._clips if isinstance(event, Clip) else self._others).append(event)
            self._newest_event = event.id
        return bool(fresh)

    def _add_log(self, lines: tuple[LogLine, ...]) -> bool:
        newest = self._log[-1].id if self._log else -1
        fresh = [line for line in lines if line.id > newest]
        for line in fresh:
            if line.id > newest + 1:
                self._log.append(_left_out(line, line.id - newest - 1))
            self._log.append(line)
            newest = line.id
        return bool(fresh)

    def _add_artifacts(self, artifacts: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
        for artifact in artifacts:
            kind = type(artifact).__name__
            kept = self._artifacts.setdefault(kind, deque(maxlen=ARTIFACTS_KEPT))
            if not kept or artifact.id > kept[-1].id:
                kept.append(artifact)
        all_kinds = [artifact for kept in self._artifacts.values() for artifact in kept]
        return tuple(sorted(all_kinds, key=lambda artifact: artifact.id))


def _left_out(before: LogLine, count: int) -> LogLine:
    """A line that stands for `count` lines before `before`, too many or too old to be sent."""
    text = f"… {count:,} lines are left out here: tui-trainer logs has all of them"
    return LogLine(before.id - 1, before.time, before.step, before.stream, text)
