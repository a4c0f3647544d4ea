"""A tensor in the inspector: the heat map of a window of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from rich.style import Style
from textual.color import Color as TextualColor
from textual.geometry import Offset, Region, Size
from textual.message import Message
from textual.strip import Strip

from tui_trainer.client.answers.tensors import cells_of
from tui_trainer.protocol.formatting import number
from tui_trainer.protocol.heat_map import MAX_CELLS, HeatMap, HeatMapWindow, Reduction
from tui_trainer.ui.panels.base import title_line
from tui_trainer.ui.panels.samples import Pixels, half_blocks
from tui_trainer.ui.terminal_images import PixelSupport, enlarged
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.lines import LineView, Row, Span
from tui_trainer.ui.widgets.picture import Picture, PictureContext

Floats = NDArray[np.float32]

REDUCTIONS: tuple[Reduction, ...] = ("mean_abs", "mean", "max_abs")
REDUCTION_NAMES = {"mean_abs": "mean |x|", "mean": "mean x", "max_abs": "max |x|"}
ENTRY_NAMES = {"mean_abs": "|x|", "mean": "x", "max_abs": "|x|"}
"""Names of the values of cells that hold a single entry."""
MAX_ENLARGEMENT = 8
"""Terminal cells across, and half cells down, for one entry at most."""
COLOR_STEPS = 33
SHADES = " .:-=+*#%@"
CAPTION_ROWS = 2
"""Rows for the title and the scale of a heat map."""
MIN_SPAN = 2
"""Rows and columns of the smallest window."""
ZOOM = 2.0
PAN = 0.25
"""Share of a window by which it moves."""


class Viewport:
    """The window of a tensor that is on the screen."""

    def __init__(self) -> None:
        self.rows: tuple[int, int] | None = None
        """None: all of them."""
        self.columns: tuple[int, int] | None = None
        self.reduction: Reduction = "mean_abs"

    @property
    def whole(self) -> bool:
        return self.rows is None and self.columns is None

    def reset(self) -> None:
        self.rows = self.columns = None

    def window(self, cells: tuple[int, int]) -> HeatMapWindow:
        """The window to ask for, reduced to at most (rows, columns) of `cells`."""
        row_from, row_to = self.rows or (0, None)
        column_from, column_to = self.columns or (0, None)
        return HeatMapWindow(*cells, row_from, row_to, column_from, column_to, self.reduction)

    def zoom(self, matrix: tuple[int, int], by: float) -> None:
        """Show a part that is `by` times as large around the same middle."""
        self.rows = _zoomed(self.rows, matrix[0], by)
        self.columns = _zoomed(self.columns, matrix[1], by)

    def pan(self, matrix: tuple[int, int], down: int, right: int) -> None:
        """Move by a part of the window."""
        self.rows = _moved(self.rows, matrix[0], down)
        self.columns = _moved(self.columns, matrix[1], right)


def _zoomed(part: tuple[int, int] | None, size: int, by: float) -> tuple[int, int] | None:
    first, last = part or (0, size)
    span = max(min(MIN_SPAN, size), round((last - first) * by))
    if span >= size:
        return None
    first = min(max(0, (first + last - span) // 2), size - span)
    return first, first + span


def _moved(part: tuple[int, int] | None, size: int, steps: int) -> tuple[int, int] | None:
    if part is None or not steps:
        return part
    span = part[1] - part[0]
    first = min(max(0, part[0] + steps * max(1, int(span * PAN))), size - span)
    return first, first + span


class HeatMapView(LineView):
    """Two cells of the heat map in one of the terminal, one above the other."""

    lessons = ("scalar-tensor",)

    class Resized(Message):
        """There is room for another number of cells."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.heat: HeatMap | None = None
        self.message = ""
        """Text in place of a heat map."""
        self._picture: Picture | None = None
        """The picture, where the terminal shows real pixels."""

    @property
    def support(self) -> PixelSupport | None:
        """The terminal's support for real pixels; None where they are not wanted."""
        return cast("PictureContext", self.app).pixels

    def on_mount(self) -> None:
        super().on_mount()
        if self.support is not None:
            self._picture = Picture(self, self.support)

    def on_unmount(self) -> None:
        self.clear_picture()

    def clear_picture(self) -> None:
        if self._picture is not None:
            self._picture.clear()

    def show(self, heat: HeatMap | None, message: str = "") -> None:
        self.heat, self.message = heat, message
        self.update_rows()

    def view_resized(self) -> None:
        super().view_resized()
        self.post_message(self.Resized())

    @property
    def pixels(self) -> tuple[int, int]:
        """(rows, columns) of cells for which there is room."""
        size = self.view_size
        rows, columns = max(1, size.height - CAPTION_ROWS), max(2, size.width)
        support = self.support
        if support is None:
            return 2 * rows, columns
        rows, columns = rows * support.cell_height, columns * support.cell_width
        return at_most(rows, columns)

    @property
    def in_pixels(self) -> bool:
        """Whether the picture is of real pixels."""
        in_color = not self.glyphs.ascii and self.palette.text.bgcolor is not None
        return self._picture is not None and in_color

    def rows(self, size: Size) -> Sequence[Row]:
        """Title, picture, scale."""
        heat = self.heat
        if heat is None:
            self.clear_picture()
            title = title_line(self, size.width, "Heat map")
            return [title, [], self.styled([(f" {self.message}", "dim")])]
        cells = cells_of(heat)
        low, high = color_range(cells, heat.reduction)
        filled = filled_cells(heat)
        return [
            title_line(self, size.width, *self._title(heat)),
            *self._map(cells, filled, low, high, size),
            self._scale(low, high, cells[filled > 0], size.width),
        ]

    def _map(self, cells: Floats, filled: Floats, low: float, high: float, size: Size) -> list[Row]:
        height = size.height - CAPTION_ROWS
        if height < 1 or not self.in_pixels:
            room = size.width, 2 * height
            return self._blocks(_enlarged(cells, *room), _enlarged(filled, *room) > 0, low, high)
        support = self.support
        assert support is not None
        room = size.width * support.cell_width, height * support.cell_height
        image = enlarged(colored(self.palette, cells, filled > 0, low, high), *room)
        rows = self.show_picture(image, Offset(0, 1), size)
        return [[] for _ in range(rows)]

    def show_picture(self, image: Pixels, place: Offset, size: Size) -> int:
        """Draw real pixels from `place` on; returns the rows that they take."""
        support, picture = self.support, self._picture
        assert support is not None
        assert picture is not None
        rows: int = min(size.height - CAPTION_ROWS, -(-image.shape[0] // support.cell_height))
        columns = min(size.width - place.x, -(-image.shape[1] // support.cell_width))
        background = np.array(background_of(self.palette), np.uint8)
        picture.show(image, columns, rows, place, background)
        return rows

    def render_line(self, y: int) -> Strip:
        strip = super().render_line(y)
        if self._picture is None or self.heat is None:
            return strip
        row = self._picture.row(y, self.palette.text)
        if row is None:
            return strip
        left = strip.crop(0, self._picture.left)
        drawn = Strip.join([left, Strip(row)])
        return drawn.adjust_cell_length(self.size.width, self.palette.text)

    def render_lines(self, crop: Region) -> list[Strip]:
        if self._picture is not None and self.heat is not None:
            self._picture.cells_drawn(self.call_after_refresh)
        return super().render_lines(crop)

    def _title(self, heat: HeatMap) -> tuple[str, list[tuple[str, str, Style]]]:
        single = heat.block_rows == heat.block_columns == 1
        names = ENTRY_NAMES if single else REDUCTION_NAMES
        style = self.palette.text
        figures = []
        if not heat.lines:
            figures.append(("rows", f"{heat.row_from:,}–{heat.row_to - 1:,}", style))
            figures.append(("columns", f"{heat.column_from:,}–{heat.column_to - 1:,}", style))
        else:
            figures.append(("entries", f"{heat.column_from:,}–{heat.column_to - 1:,}", style))
        if not single:
            block = f"{heat.block_rows:,}{self.glyphs.times}{heat.block_columns:,}"
            figures.append(("blocks", block, style))
        return names[heat.reduction], figures

    def _blocks(
        self, values: Floats, filled: NDArray[np.bool_], low: float, high: float
    ) -> list[Row]:
        if self.glyphs.ascii or self.palette.text.bgcolor is None:
            return self._shades(values, filled, low, high)
        pixels = colored(self.palette, values, filled, low, high)
        if len(pixels) % 2:  # the lower half of the last row is empty
            below = np.full_like(pixels[:1], background_of(self.palette))
            pixels = np.concatenate([pixels, below])
        return half_blocks(pixels)

    def _shades(
        self, values: Floats, filled: NDArray[np.bool_], low: float, high: float
    ) -> list[Row]:
        """Characters by magnitude, for ASCII and for themes in the terminal's own colours, which
        are unknown; `!` marks values that are not finite."""
        if values.shape[0] % 2:
            values, filled = np.vstack([values, values[-1:]]), np.vstack([filled, filled[-1:]])
        pairs = np.stack([values[0::2], values[1::2]])
        finite = np.isfinite(pairs).all(0)
        sizes = np.abs(np.where(np.isfinite(pairs), pairs, 0)).max(0)
        base, top = (0.0, max(-low, high)) if low < 0 else (low, high)
        share = np.clip((sizes - base) / ((top - base) or 1.0), 0, 1)
        marks = np.array(list(SHADES))[np.rint(share * (len(SHADES) - 1)).astype(int)]
        marks = np.where(filled[0::2], np.where(finite, marks, "!"), " ")
        return [self.styled([("".join(row), "text")]) for row in marks]

    def _scale(self, low: float, high: float, cells: Floats, width: int) -> Row:
        """The colours with their values."""
        spans: list[Span] = []
        row: Row = []
        left, right = number(low, 0), number(high, 0)
        count = int((~np.isfinite(cells)).sum())
        length = max(4, min(24, width - len(left) - len(right) - (30 if count else 2)))
        row += self.styled([(f"{left} ", "dim")])
        values = np.linspace(low, high, length, dtype=np.float32)[None]
        values = np.vstack([values, values])
        row += self._blocks(values, np.ones(values.shape, bool), low, high)[0]
        spans.append((f" {right}", "dim"))
        if count > 0:
            spans.append((f"  {count:,} not finite", "error"))
        return row + self.styled(spans)


def at_most(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns in these proportions, with at most `MAX_CELLS` cells."""
    less = max(1.0, math.sqrt(rows * columns / MAX_CELLS))
    return max(2, int(rows / less)), max(2, int(columns / less))


def colored(
    palette: Palette, values: Floats, filled: NDArray[np.bool_], low: float, high: float
) -> Pixels:
    """(h, w, 3): each value in its colour."""
    colors = _colors(palette, diverging=low < 0)
    finite = np.isfinite(values)
    share = (np.where(finite, values, low) - low) / ((high - low) or 1.0)
    places = np.clip(np.rint(share * (COLOR_STEPS - 1)), 0, COLOR_STEPS - 1).astype(int)
    pixels: Pixels = colors[places]
    pixels[~finite] = _rgb(palette.error)
    pixels[~filled] = background_of(palette)
    return pixels


def _colors(palette: Palette, diverging: bool) -> Pixels:
    """(COLOR_STEPS, 3), from the lowest value to the highest."""
    background = TextualColor(*background_of(palette))
    positive = TextualColor(*_rgb(palette.k))
    negative = TextualColor(*_rgb(palette.q))
    strong = TextualColor(*_rgb(palette.loss))
    colors = []
    for step in range(COLOR_STEPS):
        share = step / (COLOR_STEPS - 1)
        if diverging:
            share = 2 * share - 1
            color = background.blend(positive if share > 0 else negative, abs(share))
        elif share < 0.7:
            color = background.blend(positive, 0.06 + share / 0.7 * 0.94)
        else:
            color = positive.blend(strong, (share - 0.7) / 0.3)
        colors.append((color.r, color.g, color.b))
    return np.array(colors, np.uint8)


def filled_cells(heat: HeatMap) -> Floats:
    """(rows, columns): 1 for cells that hold entries, 0 for the rest of the last line."""
    flags = np.ones((heat.rows, heat.columns), np.float32)
    if heat.lines:
        flags.reshape(-1)[-(-(heat.column_to - heat.column_from) // heat.block_columns) :] = 0
    return flags


def color_range(cells: Floats, reduction: Reduction) -> tuple[float, float]:
    """The values of the first and the last colour; symmetric around 0 for signed values."""
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        return 0.0, 0.0
    low, high = float(finite.min()), float(finite.max())
    if reduction == "mean":
        high = max(abs(low), abs(high))
        return -high, high
    return low, high


def _enlarged(cells: Floats, width: int, height: int) -> Floats:
    """Each cell repeated as often as there is room, up to a limit."""
    rows, columns = cells.shape
    across = min(max(1, width // columns), MAX_ENLARGEMENT)
    down = min(max(1, height // rows), MAX_ENLARGEMENT)
    return _repeated(
        cells[:height, :width], (min(rows, height) * down, min(columns, width) * across)
    )


def _repeated(cells: Floats, shape: tuple[int, ...]) -> Floats:
    down, across = shape[0] // cells.shape[0], shape[1] // cells.shape[1]
    return cells.repeat(max(1, down), 0).repeat(max(1, across), 1)


def _rgb(style: Style) -> tuple[int, int, int]:
    color = style.color.get_truecolor() if style.color is not None else None
    return (color.red, color.green, color.blue) if color is not None else (128, 128, 128)


def background_of(palette: Palette) -> tuple[int, int, int]:
    """(red, green, blue) of the background."""
    style = palette.text
    color = style.bgcolor.get_truecolor() if style.bgcolor is not None else None
    return (color.red, color.green, color.blue) if color is not None else (0, 0, 0)
