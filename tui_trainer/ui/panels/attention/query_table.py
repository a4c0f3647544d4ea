"""A table of the keys of one query: products, angles, scores and weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from rich.cells import cell_len

from tui_trainer.client.answers.attention import (
    KeyRow,
    allowed_keys,
    entropy_text,
    key_rows,
    short_patch_label,
)
from tui_trainer.protocol.attention import (
    AttentionExamination,
)
from tui_trainer.protocol.formatting import number
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.panels.base import Figure, bar, title_line
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable

MAX_LABEL = 13
BAR_WIDTH = 12


class QueryTable(VirtualTable):
    """Rows are keys: q · k, the angle, the score, the weight."""

    lessons = ("attention-scores",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._chosen = -1
        """The query to which `show_attention` last moved the cursor."""
        self.header_height = 1
        self.found: AttentionExamination | None = None
        self._keys: list[KeyRow] = []
        self.by_weight = False
        self.columns = ()

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        self._keys = key_rows(found) if found is not None else []
        labelled = found is not None and (bool(found.labels) or found.grid is not None)
        self.columns = tuple(
            column for column in self._all_columns() if labelled or column.key != "label"
        )
        self.rearrange()
        if found is not None and found.query != self._chosen and self._keys:
            self._chosen = found.query
            self._to_query()
        self.update_rows()

    def _to_query(self) -> None:
        """Put the cursor on the key that is the query itself."""
        places = np.flatnonzero(self.order == self._chosen)
        self.move_cursor(int(places[0]) if len(places) else 0)

    def rearrange(self) -> None:
        """Sort by the keys, or by their weights."""
        weights = np.array([key.weight for key in self._keys], np.float64)
        order = np.argsort(-weights, kind="stable") if self.by_weight else np.arange(len(weights))
        self.sorted_by, self.descending = ("weight", True) if self.by_weight else ("key", False)
        self.set_order(order.astype(np.int64))

    def _all_columns(self) -> tuple[TableColumn, ...]:
        found = self.found
        patches = found is not None and found.grid is not None and not found.labels
        longest = max((cell_len(key.label) for key in self._keys), default=0)
        label = 7 if patches else min(max(longest, 5), MAX_LABEL)
        title = "row,col" if patches else "token"
        return (
            TableColumn("key", "key", 5, lambda row: Cell(str(row), self._style(row, "dim"))),
            TableColumn("label", title, label, self._label, left=True),
            TableColumn("product", "q·k", 7, self._of(lambda k: k.product)),
            TableColumn("angle", "angle", 6, self._angle),
            TableColumn("score", "score", 7, self._score),
            TableColumn("weight", "weight", 7, self._weight),
            TableColumn("bar", "", BAR_WIDTH, self._bar, left=True, style="k"),
        )

    def _style(self, row: int, usual: str = "text") -> str:
        if self.found is not None and row == self.found.query:
            return "accent"
        return "faint" if self._keys[row].masked else usual

    def _of(self, value: Callable[[KeyRow], float]) -> Callable[[int], CellValue]:
        return lambda row: Cell(value(self._keys[row]), self._style(row))

    def _label(self, row: int) -> Cell:
        found = self.found
        label = self._keys[row].label
        if found is not None and found.grid is not None and not found.labels:
            label = short_patch_label(found.grid, row)
        return Cell(label, self._style(row))

    def _angle(self, row: int) -> Cell:
        angle = self._keys[row].angle
        text = f"{angle:.1f}°" if math.isfinite(angle) else self.glyphs.missing
        return Cell(text, self._style(row))

    def _score(self, row: int) -> Cell:
        key = self._keys[row]
        return Cell("masked" if key.masked else key.score, self._style(row))

    def _weight(self, row: int) -> Cell:
        return Cell(f"{self._keys[row].weight:.4f}", self._style(row, "strong"))

    def _bar(self, row: int) -> Cell:
        largest = max((key.weight for key in self._keys), default=0.0) or 1.0
        share = self._keys[row].weight / largest
        return Cell(fine_bar(share, self.glyphs), self._style(row, "k"))

    def header(self, width: int) -> list[Row]:
        found = self.found
        figures: list[Figure] = []
        if found is not None and found.head < len(found.by_head):
            entropy = found.by_head[found.head].entropy
            text = entropy_text(entropy, allowed_keys(found))
            figures = [("entropy", text, self.palette.text)]
            if not math.isnan(found.scale):
                figures.append(("scale", number(found.scale, 0), self.palette.text))
        return [title_line(self, width, "Query by keys", figures)]


EIGHTHS = " ▏▎▍▌▋▊▉"


def fine_bar(share: float, glyphs: Glyphs) -> str:
    """A bar of at most `BAR_WIDTH` cells, in eighths of a cell unless `glyphs` are ASCII."""
    if glyphs.ascii:
        return bar(share, glyphs.bar, BAR_WIDTH)
    whole, rest = divmod(round(min(share, 1.0) * BAR_WIDTH * 8), 8) if share > 0 else (0, 0)
    return "█" * whole + (EIGHTHS[rest] if rest else "")
