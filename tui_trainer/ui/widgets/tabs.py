"""A line of tabs, scrolled so that the chosen tab is in view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.segment import Segment
from textual import events
from textual.geometry import Size
from textual.message import Message

from tui_trainer.ui.widgets.lines import LineView, Row

PADDING = 3
"""Cells of a tab besides its name: a space on either side, and the gap to the next."""
MORE_LEFT, MORE_RIGHT = "‹", "›"


class TabLine(LineView):
    """The names of the tabs, the current one highlighted; a click chooses a tab.

    Where not all tabs fit, an arrow replaces the first ones, so that the current tab is in view.
    """

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
        """Highlight another tab."""
        self.current = number % len(self.names)
        self.update_rows()

    def first_visible(self, width: int) -> int:
        """Number of the first tab that is shown."""
        first = 0
        while first < self.current and self._end(first, self.current) > width - 2:
            first += 1
        return first

    def _end(self, first: int, last: int) -> int:
        """Cells from the left edge to the end of tab `last`, when `first` is the first shown."""
        return 2 + sum(len(name) + PADDING for name in self.names[first : last + 1])

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        palette, first = self.palette, self.first_visible(size.width)
        row: Row = [Segment(MORE_LEFT if first else " ", palette.dim)]
        left = size.width - 1
        for number, name in enumerate(self.names[first:], first):
            if len(name) + 2 > left - 1:
                row.append(Segment(MORE_RIGHT.rjust(left), palette.dim))
                left = 0
                break
            style = palette.current if number == self.current else palette.dim
            row += (Segment(f" {name} ", style), Segment(" ", palette.text))
            left -= len(name) + PADDING
        row.append(Segment(self.glyphs.rule * max(0, left - 1), palette.rule))
        return [row]

    def on_click(self, event: events.Click) -> None:
        """Choose the tab under the pointer; a click on an arrow chooses the tab behind it."""
        first = self.first_visible(self.size.width)
        if event.x < 1:
            self.post_message(self.Chosen(max(0, first - 1)))
            return
        end = 1
        for number, name in enumerate(self.names[first:], first):
            end += len(name) + PADDING
            if event.x < end:
                self.post_message(self.Chosen(number))
                return
