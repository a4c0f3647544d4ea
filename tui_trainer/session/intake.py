"""The ui's side of a session: what arrived becomes the next snapshot, on the thread that polls."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from tui_trainer.history import History
from tui_trainer.protocol.messages import Artifact, Clip, Event, LogLine, Status, Update
from tui_trainer.protocol.text import harmless, harmless_all
from tui_trainer.session.api import ARTIFACTS_KEPT, EVENTS_KEPT, LOG_LINES_KEPT, Link, Snapshot


class Intake:
    """Grows one `Snapshot` out of updates. Used from one thread."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        # Apart: a run may clip at every step, and what somebody did must not be lost among that.
        self._clips: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._others: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._newest_event = -1
        self._log: deque[LogLine] = deque(maxlen=LOG_LINES_KEPT)
        self._artifacts: dict[str, deque[Artifact]] = {}

    @property
    def history(self) -> History:
        """The history that grows."""
        return self.snapshot.history

    def apply(self, update: Update) -> None:
        """Take in one answer. Raises ValueError when its rows do not fit; what came before the
        faulty rows is kept."""
        update = harmless_all(update)
        known = self.snapshot
        changes: dict[str, object] = {}
        if update.info is not None:
            for table in update.info.tables:
                self.history.declare(table)
            changes["info"] = update.info
        elif known.info is not None and update.cadences:
            info = known.info.with_cadences(update.cadences)
            if info is not known.info:
                for table in info.tables:
                    self.history.declare(table)
                changes["info"] = info
        if update.status != known.status:
            changes["status"] = update.status
        if self._take_events(update.events):
            both = (*self._others, *self._clips)
            changes["events"] = tuple(sorted(both, key=lambda event: event.id))
        if _extend(self._log, update.log):
            changes["log"] = tuple(self._log)
        if update.artifacts:
            changes["artifacts"] = self._keep(update.artifacts)
        if update.report is not None:
            changes["report"] = update.report
        elif update.status.state != "paused" and known.report is not None:
            changes["report"] = None
        if update.rows or changes:
            self.snapshot = replace(known, version=known.version + 1, **changes)  # type: ignore[arg-type]
        for rows in update.rows:
            self.history.apply(rows)

    def show_status(self, status: Status) -> None:
        """Take in a state that came without an update."""
        status = harmless_all(status)
        known = self.snapshot
        if status != known.status:
            report = known.report if status.state == "paused" else None
            self.snapshot = replace(known, status=status, report=report, version=known.version + 1)

    def show_link(self, link: Link) -> None:
        """Take in how the connection is; figures that always change are no reason to draw."""
        link = replace(link, message=harmless(link.message), hint=harmless(link.hint))
        known = self.snapshot
        if link != known.link:
            told = (link.state, link.message, link.hint, link.viewer_id, link.read_only)
            before = known.link
            same = told == (
                before.state,
                before.message,
                before.hint,
                before.viewer_id,
                before.read_only,
            )
            self.snapshot = replace(known, link=link, version=known.version + (not same))

    def _take_events(self, events: tuple[Event, ...]) -> bool:
        fresh = [event for event in events if event.id > self._newest_event]
        for event in fresh:
            (self._clips if isinstance(event, Clip) else self._others).append(event)
            self._newest_event = event.id
        return bool(fresh)

    def _keep(self, artifacts: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
        for artifact in artifacts:
            kind = type(artifact).__name__
            held = self._artifacts.setdefault(kind, deque(maxlen=ARTIFACTS_KEPT))
            if not held or artifact.id > held[-1].id:
                held.append(artifact)
        kept = [artifact for held in self._artifacts.values() for artifact in held]
        return tuple(sorted(kept, key=lambda artifact: artifact.id))


def _extend(held: deque[LogLine], new: tuple[LogLine, ...]) -> bool:
    """Add what is newer than what is held; whether there was any."""
    newest = held[-1].id if held else -1
    fresh = [item for item in new if item.id > newest]
    for line in fresh:
        if line.id > newest + 1:
            held.append(_left_out(line, line.id - newest - 1))
        held.append(line)
        newest = line.id
    return bool(fresh)


def _left_out(before: LogLine, count: int) -> LogLine:
    """In place of lines that the run did not send: too many were printed, or long ago."""
    text = f"… {count:,} lines are left out here: tui-trainer logs has them all"
    return LogLine(before.id - 1, before.time, before.step, before.stream, text)
