"""Answers a viewer's poll with everything since its cursor, within its budget of bytes.

A viewer on a slow line is sent less: rows are summarised to fit `Poll.budget`, which
`client/live.py` derives from the time that answers take, and of a flood of printed lines only the
newest are sent.
"""

from __future__ import annotations

import time

from tui_trainer.history import History
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import LogLine
from tui_trainer.protocol.messages import PhaseReport, Poll, Rows, Status, Update
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.event_log import EventLog
from tui_trainer.record.sink_items import artifact_bytes, event_bytes, line_bytes

BACKLOG_BYTES = 512 * 1024
"""Printed lines from before its connection that a new viewer is sent."""
BYTES_PER_SECOND = 32 * 1024
"""Highest rate at which a viewer is sent printed lines: more than a person can read."""
BURST_BYTES = 128 * 1024
"""Printed lines that a viewer is sent at once: a long traceback fits."""
MAX_ANSWERS_BEHIND = 4

EVENTS_PER_ANSWER = 2_000
LOG_LINES_PER_ANSWER = 2_000
ARTIFACTS_PER_ANSWER = 50
PARTS = 4
"""An answer's budget: at most a quarter each for log lines and artifacts (a single one may be
larger), half for events, and at least half for rows."""
MIN_BUDGET_BYTES = 4 * 1024
MAX_BUDGET_BYTES = 4 * 1024 * 1024
WATCH_TIMEOUT_S = 10.0
"""A viewer that has not polled for this long watches no topic."""
TOPICS = frozenset(schema.TABLE_NAMES)


class TokenBucket:
    """Limits the bytes of printed lines per viewer. Starts with BACKLOG_BYTES."""

    def __init__(self, now: float) -> None:
        self._tokens = float(BACKLOG_BYTES)
        self._now = now

    def available(self, now: float, budget: int) -> int:
        """Bytes that may be sent at `now` (seconds) to a viewer whose answers hold `budget`."""
        grown = self._tokens + (now - self._now) * min(BYTES_PER_SECOND, budget)
        self._now = now
        # The rest of the backlog is kept even if it is more than a burst.
        self._tokens = max(self._tokens, min(grown, BURST_BYTES, MAX_ANSWERS_BEHIND * budget))
        return int(self._tokens)

    def spend(self, count: int) -> None:
        self._tokens = max(0.0, self._tokens - count)


class PollHandler:
    """Makes the `Update` for a `Poll`, and remembers which topics each viewer watches."""

    def __init__(self, history: History, events: EventLog) -> None:
        self._history = history
        self._events = events
        self._watchers: dict[int, tuple[frozenset[str], float]] = {}
        self._reported: dict[int, PhaseReport] = {}
        self._buckets: dict[int, TokenBucket] = {}
        self.watched: frozenset[str] = frozenset()
        """The topics of all viewers; may be read without the recorder's lock."""
        self.report: PhaseReport | None = None

    def answer(self, poll: Poll, viewer: int, status: Status, info: RunInfo) -> Update:
        """The update with everything that `viewer` lacks. Called under the recorder's lock."""
        self._watch(viewer, frozenset(poll.watch) & TOPICS)
        budget = min(max(poll.budget, MIN_BUDGET_BYTES), MAX_BUDGET_BYTES)
        part = budget // PARTS
        events, more_events = self._events.events.since(poll.event, EVENTS_PER_ANSWER, 2 * part)
        log, more_log = self._log_lines(poll.log, viewer, budget)
        artifacts, more_artifacts = self._events.artifacts.since(
            poll.artifact, ARTIFACTS_PER_ANSWER, part
        )
        used = sum(map(event_bytes, events)) + sum(map(line_bytes, log))
        used += sum(map(artifact_bytes, artifacts))
        rows, more_rows = self._rows(poll, max(budget - used, 2 * part))
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
        """Stop watching for viewers that no longer poll. Called under the recorder's lock."""
        horizon = time.monotonic() - WATCH_TIMEOUT_S
        if any(seen < horizon for _, seen in self._watchers.values()):
            self._watchers = {k: w for k, w in self._watchers.items() if w[1] >= horizon}
            self._update_watched()

    def forget(self, viewer: int) -> None:
        """Stop watching for `viewer`, which has left. Called under the recorder's lock."""
        self._reported.pop(viewer, None)
        self._buckets.pop(viewer, None)
        if self._watchers.pop(viewer, None) is not None:
            self._update_watched()

    def _watch(self, viewer: int, topics: frozenset[str]) -> None:
        before = self._watchers.get(viewer)
        self._watchers[viewer] = (topics, time.monotonic())
        if before is None or before[0] != topics:
            self._update_watched()

    def _update_watched(self) -> None:
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

    def _log_lines(self, number: int, viewer: int, budget: int) -> tuple[tuple[LogLine, ...], bool]:
        """Lines from `number` on; only the newest if they are more than the bucket allows."""
        bucket = self._buckets.setdefault(viewer, TokenBucket(time.monotonic()))
        allowed = max(bucket.available(time.monotonic(), budget), budget // PARTS)
        log = self._events.log
        first = log.first_within(number, allowed)
        lines, more = log.since(first, LOG_LINES_PER_ANSWER, budget // PARTS)
        bucket.spend(sum(map(line_bytes, lines)))
        return lines, more

    def _rows(self, poll: Poll, budget: int) -> tuple[tuple[Rows, ...], bool]:
        cursors = []
        for number, held in enumerate(self._history.cursors()):
            given = poll.rows[number] if number < len(poll.rows) else 0
            cursors.append(min(max(given, 0), held))
        return self._history.rows_since(cursors, budget)
