"""The statistics of a tensor in the inspector: numbers, histogram, what the last phase changed, and
the recorded history of a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.style import Style

from tui_trainer.client.api import Snapshot
from tui_trainer.history.healthy_ranges import UPDATE_RATIO
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import Phase, schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.formatting import bytes_, count, number, percent
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
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.lines import BuiltLines, Row, Span

BAR_ROWS = 5


@dataclass(frozen=True)
class StatisticsReading:
    """The statistics of a tensor at one moment."""

    at: str
    """`step 12, after backward`"""
    statistics: TensorStatistics
    phase: Phase | Literal[""] = ""
    """The last phase that had ended at that moment."""
    before: BeforePhase | None = None
    """The moments of the tensor before `phase`."""


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
"""(table, label) of the quantities that are recorded for each kind of tensor."""


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
"""Fields of `TensorStatistics` that count entries, by their labels."""


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
        """Whether the histogram shows log10 |x|."""

    def show(
        self,
        tensor: TensorInfo | None,
        statistics: TensorStatistics | None,
        history: Sequence[StatisticsReading] = (),
        recorded: Sequence[RecordedColumn] = (),
    ) -> None:
        """Show a tensor; `history`: its readings while it was on the screen, oldest first."""
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
        rows += self._history_rows(width)
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
        """What has changed since the previous reading."""
        before, now = self.history[-2].statistics, self.history[-1].statistics
        rows = [title_line(self, width, "Since", right=self.history[-2].at)]
        names = ("mean", "std", "norm")
        return rows + [self._change(n, getattr(before, n), getattr(now, n)) for n in names]

    def _history_rows(self, width: int) -> list[Row]:
        """The quantities that the run records; for other tensors the norms of all readings."""
        if self.recorded:
            first = min(each.series.first_step or 0 for each in self.recorded)
            last = max(each.series.last_step or 0 for each in self.recorded)
            rows = [title_line(self, width, "History", right=f"steps {first:,}–{last:,}")]
            room = max(1, width - 17)
            for each in self.recorded:
                rows += self._recorded(each, first, last + 1, room)
            return rows
        values = [each.statistics.norm for each in self.history]
        if len(values) <= MIN_FOR_SPARKS:
            return []
        rows = [title_line(self, width, "History", right=f"{len(values):,} readings")]
        shown = np.array([values[-(width - 17) :]], np.float32)
        line = sparklines(shown, ~np.isfinite(shown), self.glyphs, hold=True)[0]
        return [*rows, self._line("norm", line, values[-1], width - 17, "text")]

    def _recorded(self, recorded: RecordedColumn, start: int, stop: int, room: int) -> list[Row]:
        """The highest value in each part of the run as a sparkline, and the newest value; below it
        what is unhealthy about the newest value, if anything."""
        cells = min(room, stop - start)
        window = recorded.series.window([recorded.column], start, stop, cells)
        line = sparklines(window.high.T, window.nonfinite.T, self.glyphs, hold=True)[0]
        newest = recorded.newest
        broken = not math.isfinite(newest) and why_absent(newest) is None
        of_updates = recorded.series.table.name == schema.UPDATE_RATIO
        words = UPDATE_RATIO.describe(newest) if of_updates else ""
        style = "error" if broken else "warning" if words else "text"
        row = self._line(recorded.label, line, newest, room, style)
        return [row, self.styled([(f"      {words}", "warning")])] if words else [row]

    def _line(self, label: str, line: str, newest: float, room: int, style: str) -> Row:
        spans = [(f"{label:<6}", "dim"), (f"{line:<{room}} ", "norm"), (number(newest, 10), style)]
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
    """A histogram as `height` lines of `width` characters, from the top; every bin with an entry is
    visible."""
    counts = np.array(histogram.counts, np.float64)
    bins = np.minimum(np.arange(width) * len(counts) // width, len(counts) - 1)
    most = counts.max(initial=0.0)
    levels = np.ceil(counts[bins] / (most or 1.0) * height * len(sparks)).astype(int)
    lines = []
    for row in range(height - 1, -1, -1):
        part = np.clip(levels - row * len(sparks), 0, len(sparks))
        lines.append("".join(" " if not level else sparks[level - 1] for level in part.tolist()))
    return lines
