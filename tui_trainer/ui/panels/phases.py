"""The phase strip: what one optimizer step is made of, where it stands, and what that produced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import PHASES, Phase, schema
from tui_trainer.protocol import formatting as f
from tui_trainer.protocol.messages import PhaseReport, Quantity
from tui_trainer.ui.panels.base import Panel, unseen
from tui_trainer.ui.widgets.lines import Row

AVERAGED = 20
"""Steps over which the times are averaged, so that they can be read."""
MEANINGS = {
    "data": "what this step learns from",
    "zero_grad": "else they would add to those of the step before",
    "forward": "its answer to the batch",
    "loss": "how wrong the answer is, in one number",
    "backward": "how the loss would change with each parameter",
    "clip": "their direction stays, their length has a limit",
    "step": "each parameter moved a little, against its gradient",
}
"""What a phase is for, for those who read this for the first time."""
SLOW_STEPS_PER_SECOND = 2.0
"""Below this the running phase is highlighted; above it would only flicker."""


class PhaseStrip(Panel):
    """Names, times, and below them either the proportions or, while paused, what came out."""

    DEFAULT_CSS = "PhaseStrip { height: 4; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._made: tuple[int, dict[Phase, float]] = (0, {})
        """The step in the making, and what each of its phases took that was stopped at."""

    def show(self, snapshot: Snapshot) -> None:
        """Note what the phase that has just ended took."""
        report = snapshot.report
        if report is not None and report.phase in PHASES:
            step, known = self._made
            if step != report.step or report.phase == PHASES[0]:
                known = {}
            self._made = (report.step, {**known, report.phase: report.duration_ms})
        super().show(snapshot)

    def rows(self, size: Size) -> Sequence[Row]:
        """Four rows (the last one only while paused), or two where the terminal is short."""
        report = self._report()
        times = self._times()
        names, values = self._columns(size.width, times, report)
        if report is not None:
            said, figures = self._produced(report, size.width)
            return [names, values, said, figures] if size.height > 2 else [names, said]
        return [names, values, self._proportions(size.width, times)]

    def _report(self) -> PhaseReport | None:
        return self.snapshot.report if self.snapshot.status.state == "paused" else None

    def _times(self) -> NDArray[np.float64]:
        """Milliseconds of each phase: the mean of the last steps, or, where the run stands
        inside a step, those that were measured in it. NaN: there is no such phase."""
        history = self.snapshot.history.table(schema.PHASE_MS)
        times = np.full(len(PHASES), np.nan)
        if history is not None and history.rows:
            values = history.tail(AVERAGED)[1]
            known = np.isfinite(values)
            counts = known.sum(0)
            sums = np.where(known, values, 0).sum(0, dtype=np.float64)
            times = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        for number, phase in enumerate(PHASES):
            if unseen(self.snapshot, phase) and not times[number] > 0:
                times[number] = np.nan  # there is no such phase, rather than one of 0 ms
        if self._report() is not None:
            for phase, duration in self._made[1].items():
                times[PHASES.index(phase)] = duration
        return times

    def _current(self) -> str:
        status = self.snapshot.status
        if status.state == "paused":
            return status.phase
        slow = (status.steps_per_second or 0.0) < SLOW_STEPS_PER_SECOND
        return status.phase if status.state == "running" and slow and status.step else ""

    def _columns(
        self, width: int, times: NDArray[np.float64], report: PhaseReport | None
    ) -> tuple[Row, Row]:
        """Names and times. While paused the step that is being made stands out: phases that it
        has not reached are dim, and so are times that are means of the steps before it."""
        palette = self.palette
        each = (width - 1) // len(PHASES)
        whole = float(np.nansum(times))
        names: Row = []
        values: Row = []
        current = self._current()
        reached = PHASES.index(report.phase) if report and report.phase in PHASES else len(PHASES)
        for number, (phase, time) in enumerate(zip(PHASES, times, strict=True)):
            there = time == time
            style = palette.text if there and number <= reached else palette.dim
            style = palette.current if phase == current else style
            names += (Segment(f" {phase}".ljust(each - 1), style), Segment(" ", palette.text))
            shown = f.milliseconds(float(time), 8) if there else self._absent(phase).rjust(8)
            values.append(Segment(shown, self._time_style(phase, there, report)))
            share = f" {100 * time / whole:3.0f}%" if there and whole and each >= 14 else ""
            values.append(Segment(share[: each - 8].ljust(each - 8), palette.dim))
        return names, values

    def _time_style(self, phase: str, there: bool, report: PhaseReport | None) -> Style:
        palette = self.palette
        if not there:
            return palette.faint
        if report is None:
            return palette.text
        return palette.provisional if phase in self._made[1] else palette.dim

    def _absent(self, phase: str) -> str:
        return "none" if unseen(self.snapshot, phase) else self.glyphs.missing

    def _proportions(self, width: int, times: NDArray[np.float64]) -> Row:
        """Under each phase a bar as long as its part of the step."""
        palette, glyphs = self.palette, self.glyphs
        each = (width - 1) // len(PHASES)
        room = each - 2
        whole = float(np.nansum(times))
        row: Row = []
        for time in times:
            filled = round(room * time / whole) if time == time and whole else 0
            row.append(Segment(" " + glyphs.bar * filled, palette.accent))
            row.append(Segment(glyphs.track * (room - filled), palette.faint))
            row.append(Segment(" ", palette.text))
        return row

    def _produced(self, report: PhaseReport, width: int) -> tuple[Row, Row]:
        """The sentence, and the figures below it."""
        palette = self.palette
        said: Row = [
            Segment(f" {self.glyphs.arrow} ", palette.warning),
            Segment(f"step {report.step:,} after {report.phase}: ", palette.warning),
            Segment(report.summary, palette.strong),
        ]
        meaning = MEANINGS.get(report.phase, "")
        room = width - 4 - sum(len(segment.text) for segment in said)
        if meaning and len(meaning) <= room:
            said.append(Segment(f"  {self.glyphs.separator} {meaning}", palette.dim))
        figures: Row = [Segment("  ", palette.text)]
        left = width - 2
        for quantity in report.quantities:
            text, value = f" {quantity.name.removesuffix('.weight')} ", _value(quantity)
            if len(text) + len(value) + 2 > left:
                continue
            figures += (Segment(text, palette.dim), Segment(f"{value}  ", palette.text))
            left -= len(text) + len(value) + 2
        return said, figures


def _value(quantity: Quantity) -> str:
    value = quantity.value
    # What is whole is a count, or an id: decimals would make it look measured.
    whole = not isinstance(value, str) and value.is_integer() and abs(value) < 1e15
    shown = value if isinstance(value, str) else f"{value:,.0f}" if whole else f.number(value, 0)
    return f"{shown} {quantity.unit}" if quantity.unit else shown
