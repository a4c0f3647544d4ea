"""Several runs compared: a chart of one series of each, their legend, and a table of their final
values and configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.comparison.compared_runs import (
    MAX_RUNS,
    SERIES,
    ComparedCurve,
    ComparedRun,
    ComparedSeries,
    ComparedValue,
    ComparedValues,
    Divergence,
    SeriesName,
)
from tui_trainer.protocol import formatting
from tui_trainer.protocol.schema import Scalar
from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.panels.base import message_row
from tui_trainer.ui.widgets.chart import Chart
from tui_trainer.ui.widgets.chart_layers import (
    AxisMarks,
    Band,
    Layer,
    Line,
    Points,
    fill_gaps,
    smooth,
)
from tui_trainer.ui.widgets.lines import LineView, Row
from tui_trainer.ui.widgets.table import Cell, TableColumn, VirtualTable

RUN_MARKERS, ASCII_RUN_MARKERS = "●◆▲■○◇△□", "ox+#@%&="
RUN_STYLES = ("q", "k", "v", "validation", "norm", "warning", "accent", "error")
assert len(RUN_MARKERS) == len(ASCII_RUN_MARKERS) == len(RUN_STYLES) == MAX_RUNS
READING = "reading …"
MARKER_SPACING = 22
"""Dot columns between two markers of a curve."""


def run_marker(number: int, glyphs: Glyphs) -> str:
    """The marker of a run, which tells curves apart even without colour."""
    return (ASCII_RUN_MARKERS if glyphs.ascii else RUN_MARKERS)[number]


class OverlayChart(LineView):
    """One series of all runs, by step or by time. Requests the buckets that it needs, and draws
    those that have been read."""

    DEFAULT_CSS = "OverlayChart { width: 1fr; height: 1fr; }"

    def __init__(
        self,
        series: SeriesName,
        runs: Sequence[ComparedRun],
        read: Callable[[OverlayChart, int, bool], None],
    ) -> None:
        """`read(chart, buckets, by_time)` requests the series, which is passed to `show_series`
        later."""
        super().__init__(id=series)
        self.series = series
        self.runs = runs
        self.chart = Chart()
        self.by_time = False
        self.smooth = True
        self._read = read
        self._found: ComparedSeries | None = None
        self._requested: tuple[int, bool] | None = None
        """(buckets, by_time) that are being read."""
        self._outdated = False

    def show_series(self, found: ComparedSeries) -> None:
        self._found, self._requested = found, None
        self.update_rows()

    def invalidate(self) -> None:
        """Read the series again; the old one is drawn until then."""
        self._outdated, self._requested = True, None
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        columns = 2 * self.chart.plot_width(size.width)
        wanted, found = (columns, self.by_time), self._found
        if found is not None and (found.buckets, found.by_time) != wanted:
            found = None
        if (found is None or self._outdated) and self._requested != wanted:
            self._requested, self._outdated = wanted, False
            self._read(self, *wanted)
        if found is None or all(curve is None for curve in found.curves):
            text = READING if found is None else "not measured in any of these runs"
            message = message_row(text, self.palette.dim)
            return [self._title_row(size.width), [], message]
        stop, layers = found.stop, self._layers(found.curves)
        steps = (0, max(1, round(stop))) if self.by_time else (1, int(stop) + 1)
        layers += self._skipped(steps, columns)
        height = size.height - 1
        rows = self.chart.rows(size.width, height, steps, layers, self.palette, self.glyphs)
        if self.by_time:
            unit = rows[-1][0]
            rows[-1][0] = Segment("seconds ".rjust(len(unit.text)), unit.style)
        # Last, since the title says whether these rows have a logarithmic axis.
        return [self._title_row(size.width), *rows]

    def _layers(self, curves: Sequence[ComparedCurve | None]) -> list[Layer]:
        """Bands below, then lines, then markers."""
        bands: list[Layer] = []
        lines: list[Layer] = []
        markers: list[Layer] = []
        for number, curve in enumerate(curves):
            if curve is None:
                continue
            style = self.style(RUN_STYLES[number])
            low, high = fill_gaps(curve.low, curve.high, curve.filled)
            if self.series == "validation" or not self.smooth:
                lines.append(Band(style, low, high, curve.nonfinite))
                middle = np.asarray(low / 2 + high / 2, np.float32)
            else:
                # All values stay behind the smoothed curve, so that no spike is hidden.
                bands.append(Band(self.palette.faint, low, high, curve.nonfinite))
                middle = smooth(low, high, geometric=not (low <= 0).any())
                lines.append(Line(style, middle))
            known = np.flatnonzero(np.isfinite(middle))
            if len(known):
                offset = number * MARKER_SPACING // max(1, len(curves))
                at = np.unique(np.r_[known[(known - offset) % MARKER_SPACING == 0], known[-1]])
                marker = run_marker(number, self.glyphs)
                markers.append(Points(style, at, middle[at], marker))
        return [*bands, *lines, *markers]

    def _skipped(self, steps: tuple[int, int], columns: int) -> list[Layer]:
        """Marks at the steps at which a run skipped iterations, which its loss curve leaves out."""
        if self.series != "loss" or self.by_time:
            return []
        return [
            AxisMarks.at_steps(
                run.skipped, steps, columns, self.style(RUN_STYLES[number]), self.glyphs.failed
            )
            for number, run in enumerate(self.runs)
            if run.skipped
        ]

    def _title_row(self, width: int) -> Row:
        """`Training loss  ● 1.43  ◆ 1.51 ───── log`"""
        palette = self.palette
        row: Row = [Segment(f"{SERIES[self.series][2]} ", palette.title)]
        left = width - len(row[0].text)
        right = " log" if self.chart.drawn_log else ""
        for number in range(len(self.runs)):
            newest = self._found.newest[number] if self._found is not None else None
            value = formatting.number(newest, 6)
            text = f" {run_marker(number, self.glyphs)} {value}"
            if len(text) + len(right) > left:
                break
            row += self.styled([(text, RUN_STYLES[number])])
            left -= len(text)
        rule = f" {self.glyphs.rule * max(0, left - len(right) - 1)}"[: max(0, left)]
        return [*row, *self.styled([(rule, "rule"), (right, "dim")])]


class Legend(LineView):
    """The marker and name of each run."""

    DEFAULT_CSS = "Legend { width: 1fr; height: 1; }"

    def __init__(self, runs: Sequence[ComparedRun]) -> None:
        super().__init__()
        self.runs = runs
        self.by_time = False

    def rows(self, size: Size) -> Sequence[Row]:
        """One row: of every run at least the marker and the ends of its name."""
        alignment = "by time" if self.by_time else "by step"
        run_width = max(6, (size.width - len(alignment) - 3) // len(self.runs))
        row = self.styled([(" ", "text")])
        left = size.width - len(alignment) - 2
        for number, run in enumerate(self.runs):
            state = f" {self.glyphs.separator} {run.run.state}" if run.run.live else ""
            name = truncate_middle(run.name + state, run_width - 4, self.glyphs.ellipsis)
            text = f"{run_marker(number, self.glyphs)} {name}  "[: max(0, left)]
            row += self.styled([(text, RUN_STYLES[number])])
            left -= len(text)
        return [[*row, *self.styled([(" " * left + alignment, "dim")])]]


MIN_RUN_WIDTH, MAX_RUN_WIDTH = 9, 20
"""Cells of a run's column."""
SAME, DIFFERENT, OUTCOME = "same configuration", "configuration", "final values"
DIVERGENCE = "first difference"


class DifferencesTable(VirtualTable):
    """A row for each final value and setting, a column for each run; the best value is coloured."""

    def __init__(self, runs: Sequence[ComparedRun], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.runs = runs
        self.placeholder = READING
        self._divergence: Sequence[Divergence] = ()
        """The first differences of the runs, once they are known."""
        self._values: ComparedValues | None = None
        self._lines: list[ComparedValue | str] = []
        """Headings and rows."""
        self._outcomes = 0
        self._run_width = MIN_RUN_WIDTH

    def show_values(self, values: ComparedValues | None) -> None:
        """Show `values`, with the first differences found so far."""
        if values is None:
            return
        self._values = values
        heading = DIFFERENT if values.settings else SAME
        divergences = self._divergence_lines()
        self._outcomes = len(divergences) + len(values.outcomes)
        self._lines = [*divergences, OUTCOME, *values.outcomes, heading, *values.settings]
        self.set_order(np.arange(len(self._lines)))
        self.update_rows()

    def show_divergence(self, divergence: Sequence[Divergence]) -> None:
        self._divergence = divergence
        self.show_values(self._values)

    def _divergence_lines(self) -> list[ComparedValue | str]:
        """Where each run first differs from the first run, and both values around that step."""
        if not self._divergence:
            return []
        steps: list[Scalar] = [None] * len(self.runs)
        phases: list[Scalar] = [None] * len(self.runs)
        around: list[ComparedValue | str] = []
        for each in self._divergence:
            first = each.found.first
            steps[each.number] = "none" if first is None else first.step
            phases[each.number] = None if first is None else first.phase
            if first is None:
                continue
            for step, x, y in first.around:
                values: list[Scalar] = [None] * len(self.runs)
                values[0], values[each.number] = first.short_texts(x, y)
                label = first.quantity if step == first.step else f"  at step {step:,}"
                around.append(ComparedValue(label, tuple(values)))
        if len(self.runs) == 2:
            steps[0], phases[0] = steps[1], phases[1]
        rows = [ComparedValue("at step", tuple(steps)), ComparedValue("in phase", tuple(phases))]
        return [DIVERGENCE, *rows, *around]

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """A column for the names, cut only to give runs their least width, and one for each run."""
        names = [line if isinstance(line, str) else line.name for line in self._lines]
        longest, count = max(map(len, names), default=len(SAME)), len(self.runs)
        name_width = min(longest, max(len(SAME), width - (MIN_RUN_WIDTH + 1) * count - 1))
        run_width = max(3, min(MAX_RUN_WIDTH, (width - name_width - 1) // count - 1))
        self._run_width = run_width
        columns = [TableColumn("name", "", name_width, self._name_cell, left=True)]
        for number in range(count):
            marker, value = run_marker(number, self.glyphs), partial(self._value_cell, number)
            columns.append(TableColumn(str(number), marker, run_width, value))
        return columns, [column.width for column in columns]

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """A row, or a heading across all columns."""
        line = self._lines[row]
        if not isinstance(line, str):
            return super().cells(row, columns, widths)
        total = sum(widths) + len(widths) - 1
        text = f"{line} ".ljust(total, self.glyphs.rule)[:total]
        heading, start = [], 0
        for width in widths:  # the table puts a space after each column
            heading.append(Segment(text[start : start + width], self.palette.title))
            start += width + 1
        return heading

    def _name_cell(self, row: int) -> Cell:
        line = self._lines[row]
        return Cell(line if isinstance(line, str) else line.name, "dim")

    def _value_cell(self, number: int, row: int) -> Cell | None:
        line = self._lines[row]
        value = None if isinstance(line, str) else line.values[number]
        if isinstance(line, str) or value is None:
            return None
        style = RUN_STYLES[number] if _best_run(line) == number else "text"
        texts = [strip_escapes(formatting.scalar(each)) for each in line.values]
        is_setting = row > self._outcomes
        if isinstance(value, float) and (not is_setting or len(texts[number]) > self._run_width):
            return Cell(value, style)  # the column writes as many digits as fit
        return Cell(distinct_parts(texts)[number], style)

    @property
    def current(self) -> ComparedValue | None:
        """The row under the cursor; None on a heading."""
        row = self.current_row
        line = self._lines[row] if row is not None else ""
        return None if isinstance(line, str) else line


class DifferenceDetail(LineView):
    """The values of the row under the cursor in full, one run a line."""

    DEFAULT_CSS = "DifferenceDetail { width: 1fr; margin-top: 1; }"

    def __init__(self, runs: Sequence[ComparedRun], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.runs = runs
        self.line: ComparedValue | None = None

    def rows(self, size: Size) -> Sequence[Row]:
        """The name of the row, and a line for each run."""
        if self.line is None:
            return [[]]
        rows = [self.styled([(self.line.name, "title")])]
        for number, value in enumerate(self.line.values):
            text = strip_escapes(formatting.scalar(value))
            text = truncate_middle(text, max(1, size.width - 2), self.glyphs.ellipsis)
            marker = run_marker(number, self.glyphs)
            rows.append(self.styled([(f"{marker} ", RUN_STYLES[number]), (text, "text")]))
        return rows[: size.height]


def distinct_parts(texts: Sequence[str]) -> list[str]:
    """Texts without the words at their beginning and end that all of them share:
    `["…1e-3", "…1e-2"]` of `["train.py --lr 1e-3", "train.py --lr 1e-2"]`."""
    split = [text.split(" ") for text in texts]
    shortest = min(map(len, split), default=0)
    head = 0
    while head < shortest - 1 and len({words[head] for words in split}) == 1:
        head += 1
    tail = 0
    while tail < shortest - head - 1 and len({words[-1 - tail] for words in split}) == 1:
        tail += 1
    ends = ("…" if head else "", "…" if tail else "")
    return [ends[0] + " ".join(words[head : len(words) - tail]) + ends[1] for words in split]


def _best_run(line: ComparedValue) -> int | None:
    """The index of the run with the best value; None where no value is better than another."""
    lower_is_better = line.name.startswith(("loss", "validation"))
    if not lower_is_better and not line.name.startswith("accuracy"):
        return None
    values = [v if isinstance(v, float) and np.isfinite(v) else np.nan for v in line.values]
    if np.isnan(values).all() or len(set(values)) == 1:
        return None
    return int(np.nanargmin(values) if lower_is_better else np.nanargmax(values))
