"""The base of what changes each frame: rows of segments, redrawn only where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from tui_trainer.ui.frames import TerminalLink
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette


class DrawingContext(Protocol):
    """What the app provides to everything that is drawn line by line."""

    palette: Palette
    glyphs: Glyphs
    link: TerminalLink
    status_message: str
    """The answer to the last command, shown in the header for a moment."""


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
        return cast("DrawingContext", self.app).palette

    @property
    def glyphs(self) -> Glyphs:
        """The signs in force."""
        return cast("DrawingContext", self.app).glyphs

    @property
    def slow_link(self) -> bool:
        """Whether the line to the terminal is slow: what changes all the time should not."""
        return cast("DrawingContext", self.app).link.slow

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


# ---- lines
# A scrolling view whose lines are made only when they come into sight.
#
# What the screens beside the dashboard stand on: a log of 5,000 lines or a matrix of 64 classes
# costs
# what is visible, not what is there. Lines are cached as `Strip`s; `changed(first)` drops the
# rest.


Line = list[tuple[str, str]]
"""Pieces of text, each with a meaning of the palette and perhaps `bold`, `reverse` or `underline`
after it: `("✗ 3 is 8", "error reverse")`; "" is plain text."""


class LinesView(ScrollView, can_focus=True):
    """Base of the line views. A subclass says `count()` and `line(index)`."""

    DEFAULT_CSS = """
    LinesView { background: $background; scrollbar-size-vertical: 1; scrollbar-size-horizontal: 1; }
    """

    fits = True
    """Whether lines are laid out to the width of the view (so that it never scrolls sideways)."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._strips: dict[int, Strip] = {}
        self._styles: dict[str, Style] = {}
        self._styled: Palette | None = None

    # ------------------------------------------------------------ to be said by the subclass

    def count(self) -> int:
        """Number of lines at the present width."""
        raise NotImplementedError

    def line(self, index: int) -> Line | Strip:
        """The line at `index`, from 0."""
        raise NotImplementedError

    def line_width(self) -> int:
        """The widest line, where the view scrolls sideways."""
        return self.width

    # ------------------------------------------------------------ what it may call

    @property
    def width(self) -> int:
        """Cells that a line has."""
        return max(1, self.scrollable_content_region.width)

    @property
    def height(self) -> int:
        """Lines in sight."""
        return max(1, self.scrollable_content_region.height)

    @property
    def palette(self) -> Palette:
        """The styles of the theme in force."""
        return cast("DrawingContext", self.app).palette

    @property
    def glyphs(self) -> Glyphs:
        """The signs in force."""
        return cast("DrawingContext", self.app).glyphs

    def style(self, name: str) -> Style:
        """The style of a meaning, such as `dim` or `error reverse`."""
        found = self._styles.get(name)
        if found is None:
            meaning, *attributes = name.split() or ["text"]
            found = getattr(self.palette, meaning)
            found += Style.parse(" ".join(attributes)) if attributes else Style()
            self._styles[name] = found
        return found

    def changed(self, first: int = 0) -> None:
        """Lines from `first` on are new, or gone; those before are as they were."""
        if first <= 0:
            self._strips.clear()
            self._styles.clear()
        else:
            for index in [index for index in self._strips if index >= first]:
                del self._strips[index]
        width = self.width if self.fits else max(self.width, self.line_width())
        size = Size(width if not self.fits else 0, self.count())
        top, bottom = self.scroll_offset.y, self.scroll_offset.y + self.size.height
        if size != self.virtual_size:
            self.virtual_size = size
        if first <= top:
            self.refresh()
        elif first < bottom:
            for y in range(first - top, self.size.height):
                self.refresh_line(y)

    def refresh_line(self, y: int) -> None:
        """Draw one visible row again."""
        self.refresh(Region(0, y, self.size.width, 1))

    # ------------------------------------------------------------ Textual

    def on_mount(self) -> None:
        """Draw anew when the theme changes."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self.call_later(self.changed))

    def on_resize(self) -> None:
        """Lay the lines out again."""
        self.changed()

    def render_line(self, y: int) -> Strip:
        """One visible row."""
        if self._styled is not self.palette:  # another theme
            self._styled = self.palette
            self._styles.clear()
            self._strips.clear()
        left, top = self.scroll_offset
        index = y + top
        if not 0 <= index < self.count():
            return Strip.blank(self.size.width, self.palette.text)
        strip = self._strips.get(index)
        if strip is None:
            made = self.line(index)
            if not isinstance(made, Strip):
                made = Strip([Segment(text, self.style(name)) for text, name in made if text])
            self._strips[index] = strip = made
        return strip.crop_extend(left, left + self.size.width, self.palette.text)
