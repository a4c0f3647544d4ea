"""The parameter groups of all optimizers: which group updates which parameters, and the memory of
each kind of tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.formatting import milliseconds
from tui_trainer.protocol.inspection import DescribeUse, Inspected, ParameterUse, TensorRef
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.parameter_groups import GroupsView, ParameterUseTable
from tui_trainer.ui.screens.base import (
    CONTROL_BINDINGS,
    RANK_BINDING,
    DetailScreen,
)
from tui_trainer.ui.screens.inspection_requests import InspectionRequests, ending
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.table import VirtualTable

MIN_WIDTH_BESIDE, MIN_WIDTH_FOR_WIDE_GROUPS = 112, 160
ROWS_KEPT = 12
"""Rows that the groups leave for everything else when they are above the parameters."""
READING = "running the forward and backward pass of this step again …"


class ParameterGroupsScreen(DetailScreen):
    """Parameter groups and memory. The inspector opens the screen; escape returns to it."""

    CSS = """
    ParameterGroupsScreen #moment { margin: 0 1; }
    ParameterGroupsScreen #parts { height: 1fr; margin: 0 1; }
    ParameterGroupsScreen GroupsView { height: auto; margin-bottom: 1; }
    ParameterGroupsScreen ParameterUseTable { height: 1fr; }
    ParameterGroupsScreen.-beside #parts { layout: horizontal; }
    ParameterGroupsScreen.-beside GroupsView { width: 48; height: 1fr; margin: 0; }
    ParameterGroupsScreen.-beside ParameterUseTable { width: 1fr; margin-left: 2; }
    ParameterGroupsScreen.-wide GroupsView { width: 72; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "read", "Read again", id="parameter_groups.read",
                tooltip="Run the forward and backward pass of this step again"),
        Binding("escape", "back", "Back", id="parameter_groups.back",
                tooltip="To the inspector"),
        RANK_BINDING,
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.use: ParameterUse | None = None
        """The groups and the memory on the screen."""
        self.requests = InspectionRequests(self)

    def body(self) -> Iterable[Widget]:
        yield Caption(id="moment")
        yield Placeholder()
        yield Container(GroupsView(), ParameterUseTable(), id="parts")

    @property
    def table(self) -> ParameterUseTable:
        return self.query_one(ParameterUseTable)

    def on_mount(self) -> None:
        self.table.focus()

    # ------------------------------------------------------------ reading

    def show_body(self, snapshot: Snapshot) -> None:
        status = snapshot.status
        live = not status.ended and snapshot.link.state == "live"
        if live and not self.requests.pending and self.requests.in_front:
            now, asked_at = self.requests.now(), self.requests.asked_at
            other = asked_at is None or asked_at.rank != now.rank
            if other or (status.state == "paused" and now != asked_at):
                self.requests.retries = 0
                self._ask()
        self._draw(snapshot)

    def _ask(self) -> None:
        self.requests.send(DescribeUse(), self._answered)

    def _answered(self, answer: Inspected) -> None:
        use = self.use = self.requests.result(answer, ParameterUse)
        running = self.context.snapshot.status.state == "running"
        if use is not None and use.waits_for_batch and running and self.requests.may_retry():
            self._ask()  # a run keeps its batches from the first request on
        self._draw(self.context.snapshot)

    # ------------------------------------------------------------ drawing

    def _draw(self, snapshot: Snapshot) -> None:
        use = self.use
        message = self._missing(snapshot) if use is None else ("", "")
        self.query_one(Placeholder).set_message(*message)
        self.query_one("#parts").display = not message[0]
        spans: list[Span] = [("Parameter groups and memory", "title")]
        right = ""
        if use is not None:
            spans.append((self.requests.read_at, "text"))
            right = f"read in {milliseconds(self.requests.took_ms, 0)}"
            if snapshot.status.ended:
                spans.append((ending(snapshot), "warning"))
        self.query_one("#moment", Caption).update(spans, right, right_is_optional=True)
        self.query_one(GroupsView).show(use)
        self.table.show(use)
        self.call_after_refresh(self._lay_out)

    def _missing(self, snapshot: Snapshot) -> tuple[str, str]:
        """Why there is nothing to see, and what to do."""
        unavailable = self.requests.unavailable(snapshot)
        return unavailable if unavailable[0] else placeholder_message(snapshot, READING)

    def _lay_out(self) -> None:
        """Put groups and table side by side where both fit; else give the groups the rows that they
        need, but leave some to the table."""
        beside = self.app.size.width >= MIN_WIDTH_BESIDE
        self.set_class(beside, "-beside")
        self.set_class(self.app.size.width >= MIN_WIDTH_FOR_WIDE_GROUPS, "-wide")
        view = self.query_one(GroupsView)
        room = max(4, self.app.size.height - ROWS_KEPT)
        view.styles.height = None if beside else min(max(1, view.line_count()), room)

    def on_groups_view_rebuilt(self) -> None:
        """Lay out again, since the groups may need another number of rows."""
        self._lay_out()

    # ------------------------------------------------------------ actions

    def action_read(self) -> None:
        """Read the groups again, even while the run is running."""
        if not self.context.snapshot.status.ended and not self.requests.pending:
            self.requests.retries = 0
            self._ask()

    def action_back(self) -> None:
        self.dismiss()

    def on_virtual_table_activated(self, event: VirtualTable.Activated) -> None:
        """Inspect the parameter under the cursor."""
        self.context.inspected = TensorRef(self.table.listed[event.row].name)
        self.dismiss()

    def on_resize(self, event: events.Resize) -> None:
        super().on_resize(event)
        self.call_after_refresh(self._lay_out)
