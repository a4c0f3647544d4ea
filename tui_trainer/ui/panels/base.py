"""What the instruments share: the base class, their title line, and how missing, provisional and
old values are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.attention import (
    AttentionExamination,
)
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.formatting import cadence, counted
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.widgets.chart_layers import AxisMarks
from tui_trainer.ui.widgets.lines import LineView, Row

Figure = tuple[str, str, Style]
"""A figure of a title line: its label, its value (of fixed width), and the value's style."""

MAX_LABEL_WIDTH, MAX_VALUE_WIDTH = 24, 36
MIN_RIGHT_WIDTH = 20
NO_STEP_YET = "no step yet"
USER_EVENTS = ("command", "control", "edit", "mark")
"""Kinds of `Notice` that a user caused: they may explain why a curve bends."""


class Panel(LineView):
    """Base class of the instruments, each drawn from the current snapshot."""

    panel_title = ""
    quantity = ""
    """Key of what the panel shows in `RunInfo.unseen`; "" for something that no run lacks."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.snapshot = Snapshot()

    def show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """The content, or the reason why this run does not have any."""
        reason = unavailable_reason(self.snapshot, self.quantity)
        if reason:
            return [self.title_line(size.width), [], message_row(reason, self.palette.dim)]
        return self.content(size)

    def content(self, size: Size) -> Sequence[Row]:
        """The rows of the panel, its title first."""
        raise NotImplementedError

    def title_line(self, width: int, figures: Sequence[Figure] = (), right: str = "") -> Row:
        """The title with some figures."""
        return title_line(self, width, self.panel_title, figures, right)


def title_line(
    view: LineView, width: int, title: str, figures: Sequence[Figure] = (), right: str = ""
) -> Row:
    """`title  label value  label value ──────── right`, in exactly `width` cells. Figures that do
    not fit are left out, the last ones first; labels and `right`, which may be names of the user,
    are cut in the middle."""
    palette, ellipsis = view.palette, view.glyphs.ellipsis
    row: Row = [Segment(title, palette.title), Segment(" ", palette.text)]
    left = width - cell_len(title) - 1
    right = truncate_middle(strip_escapes(right), max(MIN_RIGHT_WIDTH, width // 3), ellipsis)
    if right and cell_len(right) + 2 <= left:
        left -= cell_len(right) + 1
    else:
        right = ""
    for label, value, style in figures:
        label = truncate_middle(strip_escapes(label), MAX_LABEL_WIDTH, ellipsis)
        value = truncate_middle(strip_escapes(value), MAX_VALUE_WIDTH, ellipsis)
        needed = cell_len(label) + cell_len(value) + (3 if label else 2)
        if needed > left:
            break
        row.append(Segment(f" {label} " if label else " ", palette.dim))
        row += (Segment(value, style), Segment(" ", palette.text))
        left -= needed
    row.append(Segment(view.glyphs.rule * max(0, left), palette.rule))
    if right:
        row.append(Segment(f" {right}", palette.dim))
    return row


def message_row(text: str, style: Style) -> Row:
    """A message in place of values."""
    return [Segment(f" {text}", style)]


def unavailable_reason(snapshot: Snapshot, quantity: str) -> str:
    """Why this run does not have `quantity`; "" when it does."""
    return snapshot.info.unseen.get(quantity, "") if snapshot.info and quantity else ""


def waiting_message(snapshot: Snapshot) -> str:
    """What a panel without values is waiting for."""
    status = snapshot.status
    if status.ended:
        return "the run ended before this was measured"
    if snapshot.link.state in ("connecting", "lost"):
        return snapshot.link.message or "connecting to the run"
    if status.waiting_for:
        return f"waiting: {status.waiting_for}"
    return "not measured yet" if status.step else "waiting for the first step"


def placeholder_message(snapshot: Snapshot, default: str, *quantities: str) -> tuple[str, str]:
    """(message, hint) for a screen without data: the reason why this run does not have one of
    `quantities`, how the run or the connection ended, what a starting run is waiting for, or
    `default`."""
    for quantity in quantities:
        if reason := unavailable_reason(snapshot, quantity):
            return reason, ""
    status, link = snapshot.status, snapshot.link
    if link.state in ("lost", "closed") and snapshot.info is None:
        return link.message or "no connection to the run", link.hint
    if status.ended:
        reason = f": {status.reason}" if status.reason else ""
        return f"the run {status.state} at step {status.step:,}{reason}", status.hint
    if snapshot.info is None or not status.step:
        waiting_for = f": {status.waiting_for}" if status.waiting_for else " for the first step"
        return f"waiting{waiting_for} …", ""
    return default, ""


def provisional_row(snapshot: Snapshot, series: SeriesReader) -> NDArray[np.float32] | None:
    """The values (columns,) of the unfinished step that a paused run is in; they become final
    with the step."""
    report = snapshot.report
    if report is None or snapshot.status.state != "paused":
        return None
    for rows in report.rows:
        if rows.table == series.table.id:
            values = np.frombuffer(rows.values, "<f4")
            columns = len(series.table.columns)
            if len(values) >= columns:
                return values[-columns:]
    return None


def newest_row(snapshot: Snapshot, series: SeriesReader) -> tuple[NDArray[np.float32] | None, bool]:
    """The newest values (columns,), None before the first, and whether they are provisional."""
    provisional = provisional_row(snapshot, series)
    if provisional is not None:
        return provisional, True
    newest = series.latest()
    return (newest[1] if newest is not None else None), False


def user_event_marks(
    view: LineView, snapshot: Snapshot, steps: tuple[int, int], columns: int
) -> list[AxisMarks]:
    """Marks at the steps of a chart at which a user gave a command or set a mark."""
    notices = (event for event in snapshot.events if isinstance(event, Notice))
    at = [notice.step for notice in notices if notice.kind in USER_EVENTS]
    marks = AxisMarks.at_steps(at, steps, columns, view.palette.accent, view.glyphs.user_event)
    return [marks] if len(marks.columns) else []


def steps_ago(steps: int) -> str:
    """`1 step ago`, `30 steps ago`."""
    return f"{counted(steps, 'step')} ago"


def newest_step(snapshot: Snapshot) -> int:
    """The newest step that was recorded, of any optimizer."""
    tables = snapshot.history.tables_named(schema.STEP)
    return max((table.last_step or 0 for table in tables), default=0)


def staleness(snapshot: Snapshot, tables: Iterable[SeriesReader]) -> str:
    """`every 10 steps`, or `30 steps ago` when the newest value of these tables (of one quantity)
    is older than their cadence; "" when they are measured at every step."""
    measured = [table for table in tables if table.rows]
    if not measured or any(provisional_row(snapshot, each) is not None for each in measured):
        return ""
    age = newest_step(snapshot) - max(each.last_step or 0 for each in measured)
    every = max(each.table.every for each in measured)
    if age > 0 and age >= every:
        return steps_ago(age)
    return cadence(every) if every > 1 else ""


def slowed_tables(info: RunInfo) -> list[tuple[str, str]]:
    """(name, `every 320 steps instead of every 10 steps`) of each table that is measured less often
    to stay within the overhead budget."""
    found = []
    for table in info.tables:
        if table.stretched:
            optimizer = f" ({table.optimizer})" if table.optimizer else ""
            text = f"{cadence(table.every)} instead of {cadence(table.natural)}{optimizer}"
            found.append((table.name, text))
    return found


class ExaminationView(LineView):
    """Base class of the views that draw a part of the examination of an attention layer."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.found: AttentionExamination | None = None

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        self.update_rows()


def bar(share: float, glyph: str, width: int) -> str:
    """A bar of at most `width` cells."""
    return glyph * round(min(share, 1.0) * width) if share > 0 else ""
