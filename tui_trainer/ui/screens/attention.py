"""Wq, Wk and Wv of every attention layer: statistics with their trends, heads, and charts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.attention.heads_table import HeadsTable
from tui_trainer.ui.panels.attention.statistic_table import MODEL_ORDER, StatisticTable
from tui_trainer.ui.panels.attention.statistics import (
    NO_ATTENTION,
    SHOWN_STATISTICS,
    Statistic,
    missing_statistic_message,
)
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.staleness import staleness
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.form import PromptLine
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.series_chart import SeriesChart
from tui_trainer.ui.widgets.table import VirtualTable
from tui_trainer.ui.widgets.tabs import TabLine
from tui_trainer.ui.widgets.text import Caption, Placeholder

CHART = (39, 9)
"""Cells that a chart needs, with the gap beside it, so that its axis can be read."""
BESIDE, STACKED = 150, 32
"""Columns from which layers and heads stand beside each other, rows from which below."""
AROUND = 6
"""Rows of header, names of the statistics, explanation, the layer's line, and keys."""


class AttentionScreen(DetailScreen):
    """The dear statistics are measured only while this screen is open: it says so to the run."""

    topics = frozenset({schema.ATTENTION_HEADS, schema.ATTENTION_SPECTRUM, schema.ATTENTION_HEALTH})

    CSS = """
    AttentionScreen Caption { margin: 0 1; }
    AttentionScreen #upper { height: auto; margin: 0 1; layout: vertical; }
    AttentionScreen HeadsTable { display: none; }
    AttentionScreen #charts { height: 1fr; margin: 0 1; layout: grid; grid-gutter: 0 2; }
    AttentionScreen.-heads StatisticTable { display: none; }
    AttentionScreen.-heads HeadsTable { display: block; }
    AttentionScreen.-both StatisticTable { display: block; }
    AttentionScreen.-both HeadsTable { display: block; margin-top: 1; }
    AttentionScreen.-beside #upper { layout: horizontal; }
    AttentionScreen.-beside HeadsTable { width: 80; margin: 0 0 0 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m,right", "statistic(1)", "Statistic", key_display="m", id="attention.statistic",
                tooltip="Show the next statistic of every layer"),
        Binding("M,left", "statistic(-1)", "Statistic before", id="attention.statistic_back",
                show=False, tooltip="Show the statistic before"),
        Binding("h", "heads", "Heads", id="attention.heads",
                tooltip="Layers, or the heads of the layer under the cursor"),
        Binding("slash", "filter", "Filter", key_display="/", id="attention.filter",
                tooltip="Show only layers whose name has these words; escape clears it"),
        Binding("o", "order", "Sort", id="attention.order",
                tooltip="Sort the layers by the next column"),
        Binding("l", "log", "Log scale", id="attention.log",
                tooltip="Logarithmic or linear charts"),
        Binding("escape", "clear", "Clear", id="attention.clear", show=False,
                tooltip="Clear the filter; from the heads back to the layers"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._chosen = 0
        self._log = False
        self._laid_out: object = None

    def body(self) -> Iterable[Widget]:
        """Statistics, what the chosen one means, layers and heads, charts."""
        yield TabLine([statistic.title for statistic in SHOWN_STATISTICS])
        yield Caption(id="means")
        yield Caption(id="healthy")
        yield Placeholder()
        yield Container(StatisticTable(), HeadsTable(), id="upper")
        yield PromptLine()
        yield Caption(id="layer")
        yield Container(*(SeriesChart() for _ in SHOWN_STATISTICS), id="charts")

    @property
    def statistic(self) -> Statistic:
        """The chosen one."""
        return SHOWN_STATISTICS[self._chosen]

    @property
    def by_layer(self) -> StatisticTable:
        """The layers."""
        return self.query_one(StatisticTable)

    def on_mount(self) -> None:
        """Keys go to the layers."""
        self._explain()
        self.by_layer.focus()

    def show_body(self, snapshot: Snapshot) -> None:
        """Layers, then what belongs to the one under the cursor."""
        known = snapshot.info is not None and bool(snapshot.info.attention)
        message = ("", "") if known else placeholder_message(snapshot, NO_ATTENTION, "attention")
        self.query_one(Placeholder).set_message(*message)
        for name in ("#upper", "#charts", "#layer"):
            self.query_one(name).display = known
        if known:
            assert snapshot.info is not None
            if self._laid_out != (len(snapshot.info.attention), self.size):
                self._lay_out()
            self.by_layer.show(snapshot)
            self._say_healthy()
            self._show_layer()

    def _show_layer(self) -> None:
        """Heads and charts of the layer under the cursor."""
        snapshot, row = self.context.snapshot, self.by_layer.current_row
        info = snapshot.info
        if info is None or row is None or row >= len(info.attention):
            filter = self.by_layer.filter
            self.by_layer.placeholder = f"no layer has “{filter}”: escape clears the filter"
            return
        layer = info.attention[row]
        heads = f"{layer.heads} heads" if layer.heads else ""
        if layer.key_value_heads and layer.key_value_heads != layer.heads:
            heads += f", {layer.key_value_heads} for keys and values"
        pieces: list[Span] = [(layer.layer, "accent"), (layer.kind, "dim"), (heads, "dim")]
        if layer.head_dim:
            pieces.append((f"{layer.head_dim} wide", "dim"))
        if layer.note:
            pieces.append((f"n/a: {layer.note}", "warning"))
        age = staleness(snapshot, snapshot.history.tables_named(schema.ATTENTION_HEADS))
        aged = f"heads {age}" if age and self.query_one(HeadsTable).display else ""
        said = [piece for piece in pieces if piece[0]]
        self.query_one("#layer", Caption).update(said, aged, right_is_optional=True)
        self.query_one(HeadsTable).show_layer(snapshot, layer, _why_no_heads(snapshot, layer))
        self._show_charts(snapshot, layer)

    def _show_charts(self, snapshot: Snapshot, layer: AttentionInfo) -> None:
        total = snapshot.info.total_steps if snapshot.info else None
        shown = self._ordered()
        charts = list(self.query(SeriesChart))
        for chart, statistic in zip(charts, shown, strict=False):
            location = statistic.location(snapshot, layer)
            curves = statistic.curves(layer, location) if location is not None else []
            optimizer = location.history.table.optimizer if location is not None else ""
            measured = location is not None and location.history.rows > 0
            missing = missing_statistic_message(statistic, snapshot, optimizer)
            chart.plot(
                statistic.title,
                location.history if location is not None else None,
                curves,
                placeholder=f"n/a: {layer.note}" if measured and not curves else missing,
                total_steps=total,
                log=self._log and not statistic.signed,
                selected=statistic is self.statistic,
            )

    def _ordered(self) -> list[Statistic]:
        """The statistics that have a chart: all in their order where they fit, else from the chosen
        one on."""
        count = sum(chart.display for chart in self.query(SeriesChart))
        if count >= len(SHOWN_STATISTICS):
            return list(SHOWN_STATISTICS)
        start = self._chosen
        return [SHOWN_STATISTICS[(start + i) % len(SHOWN_STATISTICS)] for i in range(count)]

    def _explain(self) -> None:
        statistic = self.statistic
        self.query_one(TabLine).choose(self._chosen)
        self.query_one("#means", Caption).update([(statistic.meaning, "text")])
        self._say_healthy()

    def _say_healthy(self) -> None:
        """What is healthy, and of when the values are."""
        statistic, snapshot = self.statistic, self.context.snapshot
        age = staleness(snapshot, snapshot.history.tables_named(statistic.table))
        pieces = [("healthy", "good"), (statistic.healthy, "dim")]
        self.query_one("#healthy", Caption).update(pieces, age)

    # ------------------------------------------------------------ actions

    def action_statistic(self, by: int) -> None:
        """Another statistic."""
        self._choose((self._chosen + by) % len(SHOWN_STATISTICS))

    def on_tab_line_chosen(self, event: TabLine.Chosen) -> None:
        """A click on its name."""
        self._choose(event.number)

    def _choose(self, number: int) -> None:
        self._chosen = number
        self._explain()
        self.by_layer.choose(self.statistic)
        self._show_layer()

    def action_heads(self) -> None:
        """The other of the two, or the focus where both are there."""
        heads = self.query_one(HeadsTable)
        if self.has_class("-both"):
            (self.by_layer if heads.has_focus else heads).focus()
            return
        self.toggle_class("-heads")
        (heads if self.has_class("-heads") else self.by_layer).focus()

    def action_order(self) -> None:
        """Sort by the next part of the statistic."""
        keys = [MODEL_ORDER, *self.statistic.parts]
        table = self.by_layer
        place = keys.index(table.sorted_by) if table.sorted_by in keys else 0
        self._sort(keys[(place + 1) % len(keys)])

    def on_virtual_table_sort_requested(self, event: VirtualTable.SortRequested) -> None:
        """A click on a title; a second one turns the order round."""
        table = self.by_layer
        key = "" if event.key == "value" else event.key
        if event.table is not table or key not in ("layer", *self.statistic.parts):
            return
        key = MODEL_ORDER if key == "layer" else key
        if key == table.sorted_by:
            table.descending = not table.descending
        self._sort(key)

    def _sort(self, key: str) -> None:
        self.by_layer.sorted_by = key
        self.by_layer.rearrange()
        self.by_layer.update_rows()

    def action_filter(self) -> None:
        """Type words."""
        self.query_one(PromptLine).ask("filter", "filter")

    def on_prompt_line_typed(self, event: PromptLine.Typed) -> None:
        """Filter as it is typed."""
        self._set_filter(event.text)
        if event.done:
            self.by_layer.focus()

    def action_clear(self) -> None:
        """All layers again."""
        if self.has_class("-heads") and not self.by_layer.filter:
            self.action_heads()
        self.query_one(PromptLine).clear("filter")
        self._set_filter("")

    def _set_filter(self, text: str) -> None:
        self.by_layer.filter = text
        self.by_layer.rearrange()
        self._show_layer()
        self.by_layer.update_rows()

    def action_log(self) -> None:
        """The other scale."""
        self._log = not self._log
        self._show_layer()

    def on_virtual_table_highlighted(self, event: VirtualTable.Highlighted) -> None:
        """Another layer."""
        if event.table is self.by_layer:
            self._show_layer()

    def on_resize(self, event: events.Resize) -> None:
        """As many charts as there is room for."""
        self._lay_out()

    def _lay_out(self) -> None:
        """Tables as high as they need, within a third of the screen; the charts have the rest."""
        width, height = self.size
        info = self.context.snapshot.info
        layers = info.attention if info else ()
        beside, room = width >= BESIDE, max(4, height - AROUND)
        both = beside or height >= STACKED
        first = min(len(layers) + 1, max(5, room // 3))
        second = min(max((layer.heads or 0 for layer in layers), default=0) + 1, 9)
        self.set_class(beside, "-beside")
        self.set_class(both, "-both")
        self.by_layer.styles.height = first = max(first, second) if beside else first
        self.query_one(HeadsTable).styles.height = first if beside or not both else second
        charts = room - first - (second + 1 if both and not beside else 0)
        across = max(1, (width - 2) // CHART[0])
        down = min(max(1, charts // CHART[1]), -(-len(SHOWN_STATISTICS) // across))
        grid = self.query_one("#charts")
        grid.styles.grid_size_columns = across
        grid.styles.grid_size_rows = down
        for place, chart in enumerate(self.query(SeriesChart)):
            chart.display = place < across * down
        self._laid_out = (len(layers), self.size)
        self.call_after_refresh(self._show_layer)


def _why_no_heads(snapshot: Snapshot, layer: AttentionInfo) -> str:
    """What stands where a layer's heads will be, or would."""
    unseen = snapshot.info.unseen if snapshot.info else {}
    if schema.ATTENTION_HEADS in unseen:
        return unseen[schema.ATTENTION_HEADS]
    if not (layer.heads and layer.key_value_heads):
        return "its heads are not known"
    if snapshot.status.ended:
        return "the run ended before this was measured"
    return "measured while this is open: soon here"
