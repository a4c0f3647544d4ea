"""What is wrong with the run: the findings, worst first, each with its evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.learn.catalog import PAGE_OF_RULE
from tui_trainer.protocol.actions import Back
from tui_trainer.protocol.events import Evidence, Finding, newest_findings
from tui_trainer.protocol.formatting import count, counted
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.findings import STYLES, EvidenceChart, FindingDetail, place_of
from tui_trainer.ui.screens import ScreenMode
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen, RunScreen
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.table import Cell, TableColumn, VirtualTable

SCREEN_OF_TABLE: dict[str, ScreenMode] = {
    "grad_norm": "parameters",
    "weight_norm": "parameters",
    "update_ratio": "parameters",
    "attention": "attention",
    "attention_health": "attention",
}


class FindingsTable(VirtualTable):
    """A row for each finding; effects are listed below their cause."""

    DEFAULT_CSS = "FindingsTable { height: 4; margin: 0 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "activate", "Go there", id="findings.open",
                tooltip="To the parameter, the layer or the chart; in a replay, to the step"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.findings: Sequence[Finding] = ()
        self.columns = (
            TableColumn("level", "level", 8, self._level, left=True),
            TableColumn("onset", "since", 10, lambda row: f"{self.findings[row].onset:,}"),
            TableColumn("title", "what", 0, self._title, left=True),
            TableColumn("where", "where", 26, self._where, left=True, style="dim"),
            TableColumn("rule", "rule", 22, lambda row: self.findings[row].rule, left=True,
                        style="dim"),
        )  # fmt: skip

    def set_findings(self, findings: Sequence[Finding]) -> None:
        """Show `findings`. The cursor stays on its finding, or moves to the finding's cause when
        the cause is new."""
        row = self.current_row
        before = self.findings[row] if row is not None and row < len(self.findings) else None
        self.findings = findings
        self.set_order(np.arange(len(findings)))
        if before is None:
            return
        rows = {finding.number: row for row, finding in enumerate(findings)}
        row = rows.get(before.number)
        if row is None:
            return
        cause = findings[row].cause
        if cause is not None and before.cause is None:
            row = rows.get(cause, row)
        self.cursor = row

    @property
    def current(self) -> Finding | None:
        """The finding under the cursor."""
        row = self.current_row
        return self.findings[row] if row is not None else None

    @property
    def lessons(self) -> tuple[str, ...]:
        """The page about the finding under the cursor."""
        page = PAGE_OF_RULE.get(self.current.rule) if self.current is not None else None
        return () if page is None else (page,)

    def _level(self, row: int) -> Cell:
        level = self.findings[row].level
        return Cell(level, STYLES[level])

    def _title(self, row: int) -> Cell:
        finding = self.findings[row]
        effect = finding.cause is not None and row > 0
        title = f"  {self.glyphs.arrow} {finding.title}" if effect else finding.title
        return Cell(title, "dim" if effect else "text")

    def _where(self, row: int) -> str:
        finding = self.findings[row]
        place = place_of(finding)
        if not finding.parameters:
            return place or ", ".join(f"rank {rank}" for rank in finding.ranks) or finding.phase
        more = len(finding.parameters) - 1
        name = finding.parameters[0] + (f" +{more}" if more else "")
        return f"{place} {name}" if place else name


class FindingsScreen(DetailScreen):
    """The findings, and the one under the cursor in full."""

    CSS = """
    FindingsScreen FindingLine.-shown { display: none; }
    FindingsScreen #summary { margin: 0 1; }
    FindingsScreen #finding { height: 1fr; margin: 1 1 0 1; layout: vertical; }
    FindingsScreen EvidenceChart { max-height: 24; margin-top: 1; }
    FindingsScreen.-wide #finding { layout: horizontal; }
    FindingsScreen.-wide FindingDetail { width: 1fr; margin-right: 2; }
    FindingsScreen.-wide EvidenceChart { width: 1fr; margin-top: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *CONTROL_BINDINGS,
        Binding("B", "break_before", "Back, break there", key_display="B",
                id="findings.break_before",
                tooltip="Go to the end of the step before the finding, and pause again at the "
                "phase that it belongs to (where snapshots are kept)"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._findings: Sequence[Finding] = ()

    def body(self) -> Iterable[Widget]:
        yield Caption(id="summary")
        yield Placeholder()
        yield FindingsTable()
        yield Container(FindingDetail(), EvidenceChart(), id="finding")

    @property
    def table(self) -> FindingsTable:
        return self.query_one(FindingsTable)

    def on_mount(self) -> None:
        self.table.focus()

    def show_body(self, snapshot: Snapshot) -> None:
        self._findings = newest_findings(snapshot.events)
        table = self.table
        table.set_findings(self._findings)
        found = bool(self._findings)
        for part in (table, self.query_one("#finding")):
            part.display = found
        table.styles.height = 1 + min(len(self._findings), max(3, self.size.height // 3))
        message = ("", "")
        if not found:
            steps = counted(snapshot.status.step, "step")
            message = placeholder_message(snapshot, f"no findings in {steps}")
            if snapshot.status.step:
                message = (f"no findings in {steps}", "")
        self.query_one(Placeholder).set_message(*message)
        self.query_one("#summary", Caption).update(self._summary())
        table.update_rows()
        self._show_selected()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer to go back to a finding only in a run that can be rewound."""
        if action == "break_before":
            return super().check_action("step_back", ()) if self._findings else False
        return super().check_action(action, parameters)

    def action_break_before(self) -> None:
        """Go to the step before the finding under the cursor, with a breakpoint at the finding."""
        finding = self.table.current
        if finding is None:
            return
        place = f" at {finding.phase}" if finding.phase else ""
        condition = f"step == {finding.onset}{place}"
        self.context.command(Back(max(0, finding.onset - 1), break_at=condition))

    def _summary(self) -> list[Span]:
        levels = [finding.level for finding in self._findings if finding.cause is None]
        spans: list[Span] = [("Findings", "title")]
        for level in ("error", "warning", "info"):
            number = sum(each == level for each in levels)
            if number:
                spans.append((f"{count(number, 0)} {level}", STYLES[level]))
        effects = len(self._findings) - len(levels)
        if effects:
            spans.append((counted(effects, "effect"), "dim"))
        return spans

    def _show_selected(self) -> None:
        finding = self.table.current
        by_number = {each.number: each for each in self._findings}
        cause = by_number.get(finding.cause) if finding and finding.cause is not None else None
        effects = [f for f in self._findings if finding is not None and f.cause == finding.number]
        detail = self.query_one(FindingDetail)
        detail.show(finding, cause, effects)
        wide = self.has_class("-wide")
        width = self.size.width - 2
        detail.styles.height = detail.needed_height(width // 2 - 2 if wide else width)
        evidence = self._charted(finding)
        series, column = None, 0
        if evidence is not None and finding is not None:
            history = self.context.snapshot.history
            table = history.table(evidence.table, finding.optimizer)
            found = table.column(evidence.column) if table is not None else None
            if found is not None:
                series, column = table, found
        info = self.context.snapshot.info
        total = info.total_steps if info else None
        onset = finding.onset if finding else 0
        self.query_one(EvidenceChart).plot(evidence, onset, series, column, total)

    @staticmethod
    def _charted(finding: Finding | None) -> Evidence | None:
        """The evidence that has a series."""
        if finding is None:
            return None
        return next((each for each in finding.evidence if each.table), None)

    def on_virtual_table_activated(self, message: VirtualTable.Activated) -> None:
        """Go to what the finding under the cursor is about."""
        finding = self.table.current
        if finding is None:
            return
        seek = getattr(self.context.session, "seek", None)
        if seek is not None:
            seek(finding.onset)
        evidence = self._charted(finding)
        mode = SCREEN_OF_TABLE.get(evidence.table if evidence else "", "dashboard")
        self.context.action_go(mode)
        # `column` names a layer and one of its statistics.
        wanted = evidence.column if evidence is not None and mode == "attention" else ""
        if wanted or finding.parameters:
            self.app.call_later(self._select, wanted or finding.parameters[0])

    def _select(self, name: str) -> None:
        """Put the cursor of the screen in front on what a finding is about."""
        screen = self.app.screen
        if not isinstance(screen, RunScreen):
            return
        if screen.is_mounted:
            screen.select(name)
        else:
            screen.wanted = name

    def on_virtual_table_highlighted(self, message: VirtualTable.Highlighted) -> None:
        self._show_selected()
