"""A virtual table on the line API: only the rows on screen are built, so 10,000 cost as 50 do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message

from tui_trainer.protocol.text import truncate_middle
from tui_trainer.ui.widgets.lines import Lines, Row

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TableColumn:
    """A column: fixed in width (0: it takes what is left), so that nothing jitters."""

    key: str
    title: str
    width: int
    left: bool = False
    """Left-aligned (names); numbers are right-aligned."""
    style: str = "dim"
    """Palette style of its title."""
    tooltip: str = ""


class VirtualTable(Lines, can_focus=True):
    """Rows are numbers (`order`, any ids in any order); a subclass draws one: `cells(id, columns)`.

    Keys: up, down, page up and down, home, end move the cursor; enter activates. The wheel scrolls,
    a click moves the cursor or, on a title, asks for that order (`SortAsked`).
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = set()
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False, id="table.up", tooltip="One row up"),
        Binding("down,j", "move(1)", "Down", show=False, id="table.down", tooltip="One row down"),
        Binding("pageup", "page(-1)", "Page up", show=False, id="table.page_up"),
        Binding("pagedown", "page(1)", "Page down", show=False, id="table.page_down"),
        Binding("home,g", "edge(0)", "First", show=False, id="table.first"),
        Binding("end,G", "edge(1)", "Last", show=False, id="table.last"),
        Binding("enter", "activate", "Open", show=False, id="table.activate"),
    ]

    @dataclass
    class Highlighted(Message):
        """The cursor came to another row."""

        table: VirtualTable
        row: int

    @dataclass
    class Activated(Message):
        """Enter, or a second click, on a row."""

        table: VirtualTable
        row: int

    @dataclass
    class SortAsked(Message):
        """A click on a title."""

        table: VirtualTable
        key: str

    def __init__(
        self,
        columns: Sequence[TableColumn] = (),
        *,
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.columns: tuple[TableColumn, ...] = tuple(columns)
        self.order: Ids = np.empty(0, np.int64)
        self.cursor = 0
        """Place of the cursor in `order`."""
        self.top = 0
        """Place of the first row on screen."""
        self.empty = ""
        """What to say while there are no rows."""
        self.sorted_by = ""
        self.descending = True
        self.show_cursor = True
        self.heading = 0
        """Rows that a subclass puts above the column titles."""

    # ------------------------------------------------------------ for subclasses and owners

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """The segments of one row, one for each column, each exactly as wide as its column."""
        raise NotImplementedError

    def prepare(self, visible: Ids) -> None:
        """Called before the visible rows are drawn, to fetch their values in one go."""

    def head(self, width: int) -> list[Row]:
        """Rows above the column titles: `heading` of them."""
        return []

    def set_order(self, order: Ids) -> None:
        """Other rows, or another order; the cursor stays on its row where that is still there."""
        current = self.current
        self.order = order
        found = np.flatnonzero(order == current) if current is not None else order[:0]
        self.cursor = int(found[0]) if len(found) else min(self.cursor, max(0, len(order) - 1))
        self._keep_visible(0)

    @property
    def current(self) -> int | None:
        """The row under the cursor."""
        return int(self.order[self.cursor]) if 0 <= self.cursor < len(self.order) else None

    # ------------------------------------------------------------ drawing

    @property
    def page(self) -> int:
        """Rows that fit."""
        return max(1, self.size.height - 1 - self.heading)

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The columns that fit, leftmost first, and their widths; the scroll bar keeps one cell."""
        columns, left = [], width - 1
        flexible = max((12 for column in self.columns if not column.width), default=0)
        left -= flexible
        for column in self.columns:
            if column.width and left < column.width + 1:
                continue
            columns.append(column)
            left -= column.width + 1 if column.width else 0
        return columns, [column.width or flexible + max(0, left) for column in columns]

    def rows(self, size: Size) -> list[Row]:
        """The heading, the titles, and as many rows as fit."""
        columns, widths = self.visible_columns(size.width)
        rows = [*self.head(size.width), self._titles(columns, widths)]
        visible = self.order[self.top : self.top + self.page]
        if not len(visible):
            return [*rows, [Segment(" " + self.empty, self.palette.dim)]]
        self.prepare(visible)
        focused = self.has_focus and self.show_cursor
        for place, row in enumerate(visible.tolist(), self.top):
            cells: Row = []
            for segment in self.cells(row, columns, widths):
                cells += (segment, Segment(" ", self.palette.text))
            cells.append(self._scroll_bar(place - self.top))
            if focused and place == self.cursor:
                cells = [
                    Segment(text, _under(style, self.palette.cursor)) for text, style, _ in cells
                ]
            rows.append(cells)
        return rows

    def _titles(self, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        row: Row = []
        for column, width in zip(columns, widths, strict=True):
            title = column.title
            style = getattr(self.palette, column.style)
            if column.key == self.sorted_by:
                sign = self.glyphs.descending if self.descending else self.glyphs.ascending
                title, style = f"{title}{sign}", self.palette.accent
            text = title[:width].ljust(width) if column.left else title[:width].rjust(width)
            row += (Segment(text, style), Segment(" ", self.palette.text))
        return row

    def _scroll_bar(self, y: int) -> Segment:
        count, page = len(self.order), self.page
        if count <= page:
            return Segment(" ", self.palette.faint)
        length = max(1, page * page // count)
        start = round(self.top / (count - page) * (page - length))
        inside = start <= y < start + length
        return Segment(self.glyphs.thumb if inside else " ", self.palette.dim)

    # ------------------------------------------------------------ moving

    def move_to(self, place: int) -> None:
        """Put the cursor on the row at `place` of the order."""
        place = min(max(place, 0), max(0, len(self.order) - 1))
        moved = place != self.cursor
        self.cursor = place
        self._keep_visible(1)
        self.update_rows()
        if moved and (row := self.current) is not None:
            self.post_message(self.Highlighted(self, row))

    def _keep_visible(self, margin: int) -> None:
        last = max(0, len(self.order) - self.page)
        if margin or self.has_focus:
            self.top = min(max(self.top, self.cursor - self.page + 1), self.cursor)
        self.top = min(max(self.top, 0), last)

    def scroll_rows(self, rows: int) -> None:
        """Scroll without the cursor, unless it would leave the screen."""
        last = max(0, len(self.order) - self.page)
        self.top = min(max(self.top + rows, 0), last)
        self.cursor = min(
            max(self.cursor, self.top), min(self.top + self.page, len(self.order)) - 1
        )
        self.cursor = max(self.cursor, 0)
        self.update_rows()

    def action_move(self, rows: int) -> None:
        """Move the cursor."""
        self.move_to(self.cursor + rows)

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self.move_to(self.cursor + pages * self.page)

    def action_edge(self, end: int) -> None:
        """First or last row."""
        self.move_to((len(self.order) - 1) * end)

    def action_activate(self) -> None:
        """Open the row under the cursor."""
        if (row := self.current) is not None:
            self.post_message(self.Activated(self, row))

    def on_focus(self) -> None:
        """The cursor shows."""
        self.update_rows()

    def on_blur(self) -> None:
        """The cursor hides."""
        self.update_rows()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Scroll."""
        event.stop()
        self.scroll_rows(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Scroll."""
        event.stop()
        self.scroll_rows(-3)

    def on_click(self, event: events.Click) -> None:
        """Sort by a title, or go to a row; a click on the row under the cursor opens it."""
        y = event.y - self.heading
        if y < 0:
            return
        if y == 0:
            if (key := self._title_at(event.x)) is not None:
                self.post_message(self.SortAsked(self, key))
            return
        place = self.top + y - 1
        if place >= len(self.order):
            return
        if place == self.cursor and event.chain > 1:
            self.action_activate()
        self.move_to(place)

    def _title_at(self, x: int) -> str | None:
        columns, widths = self.visible_columns(self.size.width)
        at = 0
        for column, width in zip(columns, widths, strict=True):
            if at <= x <= at + width:
                return column.key
            at += width + 1
        return None


def fitted(text: str, width: int, left: bool = False) -> str:
    """`text` in exactly `width` cells."""
    text = truncate_middle(text, width)
    return text.ljust(width) if left else text.rjust(width)


def _under(style: Style | None, cursor: Style) -> Style:
    return style + cursor if style is not None else cursor
