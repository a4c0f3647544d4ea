"""What a report needs of a recorded run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tui_trainer.history.buckets import Window
from tui_trainer.history.series import MemorySeries
from tui_trainer.protocol.messages import Event, Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.store.reader import StoredEvents, StoredHistory


@dataclass(frozen=True)
class ReportData:
    """A run's history with its description and how it ended."""

    history: StoredHistory
    info: RunInfo
    status: Status

    @property
    def last_step(self) -> int:
        """The newest step."""
        return self.history.last_step

    def found(self, name: str, column: str) -> tuple[MemorySeries, int] | None:
        """A table that has rows, and the place of a column."""
        table = self.history.table(name)
        names = [each.name for each in table.table.columns] if table is not None else []
        return (table, names.index(column)) if table and table.rows and column in names else None

    def window(self, table: MemorySeries, columns: list[int], buckets: int) -> Window:
        """Some columns over the whole run."""
        return table.window(columns, self.first_step, self.last_step + 1, buckets)

    @property
    def first_step(self) -> int:
        """Where the charts begin."""
        return (self.info.branch_step or 0) + 1

    def last_and_best(
        self, name: str, column: str, lowest: bool
    ) -> tuple[float | None, float | None]:
        """The newest and the best value of a series; None where there is none."""
        found = self.found(name, column)
        latest = found[0].latest() if found else None
        if found is None or latest is None:
            return None, None
        table, place = found
        seen = table.window([place], table.first_step or 0, (table.last_step or 0) + 1, 1)
        best = float(seen.low[0, 0] if lowest else seen.high[0, 0])
        return float(latest[1][place]), None if math.isnan(best) else best

    def event_count(self, kind: str = "") -> int:
        """Events of a kind, or all but clips."""
        store = self.history.store
        question = (
            "SELECT count(*) FROM event WHERE kind = ?"
            if kind
            else "SELECT count(*) FROM event WHERE kind <> ?"
        )
        found = store.numbers(question, kind or "clip")
        return int(found[0][0]) if found else 0

    def events(self, count: int) -> list[Event]:
        """The first events that are no clips."""
        return list(StoredEvents(self.history.store).first_events(count))

    def steps_of(self, kind: str, count: int = 20_000) -> list[int]:
        """The steps of the events of a kind."""
        question = "SELECT DISTINCT step FROM event WHERE kind = ? ORDER BY step LIMIT ?"
        return [int(step) for (step,) in self.history.store.numbers(question, kind, count)]
