"""A grid of dots, two by four to a cell, and its translation to braille (or ASCII) characters.

Vertical extents are drawn here rather than by the plotting library: they must reach exactly the
smallest and the largest value of each column, so that no spike is ever lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style

from tui_trainer.ui.glyphs import UNICODE, Glyphs

Dots = NDArray[np.bool_]
"""(4 × cell rows, 2 × cell columns), top row first."""

# Weight of each dot of a cell, by (row, column): Unicode's order of braille dots.
_WEIGHTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], np.uint8)
# The dots of each of the 256 braille patterns, (256, 4, 2).
_PATTERNS = (np.arange(256)[:, None, None] & _WEIGHTS[None]) != 0


def blank(width: int, height: int) -> Dots:
    """A grid for `width` × `height` cells."""
    return np.zeros((4 * height, 2 * width), np.bool_)


def extents(grid: Dots, top: NDArray[np.float64], bottom: NDArray[np.float64]) -> None:
    """Set in every dot column the dots from `top` to `bottom` (dot rows, 0 at the top; NaN: none)
    and join each column to its neighbour so that a curve has no holes."""
    rows = grid.shape[0]
    known = ~(np.isnan(top) | np.isnan(bottom))
    first = np.clip(np.where(known, np.rint(top), 0), 0, rows - 1).astype(np.int64)
    last = np.clip(np.where(known, np.rint(bottom), 0), 0, rows - 1).astype(np.int64)
    both = known[1:] & known[:-1]
    # A column that ends above where the next begins reaches down to just above it, and so on.
    down = both & (last[:-1] + 1 < first[1:])
    up = both & (first[:-1] - 1 > last[1:])
    reach_last, reach_first = last.copy(), first.copy()
    reach_last[:-1][down] = first[1:][down] - 1
    reach_first[:-1][up] = last[1:][up] + 1
    at = np.arange(rows)[:, None]
    grid |= (at >= reach_first[None, :]) & (at <= reach_last[None, :]) & known[None, :]


def points(grid: Dots, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
    """Set single dots; those outside the grid are left out."""
    inside = (rows >= 0) & (rows < grid.shape[0]) & (columns >= 0) & (columns < grid.shape[1])
    grid[rows[inside], columns[inside]] = True


def from_braille(text: str, width: int, height: int) -> Dots:
    """The dots of lines of braille characters (anything else counts as blank)."""
    grid = blank(width, height)
    for y, line in enumerate(text.split("\n")[:height]):
        codes = np.frombuffer(line[:width].encode("utf-32-le"), np.uint32).astype(np.int64) - 0x2800
        codes = np.where((codes >= 0) & (codes < 256), codes, 0)
        cells = _PATTERNS[codes]
        grid[4 * y : 4 * y + 4, : 2 * len(codes)] = cells.transpose(1, 0, 2).reshape(4, -1)
    return grid


def masks(grid: Dots) -> NDArray[np.uint8]:
    """The braille pattern of each cell, (height, width)."""
    height, width = grid.shape[0] // 4, grid.shape[1] // 2
    cells = grid.reshape(height, 4, width, 2)
    return np.asarray((cells * _WEIGHTS[None, :, None, :]).sum((1, 3)), np.uint8)


def characters(patterns: NDArray[np.uint8], ascii: bool = False) -> NDArray[np.uint32]:
    """Code points of the cells; a blank cell is a space."""
    if ascii:
        return _ASCII[patterns]
    return np.where(patterns == 0, 0x20, 0x2800 + patterns.astype(np.uint32)).astype(np.uint32)


def _ascii_table() -> NDArray[np.uint32]:
    """The ASCII sign most like each pattern: `|` tall, `'` high, `-` middle, `.` low."""
    signs = []
    for pattern in _PATTERNS:
        rows = np.flatnonzero(pattern.any(1))
        if len(rows) == 0:
            signs.append(" ")
        elif rows[-1] - rows[0] >= 2:
            signs.append("|")
        else:
            signs.append(["'", "-", "-", "."][int(rows.mean())])
    return np.array([ord(sign) for sign in signs], np.uint32)


_ASCII = _ascii_table()


def segments(
    codes: NDArray[np.uint32], styles: NDArray[np.int64], table: Sequence[Style]
) -> list[list[Segment]]:
    """Rows of segments from code points and style numbers, both (height, width)."""
    rows = []
    for line, kinds in zip(codes, styles, strict=True):
        text = line.tobytes().decode("utf-32-le")
        cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(text)]
        rows.append([Segment(text[a:b], table[kinds[a]]) for a, b in pairwise(cuts)])
    return rows


# ---- sparkline
# One line of eight levels: the trend of a series beside its number.


BAD = "!"


def sparkline(
    values: NDArray[np.float32],
    bad: NDArray[np.bool_] | None = None,
    glyphs: Glyphs = UNICODE,
    floor: float | None = None,
) -> str:
    """One character a value; blank where it is NaN, `!` where `bad` (a NaN or infinity was seen).

    The smallest value is the lowest bar and the largest the highest, unless `floor` is given as the
    value of the lowest. A series that does not move is drawn low, not magnified to noise.
    """
    return sparklines(values[None, :], None if bad is None else bad[None, :], glyphs, floor)[0]


def sparklines(
    values: NDArray[np.float32],
    bad: NDArray[np.bool_] | None = None,
    glyphs: Glyphs = UNICODE,
    floor: float | None = None,
    hold: bool = False,
) -> list[str]:
    """One sparkline for each row of `values`, (rows, cells). With `hold`, what is measured now and
    then stays as it was until it is measured again, instead of leaving gaps."""
    if values.size == 0:
        return [""] * len(values)
    numbers = np.asarray(values, np.float64)
    if hold:
        seen = ~np.isnan(numbers) if bad is None else ~np.isnan(numbers) | bad
        cells = np.arange(numbers.shape[1])
        newest = np.maximum.accumulate(np.where(seen, cells, 0), axis=1)
        last = np.where(seen, cells, -1).max(1, keepdims=True)
        newest = np.where(cells <= last, newest, cells)  # what is to come stays empty
        numbers = np.take_along_axis(numbers, newest, axis=1)
        bad = None if bad is None else np.take_along_axis(bad, newest, axis=1)
    known = np.isfinite(numbers)
    low = np.where(known, numbers, np.inf).min(1, keepdims=True)
    high = np.where(known, numbers, -np.inf).max(1, keepdims=True)
    if floor is not None:
        low = np.minimum(low, floor)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        spread = high / 2 - low / 2
        flat = ~(spread > 1e-3 * np.abs(high))
        share = (numbers / 2 - low / 2) / np.where(flat, 1.0, spread)
    share = np.where(flat, 0.0, np.where(known, share, 0.0))
    levels = np.clip((share * 8).astype(np.int64), 0, 7)
    signs = np.array([ord(sign) for sign in glyphs.sparks], np.uint32)
    codes = np.where(known, signs[levels], 0x20).astype(np.uint32)
    if bad is not None:
        codes[bad] = ord(BAD)
    return [row.tobytes().decode("utf-32-le") for row in codes]
