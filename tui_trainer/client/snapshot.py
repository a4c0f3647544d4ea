"""Building the next `Snapshot` from what a run sends."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from tui_trainer.client.api import ARTIFACTS_KEPT, EVENTS_KEPT, LOG_LINES_KEPT, Link, Snapshot
from tui_trainer.history import MemoryHistory
from tui_trainer.protocol.events import Artifact, Clip, Event, LogLine
from tui_trainer.protocol.messages import Status, Update


class SnapshotBuilder:
    """Grows one `Snapshot`. Used from one thread."""

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
        """Add an update. Raises ValueError when its rows do not fit; everything before the first
        row that does not fit is kept."""
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
        """Set the state of the link. Its latency and bytes received always change and do not make
        a new version."""
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
    """A line in place of those that the run did not send, since they were too many or too old."""
    text = f"… {count:,} lines are left out here: tui-trainer logs has all of them"
    return LogLine(before.id - 1, before.time, before.step, before.stream, text)
