"""Where a viewer stands in a run: what it asks for next."""

from __future__ import annotations

from dataclasses import dataclass, field

from tui_trainer.protocol.messages import Poll, Update


@dataclass
class Cursor:
    """What has been received, whether or not the ui has taken it in yet."""

    revision: int = -1
    rows: dict[int, int] = field(default_factory=dict)
    event: int = 0
    log: int = 0
    artifact: int = 0
    report: tuple[int, str] | None = None

    def advance(self, update: Update) -> None:
        """Step over what an answer holds."""
        if update.info is not None:
            self.revision = update.info.revision
        for rows in update.rows:
            self.rows[rows.table] = rows.first + rows.count
        if update.events:
            self.event = update.events[-1].id + 1
        if update.log:
            self.log = update.log[-1].id + 1
        if update.artifacts:
            self.artifact = update.artifacts[-1].id + 1
        if update.report is not None:
            self.report = (update.report.step, update.report.phase)
        elif update.status.state != "paused":
            self.report = None

    def poll(self, watch: frozenset[str], budget: int) -> Poll:
        """The question for everything after it."""
        tables = max(self.rows, default=-1) + 1
        return Poll(
            revision=self.revision,
            rows=tuple(self.rows.get(table, 0) for table in range(tables)),
            event=self.event,
            log=self.log,
            artifact=self.artifact,
            report=self.report,
            watch=tuple(sorted(watch)),
            budget=budget,
        )
