"""One line that says what is below it: pieces in their colours, cut at the right edge."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.ui.widgets.lines import Lines, Row

Piece = tuple[str, str]
"""A text and its meaning in the palette."""


class Caption(Lines):
    """Pieces of text with a gap between them."""

    DEFAULT_CSS = """
    Caption { height: 1; width: 1fr; }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._pieces: tuple[Piece, ...] = ()
        self._right = ""
        self._yielding = False

    def say(self, pieces: Iterable[Piece], right: str = "", *, yielding: bool = False) -> None:
        """Show these; `right` at the right edge, for which they are cut, or, where it is
        `yielding`, only where there is room."""
        self._pieces, self._right, self._yielding = tuple(pieces), right, yielding
        self.update_rows()

    def rows(self, size: Size) -> list[Row]:
        """The one row."""
        row: Row = []
        for text, meaning in self._pieces:
            if row:
                row.append(Segment("  ", self.palette.text))
            row.append(Segment(text, getattr(self.palette, meaning)))
        room = max(0, size.width - cell_len(self._right) - 2)
        used = sum(segment.cell_length for segment in row)
        if not self._right or (self._yielding and used > room):
            return [row]
        if used > room:
            row = list(Segment.adjust_line_length(row, max(0, room - 1), pad=False))
            row.append(Segment(self.glyphs.ellipsis[:1], self.palette.dim))
            used = sum(segment.cell_length for segment in row)
        gap = " " * (size.width - used - cell_len(self._right))
        row += [Segment(gap, self.palette.text), Segment(self._right, self.palette.dim)]
        return [row]
