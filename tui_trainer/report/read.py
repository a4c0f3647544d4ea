"""Reads the data of a report from a recorded run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tui_trainer.history.series import SeriesReader
from tui_trainer.history.window import Window
from tui_trainer.protocol.events import Event, EventKind, Finding, newest_findings
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.store.events import StoredEvents
from tui_trainer.store.reader import StoredHistory

MAX_FINDINGS = 2_000


@dataclass(frozen=True)
class ReportData:
    """A recorded run: its history, description and last status."""

    history: StoredHistory
    info: RunInfo
    status: Status

    @property
    def last_step(self) -> int:
        return self.history.last_step

    def window(self, table: SeriesReader, columns: list[int], buckets: int) -> Window:
        """`columns` over the whole run, in at most `buckets` buckets."""
        return table.window(columns, self.first_step, self.last_step + 1, buckets)

    @property
    def first_step(self) -> int:
        """The first step of the charts."""
        return (self.info.branch_step or 0) + 1

    def last_and_best(
        self, name: str, column: str, lowest: bool
    ) -> tuple[float | None, float | None]:
        """(last value, best value) of a column; None where there is none."""
        found = self.history.find(name, column)
        last = found[0].newest(column) if found else None
        if found is None or last is None:
            return None, None
        table, place = found
        seen = table.window([place], table.first_step or 0, (table.last_step or 0) + 1, 1)
        best = float(seen.low[0, 0] if lowest else seen.high[0, 0])
        return last, None if math.isnan(best) else best

    def event_count(self, kind: EventKind | None = None) -> int:
        """Number of events of `kind`, or without `kind` of all events but clips."""
        return StoredEvents(self.history.store).count(kind)

    def events(self, count: int) -> list[Event]:
        """The first `count` events that are not clips."""
        return list(StoredEvents(self.history.store).first_events(count))

    def findings(self) -> list[Finding]:
        """Findings of the rules, worst first, effects after their cause."""
        return newest_findings(StoredEvents(self.history.store).of_kind("finding", MAX_FINDINGS))

    def steps_of(self, kind: EventKind, count: int = 20_000) -> list[int]:
        """The steps with an event of `kind`."""
        return StoredEvents(self.history.store).steps_of(kind, count)
