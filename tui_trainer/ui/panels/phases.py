"""The phase strip: the phases of an optimizer step and their times, and while paused, what the last
phase produced."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.history.healthy_ranges import CLIP_SCALE, UPDATE_RATIO, GradientNormRange
from tui_trainer.protocol import BETWEEN, PHASES, Phase, formatting, schema
from tui_trainer.protocol.messages import PhaseReport, Quantity
from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.panels.base import Panel, unavailable_reason
from tui_trainer.ui.widgets.lines import Row

AVERAGED_STEPS = 20
"""Steps over which the times are averaged, so that they do not flicker."""
PURPOSES: dict[Phase, str] = {
    "data": "the batch that this step learns from",
    "zero_grad": "or this step's gradients would be added to the last step's",
    "forward": "the model's predictions for the batch",
    "loss": "how wrong the predictions are, as one number",
    "backward": "how the loss changes with each parameter",
    "clip": "limits the length of the gradient, not its direction",
    "step": "moves each parameter a little against its gradient",
}
"""What each phase is for, for users who see it for the first time."""
SLOW_STEPS_PER_SECOND = 2.0
"""Below this rate the running phase is highlighted; above it, it would only flicker."""
TIME_WIDTH = 8
MAX_QUANTITY_WIDTH = 40
"""Maximum number of cells for the name of a quantity, and for its value, which may be a parameter's
name."""
MIN_WIDTH_FOR_SHARES = 14
MAX_WHOLE = 1e15
"""Numbers up to this are written as integers if they are whole."""


class PhaseStrip(Panel):
    """Names and times of the phases; below them their proportions or, while paused, the phase
    report."""

    DEFAULT_CSS = "PhaseStrip { height: 4; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._norm_range = GradientNormRange()
        self._step = 0
        """The step that the run last stopped in."""
        self._step_ms: dict[str, float] = {}
        """Milliseconds of the phases of step `_step` after which the run stopped."""

    def show(self, snapshot: Snapshot) -> None:
        """Draw a snapshot; the time of a phase is kept while the run stays in the same step."""
        report = snapshot.report
        if report is not None and report.phase in PHASES:
            if self._step != report.step or report.phase == PHASES[0]:
                self._step_ms = {}
            self._step = report.step
            self._step_ms = {**self._step_ms, report.phase: report.duration_ms}
        super().show(snapshot)

    def rows(self, size: Size) -> Sequence[Row]:
        """Three or four rows; two while paused where the terminal is short."""
        report, times = self._report(), self._times()
        names, values = self._names(size.width, times, report), self._values(size.width, times)
        if report is None:
            return [names, values, self._proportions(size.width, times), *self._between()]
        summary = self._summary(report, size.width)
        if size.height <= 2:
            return [names, summary]
        return [names, values, summary, self._quantities(report, size.width)]

    def _report(self) -> PhaseReport | None:
        return self.snapshot.report if self.snapshot.status.state == "paused" else None

    def _means(self, names: Sequence[str], per_step: bool = False) -> NDArray[np.float64]:
        """Mean milliseconds of columns of the table `phase_ms` over those of the last steps that
        have a value or, with `per_step`, over all of them; nan for columns without a value."""
        table = self.snapshot.history.table(schema.PHASE_MS)
        found = np.full(len(names), np.nan)
        if table is not None and table.rows:
            values = table.tail(AVERAGED_STEPS)[1]
            finite = np.isfinite(values)
            counts = finite.sum(0)
            sums = np.where(finite, values, 0).sum(0, dtype=np.float64)
            divisors = len(values) if per_step else np.maximum(counts, 1)
            means = np.where(counts > 0, sums / divisors, np.nan)
            for number, name in enumerate(names):
                if (column := table.column(name)) is not None:
                    found[number] = means[column]
        return found

    def _between(self) -> list[Row]:
        """One row with the times between the phases; no row when there are none."""
        parts = [
            f"{name} {formatting.milliseconds(time, 0)}"
            for name, time in zip(BETWEEN, self._means(BETWEEN, per_step=True), strict=True)
            if time > 0
        ]
        separator = f" {self.glyphs.separator} "
        text = f" between the phases: {separator.join(parts)}"
        return [self.styled([(text, "dim")])] if parts else []

    def _times(self) -> NDArray[np.float64]:
        """Milliseconds of each phase: the mean of the last steps or, in a step that the run is
        paused in, the times measured there. nan for phases that the run does not have."""
        times = self._means(PHASES)
        for number, phase in enumerate(PHASES):
            if unavailable_reason(self.snapshot, phase) and not times[number] > 0:
                times[number] = np.nan
            if self._report() is not None and phase in self._step_ms:
                times[number] = self._step_ms[phase]
        return times

    def _current_phase(self) -> str:
        status = self.snapshot.status
        if status.state == "paused":
            return status.phase
        slow = (status.steps_per_second or 0.0) < SLOW_STEPS_PER_SECOND
        return status.phase if status.state == "running" and slow and status.step else ""

    def _names(self, width: int, times: NDArray[np.float64], report: PhaseReport | None) -> Row:
        """The names. Phases that a paused step has not reached are dim."""
        palette, current = self.palette, self._current_phase()
        column_width = _column_width(width)
        reached = PHASES.index(report.phase) if report and report.phase in PHASES else len(PHASES)
        row: Row = []
        for number, (phase, time) in enumerate(zip(PHASES, times, strict=True)):
            style = palette.text if time == time and number <= reached else palette.dim
            style = palette.current if phase == current else style
            row.append(Segment(f" {phase}".ljust(column_width - 1), style))
            row.append(Segment(" ", palette.text))
        return row

    def _values(self, width: int, times: NDArray[np.float64]) -> Row:
        """The times, and each phase's share of the step. While paused, means are dim."""
        palette, total = self.palette, float(np.nansum(times))
        share_width = _column_width(width) - TIME_WIDTH
        row: Row = []
        for phase, time in zip(PHASES, times.tolist(), strict=True):
            share = ""
            if time != time:
                missing = "never" if unavailable_reason(self.snapshot, phase) else None
                row.append(Segment((missing or self.glyphs.missing).rjust(8), palette.dim))
            else:
                row.append(Segment(formatting.milliseconds(time, 8), self._time_style(phase)))
                if total and share_width >= MIN_WIDTH_FOR_SHARES - TIME_WIDTH:
                    share = f" {formatting.percent(time / total, 4, 0)}"
            row.append(Segment(share[:share_width].ljust(share_width), palette.dim))
        return row

    def _time_style(self, phase: Phase) -> Style:
        if self._report() is None:
            return self.palette.text
        return self.palette.provisional if phase in self._step_ms else self.palette.dim

    def _proportions(self, width: int, times: NDArray[np.float64]) -> Row:
        """Under each phase a bar as long as its share of the step."""
        palette, glyphs = self.palette, self.glyphs
        room = _column_width(width) - 2
        total = float(np.nansum(times))
        row: Row = []
        for time in times:
            filled = round(room * time / total) if time == time and total else 0
            row.append(Segment(" " + glyphs.bar * filled, palette.accent))
            row.append(Segment(glyphs.track * (room - filled), palette.faint))
            row.append(Segment(" ", palette.text))
        return row

    def _summary(self, report: PhaseReport, width: int) -> Row:
        """What the phase produced in one sentence, and what the phase is for."""
        begin = f" {self.glyphs.arrow} step {report.step:,} after {report.phase}: "
        summary = truncate_middle(
            strip_escapes(report.summary), max(0, width - cell_len(begin)), self.glyphs.ellipsis
        )
        row = self.styled([(begin, "warning"), (summary, "strong")])
        purpose = PURPOSES.get(report.phase, "") if report.phase in PHASES else ""
        if any(map(_is_nonfinite, report.quantities)):
            purpose = ""  # wrong here: an update of nan does not move anything a little
        elif words := next(filter(None, map(self._unhealthy, report.quantities)), ""):
            purpose = words
        room = width - 4 - sum(segment.cell_length for segment in row)
        if purpose and len(purpose) <= room:
            row.append(Segment(f"  {self.glyphs.separator} {purpose}", self.palette.dim))
        return row

    def _value_style(self, quantity: Quantity) -> Style:
        """Red for a value that is not finite, yellow for an unhealthy one."""
        if _is_nonfinite(quantity):
            return self.palette.error
        return self.palette.warning if self._unhealthy(quantity) else self.palette.text

    def _unhealthy(self, quantity: Quantity) -> str:
        """What is unhealthy about a quantity, in words; "" for nothing."""
        value = quantity.value
        if not isinstance(value, float):
            return ""
        if quantity.name.startswith("update ratio"):
            return f"updates {words}" if (words := UPDATE_RATIO.describe(value)) else ""
        if quantity.name == "scale":
            return f"scale {words}" if (words := CLIP_SCALE.describe(value)) else ""
        table = self.snapshot.history.table(schema.STEP)
        if table is not None and quantity.name in ("total norm", "norm before"):
            words = self._norm_range.of(table).describe(value)
            return f"norm {words}" if words else ""
        return ""

    def _quantities(self, report: PhaseReport, width: int) -> Row:
        """The quantities that the phase produced, as many as fit."""
        row: Row = [Segment("  ", self.palette.text)]
        left = width - 2
        for quantity in report.quantities:
            name = strip_escapes(formatting.parameter_name(quantity.name))
            name = f" {truncate_middle(name, MAX_QUANTITY_WIDTH, self.glyphs.ellipsis)} "
            value = strip_escapes(format_quantity(quantity))
            value = f"{truncate_middle(value, MAX_QUANTITY_WIDTH, self.glyphs.ellipsis)}  "
            if cell_len(name) + cell_len(value) > left:
                continue
            row += (Segment(name, self.palette.dim), Segment(value, self._value_style(quantity)))
            left -= cell_len(name) + cell_len(value)
        return row


def _is_nonfinite(quantity: Quantity) -> bool:
    return isinstance(quantity.value, float) and not math.isfinite(quantity.value)


def _column_width(width: int) -> int:
    return (width - 1) // len(PHASES)


def format_quantity(quantity: Quantity) -> str:
    """The value with its unit. Whole numbers are counts or ids and have no decimals, which would
    make them look measured."""
    value = quantity.value
    if isinstance(value, str):
        text = value
    elif value.is_integer() and abs(value) < MAX_WHOLE:
        text = f"{value:,.0f}"
    else:
        text = formatting.number(value, 0)
    return f"{text} {quantity.unit}" if quantity.unit else text
