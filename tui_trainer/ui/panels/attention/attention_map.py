"""The attention weights of a head as a heat map: queries down, keys across."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from textual.geometry import Offset, Size

from tui_trainer.client.answers.attention import (
    position_label,
    visible,
)
from tui_trainer.client.answers.tensors import cells_of
from tui_trainer.protocol.attention import (
    AttentionExamination,
)
from tui_trainer.protocol.heat_map import HeatMap
from tui_trainer.protocol.text import strip_escapes
from tui_trainer.ui.panels.base import Figure, title_line
from tui_trainer.ui.panels.tensor import HeatMapView, at_most, colored
from tui_trainer.ui.widgets.lines import Row

LABEL_WIDTH = 8
"""Maximum number of cells for the tokens next to the map."""
CAPTION_ROWS = 2
"""Rows for the title and for the tokens of the keys."""
MAX_CELL = 8
"""Maximum number of characters across for one key; a query gets at most half as many down."""


class AttentionMapView(HeatMapView):
    """Queries down, keys across, with the tokens next to them and a mark at the query."""

    lessons = ("attention-scores",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.found: AttentionExamination | None = None

    def show_attention(self, found: AttentionExamination | None, message: str = "") -> None:
        self.found = found
        self.show(found.map if found is not None else None, message)

    @property
    def pixels(self) -> tuple[int, int]:
        """(rows, columns) of cells for which there is room."""
        size, cell = self.view_size, self._cell
        rows, columns = size.height - CAPTION_ROWS, size.width - self._gutter
        return at_most(max(2, rows * cell.height), max(2, columns * cell.width))

    @property
    def _cell(self) -> Size:
        """Size of a character in dots, which are half blocks or pixels."""
        if not self.in_pixels or self.support is None:
            return Size(1, 2)
        return Size(self.support.cell_width, self.support.cell_height)

    @property
    def _gutter(self) -> int:
        """Width of the margin to the left of the map, in cells: a mark, and the tokens."""
        labels = self.found.labels if self.found is not None else ()
        longest = max((cell_len(visible(label)) for label in labels), default=0)
        return 2 + (min(LABEL_WIDTH, max(longest, 2)) if longest else 0)

    def rows(self, size: Size) -> Sequence[Row]:
        heat, found = self.heat, self.found
        if heat is None or found is None:
            return super().rows(size)
        cells, cell = cells_of(heat), self._cell
        lines = size.height - CAPTION_ROWS
        width, height = (size.width - self._gutter) * cell.width, lines * cell.height
        down, across = self._enlargement(heat, width, height)
        shown = cells[: height // down, : width // across]
        dots = shown.repeat(down, 0).repeat(across, 1)
        high = float(np.nanmax(cells, initial=0.0))
        filled = np.ones(dots.shape, bool)
        if self.in_pixels and lines > 0:
            image = colored(self.palette, dots, filled, 0.0, high)
            taken = self.show_picture(image, Offset(self._gutter, 1), size)
            drawn: list[Row] = [[] for _ in range(taken)]
        else:
            drawn = self._blocks(dots, filled, 0.0, high)
        gutters = [self._beside(heat, found, line, down) for line in range(len(drawn))]
        below = self._below(heat, found, across // cell.width, shown.shape[1])
        return [
            title_line(self, size.width, *self._head(heat, high)),
            *([*gutter, *line] for gutter, line in zip(gutters, drawn, strict=True)),
            below if across % cell.width == 0 else [],
        ]

    def _enlargement(self, heat: HeatMap, width: int, height: int) -> tuple[int, int]:
        """(dots down for one query, dots across for one key): about square, and whole characters
        where there is room, so that they align with the tokens."""
        cell = self._cell
        across = min(max(1, width // heat.columns), MAX_CELL * cell.width)
        down = min(max(1, height // heat.rows), MAX_CELL // 2 * cell.height)
        if down > cell.height:
            down -= down % cell.height
        across = min(across, down)
        if across > cell.width:
            across -= across % cell.width
        if cell.width > 1:  # pixels are square
            down = down if across >= cell.width and down >= cell.height else min(down, across)
        return down, across

    def _head(self, heat: HeatMap, high: float) -> tuple[str, list[Figure]]:
        style = self.palette.text
        figures = [
            ("queries", f"{heat.row_from:,}–{heat.row_to - 1:,}", style),
            ("keys", f"{heat.column_from:,}–{heat.column_to - 1:,}", style),
            ("strongest", f"{high:.3f}", style),
        ]
        if heat.block_rows > 1 or heat.block_columns > 1:
            block = f"{heat.block_rows:,}{self.glyphs.times}{heat.block_columns:,}"
            figures.append(("largest of", block, style))
        return "Weights", figures

    def _beside(self, heat: HeatMap, found: AttentionExamination, line: int, down: int) -> Row:
        """The mark of the query, and the tokens of a line's queries."""
        unit = self._cell.height
        begun, end = -(-unit * line // down), -(-unit * (line + 1) // down)
        first = heat.row_from + begun * heat.block_rows
        last = min(heat.row_from + end * heat.block_rows, heat.row_to)
        room = self._gutter - 2
        here = first <= found.query < last
        mark = self.glyphs.current if here else " "
        text = ""
        if room and heat.block_rows == 1 and end - begun <= 2:
            text = "".join(position_label(found, q)[: room if down >= unit else 1]
                           for q in range(first, last))  # fmt: skip
        text = strip_escapes(text)[:room]
        return self.styled([(mark, "accent bold"), (text.rjust(room), "accent" if here else "dim"),
                            (" ", "text")])  # fmt: skip

    def _below(self, heat: HeatMap, found: AttentionExamination, across: int, shown: int) -> Row:
        """The first character of each key's token."""
        if not found.labels or heat.block_columns > 1:
            return []
        marks = [position_label(found, heat.column_from + key)[:1] for key in range(shown)]
        text = "".join((mark if cell_len(mark) == 1 else "?").ljust(across) for mark in marks)
        return self.styled([(" " * self._gutter, "text"), (text, "dim")])
