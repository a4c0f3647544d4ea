"""The heads of one attention layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment

from tui_trainer.history.layers import place_of
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import AttentionInfo
from tui_trainer.session.api import Snapshot
from tui_trainer.ui import formatting
from tui_trainer.ui.panels.attention_statistics import STYLES
from tui_trainer.ui.panels.query_key_value import NOT_COMPARABLE
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.table import TableColumn, VirtualTable

HEAD_COLUMNS = (
    TableColumn("head", "head", 4),
    *(
        TableColumn(
            name,
            name.replace("norm_", "‖W‖ ").replace("_", " "),
            7,
            style=STYLES[name.rpartition("_")[2]],
        )
        for name in tables.HEAD_STATISTICS
    ),
)


class HeadsTable(VirtualTable):
    """The heads of one layer: norms, cosines and drifts of their parts of Wq, Wk, Wv."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(HEAD_COLUMNS, id=id)
        self.descending = False
        self._values: NDArray[np.float32] | None = None
        self._layer: AttentionInfo | None = None

    def show_layer(self, snapshot: Snapshot, layer: AttentionInfo, why: str) -> None:
        """Show the heads of `layer`; `why` where there are none."""
        self._layer, self._values = layer, None
        place = place_of(snapshot.history, tables.ATTENTION_HEADS, layer.layer)
        latest = place.history.latest() if place is not None else None
        if place is not None and latest is not None:
            self._values = latest[1][place.columns.start : place.columns.stop]
        count = len(tables.HEAD_STATISTICS)
        heads = len(self._values) // count if self._values is not None else 0
        self.empty = why
        if len(self.order) != heads:
            self.set_order(np.arange(heads))
        self.update_rows()

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One head."""
        assert self._values is not None
        assert self._layer is not None
        palette, count = self.palette, len(tables.HEAD_STATISTICS)
        cells: Row = [Segment(str(row).rjust(widths[0]), palette.text)]
        values = self._values[row * count : (row + 1) * count]
        for column, width in zip(columns[1:], widths[1:], strict=True):
            value = float(values[tables.HEAD_STATISTICS.index(column.key)])
            signed = column.key.startswith("cos")
            text = formatting.signed(value, width) if signed else formatting.number(value, width)
            style = getattr(palette, column.style)
            if value != value and not self._layer.comparable(column.key.rpartition("_")[2]):
                text, style = NOT_COMPARABLE.rjust(width), palette.faint
            elif not np.isfinite(value):
                style = palette.error
            cells.append(Segment(text, style))
        return cells
