"""A chart of steps against values: bands that lose no spike, lines, points and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style

from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets import dots, plot
from tui_trainer.ui.widgets.axes import GUTTER, step_axis, value_labels
from tui_trainer.ui.widgets.layers import Band, Label, Layer, Line, Marks, Points, Rule
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import Scale, fit

__all__ = ["GUTTER", "Band", "Chart", "Label", "Layer", "Line", "Marks", "Points", "Rule"]


@dataclass
class Chart:
    """Draws layers on cells and remembers its scale, so that the axis stands still while it can."""

    log: bool = False
    zero: bool = False
    """Whether 0 belongs on the (linear) axis."""
    scale: Scale | None = field(default=None, repr=False)
    """The axis as drawn last."""
    _lines: dict[int, tuple[object, dots.Dots]] = field(default_factory=dict, repr=False)

    def plot_width(self, width: int) -> int:
        """Cells across the plot in a chart `width` cells wide: twice as many dot columns."""
        return max(1, width - GUTTER)

    def rows(
        self,
        width: int,
        height: int,
        steps: tuple[int, int],
        layers: Sequence[Layer],
        palette: Palette,
        glyphs: Glyphs,
    ) -> list[Row]:
        """`height` rows: the plot, and below it the axis with its steps (start <= step < stop)."""
        cells, tall = self.plot_width(width), max(1, height - 1)
        scale = self.scale = _fit(layers, self.log, self.zero, self.scale)
        codes = np.full((tall, cells), 0x20, np.uint32)
        styles = np.zeros((tall, cells), np.int64)
        table: list[Style] = [palette.text]
        self._rules(layers, scale, codes, styles, table, glyphs)
        self._dots(layers, scale, codes, styles, table, glyphs)
        self._points(layers, scale, codes, styles, table)
        self._names(layers, scale, codes, styles, table)
        labels = value_labels(scale, tall) if len(layers) else {}
        plotted = dots.segments(codes, styles, table)
        out = []
        for y, row in enumerate(plotted):
            label = labels.get(y)
            edge = glyphs.tick if label is not None else glyphs.vertical
            text = (label or "").rjust(GUTTER - 1)
            out.append([Segment(text, palette.dim), Segment(edge, palette.faint), *row])
        out.append(step_axis(cells, steps, layers, palette, glyphs))
        return out

    @staticmethod
    def say(rows: list[Row], text: str, palette: Palette) -> None:
        """Put a sentence in the middle of a plot that has nothing to show yet."""
        y = max(0, len(rows) // 2 - 1)
        rows[y] = [*rows[y][:2], Segment(f"  {text}", palette.dim)]

    def _rules(
        self,
        layers: Sequence[Layer],
        scale: Scale,
        codes: NDArray[np.uint32],
        styles: NDArray[np.int64],
        table: list[Style],
        glyphs: Glyphs,
    ) -> None:
        for layer in layers:
            if isinstance(layer, Rule):
                place = scale.place(np.array([layer.value], np.float64))[0]
                if 0 <= place <= 1:
                    y = round((1 - place) * (4 * len(codes) - 1)) // 4
                    table.append(layer.style)
                    codes[y], styles[y] = ord(glyphs.dash), len(table) - 1

    def _dots(
        self,
        layers: Sequence[Layer],
        scale: Scale,
        codes: NDArray[np.uint32],
        styles: NDArray[np.int64],
        table: list[Style],
        glyphs: Glyphs,
    ) -> None:
        height, width = codes.shape
        patterns = np.zeros(codes.shape, np.uint8)
        banded = any(isinstance(layer, Band) for layer in layers)
        for number, layer in enumerate(layers):
            if isinstance(layer, Band):
                grid = dots.blank(width, height)
                top, bottom = (scale.dot_rows(v, 4 * height) for v in (layer.high, layer.low))
                dots.extents(grid, top, bottom)
            elif isinstance(layer, Line):
                grid = self._line(number, layer, scale, width, height)
            else:
                continue
            mask = dots.masks(grid)
            table.append(layer.style)
            styles[mask > 0] = len(table) - 1
            # A line stands alone in its cells, or it would drown in the band that it sums up;
            # what reaches beyond them is still drawn, so a spike is never hidden.
            keep = mask == 0 if isinstance(layer, Line) and banded else True
            patterns = np.where(keep, patterns, 0).astype(np.uint8) | mask
        drawn = patterns > 0
        codes[drawn] = dots.characters(patterns, glyphs.ascii)[drawn]

    def _line(self, number: int, layer: Line, scale: Scale, width: int, height: int) -> dots.Dots:
        """Through plotext, unless the very same line was drawn the last time."""
        places = scale.place(layer.values)
        key = (places.tobytes(), width, height)
        known = self._lines.get(number)
        if known is not None and known[0] == key:
            return known[1]
        # One point a cell says all that a smooth line has to say, at half the cost of two.
        x = np.arange(len(places), dtype=np.float64)
        last = np.flatnonzero(np.isfinite(places))[-1:]
        few = np.unique(np.concatenate([x[::2], last])).astype(np.int64)
        grid = plot.line(x[few], places[few], width, height, (0.0, 2.0 * width - 1, 0.0, 1.0))
        if plot.ready():
            self._lines[number] = (key, grid)
        return grid

    def _points(
        self,
        layers: Sequence[Layer],
        scale: Scale,
        codes: NDArray[np.uint32],
        styles: NDArray[np.int64],
        table: list[Style],
    ) -> None:
        height, width = codes.shape
        for layer in layers:
            if not isinstance(layer, Points):
                continue
            table.append(layer.style)
            rows = scale.dot_rows(layer.values, 4 * height)
            for column, row in zip(layer.columns // 2, rows, strict=True):
                if 0 <= column < width and row == row:
                    y = min(max(round(row) // 4, 0), height - 1)
                    codes[y, column], styles[y, column] = ord(layer.sign), len(table) - 1

    def _names(
        self,
        layers: Sequence[Layer],
        scale: Scale,
        codes: NDArray[np.uint32],
        styles: NDArray[np.int64],
        table: list[Style],
    ) -> None:
        height, width = codes.shape
        for layer in layers:
            if not isinstance(layer, Label):
                continue
            row = float(scale.dot_rows(np.array([layer.value], np.float32), 4 * height)[0])
            start = min(layer.column // 2 + 2, width - len(layer.text))
            if not np.isfinite(row) or start < 0:
                continue
            table.append(layer.style)
            middle = min(max(round(row) // 4, 0), height - 1)
            cells = slice(start, start + len(layer.text))
            free = (y for y in (middle, middle + 1, middle - 1) if 0 <= y < height)
            y = next((y for y in free if (codes[y, cells] == 0x20).all()), middle)
            codes[y, cells] = [ord(sign) for sign in layer.text]
            styles[y, cells] = len(table) - 1


def _fit(layers: Sequence[Layer], log: bool, zero: bool, old: Scale | None) -> Scale:
    values: list[NDArray[np.floating]] = []
    for layer in layers:
        if isinstance(layer, Band):
            values += [layer.low, layer.high]
        elif isinstance(layer, Line | Points):
            values.append(layer.values)
        elif isinstance(layer, Rule):
            values.append(np.array([layer.value]))
    every = np.concatenate([np.asarray(v, np.float64) for v in values]) if values else np.empty(0)
    every = every[np.isfinite(every) & (every > 0)] if log else every[np.isfinite(every)]
    if not len(every):
        return fit(np.nan, np.nan, log, zero, old)
    return fit(float(every.min()), float(every.max()), log, zero, old)
