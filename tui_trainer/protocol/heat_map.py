"""Heat maps: the part of a matrix, the number of cells that it is reduced to, and the cells."""

from __future__ import annotations

from typing import Literal

import msgspec

Reduction = Literal["mean_abs", "mean", "max_abs"]
"""How a heat map makes one cell of a block of entries."""

MAX_CELLS = 512 * 512
"""Limit of `HeatMapWindow.rows` times `HeatMapWindow.columns`."""


class HeatMapWindow(msgspec.Struct, frozen=True, array_like=True):
    """The part of a tensor that a heat map shows, and the size that it is reduced to.

    A tensor is shown as a matrix: its first dimension by all others. A tensor with a single row or
    a single dimension is shown in reading order, broken into lines; its window is a range of
    columns.
    """

    rows: int
    """Maximum number of rows of cells."""
    columns: int
    row_from: int = 0
    row_to: int | None = None
    """None: to the end."""
    column_from: int = 0
    column_to: int | None = None
    reduction: Reduction = "mean_abs"


class HeatMap(msgspec.Struct, frozen=True, array_like=True):
    """A window of a tensor, reduced to blocks of equal size; the last ones may be smaller."""

    matrix: tuple[int, int]
    """Rows and columns of the whole tensor."""
    row_from: int
    row_to: int
    column_from: int
    column_to: int
    block_rows: int
    block_columns: int
    rows: int
    columns: int
    reduction: Reduction
    lines: bool
    """Whether cells are in reading order: cell k has the columns from
    `column_from + k * block_columns` on, and nan fills the rest of the last line."""
    cells: bytes
    """float32 of shape (rows, columns); not finite for a block with a non-finite element."""
