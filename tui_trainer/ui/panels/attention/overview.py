"""The attention panel of the dashboard: a table of the layers, and the chart of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import counted
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.attention.statistics import (
    BY_KEY,
    NO_ATTENTION,
    PART_STYLES,
    LayerValues,
    LayerValuesReader,
    Statistic,
    layer_label,
    short_layer_name,
)
from tui_trainer.ui.panels.base import (
    NO_STEP_YET,
    Figure,
    Panel,
    staleness,
    title_line,
    unavailable_reason,
)
from tui_trainer.ui.widgets.axes import step_window
from tui_trainer.ui.widgets.chart import Chart
from tui_trainer.ui.widgets.chart_layers import Band, Label, Layer, Line, smooth
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.related import related_curves
from tui_trainer.ui.widgets.table import NOT_COMPARABLE, Cell, TableColumn, VirtualTable

COLUMNS = (
    ("cos", "qk", "cos qk", 6),
    ("cos", "qv", "cos qv", 6),
    ("cos", "kv", "cos kv", 6),
    ("drift", "q", "drift q", 7),
    ("drift", "k", "k", 7),
    ("drift", "v", "v", 7),
    ("growth", "", "growth", 6),
    ("distance", "qk", "dist qk", 7),
    ("grad_cos", "qk", "∇cos qk", 7),
    ("norm", "q", "‖Wq‖", 7),
    ("norm", "k", "‖Wk‖", 7),
    ("norm", "v", "‖Wv‖", 7),
)
"""(statistic, part, title, width in cells)"""


class LayersTable(VirtualTable):
    """A row for each attention layer, a column for each statistic."""

    lessons = ("qkv",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.header_height = 1
        self.snapshot = Snapshot()
        self.columns = (
            TableColumn("layer", "layer", 0, self._layer, left=True),
            *(self._column(BY_KEY[key], part, title, width) for key, part, title, width in COLUMNS),
        )
        self._reader = LayerValuesReader(schema.ATTENTION)
        self._values: LayerValues | None = None

    def _column(self, statistic: Statistic, part: str, title: str, width: int) -> TableColumn:
        return TableColumn(
            statistic.column(part),
            title,
            width,
            partial(self._value, statistic, part),
            statistic.format,
            title_style=part if len(part) == 1 else "dim",
            tooltip=statistic.meaning,
        )

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._values = self._reader.read(snapshot)
        layers = len(snapshot.info.attention) if snapshot.info else 0
        if len(self.order) != layers:
            self.set_order(np.arange(layers))
        no_attention = NO_ATTENTION if snapshot.status.step and not layers else NO_STEP_YET
        self.placeholder = unavailable_reason(snapshot, "attention") or no_attention
        self.update_rows()

    def header(self, width: int) -> list[Row]:
        """The title."""
        palette, layers = self.palette, len(self.order)
        figures: list[Figure] = [
            ("", "Wq", palette.q),
            ("", "Wk", palette.k),
            ("", "Wv", palette.v),
        ]
        if layers:
            figures.append(("", counted(layers, "layer"), palette.dim))
        tables = self.snapshot.history.tables_named(schema.ATTENTION)
        age = staleness(self.snapshot, tables)
        return [title_line(self, width, "Attention", figures, age)]

    def _layer(self, row: int) -> str:
        info = self.snapshot.info
        return layer_label(info.attention[row]) if info else ""

    def _value(self, statistic: Statistic, part: str, row: int) -> Cell | None:
        info = self.snapshot.info
        if self._values is None or info is None:
            return None
        cell = self._values.cell(info.attention[row], row, statistic, part)
        # Only the columns of one matrix are coloured: a table in six colours is hard to read.
        if cell is not None and len(part) != 1 and cell.style == PART_STYLES[part]:
            return Cell(cell.value, "text")
        return cell


TREND_STATISTICS = tuple(BY_KEY[key] for key in ("drift", "cos", "distance", "norm", "grad_cos"))
MIN_HEIGHT = 5
VALUE_WIDTH = 7


class TrendChart(Panel):
    """One statistic of one layer over the run: a curve for each of its parts."""

    lessons = ("qkv",)
    quantity = "attention"

    def __init__(self, statistic: int = 0, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart()
        self.layer_index = 0
        """Index of the layer that is shown."""
        self._number = statistic

    def cycle_statistic(self) -> None:
        """Show the next statistic."""
        self._number = (self._number + 1) % len(TREND_STATISTICS)
        self.chart = Chart()
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """Empty where the table above already says why there is no attention."""
        return [] if unavailable_reason(self.snapshot, self.quantity) else self.content(size)

    def content(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        if size.height < MIN_HEIGHT:
            return []
        snapshot, info = self.snapshot, self.snapshot.info
        step_table = snapshot.history.table(schema.STEP)  # the same window as the loss chart
        last_step = (step_table.last_step or 0) if step_table is not None else 0
        total_steps = info.total_steps if info else None
        steps = step_window(last_step, None, total_steps, self.slow_link)
        layers: list[Layer] = []
        figures: list[Figure] = []
        right = ""
        if info and info.attention:
            layer = info.attention[min(self.layer_index, len(info.attention) - 1)]
            layers, figures = self._curves(layer, steps, size.width)
            right = short_layer_name(layer)
            if self._averages:
                right = f"{right} {self.glyphs.separator} mean"
        self.panel_title = TREND_STATISTICS[self._number].label
        title = self.title_line(size.width, figures, right)
        height = size.height - 1
        return [
            title,
            *self.chart.rows(size.width, height, steps, layers, self.palette, self.glyphs),
        ]

    @property
    def _averages(self) -> bool:
        """Whether curves are smoothed: gradients scatter too much to be read otherwise."""
        return TREND_STATISTICS[self._number].key == "grad_cos"

    def _curves(
        self, layer: AttentionInfo, steps: tuple[int, int], width: int
    ) -> tuple[list[Layer], list[Figure]]:
        """The curves of a layer with their names at their ends, and the newest values."""
        statistic = TREND_STATISTICS[self._number]
        location = statistic.location(self.snapshot, layer)
        newest = location.history.latest() if location is not None else None
        if location is None or newest is None:
            return [], []
        columns = [location.columns[statistic.index(part)] for part in statistic.parts]
        window = location.history.window(columns, *steps, 2 * self.chart.plot_width(width))
        curves: list[Layer] = []
        names: list[Layer] = []
        figures: list[Figure] = []
        table = location.history.table
        for part, column in zip(statistic.parts, columns, strict=True):
            name, dots = table.columns[column].name, 2 * self.chart.plot_width(width)
            if layer.comparable(part):
                curves += related_curves(
                    self, self.snapshot.related, table.name, name, steps, dots
                )[0]
        for number, part in enumerate(statistic.parts):
            if not layer.comparable(part):
                figures.append((part, NOT_COMPARABLE.rjust(VALUE_WIDTH), self.palette.dim))
                continue
            style = self.style(PART_STYLES[part])
            band = Band.from_window(window, number, style)
            if self._averages:
                band = replace(band, high=smooth(band.low, band.high))
                curves.append(Line(style, band.high, band.nonfinite))
            else:
                curves.append(band)
            ends = np.flatnonzero(np.isfinite(band.high))[-1:]
            names += [Label(style, int(x), float(band.high[x]), part) for x in ends]
            value = float(newest[1][columns[number]])
            figures.append((part, statistic.format(value, VALUE_WIDTH), style))
        return [*curves, *names], figures
