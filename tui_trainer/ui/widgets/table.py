"""A table of any number of rows, of which only those in view are built."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message

from tui_trainer.protocol import formatting
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.text import fit
from tui_trainer.ui.widgets.lines import LineView, Row

RowIds = NDArray[np.int64]

MIN_FLEXIBLE_WIDTH = 12
NOT_COMPARABLE = "n/a"
"""Shown where a comparison has no meaning."""


class Cell(NamedTuple):
    """A value in a style other than its column's."""

    value: float | str | None
    style: str
    """Name of a style of the palette."""


CellValue = Cell | float | str | None
"""None: not measured yet."""


@dataclass(frozen=True)
class TableColumn:
    """A column: what it shows of a row, and how."""

    key: str
    title: str
    width: int
    """Width in cells, whatever the values, so that nothing moves; 0 takes the rest of the row."""
    value: Callable[[int], CellValue]
    """Value of the cell in a row, by the row's id."""
    format: Callable[[float | None, int], str] = formatting.number
    """Writes a number in exactly `width` cells."""
    style: str = "text"
    """Name of a style of the palette, for values that are finite."""
    title_style: str = "dim"
    left: bool = False
    """Left-aligned, for names; numbers are right-aligned."""
    tooltip: str = ""


class VirtualTable(LineView, can_focus=True, inherit_bindings=False):
    """Shows the rows `order` (ids, in any order) in `columns`, with a cursor.

    Keys: up, down, page up, page down, home and end move the cursor; enter activates its row. The
    wheel scrolls; a click moves the cursor or, on a title, asks to sort by that column.
    """

    DEFAULT_CSS = "VirtualTable { scrollbar-gutter: stable; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False, id="table.up", tooltip="One row up"),
        Binding("down,j", "move(1)", "Down", show=False, id="table.down", tooltip="One row down"),
        Binding("pageup", "page(-1)", "Page up", show=False, id="table.page_up",
                tooltip="One page up"),
        Binding("pagedown", "page(1)", "Page down", show=False, id="table.page_down",
                tooltip="One page down"),
        Binding("home", "edge(0)", "First", show=False, id="table.first",
                tooltip="To the first row"),
        Binding("end,G", "edge(1)", "Last", show=False, id="table.last",
                tooltip="To the last row"),
        Binding("enter", "activate", "Open", show=False, id="table.activate",
                tooltip="Open the row under the cursor"),
    ]  # fmt: skip

    @dataclass
    class Highlighted(Message):
        """The cursor moved to another row."""

        table: VirtualTable
        row: int

    @dataclass
    class Activated(Message):
        """Enter was pressed on a row, or it was clicked twice."""

        table: VirtualTable
        row: int

    @dataclass
    class SortRequested(Message):
        """A column title was clicked."""

        table: VirtualTable
        key: str

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.columns: tuple[TableColumn, ...] = ()
        self.order: RowIds = np.empty(0, np.int64)
        self.cursor = 0
        """Index of the cursor's row in `order`."""
        self.placeholder = ""
        """Shown while there are no rows."""
        self.sorted_by = ""
        self._reordering = False
        """Whether the order is being changed by a caller that draws the rows itself afterwards."""
        self._cells: list[Row] = []
        """The cells of the visible rows as last built, without the cursor's color."""
        self._cells_place: tuple[object, ...] = ()
        """(first row, number of rows, keys of the columns, their widths) of `_cells`."""
        self._only_cursor_moved = False
        """Whether rows are being built for the cursor alone, so that `_cells` are still valid."""
        self.descending = True
        self.header_height = 0
        """Rows that a subclass draws above the column titles."""

    # ------------------------------------------------------------ for subclasses and owners

    def header(self, width: int) -> list[Row]:
        """Rows above the column titles: `header_height` of them."""
        return []

    def prepare(self, visible: RowIds) -> None:
        """Called before the visible rows are drawn, to fetch their values at once."""

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """The segments of one row, one for each column and exactly as wide."""
        return [
            self.cell(column, row, width) for column, width in zip(columns, widths, strict=True)
        ]

    def cell(self, column: TableColumn, row: int, width: int) -> Segment:
        """One cell: a text, or a number that is red where it is not finite."""
        cell = column.value(row)
        if not isinstance(cell, Cell):
            cell = Cell(cell, column.style)
        value, style = cell.value, cell.style
        if isinstance(value, str):
            return Segment(fit(value, width, column.left), self.style(style))
        if value is None:
            return Segment(self.glyphs.missing.rjust(width), self.palette.dim)
        if not math.isfinite(value):
            if why_absent(value) is not None:
                return Segment(self.glyphs.missing.rjust(width), self.palette.dim)
            style = "error"
        return Segment(column.format(value, width), self.style(style))

    def set_order(self, order: RowIds, to_top: bool = False) -> None:
        """Show other rows, or in another order; `update_rows` draws them. The cursor stays on its
        row if that is still shown, and is kept in view if the table has the focus; `to_top` moves
        it to the first row."""
        current = None if to_top else self.current_row
        self.order = order
        self._cells = []
        found = np.flatnonzero(order == current) if current is not None else order[:0]
        last = 0 if to_top else max(0, len(order) - 1)
        self.cursor = int(found[0]) if len(found) else min(self.cursor, last)
        virtual_size = Size(0, self.header_height + 1 + len(order))
        if virtual_size != self.virtual_size:
            self.virtual_size = virtual_size
        if self.has_focus or to_top:
            self._reordering = True  # rows are built once, by the caller
            try:
                self._scroll_to_cursor()
            finally:
                self._reordering = False

    def update_rows(self) -> None:
        """Build the rows and refresh what differs from those on screen."""
        if not self._reordering:
            super().update_rows()

    @property
    def current_row(self) -> int | None:
        """The id of the row under the cursor."""
        return int(self.order[self.cursor]) if 0 <= self.cursor < len(self.order) else None

    # ------------------------------------------------------------ drawing

    @property
    def page(self) -> int:
        """Rows that fit below the titles."""
        return max(1, self.view_size.height - 1 - self.header_height)

    @property
    def top(self) -> int:
        """Index of the first row in view."""
        return min(self.scroll_offset.y, max(0, len(self.order) - self.page))

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The columns that fit, leftmost first, and their widths; a blank cell separates them."""
        flexible = 0 if all(column.width for column in self.columns) else MIN_FLEXIBLE_WIDTH
        columns, left = [], width - flexible
        for column in self.columns:
            if column.width and left < column.width + 1:
                continue
            columns.append(column)
            left -= column.width + 1 if column.width else 0
        return columns, [column.width or flexible + max(0, left) for column in columns]

    def rows(self, size: Size) -> list[Row]:
        """The header, the titles, and the rows in view."""
        columns, widths = self.visible_columns(size.width)
        rows = [*self.header(size.width), self._titles(columns, widths)]
        visible = self.order[self.top : self.top + self.page]
        if not len(visible):
            return [*rows, [Segment(" " + self.placeholder, self.palette.dim)]]
        place = (self.top, len(visible), [column.key for column in columns], widths)
        if not (self._only_cursor_moved and self._cells and self._cells_place == place):
            self.prepare(visible)
            gap = Segment(" ", self.palette.text)
            built = (self.cells(row, columns, widths) for row in visible.tolist())
            self._cells = [_spaced(cells, gap) for cells in built]
            self._cells_place = place
        rows += self._cells
        if self.has_focus and 0 <= (y := self.cursor - self.top) < len(visible):
            y -= len(visible)
            rows[y] = [Segment(text, self._highlighted(style)) for text, style, _ in rows[y]]
        return rows

    def discard_drawn(self) -> None:
        """Build the cells in the colors of the new theme."""
        self._cells = []

    def _highlighted(self, style: Style | None) -> Style:
        """The style of a cell under the cursor. Grey is hard to read on the cursor's color."""
        palette = self.palette
        return (palette.text if style in (None, palette.dim) else style) + palette.cursor

    def _titles(self, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        titles: Row = []
        for column, width in zip(columns, widths, strict=True):
            title, style = column.title, self.style(column.title_style)
            if column.key == self.sorted_by:
                arrow = self.glyphs.descending if self.descending else self.glyphs.ascending
                title, style = f"{title}{arrow}", self.palette.accent
            text = title[:width].ljust(width) if column.left else title[:width].rjust(width)
            titles.append(Segment(text, style))
        return _spaced(titles, Segment(" ", self.palette.text))

    # ------------------------------------------------------------ moving

    def move_cursor(self, index: int) -> None:
        """Put the cursor on the row at `index` of the order and scroll it into view."""
        index = min(max(index, 0), max(0, len(self.order) - 1))
        moved = index != self.cursor
        self.cursor = index
        self._scroll_to_cursor()
        self.update_rows()
        if moved:
            self._post_highlighted()

    def _post_highlighted(self) -> None:
        if (row := self.current_row) is not None:
            self.post_message(self.Highlighted(self, row))

    def _scroll_to_cursor(self) -> None:
        top = min(max(self.top, self.cursor - self.page + 1), self.cursor)
        if top != self.scroll_offset.y:
            self.scroll_to(y=top, animate=False, force=True)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Keep the cursor in view when the wheel or the scrollbar moves the rows."""
        last = min(self.top + self.page, len(self.order)) - 1
        cursor = max(0, min(max(self.cursor, self.top), last))
        if cursor != self.cursor:
            self.cursor = cursor
            self._post_highlighted()
        super().watch_scroll_y(old_value, new_value)

    def action_move(self, rows: int) -> None:
        """Move the cursor by some rows."""
        # Only two rows are drawn; the frame that the key requests brings the newest values.
        self._only_cursor_moved = True
        try:
            self.move_cursor(self.cursor + rows)
        finally:
            self._only_cursor_moved = False

    def action_page(self, pages: int) -> None:
        """Move the cursor by some pages."""
        self.move_cursor(self.cursor + pages * self.page)

    def action_edge(self, end: int) -> None:
        """Move the cursor to the first (0) or last (1) row."""
        self.move_cursor((len(self.order) - 1) * end)

    def action_activate(self) -> None:
        """Open the row under the cursor."""
        if (row := self.current_row) is not None:
            self.post_message(self.Activated(self, row))

    def on_focus(self) -> None:
        self.update_rows()

    def on_blur(self) -> None:
        self.update_rows()

    def on_click(self, event: events.Click) -> None:
        """Sort by a title, or move the cursor; a second click on the cursor's row opens it."""
        y = event.y - self.header_height
        if y == 0:
            if (key := self._title_at(event.x)) is not None:
                self.post_message(self.SortRequested(self, key))
            return
        index = self.top + y - 1
        if y < 0 or index >= len(self.order):
            return
        if index == self.cursor and event.chain > 1:
            self.action_activate()
        self.move_cursor(index)

    def _title_at(self, x: int) -> str | None:
        columns, widths = self.visible_columns(self.view_size.width)
        start = 0
        for column, width in zip(columns, widths, strict=True):
            if start <= x <= start + width:
                return column.key
            start += width + 1
        return None


def _spaced(cells: Row, gap: Segment) -> Row:
    return [segment for cell in cells for segment in (cell, gap)][:-1]
