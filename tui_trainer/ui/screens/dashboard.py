"""The dashboard: everything at a glance, and the keys that control the run."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.inspection import TensorRef
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.ui.guide import GuideLine
from tui_trainer.ui.panels.attention.overview import LayersTable, TrendChart
from tui_trainer.ui.panels.base import Panel, unavailable_reason
from tui_trainer.ui.panels.clipping import ClippingPanel
from tui_trainer.ui.panels.findings import FindingLine
from tui_trainer.ui.panels.gradients import GradientsPanel, SortKey
from tui_trainer.ui.panels.header import Banner, FactsLine, HeaderLine, ProgressLine
from tui_trainer.ui.panels.loss import LossPanel
from tui_trainer.ui.panels.phases import PhaseStrip
from tui_trainer.ui.panels.update_ratios import LearningRatePanel, UpdatesPanel
from tui_trainer.ui.screens.base import (
    CONTROL_BINDINGS,
    MIN_SIZE,
    ControlScreen,
    FoldingScreen,
    pause_label,
)
from tui_trainer.ui.screens.screen_tabs import ScreenTabs
from tui_trainer.ui.widgets.key_line import KeyLine, TooSmall
from tui_trainer.ui.widgets.search import SearchInput
from tui_trainer.ui.widgets.table import VirtualTable
from tui_trainer.ui.widgets.tabs import TabLine

TAB_PANELS = ("loss", "gradients", "clipping", "updates", "attention")
MAY_APPEAR = (Banner, FactsLine, FindingLine, GuideLine)
"""Panels that are hidden while they have nothing to say."""
SHOWN_TRENDS = (0, 1, 4)
"""Indices in TREND_STATISTICS: the first at every size, all where there is room."""
LARGE_SIZE = (160, 50)
"""Size from which updates and learning rate are shown next to attention and clipping."""


class DashboardScreen(FoldingScreen, ControlScreen):
    """Panels side by side, or one at a time with tabs where there is little room."""

    tabs = ("Loss", "Gradients", "Clipping", "Updates", "Wq Wk Wv")
    BINDINGS: ClassVar[list[BindingType]] = [
        *CONTROL_BINDINGS,
        Binding("slash", "filter", "Filter", key_display="/", id="dashboard.filter",
                tooltip="Show only parameters whose name contains these words; escape clears it"),
        Binding("o", "sort", "Sort", id="dashboard.sort",
                tooltip="Sort the gradients: in the model's order, by norm, by name"),
        Binding("l", "log('loss')", "Log scale", id="dashboard.log_loss",
                tooltip="Logarithmic axis of the loss"),
        Binding("L", "log('clipping')", "Log scale of the norm", show=False,
                id="dashboard.log_norm", tooltip="Logarithmic axis of the gradient norm"),
        Binding("w", "window", "Window", id="dashboard.window",
                tooltip="Steps in the charts: the whole run, the last 1,000, the last 200"),
        Binding("m", "trend", "Trend", id="dashboard.trend",
                tooltip="Statistic in the chart of Wq, Wk, Wv"),
        Binding("left", "tab(-1)", "Tab", show=False, id="dashboard.tab_left",
                tooltip="Show the previous panel; where all are shown: one step back, if paused"),
        Binding("right", "tab(1)", "Tab", show=False, id="dashboard.tab_right",
                tooltip="Show the next panel; where all are shown: one step forward, if paused"),
        Binding("escape", "clear_filter", "Clear", id="dashboard.clear", show=False,
                tooltip="Clear the filter"),
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._lacks = (False, False)
        """(run has no attention layers, run does not clip), as far as known: for a script both are
        assumed until a layer, or a clipping, is seen."""
        self._has_clipped = False
        self._panels: list[Panel | GradientsPanel | LayersTable] = []

    def compose(self) -> ComposeResult:
        yield TooSmall(*MIN_SIZE)
        yield HeaderLine()
        yield ScreenTabs()
        yield FindingLine()
        yield GuideLine()
        yield ProgressLine()
        yield FactsLine()
        yield PhaseStrip()
        yield Banner()
        yield TabLine(self.tabs)
        with Horizontal(id="body"):
            with Vertical(id="left"):
                yield LossPanel(id="loss")
                yield ClippingPanel(id="clipping")
                yield LearningRatePanel(id="learning-rate")
            yield GradientsPanel(id="gradients")
            with Vertical(id="attention"):
                yield LayersTable(id="layers")
                for number in range(len(SHOWN_TRENDS)):
                    yield TrendChart(SHOWN_TRENDS[number], id=f"trend-{number}")
            yield UpdatesPanel(id="updates")
        yield SearchInput("names with these words")
        yield KeyLine()

    # ------------------------------------------------------------ frames

    def show(self, snapshot: Snapshot) -> None:
        """Pass the snapshot to the visible panels."""
        self.query_one(LayersTable).styles.max_height = (
            min(3 + max(1, len(snapshot.info.attention)), 12) if snapshot.info else 4
        )
        clipping, info = self.query_one(ClippingPanel), snapshot.info
        shipped = info is None or info.task != SCRIPT
        self._has_clipped = self._has_clipped or shipped or clipping.has_clipped(snapshot)
        lacks = (
            bool(unavailable_reason(snapshot, "attention"))
            or not (shipped or (info and info.attention)),
            bool(unavailable_reason(snapshot, "clip")) or not self._has_clipped,
        )
        if lacks != self._lacks:
            self._lacks = lacks
            self.show_panels()
        for panel in self._panels:
            if panel.is_on_screen or isinstance(panel, MAY_APPEAR):
                panel.show(snapshot)
        keys = self.query_one(KeyLine)
        keys.labels["run.pause"] = pause_label(snapshot)
        keys.labels["demo.cure"] = self.context.cure_label
        keys.update_rows()

    def on_mount(self) -> None:
        self._panels = [
            widget
            for widget in self.query("*").results()
            if isinstance(widget, Panel | GradientsPanel | LayersTable)
        ]
        self.query_one("#gradients").focus()

    # ------------------------------------------------------------ layout

    def show_panels(self) -> None:
        """Show updates and learning rate in place of panels for which this run has no data."""
        no_attention, no_clipping = self._lacks
        self.query_one(ClippingPanel).clips = not no_clipping
        self.set_class(no_attention, "-no-attention")
        self.set_class(no_clipping, "-no-clipping")
        if self._folded:
            shown = {TAB_PANELS[self._tab]}
            if shown == {"clipping"} and no_clipping:
                shown.add("learning-rate")
        else:
            width, height = self.size
            large = width >= LARGE_SIZE[0] and height >= LARGE_SIZE[1]
            shown = {"loss", "gradients", "clipping"}
            shown.add("updates" if no_attention else "attention")
            if large:
                shown.add("updates")
            if no_clipping or height >= LARGE_SIZE[1]:
                shown.add("learning-rate")
        for name in (*TAB_PANELS, "learning-rate"):
            self.query_one(f"#{name}").display = name in shown
        self.query_one("#left").display = bool(shown & {"loss", "clipping"})

    def select(self, name: str) -> None:
        """Put the cursor of the gradients on a parameter, and open their tab."""
        gradients, info = self.query_one(GradientsPanel), self.context.snapshot.info
        listed = info is not None and any(each.name == name for each in info.parameters)
        if self._folded and listed and TAB_PANELS[self._tab] != "gradients":
            self.choose_tab(TAB_PANELS.index("gradients"))
            self.call_after_refresh(gradients.select, name)  # a hidden table cannot scroll
        else:
            gradients.select(name)

    # ------------------------------------------------------------ actions

    def action_tab(self, by: int) -> None:
        """Show the next or previous panel; where all are shown, go a step forward or back in a
        paused run."""
        if not self._folded:
            status, link = self.context.snapshot.status, self.context.snapshot.link
            if link.state == "live" and not link.read_only and status.state == "paused":
                (self.action_step if by > 0 else self.action_step_back)()
            return
        super().action_tab(by)

    def choose_tab(self, number: int) -> None:
        super().choose_tab(number)
        target = {"gradients": "#gradients", "attention": "#layers"}.get(TAB_PANELS[number])
        self.set_focus(self.query_one(target) if target else None)

    def action_log(self, name: str) -> None:
        """Switch between a logarithmic and a linear axis."""
        panel: Widget = self.query_one(f"#{name}")
        assert isinstance(panel, LossPanel | ClippingPanel)
        panel.toggle_log()

    def action_window(self) -> None:
        """Show other steps in the charts."""
        max_steps = self.query_one(LossPanel).cycle_window()
        clipping = self.query_one(ClippingPanel)
        clipping.max_steps = max_steps
        clipping.update_rows()

    def action_sort(self) -> None:
        self.query_one(GradientsPanel).sort()

    def action_trend(self) -> None:
        """Show the next statistic of Wq, Wk, Wv."""
        self.query_one("#trend-0", TrendChart).cycle_statistic()

    def action_filter(self) -> None:
        """Open the filter, and the panel that it filters."""
        if self._folded and TAB_PANELS[self._tab] != "gradients":
            self.choose_tab(TAB_PANELS.index("gradients"))
        self.query_one(SearchInput).open()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as the text is typed."""
        self.query_one(GradientsPanel).set_filter(event.value)

    def on_search_input_closed(self) -> None:
        self.query_one(GradientsPanel).focus()

    def action_clear_filter(self) -> None:
        self.query_one(SearchInput).value = ""

    def on_virtual_table_activated(self, message: VirtualTable.Activated) -> None:
        """Fold or unfold a module in the tree of gradients; inspect the gradient of a parameter."""
        if isinstance(message.table, GradientsPanel):
            if name := message.table.parameter(message.row):
                self.context.show_tensor(TensorRef(name, "gradient"))
            else:
                message.table.toggle(message.row)

    def on_virtual_table_sort_requested(self, message: VirtualTable.SortRequested) -> None:
        """Sort by a title that was clicked; a second click restores the model's order."""
        if isinstance(message.table, GradientsPanel):
            key: SortKey = "name" if message.key == "name" else "norm"
            message.table.sort("model" if message.table.sort_key == key else key)

    def on_virtual_table_highlighted(self, message: VirtualTable.Highlighted) -> None:
        """Show the charts of the layer under the cursor."""
        if isinstance(message.table, LayersTable):
            for trend in self.query(TrendChart):
                trend.layer_index = message.row
                trend.update_rows()
