"""Every column of every parameter, and the history of the one under the cursor."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import formatting, schema
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.parameters import (
    MODEL_ORDER,
    ParameterTable,
    ParameterValues,
    format_shape,
)
from tui_trainer.ui.panels.staleness import staleness
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.form import PromptLine
from tui_trainer.ui.widgets.lines import Span
from tui_trainer.ui.widgets.series_chart import ChartCurve, SeriesChart
from tui_trainer.ui.widgets.table import VirtualTable
from tui_trainer.ui.widgets.text import Caption, Placeholder

RESORT_SECONDS = 2.0
"""Rows sorted by a value that changes move at most this often: they must be readable."""
CHART_WIDTH = 38

_CHARTS = (
    (schema.GRAD_NORM, "gradient norm", "norm"),
    (schema.UPDATE_RATIO, "update ratio", "good"),
    (schema.WEIGHT_NORM, "weight norm", "loss"),
)
_COLUMNS = (
    (schema.GRAD_NORM, "grad", "grad norm"),
    (schema.UPDATE_RATIO, "update", "update"),
    (schema.WEIGHT_NORM, "weight", "‖w‖"),
)
"""Quantities, their columns, and the titles of these."""


class ParametersScreen(DetailScreen):
    """A table that stays fast with 10,000 rows, and a strip with the selected one's charts."""

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
                tooltip="Show only parameters whose name has these words; escape clears it"),
        Binding("o", "order(1)", "Sort", id="parameters.order",
                tooltip="Sort by the next column (or click on its title)"),
        Binding("O", "order(-1)", "Sort back", id="parameters.order_back", show=False,
                tooltip="Sort by the column before"),
        Binding("r", "reverse", "Reverse", id="parameters.reverse",
                tooltip="Turn the order round"),
        Binding("left", "shift(-1)", "Columns left", id="parameters.left", show=False,
                tooltip="Show the columns further left"),
        Binding("right", "shift(1)", "Columns right", id="parameters.right", show=False,
                tooltip="Show the columns further right"),
        Binding("l", "log", "Log scale", id="parameters.log",
                tooltip="Logarithmic or linear charts"),
        Binding("escape", "clear", "Clear", id="parameters.clear", show=False,
                tooltip="Clear the filter"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.values = ParameterValues()
        self._log = False
        self._sorted_at = 0.0

    def body(self) -> Iterable[Widget]:
        """Header, figures, table, the selected one's strip, keys."""
        yield Caption(id="summary")
        yield Placeholder()
        yield ParameterTable(self.values)
        yield PromptLine()
        yield Caption(id="selected")
        yield Horizontal(*(SeriesChart() for _ in _CHARTS), id="charts")

    @property
    def table(self) -> ParameterTable:
        """The table."""
        return self.query_one(ParameterTable)

    def on_mount(self) -> None:
        """Keys go to the table."""
        self.query(SeriesChart).last().add_class("-last")
        self.table.focus()

    def show_body(self, snapshot: Snapshot) -> None:
        """Take in the newest values."""
        anew = self.values.update(snapshot)
        table, info = self.table, snapshot.info
        known = info is not None and bool(info.parameters)
        placeholder = self.query_one(Placeholder)
        if known:
            placeholder.set_message("")
        else:
            placeholder.set_message(
                *placeholder_message(
                    snapshot, "no parameter is known yet", "parameters", "grad_norm"
                )
            )
        for part in (table, self.query_one("#charts"), self.query_one("#selected")):
            part.display = known
        if not known:
            return
        if anew:
            table.parameters_changed()
        due = time.monotonic() - self._sorted_at > RESORT_SECONDS
        if anew or (due and table.sorted_by not in (MODEL_ORDER, "name")):
            self._arrange()
        table.update_rows()
        self._say_summary()
        self._show_selected()

    def _arrange(self) -> None:
        self.table.rearrange()
        self._sorted_at = time.monotonic()

    def _say_summary(self) -> None:
        info, table = self.values.info, self.table
        assert info is not None
        count, shown = len(info.parameters), len(table.order)
        pieces: list[Span] = [("Parameters", "title")]
        pieces.append((f"{shown:,} of {count:,}" if shown != count else f"{count:,}", "text"))
        pieces.append((f"{formatting.count(table.element_count, 0)} elements", "dim"))
        by = f"by {_title(table.sorted_by)}"
        pieces.append(("in the model's order" if table.sorted_by == MODEL_ORDER else by, "dim"))
        if table.filter:
            pieces.append((f"filter “{table.filter}”", "accent"))
        self.query_one("#summary", Caption).update(pieces, self._ages())
        table.placeholder = f"no name has “{table.filter}”: escape clears the filter"

    def _ages(self) -> str:
        """Of when the columns in sight are that are not of the newest step."""
        snapshot, table = self.context.snapshot, self.table
        in_sight = {column.key for column in table.visible_columns(table.view_size.width)[0]}
        by_age: dict[str, list[str]] = {}
        for quantity, key, title in _COLUMNS:
            age = staleness(snapshot, snapshot.history.tables_named(quantity))
            if age and key in in_sight:
                by_age.setdefault(age, []).append(title)
        return ", ".join(f"{' and '.join(titles)} {age}" for age, titles in by_age.items())

    def _show_selected(self) -> None:
        info, row = self.values.info, self.table.current_row
        if info is None or row is None:
            self.query_one("#selected", Caption).update(())
            return
        parameter = info.parameters[row]
        shape = format_shape(parameter, self.context.glyphs.times)
        facts = f"{shape}  {parameter.dtype}  {parameter.numel:,} elements"
        by = f"updated by {parameter.optimizer}" if parameter.optimizer else "not updated"
        pieces: list[Span] = [(parameter.name, "accent"), (facts, "dim"), (by, "dim")]
        self.query_one("#selected", Caption).update(pieces)
        room = max(1, self.size.width // CHART_WIDTH)
        for place, (chart, (quantity, name, style)) in enumerate(
            zip(self.query(SeriesChart), _CHARTS, strict=True)
        ):
            chart.display = place < room
            found = self.values.series(quantity, row)
            why = info.unseen.get(quantity, "") or "not measured yet"
            series, column = found if found else (None, 0)
            curves = [ChartCurve("", style, column)] if found else []
            total = info.total_steps
            chart.plot(name, series, curves, placeholder=why, total_steps=total, log=self._log)

    # ------------------------------------------------------------ actions

    def action_filter(self) -> None:
        """Type words."""
        self.query_one(PromptLine).ask("filter", "filter")

    def on_prompt_line_typed(self, event: PromptLine.Typed) -> None:
        """Filter as it is typed."""
        self._set_filter(event.text)
        if event.done:
            self.table.focus()

    def action_clear(self) -> None:
        """All of them again."""
        self.query_one(PromptLine).clear("filter")
        self._set_filter("")

    def _set_filter(self, text: str) -> None:
        self.table.filter = text
        self._rearranged()

    def action_order(self, by: int) -> None:
        """Sort by the next column."""
        keys = self.table.sort_keys
        place = keys.index(self.table.sorted_by)
        self._sort(keys[(place + by) % len(keys)])

    def on_virtual_table_sort_requested(self, event: VirtualTable.SortRequested) -> None:
        """A click on a title; a second one turns the order round."""
        if event.key == self.table.sorted_by:
            self.action_reverse()
        elif event.key in self.table.sort_keys:
            self._sort(event.key)

    def _sort(self, key: str) -> None:
        self.table.sorted_by = key
        self.table.descending = key not in ("name", "shape", "dtype", "optimizer")
        self._rearranged(to_top=True)

    def action_reverse(self) -> None:
        """The other way round."""
        self.table.descending = not self.table.descending
        self._rearranged(to_top=True)

    def _rearranged(self, *, to_top: bool = False) -> None:
        if self.values.info is None:
            return
        self._arrange()
        if to_top:
            self.table.move_cursor(0)
        self.table.update_rows()
        self._say_summary()
        self._show_selected()

    def action_shift(self, by: int) -> None:
        """Other columns."""
        self.table.scroll_columns(by)

    def action_log(self) -> None:
        """The other scale."""
        self._log = not self._log
        self._show_selected()

    def on_virtual_table_highlighted(self, event: VirtualTable.Highlighted) -> None:
        """Another parameter."""
        self._show_selected()

    def on_resize(self, event: events.Resize) -> None:
        """More or fewer charts."""
        self.call_after_refresh(self._show_selected)


def _title(key: str) -> str:
    return {"grad": "gradient norm", "nonfinite": "non-finite", "weight": "weight norm"}.get(
        key, key
    )
