"""Wq, Wk and Wv of every attention layer: statistics with their trends, heads, and charts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.attention.statistics import (
    NO_ATTENTION,
    SHOWN_STATISTICS,
    Statistic,
    missing_statistic_message,
)
from tui_trainer.ui.panels.attention.tables import MODEL_ORDER, HeadsTable, StatisticTable
from tui_trainer.ui.panels.base import placeholder_message, staleness
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.chart import SeriesChart
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.search import SearchInput
from tui_trainer.ui.widgets.table import VirtualTable
from tui_trainer.ui.widgets.tabs import TabLine

CHART_SIZE = (39, 9)
"""Cells that a chart needs for a readable axis, including the gap to the next one."""
MIN_WIDTH_BESIDE = 150
"""Width from which layers and heads are side by side."""
MIN_HEIGHT_BOTH = 32
"""Height from which heads are below the layers; else one of the two is shown."""
ENTER = "enter: what it attends to"
FIXED_ROWS = 6
"""Rows of the header, the statistics' names, the explanation, the layer's line, and the keys."""


class AttentionScreen(DetailScreen):
    """Tables, heads and charts of the attention layers. The tables in `topics` are expensive and
    measured only while the screen is shown."""

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
        Binding("M,left", "statistic(-1)", "Previous statistic", id="attention.statistic_back",
                show=False, tooltip="Show the previous statistic"),
        Binding("h", "heads", "Heads", id="attention.heads",
                tooltip="Show the layers, or the heads of the layer under the cursor"),
        Binding("slash", "filter", "Filter", key_display="/", id="attention.filter",
                tooltip="Show only layers whose name contains these words; escape clears it"),
        Binding("o", "order", "Sort", id="attention.order",
                tooltip="Sort the layers by the next column"),
        Binding("l", "log", "Log scale", id="attention.log",
                tooltip="Logarithmic or linear charts"),
        Binding("escape", "clear", "Clear", id="attention.clear", show=False,
                tooltip="Clear the filter; from the heads return to the layers"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._chosen = 0
        self._log_scale: bool | None = None
        """Whether all charts are logarithmic; None: each chart as suits its values."""
        self._layout_key: tuple[int, Size] | None = None
        """The number of layers and the size that the screen was laid out for."""

    def body(self) -> Iterable[Widget]:
        yield TabLine([statistic.title for statistic in SHOWN_STATISTICS])
        yield Caption(id="means")
        yield Caption(id="healthy")
        yield Placeholder()
        yield Container(StatisticTable(), HeadsTable(), id="upper")
        yield SearchInput("names with these words")
        yield Caption(id="layer")
        yield Container(*(SeriesChart() for _ in SHOWN_STATISTICS), id="charts")

    @property
    def statistic(self) -> Statistic:
        """The chosen statistic."""
        return SHOWN_STATISTICS[self._chosen]

    @property
    def layer_table(self) -> StatisticTable:
        return self.query_one(StatisticTable)

    def on_mount(self) -> None:
        self._explain()
        self.layer_table.focus()

    def show_body(self, snapshot: Snapshot) -> None:
        known = snapshot.info is not None and bool(snapshot.info.attention)
        message = ("", "") if known else placeholder_message(snapshot, NO_ATTENTION, "attention")
        self.query_one(Placeholder).set_message(*message)
        for selector in ("#upper", "#charts", "#layer"):
            self.query_one(selector).display = known
        if known:
            assert snapshot.info is not None
            if self._layout_key != (len(snapshot.info.attention), self.size):
                self._lay_out()
            self.layer_table.show(snapshot)
            self._show_healthy()
            self._show_layer()

    def _show_layer(self) -> None:
        """Description, heads and charts of the layer under the cursor."""
        snapshot, row = self.context.snapshot, self.layer_table.current_row
        info = snapshot.info
        if info is None or row is None or row >= len(info.attention):
            self.layer_table.placeholder = (
                f"no layer contains “{self.layer_table.filter}”: escape clears the filter"
            )
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
        age_text = f"heads {age}" if age and self.query_one(HeadsTable).display else ""
        caption = self.query_one("#layer", Caption)
        shown = [piece for piece in pieces if piece[0]]
        caption.update(shown, age_text or ENTER, right_is_optional=True)
        self.query_one(HeadsTable).show_layer(snapshot, layer, _why_no_heads(snapshot, layer))
        self._show_charts(snapshot, layer)

    def _show_charts(self, snapshot: Snapshot, layer: AttentionInfo) -> None:
        total = snapshot.info.total_steps if snapshot.info else None
        charts = list(self.query(SeriesChart))
        for chart, statistic in zip(charts, self._charted_statistics(), strict=False):
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
                log=None if statistic.signed else self._log_scale,
                selected=statistic is self.statistic,
                band=statistic.band,
                related=snapshot.related,
            )

    def _charted_statistics(self) -> list[Statistic]:
        """All statistics where their charts fit, else as many as fit from the chosen one on."""
        count = sum(chart.display for chart in self.query(SeriesChart))
        if count >= len(SHOWN_STATISTICS):
            return list(SHOWN_STATISTICS)
        start = self._chosen
        return [SHOWN_STATISTICS[(start + i) % len(SHOWN_STATISTICS)] for i in range(count)]

    def _explain(self) -> None:
        """Explain the chosen statistic and its healthy values."""
        self.query_one(TabLine).choose(self._chosen)
        self.query_one("#means", Caption).update([(self.statistic.meaning, "text")])
        self._show_healthy()

    def _show_healthy(self) -> None:
        statistic, snapshot = self.statistic, self.context.snapshot
        age = staleness(snapshot, snapshot.history.tables_named(statistic.table))
        pieces: list[Span] = [("healthy", "good"), (statistic.healthy, "dim")]
        unhealthy = self.layer_table.unhealthy
        if unhealthy:
            pieces.insert(0, (f"{counted(unhealthy, 'value')} outside", "warning bold"))
        self.query_one("#healthy", Caption).update(pieces, age)

    # ------------------------------------------------------------ actions

    def action_statistic(self, by: int) -> None:
        """Choose the next or previous statistic."""
        self._choose((self._chosen + by) % len(SHOWN_STATISTICS))

    def on_tab_line_chosen(self, event: TabLine.Chosen) -> None:
        self._choose(event.number)

    def _choose(self, number: int) -> None:
        self._chosen = number
        self.layer_table.choose(self.statistic)
        self._explain()
        self._show_layer()

    def select(self, name: str) -> None:
        """Put the cursor on a layer, and show the statistic of a column (`layer.statistic`)."""
        info = self.context.snapshot.info
        layers = [layer.layer for layer in info.attention] if info else []
        layer, _, column = name.rpartition(".")
        if name not in layers and layer in layers:
            for number, statistic in enumerate(SHOWN_STATISTICS):
                if column in map(statistic.column, statistic.parts):
                    self._choose(number)
        else:
            layer = name
        if layer in layers:
            row = layers.index(layer)
            places = (self.layer_table.order == row).nonzero()[0]
            if len(places):
                self.layer_table.move_cursor(int(places[0]))

    def action_heads(self) -> None:
        """Show the other table, or move the focus to it where both are shown."""
        heads = self.query_one(HeadsTable)
        if self.has_class("-both"):
            (self.layer_table if heads.has_focus else heads).focus()
            return
        self.toggle_class("-heads")
        (heads if self.has_class("-heads") else self.layer_table).focus()

    def action_order(self) -> None:
        """Sort by the next part of the statistic."""
        keys = [MODEL_ORDER, *self.statistic.parts]
        sorted_by = self.layer_table.sorted_by
        number = keys.index(sorted_by) if sorted_by in keys else 0
        self._sort_by(keys[(number + 1) % len(keys)])

    def on_virtual_table_sort_requested(self, event: VirtualTable.SortRequested) -> None:
        """Sort by a title that was clicked; a second click reverses the order."""
        key = "" if event.key == "value" else event.key
        if event.table is not self.layer_table or key not in ("layer", *self.statistic.parts):
            return
        key = MODEL_ORDER if key == "layer" else key
        if key == self.layer_table.sorted_by:
            self.layer_table.descending = not self.layer_table.descending
        self._sort_by(key)

    def _sort_by(self, key: str) -> None:
        self.layer_table.sorted_by = key
        self.layer_table.rearrange()
        self.layer_table.update_rows()

    def action_filter(self) -> None:
        self.query_one(SearchInput).open()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as the text is typed."""
        self.layer_table.filter = event.value
        self.layer_table.rearrange()
        self._show_layer()
        self.layer_table.update_rows()

    def on_search_input_closed(self) -> None:
        self.layer_table.focus()

    def action_clear(self) -> None:
        """Clear the filter; without one, return from the heads to the layers."""
        if self.has_class("-heads") and not self.layer_table.filter:
            self.action_heads()
        self.query_one(SearchInput).value = ""

    def action_log(self) -> None:
        """Switch between logarithmic and linear charts."""
        shown = [each for each in self.query(SeriesChart) if each.display]
        self._log_scale = not any(each.chart.drawn_log for each in shown)
        self._show_layer()

    def on_virtual_table_highlighted(self, event: VirtualTable.Highlighted) -> None:
        if event.table is self.layer_table:
            self._show_layer()

    def on_virtual_table_activated(self, event: VirtualTable.Activated) -> None:
        """Open a layer: what its heads attend to."""
        from tui_trainer.ui.screens.attention_layer import AttentionLayerScreen

        info, row = self.context.snapshot.info, self.layer_table.current_row
        if info is not None and row is not None and row < len(info.attention):
            head = event.row if isinstance(event.table, HeadsTable) else 0
            self.app.push_screen(AttentionLayerScreen(info.attention[row].layer, head))

    # ------------------------------------------------------------ layout

    def on_resize(self, event: events.Resize) -> None:
        self._lay_out()

    def _lay_out(self) -> None:
        """Give the tables the rows they need, up to a third of the screen; the charts the rest."""
        width, height = self.size
        info = self.context.snapshot.info
        layers = info.attention if info else ()
        beside, available = width >= MIN_WIDTH_BESIDE, max(4, height - FIXED_ROWS)
        both = beside or height >= MIN_HEIGHT_BOTH
        layer_rows = min(len(layers) + 1, max(5, available // 3))
        head_rows = min(max((layer.heads or 0 for layer in layers), default=0) + 1, 9)
        if beside:
            layer_rows = max(layer_rows, head_rows)
        self.set_class(beside, "-beside")
        self.set_class(both, "-both")
        self.layer_table.styles.height = layer_rows
        self.query_one(HeadsTable).styles.height = layer_rows if beside or not both else head_rows
        chart_rows = available - layer_rows - (head_rows + 1 if both and not beside else 0)
        across = max(1, (width - 2) // CHART_SIZE[0])
        down = min(max(1, chart_rows // CHART_SIZE[1]), -(-len(SHOWN_STATISTICS) // across))
        grid = self.query_one("#charts")
        grid.styles.grid_size_columns = across
        grid.styles.grid_size_rows = down
        for number, chart in enumerate(self.query(SeriesChart)):
            chart.display = number < across * down
        self._layout_key = (len(layers), self.size)
        self.call_after_refresh(self._show_layer)


def _why_no_heads(snapshot: Snapshot, layer: AttentionInfo) -> str:
    """What to show in place of a layer's heads."""
    unseen = snapshot.info.unseen if snapshot.info else {}
    if schema.ATTENTION_HEADS in unseen:
        return unseen[schema.ATTENTION_HEADS]
    if not (layer.heads and layer.key_value_heads):
        return "the number of heads is not known"
    if snapshot.status.ended:
        return "the run ended before this was measured"
    return "measured while this screen is open"
