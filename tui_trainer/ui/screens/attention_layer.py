"""One attention layer of the live run: what a head attends to and what it adds to the stream, for
one example of the batch of the step, read again at each stop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical
from textual.widget import Widget

from tui_trainer.client.answers.attention import position_label
from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import Phase
from tui_trainer.protocol.attention import AttentionExamination, ExamineAttention
from tui_trainer.protocol.formatting import milliseconds
from tui_trainer.protocol.inspection import NOT_CAPTURED, Inspected
from tui_trainer.ui.panels.attention.attention_map import AttentionMapView
from tui_trainer.ui.panels.attention.examined_heads import AttentionHeadsTable, SpectraView
from tui_trainer.ui.panels.attention.input_view import InputView
from tui_trainer.ui.panels.attention.query_table import QueryTable
from tui_trainer.ui.panels.attention.residual_stream import ResidualNotes, ResidualTable
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.tensor import ZOOM, Viewport
from tui_trainer.ui.screens.base import (
    CONTROL_BINDINGS,
    RANK_BINDING,
    DetailScreen,
)
from tui_trainer.ui.screens.dialogs import NumberPrompt
from tui_trainer.ui.screens.inspection_requests import InspectionRequests, ending, last_edit
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.table import VirtualTable
from tui_trainer.ui.widgets.tabs import TabLine

Tab = Literal["map", "input", "query", "heads", "residual"]
TABS: tuple[Tab, ...] = get_args(Tab)
TAB_NAMES = ("Map", "Text or image", "Query by keys", "Heads", "Residual stream")
MIN_WIDTH_TOGETHER = 112
"""Width from which the map, the text and the query are side by side."""
ROOMY_WIDTH = 140
"""Width from which there is room for bars next to the weights."""
SPECTRA_ROWS = 9
READING, WAITING = "reading …", "waiting for the end of the current step"
SKIPPED = "the batch of the next step is being kept"


@dataclass(frozen=True)
class _SentAttentionRequest:
    """A request that was sent, and the moment that it was sent for."""

    request: ExamineAttention
    moment: tuple[int, Phase | Literal[""], bool, int]
    """(step, phase, whether the run was paused, id of the last edit)"""
    rank: int


TEXT_SHARE = 40
"""Largest share of the rows, in percent, for a text above the table."""


class AttentionLayerScreen(DetailScreen):
    """The examination of one layer. Enter on a layer of the attention screen opens it; escape
    returns."""

    CSS = """
    AttentionLayerScreen Caption { margin: 0 1; }
    AttentionLayerScreen .tab { display: none; height: 1fr; margin: 0 1; }
    AttentionLayerScreen AttentionMapView, AttentionLayerScreen #beside { display: none; }
    AttentionLayerScreen #beside { width: 1fr; }
    AttentionLayerScreen.-map #looks, AttentionLayerScreen.-input #looks,
    AttentionLayerScreen.-query #looks { display: block; }
    AttentionLayerScreen.-map AttentionMapView { display: block; }
    AttentionLayerScreen.-input #beside, AttentionLayerScreen.-query #beside { display: block; }
    AttentionLayerScreen.-input QueryTable { display: none; }
    AttentionLayerScreen.-query InputView { display: none; }
    AttentionLayerScreen.-together AttentionMapView { display: block; width: 3fr; margin: 0 1 0 0; }
    AttentionLayerScreen.-together #beside { display: block; width: 2fr; max-width: 48; }
    AttentionLayerScreen.-roomy #beside { max-width: 80; }
    AttentionLayerScreen.-together InputView { display: block; height: 2fr; }
    AttentionLayerScreen.-together QueryTable { display: block; height: 3fr; margin: 1 0 0 0; }
    AttentionLayerScreen.-heads #heads { display: block; }
    AttentionLayerScreen SpectraView { height: 8; margin: 1 0 0 0; }
    AttentionLayerScreen.-residual #residual { display: block; }
    AttentionLayerScreen ResidualNotes { height: 3; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "tab(1)", "View", id="attention_layer.tab",
                tooltip="The next view: map, text or image, query by keys, heads, residual stream"),
        Binding("M", "tab(-1)", "Previous view", id="attention_layer.tab_back", show=False,
                tooltip="The previous view"),
        Binding("h", "head(1)", "Head", id="attention_layer.head", tooltip="The next head"),
        Binding("H", "head(-1)", "Previous head", id="attention_layer.head_back", show=False,
                tooltip="The previous head"),
        Binding("right", "query(1)", "Query", key_display="←→", id="attention_layer.query",
                tooltip="The next position as the query"),
        Binding("left", "query(-1)", "Previous query", id="attention_layer.query_back", show=False,
                tooltip="The previous position as the query"),
        Binding("y", "position", "Position", id="attention_layer.position", show=False,
                tooltip="Ask for the position of the query"),
        Binding("i", "sample(1)", "Example", id="attention_layer.sample",
                tooltip="The next example of the batch"),
        Binding("I", "sample(-1)", "Previous example", id="attention_layer.sample_back",
                show=False, tooltip="The previous example of the batch"),
        Binding("right_square_bracket", "layer(1)", "Layer", key_display="[]",
                id="attention_layer.layer", tooltip="The next attention layer"),
        Binding("left_square_bracket", "layer(-1)", "Previous layer", show=False,
                key_display="[", id="attention_layer.layer_back",
                tooltip="The previous attention layer"),
        Binding("o", "order", "Sort", id="attention_layer.order",
                tooltip="Keys by their weights or in order; the stream with or without heads"),
        Binding("plus,equals_sign", "zoom(1)", "Zoom", key_display="+",
                id="attention_layer.zoom_in", show=False,
                tooltip="A smaller part of the map, around the query"),
        Binding("minus", "zoom(-1)", "Zoom out", key_display="-", show=False,
                id="attention_layer.zoom_out", tooltip="A larger part of the map"),
        Binding("f", "fit", "Whole", id="attention_layer.fit", show=False,
                tooltip="The whole map"),
        Binding("escape", "back", "Back", id="attention_layer.back",
                tooltip="To the attention screen"),
        RANK_BINDING,
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self, layer: str = "", head: int = 0) -> None:
        super().__init__()
        self.chosen_layer = layer
        self.head = head
        self.query_position: int | None = None
        """None: the last position of the sequence."""
        self.sample = 0
        self.found: AttentionExamination | None = None
        """The examination on the screen."""
        self.viewport = Viewport()
        self.viewport.reduction = "max_abs"
        self._tab = 0
        self._asked: _SentAttentionRequest | None = None
        self.requests = InspectionRequests(self)

    def body(self) -> Iterable[Widget]:
        yield Caption(id="what")
        yield TabLine(TAB_NAMES)
        yield Caption(id="how")
        yield Placeholder()
        yield Horizontal(
            AttentionMapView(), Vertical(InputView(), QueryTable(), id="beside"), id="looks",
            classes="tab",
        )  # fmt: skip
        yield Container(AttentionHeadsTable(), SpectraView(), id="heads", classes="tab")
        yield Container(ResidualTable(), ResidualNotes(), id="residual", classes="tab")

    def on_mount(self) -> None:
        self._choose(self._tab)

    @property
    def tab(self) -> Tab:
        return TABS[self._tab]

    @property
    def map_view(self) -> AttentionMapView:
        return self.query_one(AttentionMapView)

    # ------------------------------------------------------------ reading

    def show_body(self, snapshot: Snapshot) -> None:
        self._read(snapshot)
        self._draw(snapshot)

    @property
    def _shows_map(self) -> bool:
        return self.tab == "map" or self.has_class("-together")

    def _request(self) -> ExamineAttention:
        visible = self._shows_map and self.map_view.view_size.height > 3
        window = self.viewport.window(self.map_view.pixels) if visible else None
        return ExamineAttention(
            self.chosen_layer, self.head, self.query_position, self.sample, window,
            weights=self.tab == "heads", residual=self.tab == "residual",
        )  # fmt: skip

    def _read(self, snapshot: Snapshot) -> None:
        """Request the layer, unless the screen shows its present state."""
        status = snapshot.status
        if status.ended or snapshot.link.state != "live" or not self.requests.in_front:
            return
        paused = status.state == "paused"
        rank = self.context.inspected_rank
        wanted = _SentAttentionRequest(
            self._request(), (status.step, status.phase, paused, last_edit(snapshot)), rank
        )
        last = self._asked
        if wanted == last:
            return
        moved = last is None or (wanted.request, rank) != (last.request, last.rank)
        if not moved and not paused and not self.requests.may_ask_again:
            return
        self.requests.send(wanted.request, self._answered, self._given_up)
        self._asked = wanted

    def _given_up(self) -> None:
        """Send the request, which another one has replaced, again when this screen is in front."""
        self._asked = None

    def _answered(self, answer: Inspected) -> None:
        if answer.message == NOT_CAPTURED and self.context.snapshot.status.state == "running":
            self._asked = None
            if self.found is None:
                self.requests.refusal = (SKIPPED, "")
        else:
            self.found = self.requests.result(answer, AttentionExamination)
            if self.found is not None:
                self.chosen_layer = self.found.layer
                if not self.found.missing:
                    self.query_position = self.found.query
        self._draw(self.context.snapshot)

    # ------------------------------------------------------------ drawing

    def _draw(self, snapshot: Snapshot) -> None:
        found = self.found
        message = self._message(snapshot)
        self.query_one(Placeholder).set_message(*message)
        if found is not None:
            room = max(4, self.size.height - 6 - SPECTRA_ROWS)
            heads = self.query_one(AttentionHeadsTable)
            heads.styles.height = min(found.heads + 2, room)
        for each in self.query(".tab"):
            each.styles.visibility = "hidden" if message[0] else "visible"
            each.styles.height = 0 if message[0] else "1fr"
        spans, right = self._caption(snapshot)
        self.query_one("#what", Caption).update(spans, right, right_is_optional=True)
        self.query_one("#how", Caption).update(self._how())
        shown = found if not message[0] else None
        self.map_view.show_attention(shown, READING)
        self.query_one(InputView).show_attention(shown)
        self._fit_text()
        self.query_one(QueryTable).show_attention(shown)
        self.query_one(AttentionHeadsTable).show_attention(shown)
        self.query_one(SpectraView).show_attention(shown)
        self.query_one(ResidualTable).show_attention(shown)
        self.query_one(ResidualNotes).show_attention(shown)

    def _message(self, snapshot: Snapshot) -> tuple[str, str]:
        """Why there is nothing to see, and what to do."""
        found = self.found
        if found is not None:
            if found.missing and self.tab != "heads":
                return found.missing, "the view of the heads has their weights"
            return "", ""
        unavailable = self.requests.unavailable(snapshot)
        if unavailable[0]:
            return unavailable
        waiting = WAITING if snapshot.status.state != "paused" else READING
        return placeholder_message(snapshot, waiting, "attention")

    def _caption(self, snapshot: Snapshot) -> tuple[list[Span], str]:
        found = self.found
        if found is None:
            return [(self.chosen_layer or "Attention", "accent")], ""
        spans: list[Span] = [(found.layer, "accent")]
        spans.append((f"head {found.head} of {found.heads}", "text"))
        if not found.missing:
            label = position_label(found, found.query)
            spans.append((f"query {found.query:,} of {found.queries:,}", "text"))
            if label:
                spans.append((label, "accent"))
        spans.append((f"example {found.sample} of {found.samples:,}", "text"))
        if snapshot.status.ended:
            spans.append((ending(snapshot), "warning"))
        return spans, f"{self.requests.read_at}, read in {milliseconds(self.requests.took_ms, 0)}"

    def _how(self) -> list[Span]:
        """The deviation from what the examination was checked against, and the first note."""
        found = self.found
        if found is None or found.missing:
            return []
        spans: list[Span] = [("checked", "good")]
        spans.append((f"within {found.deviation:.0e} of {found.checked}", "dim"))
        return [*spans, *((note, "warning") for note in found.notes[:1])]

    # ------------------------------------------------------------ choosing

    def _show(self) -> None:
        self.show(self.context.snapshot)

    def action_tab(self, by: int) -> None:
        """Show the next or previous view."""
        self._choose((self._tab + by) % len(TABS))

    def on_tab_line_chosen(self, event: TabLine.Chosen) -> None:
        self._choose(event.number)

    def _choose(self, number: int) -> None:
        self._tab = number
        self.query_one(TabLine).choose(number)
        for name in TABS:
            self.set_class(name == self.tab, f"-{name}")
        self._lay_out()
        tables: dict[str, type[VirtualTable]] = {
            "heads": AttentionHeadsTable,
            "residual": ResidualTable,
        }
        self.query_one(tables.get(self.tab, QueryTable)).focus()
        self.call_after_refresh(self._show)

    def _lay_out(self) -> None:
        """Show map, text and query together where they fit."""
        together = self.tab in ("map", "input", "query")
        width = self.app.size.width
        self.set_class(together and width >= MIN_WIDTH_TOGETHER, "-together")
        self.set_class(width >= ROOMY_WIDTH, "-roomy")
        self.call_after_refresh(self._fit_text)

    def _fit_text(self) -> None:
        """Give a short text above the query's table only the rows that it needs."""
        view = self.query_one(InputView)
        needed = view.text_height(view.view_size.width)
        most = self.query_one("#beside").size.height * TEXT_SHARE // 100
        short = self.has_class("-together") and 0 < needed < most
        view.styles.height = needed if short else None

    def action_head(self, by: int) -> None:
        heads = self.found.heads if self.found is not None else 0
        if heads:
            self.head = (self.head + by) % heads
            self._show()

    def action_query(self, by: int) -> None:
        if self.found is not None and self.found.queries:
            self._go_to((self.found.query if self.query_position is None else self.query_position)
                        + by)  # fmt: skip

    def _go_to(self, position: int) -> None:
        queries = self.found.queries if self.found is not None else 1
        self.query_position = min(max(0, position), queries - 1)
        self._show()

    def action_position(self) -> None:
        """Ask for the position of the query."""

        def chosen(position: float | None) -> None:
            if position is not None:
                self._go_to(int(position))

        current = str(self.query_position or 0)
        self.app.push_screen(NumberPrompt("Position of the query", current, whole=True), chosen)

    def action_sample(self, by: int) -> None:
        samples = self.found.samples if self.found is not None else 0
        if samples:
            self.sample = (self.sample + by) % samples
            self._show()

    def action_layer(self, by: int) -> None:
        """The next or previous layer, with the same head if it has that many."""
        layers = self.found.layers if self.found is not None else ()
        if self.chosen_layer in layers:
            self.chosen_layer = layers[(layers.index(self.chosen_layer) + by) % len(layers)]
            info = self.context.snapshot.info
            heads = {each.layer: each.heads for each in info.attention} if info else {}
            self.head = min(self.head, (heads.get(self.chosen_layer) or 1) - 1)
            self._show()

    def action_order(self) -> None:
        """Sort the keys by their weights, or show the stream without its heads."""
        if self.tab == "residual":
            table = self.query_one(ResidualTable)
            table.heads_shown = not table.heads_shown
            table.rearrange()
            table.update_rows()
        else:
            keys = self.query_one(QueryTable)
            keys.by_weight = not keys.by_weight
            keys.rearrange()
            keys.update_rows()

    def action_zoom(self, direction: int) -> None:
        """Show a smaller (1) or a larger (-1) part of the map, around the query."""
        found = self.found
        if found is not None and found.map is not None:
            self.viewport.zoom(found.map.matrix, ZOOM**-direction)
            if self.viewport.rows is not None:
                self.viewport.rows = _around(self.viewport.rows, found.query, found.queries)
            if self.viewport.columns is not None:
                self.viewport.columns = _around(self.viewport.columns, found.query, found.keys)
            self._show()

    def action_fit(self) -> None:
        self.viewport.reset()
        self._show()

    def action_back(self) -> None:
        self.dismiss()

    def on_virtual_table_activated(self, event: VirtualTable.Activated) -> None:
        """Make a key the query, or choose a head."""
        if isinstance(event.table, QueryTable):
            self._go_to(event.row)
        elif isinstance(event.table, AttentionHeadsTable):
            self.head = event.row
            self._show()

    def on_resize(self, event: events.Resize) -> None:
        super().on_resize(event)
        self._lay_out()
        self.call_after_refresh(self._show)

    def on_heat_map_view_resized(self) -> None:
        """Request as many cells as fit now."""
        self._show()


def _around(part: tuple[int, int], place: int, size: int) -> tuple[int, int]:
    """A range as long as `part`, around `place` and within 0..size."""
    span = part[1] - part[0]
    first = min(max(0, place - span // 2), size - span)
    return first, first + span
