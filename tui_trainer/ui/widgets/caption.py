"""A caption of one line, and a placeholder for missing data."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.segment import Segment
from textual.geometry import Size
from textual.widgets import Static

from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.widgets.lines import LineView, Row, Span

GAP = "  "
MIN_NAME_WIDTH = 24
"""Cells to which the first text, a name, may be cut to make room for the others."""
MAX_TEXT_WIDTH = 40
"""Width beyond which the other texts are cut."""


class Caption(LineView):
    """One line of texts with a gap between them, and one text at the right edge."""

    DEFAULT_CSS = "Caption { height: 1; width: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._spans: tuple[Span, ...] = ()
        self._right = ""
        self._right_is_optional = False

    def update(
        self, spans: Iterable[Span], right: str = "", *, right_is_optional: bool = False
    ) -> None:
        """Show `spans`, and `right` at the right edge. Where there is no room for both, the spans
        are cut off, or an optional `right` is left out."""
        self._spans, self._right = tuple(spans), right
        self._right_is_optional = right_is_optional
        self.update_rows()

    def rows(self, size: Size) -> list[Row]:
        """The one row."""
        room = max(0, size.width - cell_len(self._right) - len(GAP))
        row: Row = []
        for span in self._cut_longest(
            room if self._right and not self._right_is_optional else size.width
        ):
            if row:
                row.append(Segment(GAP, self.palette.text))
            row += self.styled([span])
        used = sum(segment.cell_length for segment in row)
        if used > size.width and size.width:
            row = list(Segment.adjust_line_length(row, size.width - 1, pad=False))
            return [[*row, Segment(self.glyphs.ellipsis[:1], self.palette.dim)]]
        if not self._right or (self._right_is_optional and used > room):
            return [row]
        if used > room:
            row = list(Segment.adjust_line_length(row, max(0, room - 1), pad=False))
            row.append(Segment(self.glyphs.ellipsis[:1], self.palette.dim))
            used = sum(segment.cell_length for segment in row)
        gap = " " * (size.width - used - cell_len(self._right))
        row += [Segment(gap, self.palette.text), Segment(self._right, self.palette.dim)]
        return [row]

    def _cut_longest(self, room: int) -> list[Span]:
        """The spans; where they do not fit, names and other long texts of the user are cut in the
        middle."""
        texts = [strip_escapes(text) for text, _ in self._spans]
        excess = sum(map(cell_len, texts)) + len(GAP) * (len(texts) - 1) - room
        while excess > 0:
            widths = [cell_len(text) for text in texts]
            spare = [
                width - (MAX_TEXT_WIDTH if number else MIN_NAME_WIDTH)
                for number, width in enumerate(widths)
            ]
            longest = max(range(len(texts)), key=spare.__getitem__)
            if spare[longest] <= 0:
                break
            width = widths[longest] - min(excess, spare[longest])
            texts[longest] = truncate_middle(texts[longest], width, self.glyphs.ellipsis)
            excess -= widths[longest] - cell_len(texts[longest])
        return [(text, style) for text, (_, style) in zip(texts, self._spans, strict=True)]


class Placeholder(Static):
    """A centred message in place of missing data; hidden without a message."""

    DEFAULT_CSS = """
    Placeholder { width: 1fr; height: 1fr; content-align: center middle; text-align: center;
        color: $text-muted; display: none; background: $background; }
    Placeholder.-shown { display: block; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__("", id=id, markup=False)
        self.message = ("", "")

    def set_message(self, message: str, hint: str = "") -> None:
        """Show a message, with a hint below it; "" hides the placeholder."""
        if (message, hint) != self.message:
            self.message = (message, hint)
            self.set_class(bool(message), "-shown")
            self.update(f"{message}\n\n{hint}" if hint else message)
