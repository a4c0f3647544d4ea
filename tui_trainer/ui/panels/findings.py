"""The worst finding of the run in one line, and one finding in full."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.history.healthy_ranges import HealthyRange
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import Evidence, Finding, newest_findings
from tui_trainer.protocol.text import truncate, truncate_middle, wrap
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.widgets.axes import step_window
from tui_trainer.ui.widgets.chart import Chart, compact_number
from tui_trainer.ui.widgets.chart_layers import AxisMarks, Band, ChartMarker, Layer, Threshold
from tui_trainer.ui.widgets.lines import LineView, Row

STYLES = {"error": "error", "warning": "warning", "info": "dim"}
WORDS = {"possible": "possibly", "likely": "probably", "certain": "certainly"}
FINDINGS_KEY = "8"
MIN_CHART_NAME_WIDTH = 24
"""Cells that the legend leaves for the name of a charted series."""
STEP_NAMES = {"grad_norm_preclip": "gradient norm", "step_ms": "duration of the step, ms"}
"""Display names of columns of the table `step`."""


def warnings_of(snapshot: Snapshot) -> list[Finding]:
    """The findings that are warnings or errors, worst first, without the effects of others."""
    found = newest_findings(snapshot.events)
    return [finding for finding in found if finding.cause is None and finding.level != "info"]


PLACE = re.compile(r"[\w./\\-]+\.py:\d+")


def place_of(finding: Finding) -> str:
    """The line of the source that the text of a finding names, such as `train.py:7`."""
    found = PLACE.search(finding.text)
    return found.group() if found is not None else ""


def cause_of(finding: Finding) -> str:
    """The part of a finding's text that says what caused it, such as `` `log` (train.py:7)
    produced it from finite numbers``; "" where it does not name a line of the source."""
    what, colon, cause = finding.text.partition(": ")
    return cause if colon and PLACE.search(cause) and not PLACE.search(what) else ""


class FindingLine(Panel):
    """The worst finding with the key of the findings screen; hidden while nothing is wrong."""

    DEFAULT_CSS = """
    FindingLine { height: 1; display: none; }
    FindingLine.-shown { display: block; }
    """

    def show(self, snapshot: Snapshot) -> None:
        """Draw a snapshot, and appear with the first warning."""
        if snapshot.events is not self.snapshot.events:
            self._causes = warnings_of(snapshot)
            self.set_class(bool(self._causes), "-shown")
        super().show(snapshot)

    _causes: Sequence[Finding] = ()

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        if not self._causes:
            return [[]]
        worst, others = self._causes[0], len(self._causes) - 1
        style = STYLES[worst.level]
        narrow = size.width < 100
        more = f"  and {others} more" if others and not narrow else ""
        key = f"{FINDINGS_KEY} shows {'them' if others else 'it'}"
        if others and narrow:
            key = f"{FINDINGS_KEY} shows {others + 1}"
        start = f" {self.glyphs.failed} {worst.title}, since step {worst.onset:,}"
        room = size.width - cell_len(start) - cell_len(more) - cell_len(key) - 4
        row = self.styled([(start, f"{style} bold")])
        if room > 16:
            text = worst.text
            if cell_len(text) > room - 2:
                text = cause_of(worst) or text
            text = truncate(text, room - 2, self.glyphs.ellipsis)
            row += self.styled([(f": {text}", "text")])
        row += self.styled([(more, "dim")])
        gap = size.width - sum(cell_len(segment.text) for segment in row) - cell_len(key) - 1
        if gap > 0:
            row += [Segment(" " * gap, self.palette.text), Segment(key, self.palette.accent)]
        return [row]


class FindingDetail(LineView):
    """One finding in full: what, where, why, what next."""

    DEFAULT_CSS = "FindingDetail { width: 1fr; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._finding: Finding | None = None
        self._effects: Sequence[Finding] = ()
        self._cause: Finding | None = None

    def show(
        self, finding: Finding | None, cause: Finding | None, effects: Sequence[Finding]
    ) -> None:
        """Show a finding, with its cause or its effects."""
        self._finding, self._cause, self._effects = finding, cause, effects
        self.update_rows()

    def needed_height(self, width: int) -> int:
        """Rows of the whole text."""
        return len(self._text_rows(width)) if self.is_attached else 1

    def rows(self, size: Size) -> Sequence[Row]:
        """As many rows as fit."""
        return self._text_rows(size.width)[: size.height]

    def _text_rows(self, width: int) -> list[Row]:
        found = self._finding
        if found is None:
            return [[]]
        rows: list[Row] = [
            self.styled(
                [
                    (found.title, f"{STYLES[found.level]} bold"),
                    (f"  {found.level}, {WORDS[found.confidence]}", "dim"),
                ]
            )
        ]
        self._add(rows, "", found.text, width)
        if self._cause is not None:
            text = f"{self._cause.title}, since step {self._cause.onset:,}"
            self._add(rows, "an effect of", text, width)
        for effect in self._effects:
            self._add(rows, "explains", f"{effect.title}, since step {effect.onset:,}", width)
        where = [*found.parameters, *(f"rank {rank}" for rank in found.ranks)]
        if where:
            self._add(rows, "where", ", ".join(where), width)
        for each in found.evidence:
            self._add(rows, "measured", f"{each.quantity} {each.text}{band(each)}", width)
        self._add(rows, "try", found.advice, width)
        self._add(rows, "rule", f"{found.rule} (tui-trainer explain {found.rule})", width)
        return rows

    def _add(self, rows: list[Row], label: str, text: str, width: int) -> None:
        margin = 13 if label else 0
        for number, line in enumerate(wrap(text, max(20, width - margin - 1))):
            start = label if not number else ""
            rows.append(
                self.styled([(start.ljust(margin), "dim"), (line, "text" if label else "strong")])
            )


def band(evidence: Evidence) -> str:
    """`, healthy between 0.0001 and 0.1`; "" where no band is known."""
    low, high = evidence.low, evidence.high
    if low is not None and low == high:
        return f", healthy {low:.3g}"
    if low is not None and high is not None:
        return f", healthy between {low:.3g} and {high:.3g}"
    if high is not None:
        return f", healthy up to {high:.3g}"
    return f", healthy from {low:.3g}" if low is not None else ""


OTHER_QUANTITIES = (
    *("median", "share", "loss, ", "parameters ", "step at", "measured steps", "softmax"),
    *("fall of", "gradient norm, first quarter", "first loss", "‖W‖ relative"),
)
"""First words of evidence that measures another quantity than its charted series."""


def band_of_series(evidence: Evidence) -> HealthyRange:
    """The healthy band of the charted series; empty where the evidence measures another quantity,
    such as a number of parameters."""
    if evidence.quantity.startswith(OTHER_QUANTITIES):
        return HealthyRange()
    return HealthyRange(evidence.low, evidence.high)


class EvidenceChart(LineView):
    """The series of a finding's evidence, with the healthy band and the onset."""

    DEFAULT_CSS = "EvidenceChart { width: 1fr; height: 1fr; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart()
        self._title = ""
        self._evidence: Evidence | None = None
        self._onset = 0
        self._series: SeriesReader | None = None
        self._column = 0
        self._total: int | None = None

    def plot(
        self,
        evidence: Evidence | None,
        onset: int,
        series: SeriesReader | None,
        column: int,
        total_steps: int | None,
    ) -> None:
        """Show a series, or only the title where it has none."""
        if evidence is not self._evidence:
            self.chart = Chart()
        self._evidence, self._onset = evidence, onset
        self._series, self._column, self._total = series, column, total_steps
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        evidence, series, palette = self._evidence, self._series, self.palette
        if evidence is None or series is None or not series.rows or size.height < 4:
            return [[]]
        title = self._title_row(evidence, series, size.width)
        steps = step_window(series.last_step or 0, None, self._total)
        window = series.window([self._column], *steps, 2 * self.chart.plot_width(size.width))
        band = Band.from_window(window, 0, palette.norm)
        limits = band_of_series(evidence).limits
        self.chart.log = _spans_decades(band, limits) or None
        layers: list[Layer] = [band, ChartMarker(palette.error, self._onset)]
        layers += [Threshold(palette.good, x) for x in limits if x > 0 or not self.chart.log]
        columns = 2 * self.chart.plot_width(size.width)
        layers.append(
            AxisMarks.at_steps([self._onset], steps, columns, palette.error, self.glyphs.user_event)
        )
        rows = self.chart.rows(size.width, size.height - 1, steps, layers, palette, self.glyphs)
        return [title, *rows]

    def _title_row(self, evidence: Evidence, series: SeriesReader, width: int) -> Row:
        """`grad_norm head.weight  0.31  healthy 1e-4 to 0.1 ╌  since step 120 ┆`, as much as fits;
        ╌ and ┆ are drawn as in the chart."""
        value = series.newest_measured(evidence.column)
        healthy = band_of_series(evidence)
        if value is None:
            spans = []
        else:
            style = "text" if healthy.holds(value) else "warning"
            style = style if value == value else "error"
            spans = [(f"  {compact_number(value, 9).strip()}", style)]
        legend = [(f"  {self.glyphs.vertical_dash} since step {self._onset:,}", "error")]
        if healthy.limits:
            legend.insert(0, (f"  {self.glyphs.dash} {healthy.words}", "good"))
        name = f"{evidence.table.replace('_', ' ')} {evidence.column}".strip()
        if evidence.table == schema.STEP:
            name = STEP_NAMES.get(evidence.column, evidence.column.replace("_", " "))
        left = width - MIN_CHART_NAME_WIDTH - sum(len(text) for text, _ in spans)
        for text, colour in legend:
            if len(text) <= left:
                spans.append((text, colour))
                left -= len(text)
        room = width - sum(len(text) for text, _ in spans)
        name = truncate_middle(name, max(1, room), self.glyphs.ellipsis)
        return self.styled([(name, "title"), *spans])


def _spans_decades(band: Band, limits: Sequence[float]) -> bool:
    """Whether a linear axis would flatten the values: none is below zero, and with the limits the
    largest is more than 30 times the smallest that is not zero."""
    shown = np.concatenate([band.low, band.high])
    shown = shown[~np.isnan(shown)]
    if not len(shown) or shown.min() < 0 or not (shown > 0).any():
        return False
    shown = shown[shown > 0]
    drawn = [float(shown.min()), float(shown.max()), *(each for each in limits if each > 0)]
    return max(drawn) > 30 * min(drawn)
