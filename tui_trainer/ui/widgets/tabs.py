"""A line of tabs that keeps the chosen one in sight where not all of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.segment import Segment
from textual import events
from textual.geometry import Size
from textual.message import Message

from tui_trainer.ui.widgets.lines import Lines, Row

# ---- tabs
# A line of names of which one is shown: what panels fold into where there is little room.


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


_AROUND = 3
"""Cells of a tab besides its name: a space on either side, and the gap."""


class ScrollingTabs(TabLine):
    """Leaves out leading names, with a sign in their place, until the chosen one fits."""

    def first(self, width: int) -> int:
        """Number of the first name shown."""
        first = 0
        while first < self.current and self._reach(first) > width - 2:
            first += 1
        return first

    def _reach(self, first: int) -> int:
        return 2 + sum(len(name) + _AROUND for name in self.names[first : self.current + 1])

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        palette, first = self.palette, self.first(size.width)
        row: Row = [Segment("‹" if first else " ", palette.dim)]
        left = size.width - 1
        for number, name in enumerate(self.names[first:], first):
            if len(name) + 2 > left - 1:
                row.append(Segment("›".rjust(left), palette.dim))
                left = 0
                break
            style = palette.current if number == self.current else palette.dim
            row += (Segment(f" {name} ", style), Segment(" ", palette.text))
            left -= len(name) + _AROUND
        row.append(Segment(self.glyphs.rule * max(0, left - 1), palette.faint))
        return [row]

    def on_click(self, event: events.Click) -> None:
        """Choose the tab under the pointer; a click on a sign shows what is behind it."""
        event.prevent_default()
        first = self.first(self.size.width)
        if event.x < 1:
            self.post_message(self.Chosen(max(0, first - 1)))
            return
        at = 1
        for number, name in enumerate(self.names[first:], first):
            at += len(name) + _AROUND
            if event.x < at:
                self.post_message(self.Chosen(number))
                return
