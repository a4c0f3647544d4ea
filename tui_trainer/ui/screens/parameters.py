"""All parameters with every column, and charts of the one under the cursor."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.history.healthy_ranges import UPDATE_RATIO
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.inspection import TensorRef
from tui_trainer.protocol.text import truncate_middle
from tui_trainer.ui.panels.base import placeholder_message, staleness
from tui_trainer.ui.panels.parameters import (
    MODEL_ORDER,
    ParameterTable,
    ParameterValues,
    format_shape,
)
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.caption import Caption, Placeholder
from tui_trainer.ui.widgets.chart import ChartCurve, SeriesChart
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.search import SearchInput
from tui_trainer.ui.widgets.table import VirtualTable

SORT_INTERVAL_S = 2.0
"""Rows sorted by a changing value move at most this often, so that they can be read."""
CHART_WIDTH = 38
MAX_DTYPE_WIDTH = 12
MAX_OPTIMIZER_WIDTH = 16

CHARTS = (
    (schema.GRAD_NORM, "gradient norm", "norm"),
    (schema.UPDATE_RATIO, "update ratio", "good"),
    (schema.WEIGHT_NORM, "weight norm", "loss"),
)
"""Quantity, title and style of each chart."""
MEASURED_COLUMNS = (
    (schema.GRAD_NORM, "grad", "grad norm"),
    (schema.UPDATE_RATIO, "update", "update"),
    (schema.WEIGHT_NORM, "weight", "‖w‖"),
)
"""Quantity, column key and column title."""
SORT_NAMES = {"grad": "gradient norm", "nonfinite": "non-finite", "weight": "weight norm"}
TEXT_COLUMNS = ("name", "shape", "dtype", "optimizer")
"""Columns sorted in ascending order at first."""


class ParametersScreen(DetailScreen):
    """A table that stays fast with 10,000 rows, and charts of the selected row."""

    CSS = """
    ParametersScreen #summary { margin: 0 1; }
    ParametersScreen ParameterTable { margin: 0 0 0 1; }
    ParametersScreen #selected { margin: 0 1; }
    ParametersScreen #charts { height: 7; margin: 0 1; }
    ParametersScreen.-tall #charts { height: 12; }
    ParametersScreen.-very-tall #charts { height: 18; }
    ParametersScreen SeriesChart { margin-right: 2; }
    ParametersScreen SeriesChart.-last { margin-right: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/", id="parameters.filter",
                tooltip="Show only parameters whose name contains these words; escape clears it"),
        Binding("o", "order(1)", "Sort", id="parameters.order",
                tooltip="Sort by the next column (or click on its title)"),
        Binding("O", "order(-1)", "Sort back", id="parameters.order_back", show=False,
                tooltip="Sort by the previous column"),
        Binding("r", "reverse", "Reverse", id="parameters.reverse",
                tooltip="Reverse the order"),
        Binding("left", "shift(-1)", "Columns left", id="parameters.left", show=False,
                tooltip="Scroll the columns to the left"),
        Binding("right", "shift(1)", "Columns right", id="parameters.right", show=False,
                tooltip="Scroll the columns to the right"),
        Binding("l", "log", "Log scale", id="parameters.log",
                tooltip="Logarithmic or linear charts"),
        Binding("escape", "clear", "Clear", id="parameters.clear", show=False,
                tooltip="Clear the filter"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.values = ParameterValues()
        self._log_scale: bool | None = None
        """Whether all charts are logarithmic; None: each chart as suits its values."""
        self._sorted_at = 0.0
        self._wanted = ""
        """Name of the parameter to put the cursor on."""

    def body(self) -> Iterable[Widget]:
        yield Caption(id="summary")
        yield Placeholder()
        yield ParameterTable(self.values)
        yield SearchInput("names with these words")
        yield Caption(id="selected")
        yield Horizontal(*(SeriesChart() for _ in CHARTS), id="charts")

    @property
    def table(self) -> ParameterTable:
        return self.query_one(ParameterTable)

    def on_mount(self) -> None:
        self.query(SeriesChart).last().add_class("-last")
        self.table.focus()

    def show_body(self, snapshot: Snapshot) -> None:
        parameters_changed = self.values.update(snapshot)
        table, info = self.table, snapshot.info
        known = info is not None and bool(info.parameters)
        message = ("", "")
        if not known:
            nothing = "no parameter is known yet"
            message = placeholder_message(snapshot, nothing, "parameters", "grad_norm")
        self.query_one(Placeholder).set_message(*message)
        for part in (table, self.query_one("#charts"), self.query_one("#selected")):
            part.display = known
        if not known:
            return
        if parameters_changed:
            table.parameters_changed()
        due = time.monotonic() - self._sorted_at > SORT_INTERVAL_S
        if parameters_changed or (due and table.sorted_by not in (MODEL_ORDER, "name")):
            self._sort_rows()
        self._select_wanted()
        table.update_rows()
        self._show_summary()
        self._show_selected()

    def select(self, name: str) -> None:
        """Put the cursor on a parameter, once the parameters are known."""
        self._wanted = name
        self._select_wanted()

    def _select_wanted(self) -> None:
        info = self.values.info
        if not self._wanted or info is None:
            return
        names = [parameter.name for parameter in info.parameters]
        if self._wanted in names:
            places = np.flatnonzero(self.table.order == names.index(self._wanted))
            if len(places):
                self.table.move_cursor(int(places[0]))
        self._wanted = ""

    def _sort_rows(self, to_top: bool = False) -> None:
        self.table.rearrange(to_top)
        self._sorted_at = time.monotonic()

    def _show_summary(self) -> None:
        info, table = self.values.info, self.table
        assert info is not None
        count, shown = len(info.parameters), len(table.order)
        pieces: list[Span] = [("Parameters", "title")]
        pieces.append((f"{shown:,} of {count:,}" if shown != count else f"{count:,}", "text"))
        pieces.append((f"{formatting.count(table.element_count, 0)} elements", "dim"))
        if number := self.values.unhealthy_updates:
            limits = UPDATE_RATIO.words.removeprefix("healthy ")
            pieces.append((f"{counted(number, 'update')} outside {limits}", "warning"))
        elif table.sorted_by == MODEL_ORDER:
            pieces.append(("in the model's order", "dim"))
        else:
            pieces.append((f"by {SORT_NAMES.get(table.sorted_by, table.sorted_by)}", "dim"))
        if table.filter:
            pieces.append((f"filter “{table.filter}”", "accent"))
        self.query_one("#summary", Caption).update(pieces, self._ages())
        table.placeholder = f"no name contains “{table.filter}”: escape clears the filter"

    def _ages(self) -> str:
        """The age of visible columns that were not measured at the newest step."""
        snapshot, table = self.context.snapshot, self.table
        visible = {column.key for column in table.visible_columns(table.view_size.width)[0]}
        by_age: dict[str, list[str]] = {}
        for quantity, key, title in MEASURED_COLUMNS:
            age = staleness(snapshot, snapshot.history.tables_named(quantity))
            if age and key in visible:
                by_age.setdefault(age, []).append(title)
        return ", ".join(f"{' and '.join(titles)} {age}" for age, titles in by_age.items())

    def _show_selected(self) -> None:
        """Name, facts and charts of the parameter under the cursor."""
        info, row = self.values.info, self.table.current_row
        if info is None or row is None:
            self.query_one("#selected", Caption).update(())
            return
        parameter = info.parameters[row]
        shape = format_shape(parameter, self.context.glyphs.times)
        ellipsis = self.context.glyphs.ellipsis
        dtype = truncate_middle(parameter.dtype, MAX_DTYPE_WIDTH, ellipsis)
        optimizer = truncate_middle(parameter.optimizer, MAX_OPTIMIZER_WIDTH, ellipsis)
        facts = f"{shape}  {dtype}  {formatting.counted(parameter.numel, 'element')}"
        by = f"updated by {optimizer}" if optimizer else "not updated"
        pieces: list[Span] = [(parameter.name, "accent"), (facts, "dim"), (by, "dim")]
        if parameter.sharded:
            pieces.insert(1, ("norms of rank 0's shard", "dim"))
        if reason := self.values.why_absent(row):  # what does not fit is cut off at the end
            absent = (f"{self.context.glyphs.missing} {reason}", "text")
            pieces = [pieces[0], absent, (by, "dim"), (facts, "dim")]
        elif warning := self.values.warning(row):
            pieces.insert(1, (warning, "warning"))
        self.query_one("#selected", Caption).update(pieces)
        visible_charts = max(1, self.size.width // CHART_WIDTH)
        for number, (chart, (quantity, name, style)) in enumerate(
            zip(self.query(SeriesChart), CHARTS, strict=True)
        ):
            chart.display = number < visible_charts
            found = self.values.series(quantity, row)
            why = info.unseen.get(quantity, "") or "not measured yet"
            series, column = found if found else (None, 0)
            curves = [ChartCurve("", style, column)] if found else []
            total, log = info.total_steps, self._log_scale
            chart.plot(name, series, curves, placeholder=why, total_steps=total, log=log,
                       related=self.context.snapshot.related,
                       band=UPDATE_RATIO if quantity == schema.UPDATE_RATIO else None)  # fmt: skip

    # ------------------------------------------------------------ actions

    def action_filter(self) -> None:
        self.query_one(SearchInput).open()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as the text is typed."""
        self.table.filter = event.value
        self._update_order()

    def on_search_input_closed(self) -> None:
        self.table.focus()

    def action_clear(self) -> None:
        self.query_one(SearchInput).value = ""

    def action_order(self, by: int) -> None:
        """Sort by the next or previous column."""
        keys = self.table.sort_keys
        number = keys.index(self.table.sorted_by)
        self._sort_by(keys[(number + by) % len(keys)])

    def on_virtual_table_sort_requested(self, event: VirtualTable.SortRequested) -> None:
        """Sort by a title that was clicked; a second click reverses the order."""
        if event.key == self.table.sorted_by:
            self.action_reverse()
        elif event.key in self.table.sort_keys:
            self._sort_by(event.key)

    def _sort_by(self, key: str) -> None:
        self.table.sorted_by = key
        self.table.descending = key not in TEXT_COLUMNS
        self._update_order(to_top=True)

    def action_reverse(self) -> None:
        self.table.descending = not self.table.descending
        self._update_order(to_top=True)

    def _update_order(self, *, to_top: bool = False) -> None:
        """Draw after the filter or the order was changed by the user."""
        if self.values.info is None:
            return
        self._sort_rows(to_top)
        self.table.update_rows()
        self._show_summary()
        self._show_selected()

    def on_virtual_table_activated(self, message: VirtualTable.Activated) -> None:
        """Open the parameter under the cursor in the inspector."""
        if self.values.info is not None:
            self.context.show_tensor(TensorRef(self.values.info.parameters[message.row].name))

    def action_shift(self, by: int) -> None:
        """Scroll the columns."""
        self.table.scroll_columns(by)

    def action_log(self) -> None:
        """Switch between logarithmic and linear charts."""
        shown = [each for each in self.query(SeriesChart) if each.display]
        self._log_scale = not any(each.chart.drawn_log for each in shown)
        self._show_selected()

    def on_virtual_table_highlighted(self, event: VirtualTable.Highlighted) -> None:
        self._show_selected()

    def on_resize(self, event: events.Resize) -> None:
        """Show as many charts as fit."""
        self.call_after_refresh(self._show_selected)
