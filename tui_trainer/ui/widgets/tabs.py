"""A line of names of which one is shown: what panels fold into where there is little room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.segment import Segment
from textual import events
from textual.geometry import Size
from textual.message import Message

from tui_trainer.ui.widgets.lines import Lines, Row


class TabLine(Lines):
    """The names, the current one marked; a click chooses."""

    DEFAULT_CSS = "TabLine { height: 1; }"

    @dataclass
    class Chosen(Message):
        """A tab was clicked."""

        number: int

    def __init__(self, names: Sequence[str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.names = tuple(names)
        self.current = 0

    def choose(self, number: int) -> None:
        """Mark another tab."""
        self.current = number % len(self.names)
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        palette = self.palette
        row: Row = [Segment(" ", palette.text)]
        for number, name in enumerate(self.names):
            style = palette.current if number == self.current else palette.dim
            row += (Segment(f" {name} ", style), Segment(" ", palette.text))
        used = sum(len(segment.text) for segment in row)
        row.append(Segment(self.glyphs.rule * max(0, size.width - used - 1), palette.faint))
        return [row]

    def on_click(self, event: events.Click) -> None:
        """Choose the tab under the pointer."""
        at = 1
        for number, name in enumerate(self.names):
            at += len(name) + 3
            if event.x < at:
                self.post_message(self.Chosen(number))
                return
