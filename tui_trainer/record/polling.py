"""Answering a viewer's poll: everything since its cursor, within its budget."""

from __future__ import annotations

import time

from tui_trainer.history import History
from tui_trainer.protocol import schema
from tui_trainer.protocol.messages import LogLine, PhaseReport, Poll, Rows, Status, Update
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.events import EventLog, artifact_bytes, event_bytes, line_bytes

# ---- allowance
# How much of what is printed a viewer is sent: bursts whole, of a flood the newest.


BACKLOG_BYTES = 512 * 1024
"""What was printed before a viewer came."""
BYTES_A_SECOND = 32 * 1024
"""More than anybody can read."""
BURST_BYTES = 128 * 1024
"""Such as a long traceback."""
ANSWERS = 4
"""A slow viewer, whose answers are small, is behind by at most so many of them."""


class TokenBucket:
    """Grows with time and is spent; times are seconds of the caller's clock."""

    def __init__(self, now: float) -> None:
        self._bytes = float(BACKLOG_BYTES)
        self._now = now

    def at(self, now: float, budget: int) -> int:
        """Bytes that may be sent now to a viewer whose answers hold `budget` bytes."""
        grown = self._bytes + (now - self._now) * min(BYTES_A_SECOND, budget)
        self._now = now
        # What is left of the backlog is not taken away again.
        self._bytes = max(self._bytes, min(grown, BURST_BYTES, ANSWERS * budget))
        return int(self._bytes)

    def spend(self, count: int) -> None:
        """So many were sent."""
        self._bytes = max(0.0, self._bytes - count)


EVENTS_AT_ONCE = 2_000
LOG_LINES_AT_ONCE = 2_000
SHARE = 4
"""A quarter of an answer at most each is for what was printed and for artifacts (one of these may
be larger), and a half for events; the rest is for rows, and half of it at least."""
MIN_BUDGET_BYTES = 4 * 1024
MAX_BUDGET_BYTES = 4 * 1024 * 1024
WATCH_LASTS_S = 10.0
"""A viewer that has not polled for so long watches nothing any more."""
TOPICS = frozenset(schema.TABLE_NAMES)


class PollHandler:
    """Makes `Update`s; remembers what each viewer watches."""

    def __init__(self, history: History, told: EventLog) -> None:
        self._history = history
        self._told = told
        self._watchers: dict[int, tuple[frozenset[str], float]] = {}
        self._reported: dict[int, PhaseReport] = {}
        self._allowances: dict[int, TokenBucket] = {}
        self.watched: frozenset[str] = frozenset()
        self.report: PhaseReport | None = None

    def answer(self, poll: Poll, viewer: int, status: Status, info: RunInfo) -> Update:
        """Everything that `viewer` lacks, called under the recorder's lock."""
        self._watch(viewer, frozenset(poll.watch) & TOPICS)
        told, budget = self._told, min(max(poll.budget, MIN_BUDGET_BYTES), MAX_BUDGET_BYTES)
        share = budget // SHARE
        events, more_events = told.events.since(poll.event, EVENTS_AT_ONCE, 2 * share)
        log, more_log = self._printed(poll.log, viewer, budget)
        artifacts, more_artifacts = told.artifacts.since(poll.artifact, limit=50, weight=share)
        used = sum(map(event_bytes, events)) + sum(map(line_bytes, log))
        used += sum(map(artifact_bytes, artifacts))
        rows, more_rows = self._rows(poll, max(budget - used, 2 * share))
        return Update(
            status=status,
            info=None if poll.revision == info.revision else info,
            rows=rows,
            events=events,
            log=log,
            artifacts=artifacts,
            report=self._report_for(poll, viewer),
            more=more_rows or more_events or more_log or more_artifacts,
            cadences=tuple(table.every for table in info.tables),
        )

    def expire(self) -> None:
        """Drop what viewers watched who have fallen silent."""
        horizon = time.monotonic() - WATCH_LASTS_S
        if any(seen < horizon for _, seen in self._watchers.values()):
            self._watchers = {k: w for k, w in self._watchers.items() if w[1] >= horizon}
            self._gather()

    def forget(self, viewer: int) -> None:
        """This viewer has gone."""
        self._reported.pop(viewer, None)
        self._allowances.pop(viewer, None)
        if self._watchers.pop(viewer, None) is not None:
            self._gather()

    def _watch(self, viewer: int, topics: frozenset[str]) -> None:
        before = self._watchers.get(viewer)
        self._watchers[viewer] = (topics, time.monotonic())
        if before is None or before[0] != topics:
            self._gather()

    def _gather(self) -> None:
        watchers = list(self._watchers.values())
        self.watched = frozenset().union(*(topics for topics, _ in watchers))

    def _report_for(self, poll: Poll, viewer: int) -> PhaseReport | None:
        report = self.report
        if report is None:
            return None
        known = poll.report == (report.step, report.phase)
        if known and self._reported.get(viewer) is report:
            return None
        self._reported[viewer] = report
        return report

    def _printed(self, number: int, viewer: int, budget: int) -> tuple[tuple[LogLine, ...], bool]:
        """Lines from `number` on; where they are more than this viewer is allowed, the newest."""
        allowance = self._allowances.setdefault(viewer, TokenBucket(time.monotonic()))
        journal = self._told.log
        allowed = max(allowance.at(time.monotonic(), budget), budget // SHARE)
        found, more = journal.since(
            journal.within(number, allowed), LOG_LINES_AT_ONCE, budget // SHARE
        )
        allowance.spend(sum(map(line_bytes, found)))
        return found, more

    def _rows(self, poll: Poll, budget: int) -> tuple[tuple[Rows, ...], bool]:
        cursors = []
        for number, held in enumerate(self._history.cursors()):
            given = poll.rows[number] if number < len(poll.rows) else 0
            cursors.append(min(max(given, 0), held))
        return self._history.rows_since(cursors, budget)
