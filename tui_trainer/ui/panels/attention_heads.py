"""The heads of one attention layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment

from tui_trainer.history.table import TableHistory
from tui_trainer.protocol import tables
from tui_trainer.session.api import Snapshot
from tui_trainer.ui import formatting
from tui_trainer.ui.panels.attention_statistics import STYLES
from tui_trainer.ui.panels.attention_table import NOT_COMPARABLE
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
        self._indexed: TableHistory | None = None
        self._places: dict[str, list[int]] = {}
        self._values: NDArray[np.float32] | None = None
        self._note = ""

    def show_layer(self, snapshot: Snapshot, layer: str, note: str, why: str) -> None:
        """Show the heads of `layer`; `why` where there are none."""
        history = snapshot.history.table(tables.ATTENTION_HEADS)
        if history is not None and history is not self._indexed:
            self._index(history)
        latest = history.latest() if history is not None else None
        places = self._places.get(layer, [])
        self._note = note
        self._values = latest[1][places] if latest is not None and places else None
        heads = len(places) // len(tables.HEAD_STATISTICS) if self._values is not None else 0
        self.empty = why
        if len(self.order) != heads:
            self.set_order(np.arange(heads))
        self.update_rows()

    def _index(self, history: TableHistory) -> None:
        """Columns of each layer, in order of head and statistic."""
        self._indexed, self._places = history, {}
        for place, column in enumerate(history.table.columns):
            layer = column.name.rsplit(".", 2)[0]
            self._places.setdefault(layer, []).append(place)

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One head."""
        assert self._values is not None
        palette, count = self.palette, len(tables.HEAD_STATISTICS)
        cells: Row = [Segment(str(row).rjust(widths[0]), palette.text)]
        values = self._values[row * count : (row + 1) * count]
        for column, width in zip(columns[1:], widths[1:], strict=True):
            value = float(values[tables.HEAD_STATISTICS.index(column.key)])
            signed = column.key.startswith("cos")
            text = formatting.signed(value, width) if signed else formatting.number(value, width)
            style = getattr(palette, column.style)
            if value != value and self._note:
                text, style = NOT_COMPARABLE.rjust(width), palette.faint
            elif not np.isfinite(value):
                style = palette.error
            cells.append(Segment(text, style))
        return cells
