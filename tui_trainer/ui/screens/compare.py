"""Runs over each other: losses, gradient norms, and what was set up differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical

from tui_trainer.client.api import Snapshot
from tui_trainer.client.compare import SERIES, ComparedRun
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.panels.runs import DifferencesTable, Legend, OverlayChart
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.widgets.keys import KeyLine, TooSmall
from tui_trainer.ui.widgets.tabs import TabLine

TABS = ("Loss", "Validation", "Gradient norm", "Differences")
ROOM, FULL = (40, 10), (100, 30)
"""Below the first nothing can be shown, from the second on all stands side by side."""
LOOK_AGAIN_S = 1.0


class CompareScreen(RunScreen):
    """Charts of all runs, and a table of them."""

    CSS = """
    CompareScreen #charts { width: 3fr; height: 1fr; padding: 0 1; }
    CompareScreen #differences { width: 2fr; padding: 0 1 0 0; }
    CompareScreen #body { height: 1fr; }
    CompareScreen TabLine { display: none; }
    CompareScreen.-folded TabLine { display: block; }
    CompareScreen.-folded #charts, CompareScreen.-folded #differences { width: 1fr; }
    CompareScreen #loss { height: 3fr; }
    CompareScreen #validation, CompareScreen #norm { height: 2fr; }
    """
    COMMANDS = RunScreen.COMMANDS | {ActionProvider}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "align", "By time/step", id="compare.align",
                tooltip="Align the runs by step or by time"),
        Binding("m", "smooth", "Smooth", id="compare.smooth",
                tooltip="Smoothed curves over all values, or all values alone"),
        Binding("l", "log", "Log", id="compare.log", tooltip="Logarithmic axes"),
        Binding("left", "tab(-1)", "Tab", show=False, id="compare.tab_left",
                tooltip="Panel before, where there is room for one"),
        Binding("right", "tab(1)", "Tab", show=False, id="compare.tab_right",
                tooltip="Panel after, where there is room for one"),
    ]  # fmt: skip

    def __init__(self, runs: Sequence[ComparedRun]) -> None:
        super().__init__()
        self.runs = runs
        self.by_time = False
        self._tab = 0
        self._folded = False

    def compose(self) -> ComposeResult:
        """Legend, charts, table, keys."""
        yield TooSmall(*ROOM)
        yield Legend(self.runs)
        yield TabLine(TABS)
        with Horizontal(id="body"):
            with Vertical(id="charts"):
                for series in SERIES:
                    yield OverlayChart(series, self.runs, id=series)
            yield DifferencesTable(self.runs, id="differences")
        yield KeyLine()

    def on_mount(self) -> None:
        """Read the runs; those that live are read again."""
        table = self.query_one(DifferencesTable)
        table.read()
        table.focus()
        self.set_interval(LOOK_AGAIN_S, self._look_again)

    def show(self, snapshot: Snapshot) -> None:
        """Draw all of it again: what the charts were drawn from is theirs."""
        for chart in self.query(OverlayChart):
            chart.update_rows()
        self.query_one(Legend).update_rows()
        self.query_one(DifferencesTable).update_rows()
        self.query_one(KeyLine).update_rows()

    def _look_again(self) -> None:
        living = [run for run in self.runs if run.run.live]
        for run in living:
            run.refresh()
        if living:
            self.query_one(DifferencesTable).read()
            self.show(self.context.snapshot)

    # ------------------------------------------------------------ room

    def on_resize(self, event: events.Resize) -> None:
        """Fold or unfold."""
        width, height = event.size
        self.set_class(width < ROOM[0] or height < ROOM[1], "-too-small")
        self._folded = width < FULL[0] or height < FULL[1]
        self.set_class(self._folded, "-folded")
        self._show_tab()

    def _show_tab(self) -> None:
        names = (*SERIES, "differences")
        for number, name in enumerate(names):
            self.query_one(f"#{name}").display = not self._folded or number == self._tab
        self.query_one("#charts").display = not self._folded or self._tab < len(SERIES)
        self.query_one(TabLine).choose(self._tab)
        self.call_after_refresh(self.show, self.context.snapshot)

    def action_tab(self, by: int) -> None:
        """Another panel."""
        self._choose((self._tab + by) % len(TABS))

    def on_tab_line_chosen(self, message: TabLine.Chosen) -> None:
        """A tab was clicked."""
        self._choose(message.number)

    def _choose(self, number: int) -> None:
        self._tab = number
        self._show_tab()
        if number == len(TABS) - 1:
            self.query_one(DifferencesTable).focus()

    # ------------------------------------------------------------ keys

    def action_align(self) -> None:
        """By time, or by step."""
        self.by_time = not self.by_time
        for chart in self.query(OverlayChart):
            chart.by_time = self.by_time
        self.query_one(Legend).by_time = self.by_time
        self.show(self.context.snapshot)

    def action_smooth(self) -> None:
        """Smoothed, or as measured."""
        for chart in self.query(OverlayChart):
            chart.smooth = not chart.smooth
            chart.update_rows()

    def action_log(self) -> None:
        """Logarithmic, or linear."""
        for chart in self.query(OverlayChart):
            chart.chart.log = not chart.chart.log
            chart.update_rows()
