"""Reduces a window of a tensor to the cells of a heat map, on the tensor's device."""

from __future__ import annotations

import numpy as np
import torch

from tui_trainer.inspector.errors import InspectionError
from tui_trainer.inspector.tensor_catalog import as_real, matrix_shape, part_elements
from tui_trainer.protocol.heat_map import MAX_CELLS, HeatMap, HeatMapWindow, Reduction


def heat_map(tensor: torch.Tensor, window: HeatMapWindow) -> HeatMap:
    """Reduce a window of a readable tensor. Raises InspectionError for an impossible window.

    Needs memory for the cells, and for one part of `part_elements` elements at a time.
    """
    if not (window.rows > 0 and window.columns > 0 and window.rows * window.columns <= MAX_CELLS):
        raise InspectionError(f"a heat map has from 1 to {MAX_CELLS:,} cells")
    rows, columns = matrix_shape(tensor)
    row_from, row_to = _range(window.row_from, window.row_to, rows)
    column_from, column_to = _range(window.column_from, window.column_to, columns)
    part = _MatrixPart(tensor, (row_from, row_to), (column_from, column_to))
    lines = rows == 1
    if lines:
        block = _block(part.columns, window.rows * window.columns)
        block_rows, block_columns = 1, block
        cells = _in_lines(_reduce_blocks(part, 1, block, window.reduction)[0], window.columns)
    else:
        block_rows = _block(part.rows, window.rows)
        block_columns = _block(part.columns, window.columns)
        cells = _reduce_blocks(part, block_rows, block_columns, window.reduction).cpu().numpy()
    return HeatMap(
        matrix=(rows, columns),
        row_from=row_from,
        row_to=row_to,
        column_from=column_from,
        column_to=column_to,
        block_rows=block_rows,
        block_columns=block_columns,
        rows=cells.shape[0],
        columns=cells.shape[1],
        reduction=window.reduction,
        lines=lines,
        cells=np.ascontiguousarray(cells, "<f4").tobytes(),
    )


def _range(first: int, last: int | None, size: int) -> tuple[int, int]:
    """The range clipped to `size`, with at least one element if there is any."""
    first = min(max(first, 0), max(size - 1, 0))
    return first, size if last is None else min(max(last, first + 1), size)


def _block(length: int, cells: int) -> int:
    return max(1, -(-length // cells))


def _in_lines(
    cells: torch.Tensor, columns: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Cells in reading order, as lines of at most `columns`."""
    values = cells.cpu().numpy()
    width = max(1, min(columns, values.size))
    filled = np.full((max(1, -(-values.size // width)), width), np.nan, np.float32)
    filled.reshape(-1)[: values.size] = values
    return filled


class _MatrixPart:
    """A part of a tensor as a matrix, the first dimension by all others. If the strides of the
    tensor allow no such view, only the requested slices are copied."""

    def __init__(
        self, tensor: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]
    ) -> None:
        self.tensor = tensor
        self.rows, self.columns = rows[1] - rows[0], columns[1] - columns[0]
        self._top, self._left = rows[0], columns[0]

    def slice(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        """(bottom − top, right − left)"""
        tensor = self.tensor
        columns = slice(self._left + left, self._left + right)
        if tensor.dim() < 2:
            return tensor.reshape(1, -1)[:, columns]
        rows = tensor[self._top + top : self._top + bottom]
        if tensor.dim() == 2 or tensor.is_contiguous() or rows.numel() <= part_elements(tensor):
            return rows.flatten(1)[:, columns]
        flat = torch.arange(columns.start, columns.stop, device=tensor.device)
        index: tuple[torch.Tensor | slice, ...] = torch.unravel_index(flat, tensor.shape[1:])
        return rows[(slice(None), *index)]


def _reduce_blocks(
    matrix: _MatrixPart, block_rows: int, block_columns: int, reduction: Reduction
) -> torch.Tensor:
    """(R, C) → float32 (⌈R / block_rows⌉, ⌈C / block_columns⌉)."""
    rows, columns, device = matrix.rows, matrix.columns, matrix.tensor.device
    shape = (-(-rows // block_rows), -(-columns // block_columns))
    # Accumulated in float64, except on mps, which does not have it.
    wide = torch.float32 if device.type == "mps" else torch.float64
    out = torch.zeros(shape, dtype=wide, device=device)
    limit = part_elements(matrix.tensor)
    # As many whole blocks across as fit; then whole blocks down, or some rows of one block.
    across = max(1, limit // block_columns) * block_columns
    for left in range(0, columns, across):
        right = min(left + across, columns)
        width = right - left
        down = max(1, limit // width)
        down = down // block_rows * block_rows or down
        top = 0
        while top < rows:
            # Parts of a block end where the block ends.
            end = min(top + down, rows)
            if down < block_rows:
                end = min(end, (top // block_rows + 1) * block_rows)
            part = matrix.slice(top, end, left, right)
            _add(out, part, top, left, block_rows, block_columns, reduction)
            top = end
    if reduction != "max_abs":
        out /= _sizes(rows, block_rows, out)[:, None] * _sizes(columns, block_columns, out)[None]
    return out.float()


def _add(
    out: torch.Tensor,
    part: torch.Tensor,
    top: int,
    left: int,
    block_rows: int,
    block_columns: int,
    reduction: Reduction,
) -> None:
    """Add a part that begins at (top, left) to its blocks. Its rows lie within one block, or begin
    where a block begins."""
    values = as_real(part)
    if reduction != "mean":
        values = values.abs()
    row, column = top // block_rows, left // block_columns
    for first, length, block in _pieces(values.shape[0], block_rows, top % block_rows):
        for start, extent, across in _pieces(values.shape[1], block_columns, 0):
            piece = values[first : first + length, start : start + extent]
            height, width = piece.shape
            blocks = piece.view(height // block, block, width // across, across)
            place = out[
                row + first // block_rows : row + first // block_rows + blocks.shape[0],
                column + start // block_columns : column + start // block_columns + blocks.shape[2],
            ]
            if reduction == "max_abs":
                torch.maximum(place, blocks.amax((1, 3)).to(out.dtype), out=place)
            else:
                place += blocks.sum((1, 3))


def _pieces(length: int, block: int, begun: int) -> list[tuple[int, int, int]]:
    """(first, length, block) of the whole blocks, and of the rest, which is a smaller block."""
    if begun or length < block:
        return [(0, length, length)]
    whole = length // block * block
    rest = [(whole, length - whole, length - whole)] if whole < length else []
    return [(0, whole, block), *rest]


def _sizes(length: int, block: int, like: torch.Tensor) -> torch.Tensor:
    """The length of each block; the last one may be shorter."""
    count = -(-length // block)
    sizes = torch.full((count,), float(block), dtype=like.dtype, device=like.device)
    if count:
        sizes[-1] = length - (count - 1) * block
    return sizes
