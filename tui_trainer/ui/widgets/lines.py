"""Widgets that are drawn line by line: rows of segments through Textual's line API, of which only
the cells that changed are refreshed.

Textual sends every cell of a refreshed region, changed or not. A chart or table changes a few cells
a frame, so comparing its new rows with those on screen saves most of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

from rich.cells import get_character_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui_trainer.protocol.text import strip_escapes, wrap
from tui_trainer.ui.frames import TerminalLink
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette

Row = list[Segment]
"""One line of cells; it may be shorter than its widget."""
Span = tuple[str, str]
"""A text and the name of its style in the palette, with attributes if wanted: `error reverse`."""

NARROW = frozenset(map(chr, (*range(0x20, 0x7F), *range(0x2500, 0x25FD), *range(0x2800, 0x2900))))
"""Characters of one cell, with which nearly everything is drawn: ASCII, boxes, blocks, braille."""
JOINED_CELLS = 6
"""Changed stretches of a row closer than this are refreshed as one region."""


class DrawingContext(Protocol):
    """What the app provides to everything that is drawn line by line."""

    palette: Palette
    glyphs: Glyphs
    link: TerminalLink
    status_message: str
    """The answer to the last command, shown in the header for a moment."""


class LineView(ScrollView, can_focus=False):
    """Draws `rows(size)` and, on `update_rows()`, refreshes the cells that differ from those on
    screen. While the widget is hidden no rows are built."""

    DEFAULT_CSS = """
    LineView {
        background: $background;
        width: 1fr;
        height: 1fr;
        scrollbar-size-vertical: 1;
        scrollbar-size-horizontal: 1;
        scrollbar-color: $foreground 30%;
        scrollbar-color-hover: $foreground 50%;
        scrollbar-color-active: $accent;
        scrollbar-background: $background;
        scrollbar-background-hover: $background;
        scrollbar-background-active: $background;
        scrollbar-corner-color: $background;
    }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._rows: list[Row] = []
        """The rows on screen."""
        self._rows_palette: Palette | None = None
        self._styles: dict[str, Style] = {}
        """Styles of `_rows_palette`, by name."""

    @property
    def lessons(self) -> tuple[str, ...]:
        """Pages of `tui-trainer learn` about what the view shows; the help leads to them."""
        return ()

    def rows(self, size: Size) -> Sequence[Row]:
        """The visible rows, from the top, of a view of this size."""
        raise NotImplementedError

    @property
    def palette(self) -> Palette:
        """The styles of the current theme."""
        return cast("DrawingContext", self.app).palette

    @property
    def glyphs(self) -> Glyphs:
        """The characters to draw with: Unicode or ASCII."""
        return cast("DrawingContext", self.app).glyphs

    @property
    def slow_link(self) -> bool:
        """Whether the terminal is at the end of a slow link, so that redrawing should be rare."""
        return cast("DrawingContext", self.app).link.slow

    @property
    def view_size(self) -> Size:
        """The size of the rows: the content without scrollbars."""
        return self.scrollable_content_region.size

    def style(self, name: str) -> Style:
        """A style of the palette by name, with attributes if wanted: `dim`, `error reverse`. Call
        only while rows are built."""
        style = self._styles.get(name)
        if style is None:
            base, *attributes = name.split()
            style = getattr(self.palette, base)
            style += Style.parse(" ".join(attributes)) if attributes else Style()
            self._styles[name] = style
        return style

    def styled(self, spans: Iterable[Span]) -> Row:
        """A row of texts in named styles."""
        return [Segment(text, self.style(name)) for text, name in spans if text]

    def wrapped_rows(self, text: str, style: str, width: int, indent: int = 0) -> list[Row]:
        """A text on as many rows as it takes; none for an empty one."""
        lines = wrap(text, width - indent) if text else []
        return [self.styled([(" " * indent + line, style)]) for line in lines]

    def update_rows(self) -> None:
        """Build the rows and refresh what differs from those on screen."""
        size = self.view_size
        if not size.width or not size.height or not self.is_attached:
            return
        palette = self.palette
        theme_changed = self._rows_palette is not palette
        if theme_changed:
            self._rows_palette = palette
            self._styles.clear()
            self.discard_drawn()
        old, new = self._rows, [_drawable(row) for row in self.rows(size)[: size.height]]
        self._rows = new
        if theme_changed:  # empty cells change their background, too
            self.refresh()
            return
        regions = [
            Region(x, y, width, 1)
            for y in range(max(len(new), len(old)))
            for x, width in _changed_stretches(_row(old, y), _row(new, y), size.width)
        ]
        if regions:
            self.refresh(*regions)

    def discard_drawn(self) -> None:
        """Discard cached rows, which have the colours of another theme."""

    def on_mount(self) -> None:
        """Redraw when the theme changes."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self.call_later(self.update_rows))

    def view_resized(self) -> None:
        """Build what depends on the size of the view."""
        self.update_rows()

    def on_resize(self, event: events.Resize) -> None:
        """Build the rows for the new size."""
        self._rows = []
        self.refresh()
        self.view_resized()

    def watch_show_vertical_scrollbar(self) -> None:
        """Build the rows again, since a scrollbar that appears narrows the view."""
        if self.show_vertical_scrollbar:  # it may have been scrolled without one
            self.vertical_scrollbar.position = self.scroll_y
        self.call_later(self.view_resized)

    def on_show(self) -> None:
        """Build the rows that were not built while the widget was hidden."""
        self.update_rows()

    def watch_scroll_x(self, old_value: float, new_value: float) -> None:
        """Show what came into view. Textual's own watcher would refresh every cell."""
        if self.show_horizontal_scrollbar:
            self.horizontal_scrollbar.position = new_value
        self.update_rows()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Show what came into view. Textual's own watcher would refresh every cell."""
        if self.show_vertical_scrollbar:
            self.vertical_scrollbar.position = new_value
        self.update_rows()

    def render_line(self, y: int) -> Strip:
        """One visible row, as last built."""
        row = self._rows[y] if y < len(self._rows) else []
        return Strip(row).adjust_cell_length(self.size.width, self.palette.text)


class ScrollingLines(LineView, can_focus=True):
    """Scrolls through lines that are built when they come into view, and then cached."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._lines: dict[int, Row] = {}

    def line_count(self) -> int:
        """Number of lines at the present width."""
        raise NotImplementedError

    def line(self, index: int) -> Row:
        """Build the line at `index`."""
        raise NotImplementedError

    def line_width(self) -> int:
        """Width of the longest line, in cells; 0 if lines do not scroll sideways."""
        return 0

    def lines_changed(self, first: int = 0) -> None:
        """Build the lines from `first` on again; earlier lines have not changed."""
        self._lines = {index: line for index, line in self._lines.items() if index < first}
        virtual_size = Size(self.line_width(), self.line_count())
        if virtual_size != self.virtual_size:
            self.virtual_size = virtual_size
        self.update_rows()

    def discard_drawn(self) -> None:
        """Discard the cached lines, which have the colours of another theme."""
        self._lines.clear()

    def rows(self, size: Size) -> Sequence[Row]:
        """The lines in view."""
        left, top = self.scroll_offset
        in_view = range(top, min(top + size.height, self.line_count()))
        lines = [self._kept_line(index) for index in in_view]
        if left:
            lines = [list(Strip(line).crop(left, left + size.width)) for line in lines]
        return lines

    def _kept_line(self, index: int) -> Row:
        line = self._lines.get(index)
        if line is None:
            line = self._lines[index] = self.line(index)
        return line

    def view_resized(self) -> None:
        """Lay the lines out for the new width."""
        self.lines_changed()


def _row(rows: list[Row], y: int) -> Row:
    return rows[y] if y < len(rows) else []


def _drawable(row: Row) -> Row:
    """`row` without characters that would move the cursor, wherever a text comes from."""
    if "".join([segment.text for segment in row]).isprintable():
        return row
    return [Segment(strip_escapes(segment.text), segment.style) for segment in row]


def _changed_stretches(old: Row, new: Row, width: int) -> list[tuple[int, int]]:
    """(x, width) of the stretches in which two rows differ; close ones are joined."""
    if old == new:
        return []
    stretches: list[tuple[int, int]] = []
    pairs = enumerate(zip(_cells(old, width), _cells(new, width), strict=True))
    for x in [x for x, (before, after) in pairs if before != after]:
        if stretches and x - sum(stretches[-1]) < JOINED_CELLS:
            stretches[-1] = (stretches[-1][0], x + 1 - stretches[-1][0])
        else:
            stretches.append((x, 1))
    return stretches


def _cells(row: Row, width: int) -> list[tuple[str, Style | None]]:
    """The characters of a row by cell. A wide character takes two cells; a character of no width
    belongs to the cell before it."""
    cells: list[tuple[str, Style | None]] = []
    for text, style, _ in row:
        if NARROW.issuperset(text):
            cells += [(character, style) for character in text]
            continue
        for character in text:
            size = get_character_cell_size(character)
            if size:
                cells += [(character, style)] * size
            elif cells:
                cells[-1] = (cells[-1][0] + character, cells[-1][1])
    del cells[width:]
    return cells + [(" ", None)] * (width - len(cells))


class BuiltLines(ScrollingLines):
    """Scrolls through lines that are built all at once, whenever their content or width changes."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._built: list[Row] = []

    def _build(self) -> None:
        """Set `_built` for the present width, and call `lines_changed`."""
        raise NotImplementedError

    def view_resized(self) -> None:
        self._build()

    def discard_drawn(self) -> None:
        """Build the lines again in the colours of the new theme."""
        super().discard_drawn()
        self.call_later(self._build)

    def line_count(self) -> int:
        return len(self._built)

    def line(self, index: int) -> Row:
        return self._built[index]
