"""The tables of the attention screen: one statistic of every layer with its trend, and the heads of
one layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tui_trainer.client.api import Snapshot
from tui_trainer.history.columns import location_of
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.attention.statistics import (
    BY_KEY,
    PART_STYLES,
    SHOWN_STATISTICS,
    LayerValues,
    LayerValuesReader,
    Statistic,
    layer_label,
)
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.table import NOT_COMPARABLE, Cell, RowIds, TableColumn, VirtualTable

VALUE_WIDTH = 9
MAX_TREND_WIDTH, MIN_TREND_WIDTH = 40, 6
READABLE_TREND_WIDTH = 16
"""Width of a trend, in cells, below which summary columns are dropped to make room."""
MIN_NAME_WIDTH = 8
SUMMARY = (("growth", ""), ("cos", "qk"), ("max_logit", ""), ("entropy", ""), ("grad_cos", "qk"))
"""(statistic, part) shown next to the chosen statistic where there is room."""
MODEL_ORDER = "order"
"""`sorted_by` of a table in the order of the model."""


class StatisticTable(VirtualTable):
    """A row for each attention layer: the values and trends of one statistic, and a summary."""

    lessons = ("qkv", "residual-stream")

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.snapshot = Snapshot()
        self.statistic = SHOWN_STATISTICS[0]
        self.filter = ""
        self.sorted_by = MODEL_ORDER
        tables = (schema.ATTENTION, schema.ATTENTION_SPECTRUM, schema.ATTENTION_HEALTH)
        self._readers = [LayerValuesReader(table) for table in tables]
        self._values: dict[str, LayerValues] = {}
        self._trends: dict[tuple[int, str], str] = {}
        self._trend_width = 0
        self._layers: tuple[AttentionInfo, ...] = ()
        self._matching: tuple[str, RowIds] | None = None
        """The filter, and the layers that match it."""
        self._name_width = MIN_NAME_WIDTH

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._values = {}
        for reader in self._readers:
            values = reader.read(snapshot)
            if values is not None:
                self._values[reader.table] = values
        layers = snapshot.info.attention if snapshot.info else ()
        if layers is not self._layers:
            self._layers, self._matching = layers, None
            longest = max((len(layer_label(layer)) for layer in layers), default=0)
            self._name_width = max(MIN_NAME_WIDTH, longest + 1)
        self.rearrange()
        self.update_rows()

    def choose(self, statistic: Statistic) -> None:
        """Show another statistic."""
        self.statistic = statistic
        if self.sorted_by not in (MODEL_ORDER, *statistic.parts):
            self.sorted_by = MODEL_ORDER
        self.rearrange()
        self.update_rows()

    def rearrange(self) -> None:
        """Filter and sort the layers again."""
        order = self._matching_layers()
        if self.sorted_by != MODEL_ORDER and len(order):
            part = self.sorted_by if self.sorted_by in self.statistic.parts else ""
            values = [self.value(self.statistic, int(row), part) for row in order]
            keys = np.array([np.nan if v is None else v for v in values], np.float64)
            keys = np.where(np.isnan(keys), np.inf, -keys if self.descending else keys)
            order = order[np.argsort(keys, kind="stable")]
        elif not self.descending:
            order = order[::-1]
        self.set_order(order)

    def _matching_layers(self) -> RowIds:
        """The layers whose name contains every word of the filter."""
        if self._matching is None or self._matching[0] != self.filter:
            words = self.filter.casefold().split()
            names = enumerate(layer.layer.casefold() for layer in self._layers)
            rows = [row for row, name in names if all(word in name for word in words)]
            self._matching = (self.filter, np.array(rows, np.int64))
        return self._matching[1]

    def value(self, statistic: Statistic, row: int, part: str) -> float | None:
        """The newest value of a layer; None before the first measurement, and where the statistic
        has no meaning."""
        cell = self.value_cell(statistic, part, row)
        return cell.value if cell is not None and isinstance(cell.value, float) else None

    @property
    def unhealthy(self) -> int:
        """How many values of the chosen statistic lie outside their healthy band."""
        band = self.statistic.band
        if band is None:
            return 0
        values = (
            self.value(self.statistic, row, part)
            for row in range(len(self._layers))
            for part in self.statistic.parts
        )
        return sum(value is not None and not band.holds(value) for value in values)

    # ------------------------------------------------------------ drawing

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The name, the value and trend of each part, and a summary where there is room."""
        parts = self.statistic.parts
        name_width = min(self._name_width, max(12, width // 4))
        room = width - 1 - name_width - len(parts) * (VALUE_WIDTH + 2)
        summary = [(key, part) for key, part in SUMMARY if key != self.statistic.key]
        while summary and room - len(summary) * (VALUE_WIDTH + 1) < (
            len(parts) * READABLE_TREND_WIDTH
        ):
            summary.pop()
        trend_width = (room - len(summary) * (VALUE_WIDTH + 1)) // len(parts)
        trend_width = min(MAX_TREND_WIDTH, trend_width)
        self._trend_width = trend_width if trend_width >= MIN_TREND_WIDTH else 0
        columns = [TableColumn("layer", "layer", name_width, self._layer, left=True)]
        for part in parts:
            title = part or self.statistic.title
            columns.append(self._value_column(self.statistic, part, title, PART_STYLES[part]))
            if self._trend_width:
                trend = partial(self._trend, part)
                columns.append(
                    TableColumn(f"trend {part}", "", self._trend_width, trend, left=True)
                )
        for key, part in summary:
            title = f"{BY_KEY[key].label} {part}".strip()
            columns.append(self._value_column(BY_KEY[key], part, title, "dim"))
        return columns, [column.width for column in columns]

    def _value_column(self, statistic: Statistic, part: str, title: str, style: str) -> TableColumn:
        chosen = statistic is self.statistic
        return TableColumn(
            part or "value" if chosen else statistic.column(part),
            title,
            VALUE_WIDTH,
            partial(self.value_cell, statistic, part),
            statistic.format,
            title_style=style,
            tooltip=statistic.meaning,
        )

    def prepare(self, visible: RowIds) -> None:
        """Draw the trends of the layers in view, from one read of each table."""
        self._trends = {}
        if not self._trend_width:
            return
        wanted: dict[SeriesReader, list[tuple[int, str, int]]] = {}
        for row in visible.tolist():
            layer = self._layers[row]
            location = self.statistic.location(self.snapshot, layer)
            for part in self.statistic.parts:
                if location is not None and layer.comparable(part):
                    column = location.columns[self.statistic.index(part)]
                    wanted.setdefault(location.history, []).append((row, part, column))
        for series, trends in wanted.items():
            self._draw_trends(series, trends)

    def _draw_trends(self, series: SeriesReader, trends: Sequence[tuple[int, str, int]]) -> None:
        """`trends`: (row, part, column) of each trend in the table `series`."""
        start, stop = series.first_step or 0, (series.last_step or 0) + 1
        buckets = min(self._trend_width, series.rows)  # no gaps between rare measurements
        if not buckets:
            return
        window = series.window([column for _, _, column in trends], start, stop, buckets)
        lines = sparklines(window.high.T, window.nonfinite.T, self.glyphs, hold=True)
        for (row, part, _), line in zip(trends, lines, strict=True):
            self._trends[row, part] = line

    def _layer(self, row: int) -> str:
        return layer_label(self._layers[row])

    def value_cell(self, statistic: Statistic, part: str, row: int) -> Cell | None:
        """The table cell with the newest value of a layer; None before the first measurement."""
        values = self._values.get(statistic.table)
        cell = values.cell(self._layers[row], row, statistic, part) if values else None
        summary = statistic is not self.statistic
        if cell is not None and summary and cell.style == PART_STYLES[part]:
            return Cell(cell.value, "dim")
        return cell

    def _trend(self, part: str, row: int) -> Cell:
        return Cell(self._trends.get((row, part), ""), PART_STYLES[part])


HEAD_VALUE_WIDTH = 7


class HeadsTable(VirtualTable):
    """Norms, cosines and drifts of the parts of Wq, Wk and Wv that belong to each head."""

    lessons = ("attention-scores", "residual-stream")

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.columns = (
            TableColumn("head", "head", 4, str),
            *(self._column(index, name) for index, name in enumerate(schema.HEAD_STATISTICS)),
        )
        self.descending = False
        self._values: NDArray[np.float32] = np.empty((0, len(schema.HEAD_STATISTICS)), np.float32)
        """(heads, statistics)"""
        self._layer: AttentionInfo | None = None

    def _column(self, index: int, name: str) -> TableColumn:
        """The column of a statistic such as `norm_q`."""
        key, _, part = name.rpartition("_")
        title = f"‖W‖ {part}" if key == "norm" else f"{key} {part}"
        value = partial(self._value, index, part)
        write = formatting.signed if BY_KEY[key].signed else formatting.number
        style = PART_STYLES[part]
        return TableColumn(name, title, HEAD_VALUE_WIDTH, value, write, style, title_style=style)

    def show_layer(self, snapshot: Snapshot, layer: AttentionInfo, placeholder: str) -> None:
        """Show the heads of `layer`, or `placeholder` where there are none."""
        self._layer, self._values = layer, self._values[:0]
        location = location_of(snapshot.history, schema.ATTENTION_HEADS, layer.layer)
        newest = location.history.latest() if location is not None else None
        if location is not None and newest is not None:
            values = newest[1][location.columns.start : location.columns.stop]
            self._values = values.reshape(-1, len(schema.HEAD_STATISTICS))
        self.placeholder = placeholder
        if len(self.order) != len(self._values):
            self.set_order(np.arange(len(self._values)))
        self.update_rows()

    def _value(self, index: int, part: str, row: int) -> Cell | float:
        value = float(self._values[row, index])
        if value != value and self._layer is not None and not self._layer.comparable(part):
            return Cell(NOT_COMPARABLE, "dim")
        return value
