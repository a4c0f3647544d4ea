"""A table of what was added to the residual stream, with notes on it."""

from __future__ import annotations

import math

import numpy as np
from rich.cells import cell_len

from tui_trainer.client.answers.attention import (
    place_text,
    target_text,
)
from tui_trainer.protocol.attention import (
    AttentionExamination,
    Contribution,
)
from tui_trainer.protocol.formatting import number, signed
from tui_trainer.protocol.text import wrap
from tui_trainer.ui.panels.base import Figure, bar, title_line
from tui_trainer.ui.widgets.lines import Row, ScrollingLines, Span
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable

EFFECT_WIDTH = 9
"""Cells of a bar on either side of the axis."""


class ResidualTable(VirtualTable):
    """A row for each contribution to the stream, in order."""

    lessons = ("residual-stream",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.header_height = 1
        self.found: AttentionExamination | None = None
        self.heads_shown = True
        self.columns = self._columns(20)

    def _columns(self, width: int) -> tuple[TableColumn, ...]:
        """`width`: cells for the names."""
        return (
            TableColumn("name", "what was added", width, self._what, left=True),
            TableColumn("norm", "norm", 8, lambda row: self._figure(row, "norm")),
            TableColumn("cosine", "cosine", 7, lambda row: self._figure(row, "cosine")),
            TableColumn("logit", "logit", 8, lambda row: self._figure(row, "logit")),
            TableColumn("bar", "", 2 * EFFECT_WIDTH + 1, self._bar, left=True),
        )

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        stream = self.found.residual if self.found is not None else None
        return stream.contributions if stream is not None else ()

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        if found is not None:
            self.placeholder = found.no_residual or found.missing or "reading …"
        longest = max((cell_len(each.name) for each in self.contributions), default=12)
        self.columns = self._columns(min(longest + 8, max(20, self.view_size.width - 46)))
        self.rearrange()
        self.update_rows()

    def rearrange(self) -> None:
        """Show the heads of each layer, or hide them."""
        shown = [
            row
            for row, each in enumerate(self.contributions)
            if self.heads_shown or each.kind not in ("head", "bias")
        ]
        self.set_order(np.array(shown, np.int64))

    def _part(self, row: int) -> bool:
        return self.contributions[row].kind in ("head", "bias")

    def _what(self, row: int) -> Cell:
        each = self.contributions[row]
        if self._part(row):
            return Cell(f"  {each.name}", "dim")
        style = {"attention": "v", "start": "text", "readout": "dim"}.get(each.kind, "text")
        return Cell(f"{each.name} (start)" if each.kind == "start" else each.name, style)

    def _figure(self, row: int, name: str) -> CellValue:
        each = self.contributions[row]
        value: float = getattr(each, name)
        style = "dim" if self._part(row) else "text"
        if math.isnan(value):
            return Cell("", style)
        return Cell(number(value, 8) if name == "norm" else signed(value, 7, 3), style)

    def _bar(self, row: int) -> Cell:
        """The effect on the logit, to the left or to the right; without one, the norm."""
        each = self.contributions[row]
        name = "norm" if all(math.isnan(c.logit) for c in self.contributions) else "logit"
        sizes = [abs(getattr(c, name)) for c in self.contributions]
        largest = max((size for size in sizes if math.isfinite(size)), default=0.0) or 1.0
        value: float = getattr(each, name)
        if math.isnan(value):
            return Cell("", "text")
        drawn = bar(abs(value) / largest, self.glyphs.bar, EFFECT_WIDTH)
        axis = self.glyphs.vertical
        if value < 0:
            return Cell(f"{drawn.rjust(EFFECT_WIDTH)}{axis}", "q")
        return Cell(f"{' ' * EFFECT_WIDTH}{axis}{drawn}", "dim" if self._part(row) else "k")

    def header(self, width: int) -> list[Row]:
        found = self.found
        stream = found.residual if found is not None else None
        figures: list[Figure] = []
        if found is not None and stream is not None:
            figures = [
                ("norm", number(stream.norm, 0), self.palette.text),
                ("sum within", f"{stream.difference:.0e}", self.palette.good),
            ]
            if not stream.no_logit:
                off = f"{stream.logit_difference:.0e}"
                figures.insert(1, ("logit", signed(stream.logit, 8, 3).strip(), self.palette.text))
                figures.append(("logit within", off, self.palette.good))
        return [title_line(self, width, "Residual stream", figures)]


class ResidualNotes(ScrollingLines, can_focus=False):
    """Where the stream is read, whose logit is shown, and notes."""

    lessons = ("residual-stream",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._texts: list[Span] = []
        self._built: list[Row] = []

    def show_attention(self, found: AttentionExamination | None) -> None:
        stream = found.residual if found is not None else None
        self._texts = []
        if found is not None and stream is not None:
            logit = f"no effect on a logit: {stream.no_logit}" if stream.no_logit else (
                f"logit of {target_text(stream)}, the divisor of the final norm held"
            )  # fmt: skip
            self._texts = [(f"at {place_text(found, stream)}; {logit}", "text")]
            self._texts += [(note, "warning") for note in stream.notes]
        self.view_resized()

    def view_resized(self) -> None:
        if not self.is_attached or not self.view_size.width:
            return
        self._built = [
            self.styled([(line, style)])
            for text, style in self._texts
            for line in wrap(text, self.view_size.width)
        ]
        self.lines_changed()

    def discard_drawn(self) -> None:
        super().discard_drawn()
        self.call_later(self.view_resized)

    def line_count(self) -> int:
        return len(self._built)

    def line(self, index: int) -> Row:
        return self._built[index]
