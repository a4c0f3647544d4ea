"""The autograd graph of the current step: from the loss through the modules to the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.autograd import AutogradGraph, DescribeGraph
from tui_trainer.protocol.formatting import milliseconds, number
from tui_trainer.protocol.inspection import NOT_CAPTURED, Inspected, TensorRef
from tui_trainer.ui.panels.autograd import GraphTable, NodeDetails, graph_spans
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, RANK_BINDING, DetailScreen
from tui_trainer.ui.screens.inspection_requests import InspectionRequests
from tui_trainer.ui.screens.saving import save_graph
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.search import SearchInput
from tui_trainer.ui.widgets.table import VirtualTable

MIN_WIDTH_BESIDE, MIN_HEIGHT_BELOW = 118, 30
"""Size from which the details are shown next to the graph, or else below it."""
MIN_WIDTH_WIDE = 160
"""Width from which the details are wider."""
READING = "running the forward pass of this step again …"
NO_GRAPH = "no graph was read yet"


class AutogradScreen(DetailScreen):
    """A tree that opens module by module, and the details of the row under the cursor."""

    CSS = """
    AutogradScreen #graph { margin: 0 1; }
    AutogradScreen #parts { height: 1fr; margin: 0 1; }
    AutogradScreen #beside { width: 40; margin-left: 2; display: none; }
    AutogradScreen #below { height: 9; margin: 1 1 0 1; display: none; }
    AutogradScreen.-beside #beside { display: block; }
    AutogradScreen.-wide #beside { width: 72; }
    AutogradScreen.-below #below { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "search", "Search", key_display="/", id="autograd.search",
                tooltip="Show only rows with these words: an operation, a module, a parameter"),
        Binding("u", "repeats", "Repeats", id="autograd.repeats",
                tooltip="Equal blocks as one, or each by itself"),
        Binding("r", "read", "Read again", id="autograd.read",
                tooltip="Run the forward and backward pass of this step again"),
        Binding("i", "inspect", "Inspect", id="autograd.inspect",
                tooltip="Open the parameter under the cursor in the inspector"),
        Binding("w", "save", "Write", id="autograd.save", show=False,
                tooltip="Write the graph to an .svg, .dot or .json file"),
        Binding("escape", "clear", "Clear", show=False, id="autograd.clear",
                tooltip="Show all rows again"),
        RANK_BINDING,
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.graph: AutogradGraph | None = None
        self.requests = InspectionRequests(self)

    def body(self) -> Iterable[Widget]:
        yield Caption(id="graph")
        yield Placeholder()
        with Horizontal(id="parts"):
            yield GraphTable()
            yield NodeDetails(id="beside")
        with Vertical(id="below"):
            yield NodeDetails()
        yield SearchInput("operation, module or parameter with these words")

    @property
    def table(self) -> GraphTable:
        return self.query_one(GraphTable)

    def on_mount(self) -> None:
        self.table.focus()

    # ------------------------------------------------------------ reading

    def show_body(self, snapshot: Snapshot) -> None:
        status = snapshot.status
        live = not status.ended and snapshot.link.state in ("live", "replay")
        if live and not self.requests.pending and self.requests.in_front:
            now, asked_at = self.requests.now(), self.requests.asked_at
            stopped = status.state == "paused" and now != asked_at
            other = asked_at is None or asked_at.rank != now.rank
            if stopped or (other and status.step > 0):
                self.requests.retries = 0
                self._ask()
        self._draw(snapshot)

    def _ask(self) -> None:
        self.requests.send(DescribeGraph(), self._answered)

    def _answered(self, answer: Inspected) -> None:
        status = self.context.snapshot.status
        result = answer.result
        live = isinstance(result, AutogradGraph) and result.source == "live"
        early = (answer.message == NOT_CAPTURED or live) and status.state == "running"
        if early and self.requests.may_retry():  # a run keeps its batches from the first request on
            self._ask()
            return
        self.graph = self.requests.result(answer, AutogradGraph)
        self.table.show(self.graph)
        self._show_details()
        self._draw(self.context.snapshot)

    # ------------------------------------------------------------ drawing

    def _draw(self, snapshot: Snapshot) -> None:
        message, hint = self._missing(snapshot) if self.graph is None else ("", "")
        self.query_one(Placeholder).set_message(message, hint)
        self.query_one("#parts").display = not message
        spans: list[Span] = [("Autograd graph", "title")]
        right = ""
        if self.graph is not None:
            if self.graph.loss is not None:
                spans.append((f"loss {number(self.graph.loss, 0)}", "accent"))
            spans.append((self.requests.read_at, "text"))
            if self.graph.source == "live":
                spans.append(("without gradients", "warning"))
            spans += graph_spans(self.graph, self.app.size.width >= MIN_WIDTH_BESIDE)
            right = f"read in {milliseconds(self.requests.took_ms, 0)}"
        self.query_one("#graph", Caption).update(spans, right, right_is_optional=True)

    def _missing(self, snapshot: Snapshot) -> tuple[str, str]:
        if self.requests.pending and not self.requests.refusal[0]:
            return READING, ""
        unavailable = self.requests.unavailable(snapshot, recorded=True)
        return unavailable if unavailable[0] else placeholder_message(snapshot, NO_GRAPH)

    def _show_details(self) -> None:
        for details in self.query(NodeDetails):
            details.show(self.graph, self.table.selected)

    def on_virtual_table_highlighted(self) -> None:
        """Describe the row under the cursor."""
        self._show_details()

    def on_virtual_table_activated(self, event: VirtualTable.Activated) -> None:
        """Open or close a module, or inspect a parameter."""
        if self.table.row_at(event.row).children:
            self.table.toggle()
        else:
            self.action_inspect()

    # ------------------------------------------------------------ actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim the keys that have nothing to act on."""
        if action in ("search", "repeats", "save"):
            return True if self.graph is not None else None
        if action == "inspect":
            row = self.table.selected if self.is_mounted else None
            return True if row is not None and row.kind == "leaf" else None
        return super().check_action(action, parameters)

    def action_search(self) -> None:
        self.query_one(SearchInput).open()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as the text is typed."""
        self.table.filter = event.value.strip()
        self.table.rebuild()

    def on_search_input_closed(self) -> None:
        self.table.focus()

    def action_clear(self) -> None:
        self.query_one(SearchInput).value = ""

    def action_repeats(self) -> None:
        """Show equal blocks as one, or each by itself."""
        self.table.repeats = not self.table.repeats
        self.table.rebuild()

    def action_read(self) -> None:
        """Read the graph again, even while the run is running."""
        status = self.context.snapshot.status
        if not status.ended and not self.requests.pending:
            self.requests.retries = 0
            self._ask()

    def action_save(self) -> None:
        """Write the graph that is shown to a file."""
        if self.graph is not None:
            loss = "" if self.graph.loss is None else f"loss {number(self.graph.loss, 0, 6)} · "
            info = self.context.snapshot.info
            title = f"{info.name if info else ''} · {loss}{self.requests.read_at}"
            save_graph(self, self.graph, title, self.table.repeats)

    def action_inspect(self) -> None:
        row = self.table.selected
        if row is not None and row.kind == "leaf" and row.path:
            self.context.show_tensor(TensorRef(row.path))

    def on_resize(self, event: events.Resize) -> None:
        """Put the details where there is room for them."""
        super().on_resize(event)
        beside = event.size.width >= MIN_WIDTH_BESIDE
        self.set_class(beside, "-beside")
        self.set_class(event.size.width >= MIN_WIDTH_WIDE, "-wide")
        self.set_class(not beside and event.size.height >= MIN_HEIGHT_BELOW, "-below")
