"""Answering a viewer's poll: everything since its cursor, within its budget."""

from __future__ import annotations

import time

from tui_trainer.history import History
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import PhaseReport, Poll, Rows, Status, Update
from tui_trainer.recording.telling import Tellings

EVENTS_AT_ONCE = 2_000
LOG_LINES_AT_ONCE = 2_000
LOG_CHARACTERS_AT_ONCE = 1_000_000
ARTIFACT_BYTES_AT_ONCE = 2_000_000
MIN_BUDGET_BYTES = 4 * 1024
MAX_BUDGET_BYTES = 4 * 1024 * 1024
WATCH_LASTS_S = 10.0
"""A viewer that has not polled for so long watches nothing any more."""
TOPICS = frozenset(tables.TABLE_NAMES)


class Answerer:
    """Makes `Update`s; remembers what each viewer watches."""

    def __init__(self, history: History, told: Tellings) -> None:
        self._history = history
        self._told = told
        self._watchers: dict[int, tuple[frozenset[str], float]] = {}
        self._reported: dict[int, PhaseReport] = {}
        self.watched: frozenset[str] = frozenset()
        self.report: PhaseReport | None = None

    def answer(self, poll: Poll, viewer: int, status: Status, info: RunInfo) -> Update:
        """Everything that `viewer` lacks, called under the recorder's lock."""
        self._watch(viewer, frozenset(poll.watch) & TOPICS)
        events, more_events = self._told.events.since(poll.event, EVENTS_AT_ONCE)
        log, more_log = self._told.log.since(poll.log, LOG_LINES_AT_ONCE, LOG_CHARACTERS_AT_ONCE)
        artifacts, more_artifacts = self._told.artifacts.since(
            poll.artifact, limit=50, weight=ARTIFACT_BYTES_AT_ONCE
        )
        rows, more_rows = self._rows(poll)
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

    def _rows(self, poll: Poll) -> tuple[tuple[Rows, ...], bool]:
        cursors = []
        for number, held in enumerate(self._history.cursors()):
            given = poll.rows[number] if number < len(poll.rows) else 0
            cursors.append(min(max(given, 0), held))
        budget = min(max(poll.budget, MIN_BUDGET_BYTES), MAX_BUDGET_BYTES)
        return self._history.rows_since(cursors, budget)
