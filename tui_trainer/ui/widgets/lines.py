"""The base of what changes each frame: rows of segments, redrawn only where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.strip import Strip
from textual.widget import Widget

from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette

if TYPE_CHECKING:
    from tui_trainer.ui.app import TuiTrainerApp

Row = list[Segment]
"""One line of cells. Only single-width characters; a row may be shorter than its widget."""


def span(text: str, style: Style | None = None) -> Segment:
    """One run of cells of one style."""
    return Segment(text, style)


class Lines(Widget):
    """Draws `rows()` through the line API; `update_rows()` refreshes the regions that changed.

    Subclasses build their rows in `rows(size)` from what they were last given, and call
    `update_rows()` when that changed. Building is skipped while the widget is not displayed.
    """

    DEFAULT_CSS = """
    Lines { background: $background; width: 1fr; height: 1fr; }
    """

    def __init__(
        self, *, id: str | None = None, classes: str | None = None, name: str | None = None
    ) -> None:
        super().__init__(name=name, id=id, classes=classes)
        self._rows: list[Row] = []
        self._drawn_with: Palette | None = None

    @property
    def palette(self) -> Palette:
        """The styles of the theme in force."""
        return cast("TuiTrainerApp", self.app).palette

    @property
    def glyphs(self) -> Glyphs:
        """The signs in force."""
        return cast("TuiTrainerApp", self.app).glyphs

    @property
    def frugal(self) -> bool:
        """Whether the line to the terminal is slow: what changes all the time should not."""
        return cast("TuiTrainerApp", self.app).link.frugal

    def rows(self, size: Size) -> Sequence[Row]:
        """The rows for a widget of this size, top first."""
        raise NotImplementedError

    def update_rows(self) -> None:
        """Build the rows anew and refresh what differs from those on screen."""
        size = self.size
        if not size.width or not size.height or not self.is_attached:
            return
        new = list(self.rows(size))[: size.height]
        old, self._rows = self._rows, new
        if self._drawn_with is not self.palette:  # another theme: blank cells change as well
            self._drawn_with = self.palette
            self.refresh()
            return
        regions = [
            Region(x, y, width, 1)
            for y in range(max(len(new), len(old)))
            for x, width in _difference(_row(old, y), _row(new, y), size.width)
        ]
        if regions:
            self.refresh(*regions)

    def on_resize(self, event: events.Resize) -> None:
        """Another size: other rows."""
        self._rows = []
        self.refresh()
        self.update_rows()

    def on_show(self) -> None:
        """Displayed again."""
        self.update_rows()

    def render_line(self, y: int) -> Strip:
        """One line, as built last."""
        width = self.size.width
        if y >= len(self._rows):
            return Strip.blank(width, self.palette.text)
        return Strip(self._rows[y]).adjust_cell_length(width, self.palette.text)


def _row(rows: list[Row], y: int) -> Row:
    return rows[y] if y < len(rows) else []


def _difference(old: Row, new: Row, width: int) -> list[tuple[int, int]]:
    """(x, width) of the stretches in which two rows differ; close ones are joined."""
    if old == new:
        return []
    cells = list(zip(_cells(old, width), _cells(new, width), strict=True))
    stretches: list[tuple[int, int]] = []
    for x, (before, after) in enumerate(cells):
        if before == after:
            continue
        if stretches and x - sum(stretches[-1]) < 6:
            stretches[-1] = (stretches[-1][0], x + 1 - stretches[-1][0])
        else:
            stretches.append((x, 1))
    return stretches


def _cells(row: Row, width: int) -> list[tuple[str, Style | None]]:
    cells = [(sign, style) for text, style, _ in row for sign in text][:width]
    return cells + [(" ", None)] * (width - len(cells))
