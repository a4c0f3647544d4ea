"""One series of several runs on one chart: a colour and a sign for each, with a legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.compare import (
    MAX_RUNS,
    SERIES,
    ComparedCurve,
    ComparedRun,
    Difference,
    differences,
    outcome,
)
from tui_trainer.protocol import formatting as f
from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.panels.base import note
from tui_trainer.ui.panels.loss import SMOOTHED_SHARE, smoothed
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.chart import Band, Chart, Layer, Line, Points, bridge
from tui_trainer.ui.widgets.lines import Lines, Row
from tui_trainer.ui.widgets.table import TableColumn, VirtualTable, fitted

SIGNS, ASCII_SIGNS = "●◆▲■○◇△□", "ox+#@%&="
STYLES = ("q", "k", "v", "validation", "norm", "warning", "accent", "error")
assert len(SIGNS) == len(ASCII_SIGNS) == len(STYLES) == MAX_RUNS
EVERY = 22
"""Dot columns between two signs on a curve."""


def sign_of(number: int, glyphs: Glyphs) -> str:
    """What marks a run's curve, colour or not."""
    return (ASCII_SIGNS if glyphs.ascii else SIGNS)[number]


def style_of(number: int, palette: Palette) -> Style:
    """The colour of a run."""
    style: Style = getattr(palette, STYLES[number])
    return style


class OverlayChart(Lines):
    """A series of `SERIES` of all runs, by step or by time."""

    DEFAULT_CSS = "OverlayChart { width: 1fr; height: 1fr; }"

    def __init__(self, series: str, runs: Sequence[ComparedRun], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.series = series
        self.runs = runs
        self.chart = Chart()
        self.by_time = False
        self.smooth = True

    def stop(self) -> float:
        """The end of the axis: steps, or seconds."""
        lengths = [run.length[1 if self.by_time else 0] for run in self.runs]
        return max(1.0, *lengths)

    def rows(self, size: Size) -> Sequence[Row]:
        """Title, then the chart."""
        buckets = 2 * self.chart.plot_width(size.width)
        stop = self.stop()
        curves = [run.curve(self.series, stop, buckets, self.by_time) for run in self.runs]
        title = self._title(size.width)
        if all(curve is None for curve in curves):
            return [title, [], note("none of these runs measured it", self.palette.dim)]
        layers = self._layers(curves, buckets)
        axis = (0, max(1, round(stop))) if self.by_time else (1, int(stop) + 1)
        rows = self.chart.rows(size.width, size.height - 1, axis, layers, self.palette, self.glyphs)
        if self.by_time:
            first = rows[-1][0]
            rows[-1][0] = Segment("seconds ".rjust(len(first.text)), first.style)
        return [title, *rows]

    def _layers(self, curves: Sequence[ComparedCurve | None], buckets: int) -> list[Layer]:
        bands: list[Layer] = []
        lines: list[Layer] = []
        signs: list[Layer] = []
        for number, curve in enumerate(curves):
            if curve is None:
                continue
            style = style_of(number, self.palette)
            if self.series == "validation" or not self.smooth:
                low, high = bridge(curve.low, curve.high, curve.filled)
                lines.append(Band(style, low, high, curve.nonfinite))
                middle = np.asarray(low / 2 + high / 2, np.float32)
            else:
                # Where the curve is smoothed, what it was drawn from stays behind it, so that no
                # spike goes unseen.
                low, high = bridge(curve.low, curve.high, curve.filled)
                bands.append(Band(self.palette.faint, low, high, curve.nonfinite))
                middle = smoothed(low, high, max(2.0, buckets * SMOOTHED_SHARE))
                lines.append(Line(style, middle))
            known = np.flatnonzero(np.isfinite(middle))
            if not len(known):
                continue
            apart = number * EVERY // max(1, len(curves))
            at = np.unique(np.r_[known[(known - apart) % EVERY == 0], known[-1]])
            signs.append(Points(style, at, middle[at], sign_of(number, self.glyphs)))
        return [*bands, *lines, *signs]

    def _title(self, width: int) -> Row:
        """`Training loss  ● 1.43  ◆ 1.51 ───── log`."""
        palette = self.palette
        row: Row = [Segment(f"{SERIES[self.series][2]} ", palette.title)]
        left = width - len(row[0].text)
        right = " log" if self.chart.log else ""
        for number, run in enumerate(self.runs):
            found = run.series(self.series)
            latest = found[0].latest() if found else None
            value = float(latest[1][found[1]]) if found and latest else None
            text = f" {sign_of(number, self.glyphs)} {f.number(value, 6)}"
            if len(text) + len(right) > left:
                break
            row.append(Segment(text, style_of(number, palette)))
            left -= len(text)
        rule = self.glyphs.rule * max(0, left - len(right) - 1)
        return [
            *row,
            Segment(f" {rule}"[: max(0, left)], palette.faint),
            Segment(right, palette.dim),
        ]


class Legend(Lines):
    """Which sign is which run."""

    DEFAULT_CSS = "Legend { width: 1fr; height: 1; }"

    def __init__(self, runs: Sequence[ComparedRun]) -> None:
        super().__init__()
        self.runs = runs
        self.by_time = False

    def rows(self, size: Size) -> Sequence[Row]:
        """One row: every run at least by its sign and the beginning of its name."""
        how = "by time" if self.by_time else "by step"
        each = max(6, (size.width - len(how) - 3) // len(self.runs))
        row: Row = [Segment(" ", self.palette.text)]
        left = size.width - len(how) - 2
        for number, run in enumerate(self.runs):
            live = f" {self.glyphs.separator} {run.run.state}" if run.run.live else ""
            name = truncate_middle(run.name + live, each - 4, self.glyphs.ellipsis)
            text = f"{sign_of(number, self.glyphs)} {name}  "[: max(0, left)]
            row.append(Segment(text, style_of(number, self.palette)))
            left -= len(text)
        return [[*row, Segment(" " * left + how, self.palette.dim)]]


# ---- differences
# A table of runs: how each ended, and what was set up differently.


LEAST = 9
"""Cells of a run's column."""
HEADINGS = len("set up differently ")


class DifferencesTable(VirtualTable):
    """Rows are quantities and options, columns are runs; the better end is set off."""

    def __init__(self, runs: Sequence[ComparedRun], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.runs = runs
        self.empty = "nothing was recorded"
        self._lines: list[Difference | str] = []
        self.show_cursor = True

    def read(self) -> None:
        """Look at the runs again."""
        unlike = differences(self.runs)
        self._lines = [
            "at the end",
            *outcome(self.runs),
            "set up differently" if unlike else "set up alike",
            *unlike,
        ]
        self.set_order(np.arange(len(self._lines)))
        self.update_rows()

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The names as wide as they are, the rest shared by the runs; all runs are shown."""
        names = [line.name for line in self._lines if isinstance(line, Difference)]
        count = len(self.runs)
        most = max(HEADINGS, width - (LEAST + 1) * count - 2)
        left = min(max(HEADINGS, *map(len, names)), most)
        each = max(3, min(20, (width - left - 2) // count - 1))
        columns = [TableColumn("name", "", left, left=True)]
        columns += [TableColumn(str(n), sign_of(n, self.glyphs), each) for n in range(count)]
        return columns, [column.width for column in columns]

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One quantity or option."""
        line, palette = self._lines[row], self.palette
        if isinstance(line, str):
            total = sum(widths) + len(widths) - 1
            text = f"{line} ".ljust(total, self.glyphs.rule)[:total]
            pieces, at = [], 0
            for width in widths:  # the table puts a space after each column
                pieces.append(Segment(text[at : at + width], palette.title))
                at += width + 1
            return pieces
        best = _best(line)
        out: Row = [Segment(fitted(line.name, widths[0], True), palette.dim)]
        for number, value in enumerate(line.values):
            text = truncate_middle(
                strip_escapes(f.scalar(value)), widths[number + 1], self.glyphs.ellipsis
            )
            style = style_of(number, palette) if number == best else palette.text
            sign = self.glyphs.missing if value is None else text
            out.append(Segment(sign.rjust(widths[number + 1]), style))
        return out


def _best(line: Difference) -> int:
    """Which run did best in this row; -1 where that cannot be said."""
    lower = line.name.startswith(("loss", "validation"))
    if not lower and not line.name.startswith("accuracy"):
        return -1
    values = [v if isinstance(v, float) and np.isfinite(v) else np.nan for v in line.values]
    if np.isnan(values).all() or len(set(values)) == 1:
        return -1
    return int(np.nanargmin(values) if lower else np.nanargmax(values))
