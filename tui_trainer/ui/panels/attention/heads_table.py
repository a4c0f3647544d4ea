"""The heads of one attention layer."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from tui_trainer.client.api import Snapshot
from tui_trainer.history.analysis import location_of
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.attention.statistics import BY_KEY, PART_STYLES
from tui_trainer.ui.widgets.table import NOT_COMPARABLE, Cell, TableColumn, VirtualTable

VALUE_WIDTH = 7


class HeadsTable(VirtualTable):
    """Norms, cosines and drifts of the parts of Wq, Wk and Wv that belong to each head."""

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
        return TableColumn(name, title, VALUE_WIDTH, value, write, style, title_style=style)

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
