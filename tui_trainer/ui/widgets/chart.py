"""A chart of steps against values: bands that lose no spike, lines, points and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style

from tui_trainer.history.window import Window
from tui_trainer.protocol import formatting
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets import braille
from tui_trainer.ui.widgets.braille import Dots, blank, from_braille
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import Scale, fit

# ---- layers
# What a chart can show: bands that lose no spike, lines, points, names, thresholds and marks.


Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Band:
    """The smallest to the largest value of each dot column (two to a cell); NaN: there is none."""

    style: Style
    low: Floats
    high: Floats
    bad: NDArray[np.bool_] | None = None
    """Dot columns in which a NaN or an infinity was measured: marked on the axis."""

    @staticmethod
    def of(window: Window, column: int, style: Style) -> Band:
        """A band from a column of a history window of two buckets a cell."""
        low, high = window.low[:, column], window.high[:, column]
        bad = window.nonfinite[:, column]
        return Band(style, *bridge(low, high, window.filled), bad)


@dataclass(frozen=True)
class Line:
    """A line through one value a dot column, NaN where there is none; drawn by plotext."""

    style: Style
    values: Floats
    bad: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Points:
    """Single values, each a sign in its cell."""

    style: Style
    columns: NDArray[np.int64]
    """Dot columns."""
    values: Floats
    sign: str


@dataclass(frozen=True)
class Label:
    """A name at the end of a curve, so that curves can be told apart without colour too."""

    style: Style
    column: int
    """Dot column of the curve's end: the name stands right of it."""
    value: float
    text: str


@dataclass(frozen=True)
class Rule:
    """A dashed level, such as the threshold of clipping."""

    style: Style
    value: float


@dataclass(frozen=True)
class Marks:
    """Dot columns to mark on the axis: clip events, notes."""

    style: Style
    columns: NDArray[np.int64]
    sign: str


Layer = Band | Line | Points | Label | Rule | Marks


def bridge(
    low: Floats, high: Floats, filled: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Dot columns without a measurement between two that have one (fewer steps than dots) take
    values between theirs; a measured NaN stays a gap."""
    at = np.flatnonzero(filled)
    if len(at) < 2 or len(at) == at[-1] - at[0] + 1:
        return low, high
    inner = np.arange(at[0], at[-1] + 1)
    low, high = low.copy(), high.copy()
    for values in (low, high):
        values[inner] = np.interp(inner, at, values[at]).astype(np.float32)
    return low, high


# ---- axes
# The frame of a chart: values beside it, steps below it, and the marks on its axis.


GUTTER = 9
"""Cells left of the plot: a label of 8, right-aligned, and the axis."""


def value_labels(scale: Scale, rows: int) -> dict[int, str]:
    """Row to what is written beside it: round values, evenly spaced."""
    labels: dict[int, str] = {}
    ticks = scale.ticks(rows)
    texts = _texts(ticks, scale.log)
    for value, text in zip(ticks, texts, strict=True):
        place = float(scale.place(np.array([value], np.float64))[0])
        y = round((1 - place) * (4 * rows - 1)) // 4
        if 0 <= y < rows:
            labels[y] = text
    return labels


def _texts(ticks: Sequence[float], log: bool) -> list[str]:
    """The ticks with as many decimals as tell them apart."""
    room = GUTTER - 1
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if log:  # `0.1`, `1`, `1e-30`
        return [f"{tick:.3g}".replace("e+", "e").replace("e-0", "e-") for tick in ticks]
    if len(ticks) < 2 or not 1e-5 < largest < 1e6:
        return [formatting.number(tick, room, 3).strip() if tick else "0" for tick in ticks]
    for decimals in range(7):
        texts = [f"{tick:.{decimals}f}" for tick in ticks]
        exact = all(
            abs(float(t) - tick) < 1e-3 * largest for t, tick in zip(texts, ticks, strict=True)
        )
        if exact and len(set(texts)) == len(texts):
            break
    return [
        text if len(text) <= room else formatting.number(float(text), room, 3) for text in texts
    ]


def step_axis(
    cells: int, steps: tuple[int, int], layers: Sequence[Layer], palette: Palette, glyphs: Glyphs
) -> Row:
    """The rule under the plot with step numbers in it, and marks where something is to be seen.

    A NaN's mark drives a step number away; an event's colours the digit that it falls on.
    """
    line = [(glyphs.axis, palette.faint)] * cells
    for layer in layers:
        bad = getattr(layer, "bad", None)
        if bad is not None and bad.any():
            for column in np.unique(np.flatnonzero(bad) // 2):
                line[column] = (glyphs.failed, palette.error)
    _number_axis(line, steps, palette)
    for layer in layers:
        if isinstance(layer, Marks):
            for column in np.unique(layer.columns // 2):
                if 0 <= column < cells and line[column][1] is not palette.error:
                    digit = line[column][1] is palette.dim
                    line[column] = (line[column][0] if digit else layer.sign, layer.style)
    row: Row = [
        Segment("step ".rjust(GUTTER - 1), palette.dim),
        Segment(glyphs.corner, palette.faint),
    ]
    text, style = "", line[0][1]
    for sign, kind in line:
        if kind is not style:
            row.append(Segment(text, style))
            text, style = "", kind
        text += sign
    row.append(Segment(text, style))
    return row


def _number_axis(line: list[tuple[str, Style]], steps: tuple[int, int], palette: Palette) -> None:
    (start, stop), cells = steps, len(line)
    for tick in _step_ticks(start, stop, max(1, cells // 10)):
        text = f"{tick:,}"
        at = int((tick - start) * cells / max(1, stop - start)) - len(text) // 2
        at = min(max(at, 0), cells - len(text))
        around = line[max(0, at - 1) : at + len(text) + 1]
        if at >= 0 and all(style is palette.faint for _, style in around):
            line[at : at + len(text)] = [(sign, palette.dim) for sign in text]


def _step_ticks(start: int, stop: int, count: int) -> list[int]:
    every = max(1, -(-(stop - start) // max(1, count)))
    power = 10 ** (len(str(every)) - 1)
    every = next(n * power for n in (1, 2, 5, 10) if n * power >= every)
    first = -(-start // every) * every
    return list(range(first, stop + 1, every))


# ---- plot
# Lines drawn by plotext 6, taken as a matrix of braille cells: no ANSI, no terminal in between.


_figure: Any = None


def load() -> None:
    """Import plotext (0.1 s: on a thread, so that no frame waits for it) and free its figure from
    the size of the terminal."""
    global _figure
    import plotext

    plotext.terminal.limit(False, False)
    _figure = plotext.figure


def ready() -> bool:
    """Whether lines can be drawn yet."""
    return _figure is not None


def line(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    width: int,
    height: int,
    limits: tuple[float, float, float, float],
) -> Dots:
    """The dots of a line through (x, y) on `width` × `height` cells; NaN in y interrupts it;
    none before plotext is loaded.

    `limits` are (left, right, bottom, top). Costs about 10 µs a point: hand it at most two
    a column.
    """
    known = np.isfinite(y)
    if not ready() or not known.any() or width < 1 or height < 1:
        return blank(width, height)
    left, right, bottom, top = limits
    figure = _figure
    figure.clear.all()
    figure.plot_size(width, height)
    figure.canvas("default")
    figure.axes(False)
    for axis in ("x", "y"):
        figure.ruler(axis).ticks([]).alignment(lim="edge")
    figure.ruler("x").lim(left, right)
    figure.ruler("y").lim(bottom, top)
    at = np.flatnonzero(known)
    inside = np.clip(y[at], bottom, top)
    signal = figure.signal(x[at].tolist(), inside.tolist(), marker="braille").lines(True)
    for place in np.flatnonzero(np.diff(at) > 1) + 1:
        signal.line(int(place), False)
    figure.draw(signal)
    return from_braille(figure.build().string(colorless=True), width, height)


__all__ = ["GUTTER", "Band", "Chart", "Label", "Layer", "Line", "Marks", "Points", "Rule"]


@dataclass
class Chart:
    """Draws layers on cells and remembers its scale, so that the axis stands still while it can."""

    log: bool = False
    zero: bool = False
    """Whether 0 belongs on the (linear) axis."""
    scale: Scale | None = field(default=None, repr=False)
    """The axis as drawn last."""
    _lines: dict[int, tuple[object, braille.Dots]] = field(default_factory=dict, repr=False)

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
        plotted = braille.segments(codes, styles, table)
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
                grid = braille.blank(width, height)
                top, bottom = (scale.dot_rows(v, 4 * height) for v in (layer.high, layer.low))
                braille.extents(grid, top, bottom)
            elif isinstance(layer, Line):
                grid = self._line(number, layer, scale, width, height)
            else:
                continue
            mask = braille.masks(grid)
            table.append(layer.style)
            styles[mask > 0] = len(table) - 1
            # A line stands alone in its cells, or it would drown in the band that it sums up;
            # what reaches beyond them is still drawn, so a spike is never hidden.
            keep = mask == 0 if isinstance(layer, Line) and banded else True
            patterns = np.where(keep, patterns, 0).astype(np.uint8) | mask
        drawn = patterns > 0
        codes[drawn] = braille.characters(patterns, glyphs.ascii)[drawn]

    def _line(
        self, number: int, layer: Line, scale: Scale, width: int, height: int
    ) -> braille.Dots:
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
        grid = line(x[few], places[few], width, height, (0.0, 2.0 * width - 1, 0.0, 1.0))
        if ready():
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
