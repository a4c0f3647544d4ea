"""The attention layers and their most telling statistics, as the dashboard shows them."""

from __future__ import annotations

from functools import partial

import numpy as np

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import counted
from tui_trainer.ui.panels.attention.statistics import (
    BY_KEY,
    NO_ATTENTION,
    PART_STYLES,
    LayerValues,
    LayerValuesReader,
    Statistic,
    layer_label,
)
from tui_trainer.ui.panels.base import NO_STEP_YET, Figure, title_line, unavailable_reason
from tui_trainer.ui.panels.staleness import staleness
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.table import Cell, TableColumn, VirtualTable

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
"""Statistic, part, title, width."""


class LayersTable(VirtualTable):
    """Layers by statistics."""

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
        """Draw a snapshot."""
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
