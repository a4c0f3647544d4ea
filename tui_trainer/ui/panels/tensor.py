"""A tensor in the inspector: the heat map of a window of it, and its statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from rich.style import Style
from textual.color import Color as TextualColor
from textual.geometry import Offset, Region, Size
from textual.message import Message
from textual.strip import Strip

from tui_trainer.client.answers.tensors import cells_of
from tui_trainer.client.api import Snapshot
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import Phase, schema
from tui_trainer.protocol.formatting import bytes_, count, number, percent
from tui_trainer.protocol.heat_map import MAX_CELLS, HeatMap, HeatMapWindow, Reduction
from tui_trainer.protocol.inspection import (
    BeforePhase,
    Histogram,
    TensorEntry,
    TensorInfo,
    TensorMoments,
    TensorRef,
    TensorStatistics,
)
from tui_trainer.ui.panels.base import newest_row, title_line
from tui_trainer.ui.panels.samples import Pixels, half_blocks
from tui_trainer.ui.terminal_images import PixelSupport, enlarged
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.lines import BuiltLines, LineView, Row, Span
from tui_trainer.ui.widgets.picture import Picture, PictureContext

Floats = NDArray[np.float32]

REDUCTIONS: tuple[Reduction, ...] = ("mean_abs", "mean", "max_abs")
REDUCTION_NAMES = {"mean_abs": "mean |x|", "mean": "mean x", "max_abs": "max |x|"}
ENTRY_NAMES = {"mean_abs": "|x|", "mean": "x", "max_abs": "|x|"}
"""Names of the value of a cell that is one entry."""
MAX_ENLARGEMENT = 8
"""Terminal cells across, and half cells down, for one entry at most."""
COLOR_STEPS = 33
SHADES = " .:-=+*#%@"
CAPTION_ROWS = 2
"""Title and scale of a heat map."""
MIN_SPAN = 2
"""Rows and columns of the smallest window."""
ZOOM = 2.0
PAN = 0.25
"""Share of a window by which it moves."""
BAR_ROWS = 5


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
        """What the terminal supports of real pixels, where they are wanted."""
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
        """Characters by size, for terminals without colours of their own; `!` is not finite."""
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
    """1 where there is a cell: nothing fills the rest of the last line."""
    flags = np.ones((heat.rows, heat.columns), np.float32)
    if heat.lines:
        flags.reshape(-1)[-(-(heat.column_to - heat.column_from) // heat.block_columns) :] = 0
    return flags


def color_range(cells: Floats, reduction: Reduction) -> tuple[float, float]:
    """The values of the first and the last colour: around 0 for signed values."""
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
    """Red, green and blue."""
    style = palette.text
    color = style.bgcolor.get_truecolor() if style.bgcolor is not None else None
    return (color.red, color.green, color.blue) if color is not None else (0, 0, 0)


# ---------------------------------------------------------------- statistics


@dataclass(frozen=True)
class StatisticsReading:
    """The statistics of a tensor at one moment."""

    at: str
    """`step 12, after backward`"""
    statistics: TensorStatistics
    phase: Phase | Literal[""] = ""
    """The phase that had ended last."""
    before: BeforePhase | None = None
    """The same tensor before that phase."""


@dataclass(frozen=True)
class RecordedColumn:
    """A quantity of a parameter that the run records, such as its norm."""

    label: str
    series: SeriesReader
    column: int
    newest: float


RECORDED = {
    "parameter": (
        (schema.WEIGHT_NORM, "‖w‖"),
        (schema.GRAD_NORM, "‖g‖"),
        (schema.UPDATE_RATIO, "Δw/w"),
    ),
    "gradient": ((schema.GRAD_NORM, "‖g‖"),),
}
"""What is recorded of each kind of tensor, and its label."""


def recorded_columns(snapshot: Snapshot, ref: TensorRef) -> list[RecordedColumn]:
    """What the run has recorded of a parameter, or of its gradient."""
    found = []
    for quantity, label in RECORDED.get(ref.kind, ()):
        for series in snapshot.history.tables_named(quantity):
            names = [column.name for column in series.table.columns]
            row, _ = newest_row(snapshot, series)
            if series.rows and row is not None and ref.name in names:
                at = names.index(ref.name)
                found.append(RecordedColumn(label, series, at, float(row[at])))
                break
    return found


MIN_FOR_SPARKS = 3
COUNTS = {"zeros": "zeros", "nan/inf": "not_finite"}
"""Statistics that are numbers of entries, by their labels."""


class StatisticsView(BuiltLines):
    """Facts, moments, quantiles, the histogram and single entries of a tensor."""

    lessons = ("scalar-tensor",)

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.tensor: TensorInfo | None = None
        self.statistics: TensorStatistics | None = None
        self.history: Sequence[StatisticsReading] = ()
        self.recorded: Sequence[RecordedColumn] = ()
        self.log_scale = False
        """Whether the histogram is of the logarithms of absolute values."""

    def show(
        self,
        tensor: TensorInfo | None,
        statistics: TensorStatistics | None,
        history: Sequence[StatisticsReading] = (),
        recorded: Sequence[RecordedColumn] = (),
    ) -> None:
        """Show a tensor; `history`: its readings while it was on the screen, the last one last."""
        self.tensor, self.statistics, self.history = tensor, statistics, history
        self.recorded = recorded
        self._build()

    def toggle_log(self) -> None:
        self.log_scale = not self.log_scale
        self._build()

    def _build(self) -> None:
        if not self.is_attached or not self.view_size.width:
            return
        self._built = self._all_rows(self.view_size.width)
        self.lines_changed()

    def _all_rows(self, width: int) -> list[Row]:
        tensor, statistics = self.tensor, self.statistics
        if tensor is None:
            return []
        rows = [title_line(self, width, "Entries")]
        rows += self._facts(tensor)
        if statistics is None or not statistics.count:
            return rows
        rows += self._moments(statistics)
        if self.history and self.history[-1].before is not None:
            rows += self._last_phase(self.history[-1], self.history[-1].before, width)
        elif len(self.history) > 1:
            rows += self._since_last(width)
        rows += [title_line(self, width, "Histogram", self._histogram_figures(statistics))]
        rows += self._histogram(statistics, width)
        rows += [title_line(self, width, "Quantiles", (), self._sampled(statistics))]
        rows += self._quantiles(statistics)
        rows += self._course(width)
        rows += [title_line(self, width, "Largest and smallest")]
        rows += self._extremes(statistics)
        return rows

    def _facts(self, tensor: TensorInfo) -> list[Row]:
        shape = self.glyphs.times.join(map(str, tensor.shape)) or "0-d"
        size = f"{count(tensor.elements, 0)} entries, {bytes_(tensor.bytes, 0)} on {tensor.device}"
        rows = [self.styled([(f"{shape} {tensor.dtype}", "text")]), self.styled([(size, "dim")])]
        if tensor.note:
            rows.append(self.styled([(tensor.note, "warning")]))
        return rows

    def _moments(self, statistics: TensorStatistics) -> list[Row]:
        pairs = (
            (("mean", statistics.mean), ("std", statistics.std)),
            (("min", statistics.minimum), ("max", statistics.maximum)),
        )
        rows = [
            self.styled([s for name, value in pair for s in self._pair(name, number(value, 10))])
            for pair in pairs
        ]
        zeros = percent(statistics.zeros / statistics.count, 10)
        last = [*self._pair("norm", number(statistics.norm, 10)), *self._pair("zeros", zeros)]
        rows.append(self.styled(last))
        if statistics.not_finite:
            kinds = (
                (statistics.nan, "nan"),
                (statistics.positive_inf, "inf"),
                (statistics.negative_inf, "-inf"),
            )
            text = ", ".join(f"{many:,} {name}" for many, name in kinds if many)
            rows.append(self.styled([(f"not finite: {text}", "error")]))
            rows += [self._entry_row("", entry, "error") for entry in statistics.nonfinite[:3]]
        return rows

    def _last_phase(self, now: StatisticsReading, before: BeforePhase, width: int) -> list[Row]:
        """What the last phase has changed."""
        arrow = f"{before.phase} {self.glyphs.arrow} {now.phase}"
        rows = [title_line(self, width, "Last phase", right=arrow)]
        if before.moments is None:
            return [*rows, self.styled([(f"it was not there before {now.phase}", "text")])]
        changes = _changes(before.moments, now.statistics)
        if not changes:
            return [*rows, self.styled([(f"{now.phase} has not changed it", "dim")])]
        return rows + [self._change(*change) for change in changes]

    def _change(self, name: str, old: float, new: float) -> Row:
        change = f"{new - old:+.3g}" if math.isfinite(new - old) else number(new, 0)
        if new == old:
            change = "the same"
        counted = name in COUNTS
        before = f"{old:>10,.0f}" if counted else number(old, 10)
        return self.styled([(f"{name:<6}", "dim"), (before, "dim"), (f"  {change}", "text")])

    def _since_last(self, width: int) -> list[Row]:
        """What has changed since the reading before."""
        before, now = self.history[-2].statistics, self.history[-1].statistics
        rows = [title_line(self, width, "Since", right=self.history[-2].at)]
        names = ("mean", "std", "norm")
        return rows + [self._change(n, getattr(before, n), getattr(now, n)) for n in names]

    def _course(self, width: int) -> list[Row]:
        """What the run has recorded; of other tensors the norm at all readings."""
        if self.recorded:
            series = self.recorded[0].series
            steps = f"steps {series.first_step or 0:,}–{series.last_step or 0:,}"
            rows = [title_line(self, width, "History", right=steps)]
            return rows + [self._recorded(each, max(1, width - 17)) for each in self.recorded]
        values = [each.statistics.norm for each in self.history]
        if len(values) <= MIN_FOR_SPARKS:
            return []
        rows = [title_line(self, width, "History", right=f"{len(values):,} readings")]
        shown = np.array([values[-(width - 17) :]], np.float32)
        line = sparklines(shown, ~np.isfinite(shown), self.glyphs, hold=True)[0]
        return [*rows, self._line("norm", line, values[-1], width - 17)]

    def _recorded(self, recorded: RecordedColumn, room: int) -> Row:
        """The highest value in each part of the run, and the newest one."""
        series = recorded.series
        start, stop = series.first_step or 0, (series.last_step or 0) + 1
        window = series.window([recorded.column], start, stop, min(room, series.rows))
        line = sparklines(window.high.T, window.nonfinite.T, self.glyphs, hold=True)[0]
        return self._line(recorded.label, line, recorded.newest, room)

    def _line(self, label: str, line: str, newest: float, room: int) -> Row:
        spans = [(f"{label:<6}", "dim"), (f"{line:<{room}} ", "norm"), (number(newest, 10), "text")]
        return self.styled(spans)

    def _pair(self, name: str, value: str) -> list[Span]:
        return [(f"{name:<6}", "dim"), (f"{value}   ", "text")]

    def _histogram_figures(self, statistics: TensorStatistics) -> list[tuple[str, str, Style]]:
        return [("", "log10 |x|" if self.log_scale else "x", self.palette.text)]

    def _histogram(self, statistics: TensorStatistics, width: int) -> list[Row]:
        shown = statistics.log_histogram if self.log_scale else statistics.histogram
        if not shown.counts:
            return [self.styled([("no entry is above 0 in size" if self.log_scale else "", "dim")])]
        lines = bars(shown, width, BAR_ROWS, self.glyphs.sparks)
        rows = [self.styled([(text, "norm")]) for text in lines]
        ends = (shown.low, shown.high)
        low, high = (f"1e{v:.1f}" for v in ends) if self.log_scale else (number(v, 0) for v in ends)
        gap = " " * max(1, width - len(low) - len(high))
        return [*rows, self.styled([(f"{low}{gap}{high}", "dim")])]

    def _sampled(self, statistics: TensorStatistics) -> str:
        if statistics.sampled >= statistics.count:
            return ""
        return f"of {count(statistics.sampled, 0)} entries"

    def _quantiles(self, statistics: TensorStatistics) -> list[Row]:
        inner = statistics.quantiles[1:-1]
        half = -(-len(inner) // 2)
        rows = []
        for left, right in zip(inner[:half], [*inner[half:], None], strict=False):
            spans: list[Span] = []
            for pair in (left, right):
                if pair is not None:
                    spans += [
                        (f"{percent(pair[0], 0):>7}", "dim"),
                        (f"{number(pair[1], 10)}  ", "text"),
                    ]
            rows.append(self.styled(spans))
        return rows

    def _extremes(self, statistics: TensorStatistics) -> list[Row]:
        rows = [self._entry_row("max", entry, "text") for entry in statistics.largest]
        return rows + [self._entry_row("min", entry, "text") for entry in statistics.smallest]

    def _entry_row(self, label: str, entry: TensorEntry, style: str) -> Row:
        place = f"[{', '.join(map(str, entry.index))}]"
        spans = [(f"{label:<4}", "dim"), (number(entry.value, 10), style), (f"  {place}", "dim")]
        return self.styled(spans)


def _changes(before: TensorMoments, now: TensorStatistics) -> list[tuple[str, float, float]]:
    """(name, old, new) of the statistics to show; none where nothing has changed."""
    pairs = [
        ("mean", before.mean, now.mean),
        ("std", before.std, now.std),
        ("norm", before.norm, now.norm),
        ("min", before.minimum, now.minimum),
        ("max", before.maximum, now.maximum),
    ]
    counts = [(n, float(getattr(before, at)), float(getattr(now, at))) for n, at in COUNTS.items()]
    differing = [(name, old, new) for name, old, new in counts if old != new]
    same = all(old == new or (math.isnan(old) and math.isnan(new)) for _, old, new in pairs)
    return [] if same and not differing else pairs + differing


def bars(histogram: Histogram, width: int, height: int, sparks: str) -> list[str]:
    """A histogram as `height` lines of `width` characters, from the top; a bin with any entry
    shows."""
    counts = np.array(histogram.counts, np.float64)
    bins = np.minimum(np.arange(width) * len(counts) // width, len(counts) - 1)
    most = counts.max(initial=0.0)
    levels = np.ceil(counts[bins] / (most or 1.0) * height * len(sparks)).astype(int)
    lines = []
    for row in range(height - 1, -1, -1):
        part = np.clip(levels - row * len(sparks), 0, len(sparks))
        lines.append("".join(" " if not level else sparks[level - 1] for level in part.tolist()))
    return lines
