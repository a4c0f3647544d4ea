"""A picture of real pixels within a widget that is drawn line by line."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Protocol, cast

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Offset, Region
from textual.widget import Widget

from tui_trainer.ui.terminal_images import (
    MAX_CELLS,
    Pixels,
    PixelSupport,
    delete_kitty,
    kitty,
    padded,
    placeholders,
    sixel,
)
from tui_trainer.ui.widgets.lines import Row

_numbers = itertools.count()


class PictureContext(Protocol):
    """What the app provides to pictures."""

    pixels: PixelSupport | None
    """None when pixels are not wanted, or when the terminal has none."""

    def write_to_terminal(self, data: str) -> None:
        """Write an escape sequence between two frames."""


class Picture:
    """Draws a picture in some cells of a widget.

    With kitty's protocol the picture is sent once, and the cells hold characters that stand for its
    parts, so whatever is drawn over the cells hides the picture. With sixel the cells are blank,
    and the picture is written over them after each frame that has drawn them.
    """

    def __init__(self, widget: Widget, support: PixelSupport) -> None:
        self._widget = widget
        self._support = support
        self._number = 0x400000 | (next(_numbers) & 0xF) << 16 | os.getpid() & 0xFFFF
        """Id of the picture in the terminal, which may hold several."""
        self._wanted: tuple[int, int, bytes] | None = None
        """(columns, rows, bytes) of the picture that is being encoded or drawn."""
        self._sequence = ""
        self._lines: list[str] = []
        self._area = Region()
        self._drawn_later = False

    def show(self, image: Pixels, columns: int, rows: int, place: Offset, color: Pixels) -> None:
        """Draw `image` in `columns` × `rows` cells whose first is at `place` in the widget. The
        rest of these cells has `color`."""
        columns, rows = min(columns, MAX_CELLS), min(rows, MAX_CELLS)
        cell = self._support.cell_width, self._support.cell_height
        image = padded(image, columns, rows, cell, color)
        wanted = (columns, rows, image.tobytes())
        self._area = Region(place.x, place.y, columns, rows)
        if wanted == self._wanted:
            return
        self._wanted = wanted

        def encode() -> None:
            """Runs on a thread, since encoding may take some tenths of a second."""
            if self._support.placeholders:
                sequence = kitty(image, columns, rows, self._number)
            else:
                sequence = sixel(image[: len(image) // 6 * 6])
            self._widget.app.call_from_thread(encoded, sequence)

        def encoded(sequence: str) -> None:
            if wanted is not self._wanted or not self._widget.is_attached:
                return
            if self._support.placeholders:
                self._context.write_to_terminal(sequence)
                lines = placeholders(columns, rows)
                if lines != self._lines:
                    self._lines = lines
                    self._widget.refresh()
            else:
                self._sequence = sequence
                self.draw()

        self._widget.run_worker(
            encode, thread=True, exclusive=True, group="picture", exit_on_error=False
        )

    def clear(self) -> None:
        """Stop drawing the picture, and delete it where the terminal keeps it."""
        if self._lines:
            self._context.write_to_terminal(delete_kitty(self._number))
        self._wanted, self._sequence, self._lines = None, "", []

    @property
    def _context(self) -> PictureContext:
        return cast("PictureContext", self._widget.app)

    @property
    def left(self) -> int:
        """The first column of the picture in the widget."""
        return self._area.x

    def row(self, y: int, background: Style) -> Row | None:
        """The characters of row `y` of the widget from `left` on; None where the widget draws the
        row itself."""
        y -= self._area.y
        if not 0 <= y < len(self._lines) or self._wanted is None:
            return None
        red, green, blue = self._number.to_bytes(3)
        color = Style(color=Color.from_rgb(red, green, blue), bgcolor=background.bgcolor)
        return [Segment(self._lines[y], color)]

    def cells_drawn(self, when_sent: Callable[[Callable[[], object]], object]) -> None:
        """Draw sixels again once the cells that the widget has just drawn are sent."""
        if self._sequence and not self._drawn_later:
            self._drawn_later = True
            when_sent(self.draw)

    def draw(self) -> None:
        """Write the sixels at their place, unless something is in front."""
        self._drawn_later = False
        widget = self._widget
        if not self._sequence or not widget.is_attached or widget.app.screen is not widget.screen:
            return
        region = widget.content_region
        shown = widget.is_on_screen and widget.display and region.height > self._area.y
        if shown:
            place = f"\x1b[{region.y + self._area.y + 1};{region.x + self._area.x + 1}H"
            self._context.write_to_terminal(f"\x1b7{place}{self._sequence}\x1b8")
