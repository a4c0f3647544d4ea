"""The training processes of a run: one line each, with what is unusual."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import numpy as np
from rich.cells import cell_len
from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.geometry import Size
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.history.ranks import WINDOW, RankSummary, skew_ms, summarize_ranks
from tui_trainer.protocol import BETWEEN, PHASES, formatting, schema
from tui_trainer.protocol.text import wrap
from tui_trainer.ui.panels.base import NO_STEP_YET, Figure, Panel, placeholder_message
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.axes import step_window
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.chart import Chart, put_message
from tui_trainer.ui.widgets.chart_layers import Band, Layer, Line
from tui_trainer.ui.widgets.lines import LineView, Row, Span
from tui_trainer.ui.widgets.table import Cell, TableColumn, VirtualTable

ONE_PROCESS = "this run trains in one process"
HINT = "tui-trainer run --nproc 4 train.py, or torchrun, trains in several"
WIDE, WIDEST = 90, 170
"""Widths from which the lag, and from which phases and memory, are shown."""
ENDED_BADLY = ("killed", "crashed", "lost")
MAX_CHARTED = 64
"""Maximum number of processes whose values a chart reads; of more, it reads every n-th."""
MIN_HEIGHT_FOR_CHARTS, MIN_CHART_WIDTH = 18, 60
"""Minimum number of rows that the table and the remarks leave for charts, and of cells per
chart."""
SHOWN_MS = 1.0
"""A time between phases has a column when it is at least this long in any process."""
STATE_STYLES = {**dict.fromkeys(ENDED_BADLY, "error"), "waiting": "warning"}


class RanksTable(VirtualTable):
    """A row for each process."""

    DEFAULT_CSS = "RanksTable { height: 1; max-height: 70%; margin: 0 1; }"

    def __init__(self) -> None:
        super().__init__()
        self.ranks: Sequence[RankSummary] = ()

    def set_ranks(self, ranks: Sequence[RankSummary]) -> None:
        """Show the processes of a run."""
        self.ranks = ranks
        self.set_order(np.arange(len(ranks)))
        self.update_rows()

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """Name, step, loss, norm, time, state and remarks; the lag, and the memory and the times of
        all phases, where they fit."""
        named = max((len(rank.name) for rank in self.ranks), default=6)
        columns = [
            TableColumn("name", "", min(16, named), lambda row: self.ranks[row].name, left=True),
            TableColumn("step", "step", 8, self._step),
            TableColumn("loss", "loss", 8, self._checked("loss")),
            TableColumn("norm", "grad norm", 9, self._checked("grad_norm_preclip")),
            self._time("step_ms", "ms/step", 8),
        ]
        if width >= WIDE:
            columns.append(self._time("lag_ms", "lag", 8))
        if width >= WIDEST:
            columns += [self._time(f"phase_ms.{phase}", phase, 9) for phase in PHASES]
            columns += [
                self._time(f"phase_ms.{name}", name, 10)
                for name in BETWEEN
                if any(
                    (rank.values.get(f"phase_ms.{name}") or 0) >= SHOWN_MS for rank in self.ranks
                )
            ]
            columns.append(TableColumn("memory", "memory", 9, self._memory, formatting.bytes_))
        columns.append(TableColumn("state", "state", 9, self._state, left=True))
        columns.append(TableColumn("remarks", "", 0, self._remarks, left=True))
        fixed = sum(column.width + 1 for column in columns)
        return columns, [column.width or max(1, width - fixed) for column in columns]

    def _time(self, name: str, title: str, width: int) -> TableColumn:
        def cell(row: int) -> Cell:
            rank = self.ranks[row]
            out = name in rank.standing_out
            return Cell(rank.values.get(name), "warning" if out else "text")

        return TableColumn(name, title, width, cell, formatting.milliseconds)

    def _checked(self, name: str) -> Callable[[int], Cell]:
        """Cells of a value that should be finite and similar in all processes."""

        def cell(row: int) -> Cell:
            rank = self.ranks[row]
            value = rank.values.get(name)
            style = "warning" if name in rank.standing_out else "text"
            return Cell(value, style if value is None or np.isfinite(value) else "error")

        return cell

    def _step(self, row: int) -> str:
        step = self.ranks[row].step
        return (self.glyphs.missing if step is None else f"{step:,}").rjust(8)

    def _memory(self, row: int) -> float | None:
        values = self.ranks[row].values
        device = values.get("device_bytes")
        return values.get("host_bytes") if device is None else device

    def _state(self, row: int) -> Cell:
        """The last phase that the process has passed, or how the process ended."""
        rank = self.ranks[row]
        at = rank.at
        if rank.process.state != "running" or at is None or not at.phase:
            return Cell(rank.process.state, STATE_STYLES.get(rank.process.state, "dim"))
        if at.held:
            return Cell("paused", "warning")
        return Cell(at.phase, "dim")

    def _remarks(self, row: int) -> Cell:
        rank = self.ranks[row]
        bad = rank.process.state in ENDED_BADLY
        return Cell("; ".join(rank.remarks), "error" if bad else "warning")

    def cut_remarks(self) -> list[RankSummary]:
        """The processes whose remarks do not fit into their column."""
        _, widths = self.visible_columns(self.view_size.width)
        return [rank for rank in self.ranks if cell_len("; ".join(rank.remarks)) > widths[-1]]


class RemarksView(LineView):
    """The remarks that the table cuts, in full."""

    DEFAULT_CSS = "RemarksView { height: 1fr; margin: 1 1 0 1; }"

    def __init__(self, table: RanksTable) -> None:
        super().__init__()
        self._table = table

    def rows(self, size: Size) -> Sequence[Row]:
        """As many rows as fit."""
        rows: list[Row] = []
        cut = self._table.cut_remarks()
        margin = max((cell_len(rank.name) for rank in cut), default=0) + 2
        for rank in cut:
            name = rank.name
            for remark in rank.remarks:
                for line in wrap(remark, max(20, size.width - margin)):
                    rows.append(self.styled([(name.ljust(margin), "dim"), (line, "text")]))
                    name = ""
        return rows[: size.height]


class RanksChart(Panel):
    """One quantity of all processes: the range of their values, and a line for the selected one."""

    DEFAULT_CSS = "RanksChart { width: 1fr; height: 1fr; min-height: 6; margin: 1 1 0 1; }"

    def __init__(self, title: str, column: str) -> None:
        super().__init__()
        self.panel_title = title
        self._column = column
        self._selected = 0
        self._chart = Chart()

    def show_ranks(self, snapshot: Snapshot, selected: int) -> None:
        """Draw a snapshot, with a line for the rank `selected`."""
        self._selected = selected
        self.show(snapshot)

    def content(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        tables = [table for table in self.snapshot.history.tables_named(schema.RANKS) if table.rows]
        chosen = [table for table in tables if table.table.rank == self._selected]
        # Every table has to be read, so only some of many processes are drawn, the selected one
        # among them.
        tables = [*tables[:: -(-len(tables) // MAX_CHARTED) or 1], *chosen]
        last_step = max((table.last_step or 0 for table in tables), default=0)
        info = self.snapshot.info
        steps = step_window(last_step, None, info.total_steps if info else None, self.slow_link)
        layers: list[Layer] = []
        bins = 2 * self._chart.plot_width(size.width)
        bands = [
            Band.from_window(table.window([column], *steps, bins), 0, self.palette.faint)
            for table in tables
            if (column := table.column(self._column)) is not None
        ]
        if bands:
            bad = [band.nonfinite for band in bands if band.nonfinite is not None]
            layers.append(
                Band(
                    self.palette.faint,
                    np.fmin.reduce([band.low for band in bands]),
                    np.fmax.reduce([band.high for band in bands]),
                    np.logical_or.reduce(bad) if bad else None,
                )
            )
        figures: list[Figure] = []
        if chosen and bands:
            own = bands[-1]
            layers.append(Line(self.palette.accent, own.high))
            value = chosen[-1].newest(self._column)
            text = formatting.number(value, 8) if value is not None else self.glyphs.missing
            figures.append((f"rank {self._selected}", text, self.palette.accent))
        rows = self._chart.rows(
            size.width, size.height - 1, steps, layers, self.palette, self.glyphs
        )
        if not layers:
            put_message(rows, NO_STEP_YET, self.palette.dim)
        log = "log" if self._chart.drawn_log else ""
        return [self.title_line(size.width, figures, f"grey: all ranks {log}".rstrip()), *rows]


class RanksScreen(DetailScreen):
    """The processes, the skew between them, and what stands out."""

    CSS = """
    RanksScreen #summary { margin: 0 1; }
    RanksScreen #charts { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("i", "inspect", "Inspect", id="ranks.inspect",
                tooltip="Inspect the tensors of the process under the cursor"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def on_mount(self) -> None:
        self.query_one(RanksTable).focus()

    def body(self) -> Iterable[Widget]:
        yield Caption(id="summary")
        yield Placeholder()
        table = RanksTable()
        yield table
        yield RemarksView(table)
        with Horizontal(id="charts"):
            yield RanksChart("Loss", "loss")
            yield RanksChart("Gradient norm", "grad_norm_preclip")
            yield RanksChart("Time of a step, ms", "step_ms")

    def show_body(self, snapshot: Snapshot) -> None:
        info = snapshot.info
        ranks = summarize_ranks(info, snapshot.status, snapshot.history) if info else []
        table = self.query_one(RanksTable)
        table.display = bool(ranks)
        message = ("", "")
        if not ranks:
            message = placeholder_message(snapshot, ONE_PROCESS)
            message = (message[0], HINT) if message[0] == ONE_PROCESS else message
        self.query_one(Placeholder).set_message(*message)
        self.query_one("#summary", Caption).update(_summary(ranks))
        table.set_ranks(ranks)
        table.styles.height = 1 + len(ranks)
        remarks = self.query_one(RemarksView)
        remarks.display = bool(ranks)
        remarks.update_rows()
        self._show_charts(snapshot, ranks)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "inspect":
            return True if self.query_one(RanksTable).ranks else None
        return super().check_action(action, parameters)

    def on_virtual_table_activated(self) -> None:
        self.action_inspect()

    def action_inspect(self) -> None:
        """Open the inspector over the tensors of the process under the cursor."""
        table = self.query_one(RanksTable)
        if table.ranks:
            row = min(table.current_row or 0, len(table.ranks) - 1)
            self.context.inspected_rank = table.ranks[row].process.rank
            self.context.action_go("inspect")

    def on_virtual_table_highlighted(self) -> None:
        """Draw the line of the rank under the cursor."""
        self._show_charts(self.context.snapshot, self.query_one(RanksTable).ranks)

    def on_resize(self, event: events.Resize) -> None:
        """Hide the charts where there is no room for them."""
        super().on_resize(event)
        self._show_charts(self.context.snapshot, self.query_one(RanksTable).ranks)

    def _show_charts(self, snapshot: Snapshot, ranks: Sequence[RankSummary]) -> None:
        """Draw the charts in the rows that the table and the remarks leave, if these are enough."""
        table, remarks = self.query_one(RanksTable), self.query_one(RemarksView)
        cut = sum(len(rank.remarks) for rank in table.cut_remarks())
        shown = bool(ranks) and self.size.height - len(ranks) - 2 * cut >= MIN_HEIGHT_FOR_CHARTS
        self.query_one("#charts").display = shown
        remarks.styles.height = 2 * cut if shown else "1fr"
        if not shown:
            return
        row = table.current_row or 0
        selected = ranks[min(row, len(ranks) - 1)].process.rank
        for number, chart in enumerate(self.query(RanksChart)):
            chart.display = (number + 1) * MIN_CHART_WIDTH <= self.size.width
            if chart.display:
                chart.show_ranks(snapshot, selected)


def _summary(ranks: Sequence[RankSummary]) -> list[Span]:
    spans: list[Span] = [("Processes", "title")]
    skew = skew_ms(ranks)
    if skew is not None:
        spans.append((f"{formatting.milliseconds(skew, 0)} apart at the end of a step", "text"))
    if ranks:
        spans.append((f"times: means of {WINDOW} steps", "dim"))
    return spans
