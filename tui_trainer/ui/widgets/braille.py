"""Dot grids drawn as braille characters, two by four dots to a cell, and sparklines."""

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

# The bit of each dot of a cell, by (row, column): Unicode's numbering of braille dots.
_DOT_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], np.uint8)
# The dots of each of the 256 braille patterns, (256, 4, 2).
_PATTERN_DOTS = (np.arange(256)[:, None, None] & _DOT_BITS[None]) != 0


def blank_dots(width: int, height: int) -> Dots:
    """An empty grid for `width` × `height` cells."""
    return np.zeros((4 * height, 2 * width), np.bool_)


def draw_extents(dots: Dots, top: NDArray[np.float64], bottom: NDArray[np.float64]) -> None:
    """Fill each dot column from `top` to `bottom` (dot rows from the top; nan leaves it empty), and
    extend a column down or up to its neighbour so that a curve has no gaps."""
    first, last, known = _nearest_rows(dots, top), _nearest_rows(dots, bottom), ~np.isnan(top)
    known &= ~np.isnan(bottom)
    neighbours = known[1:] & known[:-1]
    falls = neighbours & (last[:-1] + 1 < first[1:])
    rises = neighbours & (first[:-1] - 1 > last[1:])
    extended_first, extended_last = first.copy(), last.copy()
    extended_last[:-1][falls] = first[1:][falls] - 1
    extended_first[:-1][rises] = last[1:][rises] + 1
    _fill_columns(dots, extended_first, extended_last, known)


def draw_line(dots: Dots, rows: NDArray[np.float64]) -> None:
    """Draw a line through one value per dot column, in dot rows from the top; nan interrupts it.
    Every value has its dot; two neighbours are joined half way in each of their columns."""
    known = ~np.isnan(rows)
    at = _nearest_rows(dots, rows)
    first, last = at.copy(), at.copy()
    neighbours = known[1:] & known[:-1]
    middle = (at[:-1] + at[1:]) // 2
    falls = neighbours & (at[1:] > at[:-1])
    rises = neighbours & (at[1:] < at[:-1])
    first[1:][falls] = np.minimum(first[1:], middle + 1)[falls]
    last[:-1][falls] = np.maximum(last[:-1], middle)[falls]
    first[:-1][rises] = np.minimum(first[:-1], middle + 1)[rises]
    last[1:][rises] = np.maximum(last[1:], middle)[rises]
    _fill_columns(dots, first, last, known)


def _nearest_rows(dots: Dots, rows: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.clip(np.rint(np.nan_to_num(rows)), 0, dots.shape[0] - 1).astype(np.int64)


def _fill_columns(
    dots: Dots, first: NDArray[np.int64], last: NDArray[np.int64], known: NDArray[np.bool_]
) -> None:
    rows = np.arange(dots.shape[0])[:, None]
    dots |= (rows >= first[None, :]) & (rows <= last[None, :]) & known[None, :]


def cell_patterns(dots: Dots) -> NDArray[np.uint8]:
    """The braille pattern of each cell, (height, width)."""
    height, width = dots.shape[0] // 4, dots.shape[1] // 2
    cells = dots.reshape(height, 4, width, 2)
    return np.asarray((cells * _DOT_BITS[None, :, None, :]).sum((1, 3)), np.uint8)


def pattern_codes(patterns: NDArray[np.uint8], ascii: bool = False) -> NDArray[np.uint32]:
    """Code points of braille patterns (or of ASCII stand-ins); an empty cell is a space."""
    if ascii:
        return _ASCII_CODES[patterns]
    return np.where(patterns == 0, 0x20, 0x2800 + patterns.astype(np.uint32)).astype(np.uint32)


def _ascii_codes() -> NDArray[np.uint32]:
    """The ASCII character most like each pattern: `|` tall, `'` high, `-` middle, `.` low."""
    characters = []
    for pattern in _PATTERN_DOTS:
        rows = np.flatnonzero(pattern.any(1))
        if len(rows) == 0:
            characters.append(" ")
        elif rows[-1] - rows[0] >= 2:
            characters.append("|")
        else:
            characters.append(["'", "-", "-", "."][int(rows.mean())])
    return np.array([ord(character) for character in characters], np.uint32)


_ASCII_CODES = _ascii_codes()


def styled_rows(
    codes: NDArray[np.uint32], style_numbers: NDArray[np.int64], styles: Sequence[Style]
) -> list[list[Segment]]:
    """Rows of segments from code points and indices into `styles`, both (height, width)."""
    rows = []
    for line, numbers in zip(codes, style_numbers, strict=True):
        text = line.tobytes().decode("utf-32-le")
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(text)]
        rows.append([Segment(text[a:b], styles[numbers[a]]) for a, b in pairwise(cuts)])
    return rows


NONFINITE_MARK = "!"


def sparklines(
    values: NDArray[np.float32],
    nonfinite: NDArray[np.bool_] | None = None,
    glyphs: Glyphs = UNICODE,
    hold: bool = False,
) -> list[str]:
    """One sparkline of eight levels for each row of `values`, (rows, cells).

    A cell is blank where its value is nan and `!` where `nonfinite` is set. Each row is scaled to
    its own range; a series that hardly moves is drawn at the lowest level rather than magnified to
    noise. With `hold`, a value is repeated until the next one, for series that are not measured at
    every step; cells after the last value stay blank.
    """
    if values.size == 0:
        return [""] * len(values)
    numbers = np.asarray(values, np.float64)
    if hold:
        held = _last_measured(numbers, nonfinite)
        numbers = np.take_along_axis(numbers, held, axis=1)
        nonfinite = None if nonfinite is None else np.take_along_axis(nonfinite, held, axis=1)
    finite = np.isfinite(numbers)
    low = np.where(finite, numbers, np.inf).min(1, keepdims=True)
    high = np.where(finite, numbers, -np.inf).max(1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        spread = high / 2 - low / 2  # halves: the range of two extreme floats is infinite
        flat = ~(spread > 1e-3 * np.abs(high))
        fraction = (numbers / 2 - low / 2) / np.where(flat, 1.0, spread)
    fraction = np.where(flat, 0.0, np.where(finite, fraction, 0.0))
    levels = np.clip((fraction * 8).astype(np.int64), 0, 7)
    bars = np.array([ord(bar) for bar in glyphs.sparks], np.uint32)
    codes = np.where(finite, bars[levels], 0x20).astype(np.uint32)
    if nonfinite is not None:
        codes[nonfinite] = ord(NONFINITE_MARK)
    return [row.tobytes().decode("utf-32-le") for row in codes]


def _last_measured(
    numbers: NDArray[np.float64], nonfinite: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """For each cell, the index of the last cell up to it that has a value. A cell after the last
    value has its own index."""
    measured = ~np.isnan(numbers) if nonfinite is None else ~np.isnan(numbers) | nonfinite
    cells = np.arange(numbers.shape[1])
    held = np.maximum.accumulate(np.where(measured, cells, 0), axis=1)
    last = np.where(measured, cells, -1).max(1, keepdims=True)
    return np.where(cells <= last, held, cells)
