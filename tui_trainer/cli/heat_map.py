"""Heat maps in the terminal: as shades of text, or with real pixels where the terminal has them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from tui_trainer.cli.errors import notify
from tui_trainer.client.answers.tensors import cells_of
from tui_trainer.protocol.formatting import number
from tui_trainer.protocol.heat_map import MAX_CELLS, HeatMap, HeatMapWindow

if TYPE_CHECKING:
    from tui_trainer.ui.terminal_images import PixelSupport

SHADES = " ░▒▓█"
NOT_FINITE = "!"
COLUMNS = 64
"""Cells of a heat map across the terminal."""
PICTURE_ROWS = 24
"""Rows of the terminal for a picture of real pixels."""


def heat_lines(heat: HeatMap) -> list[str]:
    """A title, and a character for each cell of the map, darker for larger absolute values."""
    cells = cells_of(heat)
    finite = np.isfinite(cells)
    sizes = np.abs(np.where(finite, cells, 0.0))
    top = float(sizes.max(initial=0.0))
    levels = np.ceil(sizes / (top or 1.0) * (len(SHADES) - 1)).astype(int)
    marks = np.where(finite, np.array(list(SHADES))[levels], NOT_FINITE)
    if heat.lines:  # the rest of the last line
        filled = -(-(heat.column_to - heat.column_from) // heat.block_columns)
        marks.reshape(-1)[filled:] = " "
    lines = ["  " + "".join(row).rstrip() for row in marks]
    return [f"{heat_title(heat)}, darkest: {number(top, 0)}", *lines]


def heat_title(heat: HeatMap) -> str:
    """Reduction, size of the blocks and range of a heat map."""
    block = f"{heat.block_rows}×{heat.block_columns}"
    text = {"mean_abs": "mean |x|", "mean": "|mean|", "max_abs": "max |x|"}[heat.reduction]
    part = (
        f"entries {heat.column_from:,} to {heat.column_to:,} in reading order"
        if heat.lines
        else f"rows {heat.row_from:,} to {heat.row_to:,}, "
        f"columns {heat.column_from:,} to {heat.column_to:,}"
    )
    return f"{text} of blocks {block}, {part}"


# ---------------------------------------------------------------- real pixels


def ask_for_pixels() -> PixelSupport | None:
    """What the terminal offers for pictures; None, with the reason on stderr, if it shows none."""
    from tui_trainer.ui.terminal_images import HINT, ask_terminal

    if not sys.stdout.isatty():
        notify("no pixels: the output is not a terminal", "--save writes the tensor to a file")
        return None
    screen = ask_terminal()
    if screen.kitty or screen.sixel:
        return screen
    notify(f"no pixels: {screen.missing}", HINT)
    return None


def window_of_pixels(window: HeatMapWindow, screen: PixelSupport) -> HeatMapWindow:
    """`window` with a cell for each pixel of the picture, up to MAX_CELLS."""
    rows, columns = PICTURE_ROWS * screen.cell_height, COLUMNS * screen.cell_width
    less = max(1.0, (rows * columns / MAX_CELLS) ** 0.5)
    return msgspec.structs.replace(window, rows=int(rows / less), columns=int(columns / less))


def picture_lines(heat: HeatMap, screen: PixelSupport) -> list[str]:
    """A title, and the picture as an escape sequence."""
    from tui_trainer.ui.panels.tensor import background_of, color_range, colored, filled_cells
    from tui_trainer.ui.terminal_images import enlarged, kitty, padded, sixel
    from tui_trainer.ui.theme import DARK, palette

    colors = palette(DARK.to_color_system().generate())
    cells = cells_of(heat)
    low, high = color_range(cells, heat.reduction)
    image = colored(colors, cells, filled_cells(heat) > 0, low, high)
    cell = screen.cell_width, screen.cell_height
    image = enlarged(image, COLUMNS * cell[0], PICTURE_ROWS * cell[1])
    columns, rows = -(-image.shape[1] // cell[0]), -(-image.shape[0] // cell[1])
    image = padded(image, columns, rows, cell, np.array(background_of(colors), np.uint8))
    title = f"{heat_title(heat)}, from {number(low, 0)} (dark) to {number(high, 0)}"
    return [title, kitty(image, columns, rows) if screen.kitty else sixel(image)]
