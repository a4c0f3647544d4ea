"""The app for `tui-trainer compare`: several runs on top of each other, and their differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical

from tui_trainer.client.api import Snapshot
from tui_trainer.comparison.compared_runs import (
    SERIES,
    ComparedRun,
    ComparedSeries,
    ComparedValues,
    Divergence,
    find_divergences,
    read_series,
    read_values,
)
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.command_palette import ActionProvider
from tui_trainer.ui.panels.runs import DifferenceDetail, DifferencesTable, Legend, OverlayChart
from tui_trainer.ui.reader_thread import ReaderThread
from tui_trainer.ui.screens.base import MIN_SIZE, FoldingScreen, RunScreen
from tui_trainer.ui.theme import initial_theme
from tui_trainer.ui.widgets.key_line import KeyLine, TooSmall
from tui_trainer.ui.widgets.tabs import TabLine

REFRESH_INTERVAL_S = 1.0
"""How often live runs are read again."""
SEARCH_INTERVAL_S = 10.0
"""How often live runs are searched for their first differences, until all are found."""


class CompareScreen(FoldingScreen):
    """Charts of all runs, and a table of their differences.

    The runs are read on a thread, by the methods whose names begin with `_load`.
    """

    CSS = """
    CompareScreen #charts { width: 3fr; height: 1fr; padding: 0 1; }
    CompareScreen #table { width: 2fr; padding: 0 1 0 0; }
    CompareScreen.-many #table { width: 3fr; }
    CompareScreen.-wide #table { width: 2fr; }
    CompareScreen #body { height: 1fr; }
    CompareScreen.-folded #charts, CompareScreen.-folded #table { width: 1fr; }
    CompareScreen #loss { height: 3fr; }
    CompareScreen #validation, CompareScreen #norm { height: 2fr; }
    """
    tabs = ("Loss", "Validation", "Gradient norm", "Differences")
    COMMANDS = RunScreen.COMMANDS | {ActionProvider}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "align", "By time/step", id="compare.align",
                tooltip="Align the runs by step or by time"),
        Binding("m", "smooth", "Smooth", id="compare.smooth",
                tooltip="Show smoothed curves with all values behind them, or only the values"),
        Binding("l", "log", "Log scale", id="compare.log", tooltip="Logarithmic or linear axes"),
        Binding("left", "tab(-1)", "Tab", show=False, id="compare.tab_left",
                tooltip="Show the previous panel, where only one fits"),
        Binding("right", "tab(1)", "Tab", show=False, id="compare.tab_right",
                tooltip="Show the next panel, where only one fits"),
    ]  # fmt: skip

    def __init__(self, runs: Sequence[ComparedRun], tolerance: float = 0.0) -> None:
        super().__init__()
        self.runs = runs
        self.tolerance = tolerance
        self.divergence: Sequence[Divergence] = ()
        self.by_time = False
        self.reading = 0
        """Number of jobs that the reader thread has not finished."""
        self._thread = ReaderThread(
            "tui-trainer comparison", lambda: self.context.schedule(self._failed)
        )
        self._measured = frozenset(SERIES)
        """Series that at least one run has measured."""

    def compose(self) -> ComposeResult:
        yield TooSmall(*MIN_SIZE)
        yield Legend(self.runs)
        yield TabLine(self.tabs)
        with Horizontal(id="body"):
            with Vertical(id="charts"):
                for series in SERIES:
                    yield OverlayChart(series, self.runs, self._read_series)
            with Vertical(id="table"):
                yield DifferencesTable(self.runs, id="differences")
                yield DifferenceDetail(self.runs)
        yield KeyLine()

    def on_mount(self) -> None:
        self.query_one(DifferenceDetail).styles.height = len(self.runs) + 1
        self.set_class(len(self.runs) > 3, "-many")
        table = self.query_one(DifferencesTable)
        table.focus()
        self._load(self._load_values)
        self.set_interval(REFRESH_INTERVAL_S, self._refresh_live_runs)
        self._search()
        if any(run.run.live for run in self.runs):
            self.set_interval(SEARCH_INTERVAL_S, self._search)

    def show(self, snapshot: Snapshot) -> None:
        """Draw the runs. `snapshot`, which is of a single run, is not used."""
        for chart in self.query(OverlayChart):
            chart.update_rows()
        self.query_one(Legend).update_rows()
        self.query_one(DifferencesTable).update_rows()
        self._show_detail()
        self.query_one(KeyLine).update_rows()

    def _show_detail(self) -> None:
        detail = self.query_one(DifferenceDetail)
        detail.line = self.query_one(DifferencesTable).current
        detail.update_rows()

    def on_virtual_table_highlighted(self) -> None:
        """Show the row under the cursor in full."""
        self._show_detail()

    def _redraw(self) -> None:
        self.show(self.context.snapshot)

    # ------------------------------------------------------------ reading

    def _load(self, job: Callable[[], None]) -> None:
        self.reading += 1
        self._thread.put(job)

    def _refresh_live_runs(self) -> None:
        if not self.reading and any(run.run.live for run in self.runs):
            self._load(self._load_live_runs)

    def _read_series(self, chart: OverlayChart, buckets: int, by_time: bool) -> None:
        self._load(partial(self._load_series, chart, buckets, by_time))

    def _load_live_runs(self) -> None:
        for run in self.runs:
            if run.run.live:
                run.refresh()
        self.context.schedule(self._show_values, read_values(self.runs), True)

    def _load_values(self) -> None:
        self.context.schedule(self._show_values, read_values(self.runs), False)

    def _load_series(self, chart: OverlayChart, buckets: int, by_time: bool) -> None:
        found = read_series(self.runs, chart.series, buckets, by_time)
        self.context.schedule(self._show_series, chart, found)

    def _show_values(self, values: ComparedValues, refreshed: bool) -> None:
        self.reading -= 1
        self.query_one(DifferencesTable).show_values(values)
        if refreshed:
            for chart in self.query(OverlayChart):
                chart.invalidate()
        if values.measured != self._measured:
            self._measured = values.measured
            self.show_panels()
        self._redraw()

    def _show_series(self, chart: OverlayChart, found: ComparedSeries) -> None:
        self.reading -= 1
        chart.show_series(found)

    def _failed(self) -> None:
        """Called after an error in a job. A chart requests its series again once live runs have
        been read again, or when its width or alignment changes."""
        self.reading -= 1

    def on_unmount(self) -> None:
        self._thread.close(lambda: None)

    # ------------------------------------------------------------ the first difference

    def _search(self) -> None:
        """Look for the first differences on a thread, unless all are known."""
        if any(line.found.first is None for line in self.divergence) or not self.divergence:
            self.run_worker(self._find, thread=True, exclusive=True, group="divergence")

    def _find(self) -> None:
        divergence = find_divergences([run.run for run in self.runs], self.tolerance)
        self.app.call_from_thread(self._found, divergence)

    def _found(self, divergence: Sequence[Divergence]) -> None:
        self.divergence = divergence
        self.query_one(DifferencesTable).show_divergence(divergence)

    # ------------------------------------------------------------ layout

    def show_panels(self) -> None:
        for number, name in enumerate((*SERIES, "table")):
            measured = name == "table" or name in self._measured
            shown = number == self._tab if self._folded else measured
            self.query_one(f"#{name}").display = shown
        # Columns of two runs are wide enough for nearly all values.
        self.query_one(DifferenceDetail).display = not self._folded or len(self.runs) > 2
        self.query_one("#charts").display = not self._folded or self._tab < len(SERIES)

    def choose_tab(self, number: int) -> None:
        super().choose_tab(number)
        if number == len(SERIES):
            self.query_one(DifferencesTable).focus()

    # ------------------------------------------------------------ actions

    def action_align(self) -> None:
        """Align the runs by time, or by step."""
        self.by_time = not self.by_time
        for chart in self.query(OverlayChart):
            chart.by_time = self.by_time
        self.query_one(Legend).by_time = self.by_time
        self._redraw()

    def action_smooth(self) -> None:
        """Switch between smoothed curves and measured values."""
        for chart in self.query(OverlayChart):
            chart.smooth = not chart.smooth
            chart.update_rows()

    def action_log(self) -> None:
        """Switch between logarithmic and linear axes."""
        for chart in self.query(OverlayChart):
            chart.chart.toggle_log()
            chart.update_rows()


class CompareApp(TuiTrainerApp):
    """Shows runs on top of each other."""

    HOME_MODE = "compare"
    OWN_SCREENS = (("Comparing", CompareScreen),)
    """(title, class) of screens that are not in `SCREENS`, for the help."""

    def __init__(self, runs: Sequence[ComparedRun], tolerance: float = 0.0, **options: Any) -> None:
        super().__init__(None, start_mode=self.HOME_MODE, **options)
        self.add_mode(self.HOME_MODE, lambda: CompareScreen(runs, tolerance))


def run_comparison(
    runs: Sequence[ComparedRun], *, ascii: bool = False, tolerance: float = 0.0
) -> int:
    """Show the runs until the user leaves. Returns the exit code."""
    return CompareApp(runs, tolerance, ascii=ascii, **initial_theme()).run_until_exit()
