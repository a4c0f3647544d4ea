"""A table of runs: how each ended, and what was set up differently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.segment import Segment

from tui_trainer.protocol.describe import Scalar
from tui_trainer.session.comparing import Compared, Line, differences, outcome
from tui_trainer.ui.formatting import shorten
from tui_trainer.ui.panels.overlay import sign_of, style_of
from tui_trainer.ui.panels.plain import clean
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.table import TableColumn, VirtualTable, fitted

LEAST = 9
"""Cells of a run's column."""
HEADINGS = len("set up differently ")


class DifferencesTable(VirtualTable):
    """Rows are quantities and options, columns are runs; the better end is set off."""

    def __init__(self, runs: Sequence[Compared], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.runs = runs
        self.empty = "nothing was recorded"
        self._lines: list[Line | str] = []
        self.show_cursor = True

    def read(self) -> None:
        """Look at the runs again."""
        unlike = differences(self.runs)
        self._lines = [
            "at the end",
            *outcome(self.runs),
            "set up differently" if unlike else "set up alike",
            *unlike,
        ]
        self.set_order(np.arange(len(self._lines)))
        self.update_rows()

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The names as wide as they are, the rest shared by the runs; all runs are shown."""
        names = [line.name for line in self._lines if isinstance(line, Line)]
        count = len(self.runs)
        most = max(HEADINGS, width - (LEAST + 1) * count - 2)
        left = min(max(HEADINGS, *map(len, names)), most)
        each = max(3, min(20, (width - left - 2) // count - 1))
        columns = [TableColumn("name", "", left, left=True)]
        columns += [TableColumn(str(n), sign_of(n, self.glyphs), each) for n in range(count)]
        return columns, [column.width for column in columns]

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One quantity or option."""
        line, palette = self._lines[row], self.palette
        if isinstance(line, str):
            total = sum(widths) + len(widths) - 1
            text = f"{line} ".ljust(total, self.glyphs.rule)[:total]
            pieces, at = [], 0
            for width in widths:  # the table puts a space after each column
                pieces.append(Segment(text[at : at + width], palette.title))
                at += width + 1
            return pieces
        best = _best(line)
        out: Row = [Segment(fitted(line.name, widths[0], True), palette.dim)]
        for number, value in enumerate(line.values):
            text = shorten(clean(text_of(value)), widths[number + 1], self.glyphs.ellipsis)
            style = style_of(number, palette) if number == best else palette.text
            sign = self.glyphs.missing if value is None else text
            out.append(Segment(sign.rjust(widths[number + 1]), style))
        return out


def _best(line: Line) -> int:
    """Which run did best in this row; -1 where that cannot be said."""
    lower = line.name.startswith(("loss", "validation"))
    if not lower and not line.name.startswith("accuracy"):
        return -1
    values = [v if isinstance(v, float) and np.isfinite(v) else np.nan for v in line.values]
    if np.isnan(values).all() or len(set(values)) == 1:
        return -1
    return int(np.nanargmin(values) if lower else np.nanargmax(values))


def text_of(value: Scalar) -> str:
    """A value in few characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return " ".join(value.split()) if value else ""
