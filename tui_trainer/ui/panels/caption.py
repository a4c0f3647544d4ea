"""One line that says what is below it: pieces in their colours, cut at the right edge."""

from __future__ import annotations

from collections.abc import Iterable

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

    def say(self, pieces: Iterable[Piece]) -> None:
        """Show these."""
        self._pieces = tuple(pieces)
        self.update_rows()

    def rows(self, size: Size) -> list[Row]:
        """The one row."""
        row: Row = []
        for text, meaning in self._pieces:
            if row:
                row.append(Segment("  ", self.palette.text))
            row.append(Segment(text, getattr(self.palette, meaning)))
        return [row]
