"""What the panels share: a title and its figures in one thin line, and how they read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.history.series import SeriesReader
from tui_trainer.ui.widgets.lines import Lines, Row

Item = tuple[str, str, Style]
"""A figure in a title: its label, its value (of fixed width), and the style of the value."""


class Panel(Lines):
    """One instrument of the dashboard. `quantity` names what it shows in `RunInfo.unseen`."""

    quantity = ""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.snapshot = Snapshot()

    def show(self, snapshot: Snapshot) -> None:
        """Take the snapshot and redraw what it changed."""
        self.snapshot = snapshot
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """The reason why there is nothing to see, where there is one; else `content`."""
        reason = unseen(self.snapshot, self.quantity)
        if reason:
            return [self.title(size.width), [], note(reason, self.palette.dim)]
        return self.content(size)

    def content(self, size: Size) -> Sequence[Row]:
        """The panel's rows, its title first."""
        raise NotImplementedError

    def title(self, width: int, items: Sequence[Item] = (), right: str = "") -> Row:
        """The title line."""
        raise NotImplementedError

    def waiting(self) -> str:
        """What to say where values will come."""
        return waiting_text(self.snapshot)


def title_row(
    lines: Lines, width: int, name: str, items: Sequence[Item] = (), right: str = ""
) -> Row:
    """`name  label value  label value ──────── right`, in exactly `width` cells; figures that do
    not fit are left out whole, last ones first."""
    palette, rule = lines.palette, lines.glyphs.rule
    row: Row = [Segment(name, palette.title), Segment(" ", palette.text)]
    left = width - len(name) - 1
    if right and len(right) + 2 <= left:
        left -= len(right) + 1
    else:
        right = ""
    for label, value, style in items:
        cost = len(label) + len(value) + (2 if label else 1) + 1
        if cost > left:
            break
        if label:
            row.append(Segment(f" {label} ", palette.dim))
        else:
            row.append(Segment(" ", palette.dim))
        row += (Segment(value, style), Segment(" ", palette.text))
        left -= cost
    row.append(Segment(rule * max(0, left), palette.faint))
    if right:
        row.append(Segment(f" {right}", palette.dim))
    return row


def note(text: str, style: Style) -> Row:
    """A line of plain words."""
    return [Segment(f" {text}", style)]


def unseen(snapshot: Snapshot, quantity: str) -> str:
    """Why `quantity` cannot be seen in this run; "" when it can."""
    return snapshot.info.unseen.get(quantity, "") if snapshot.info and quantity else ""


FIRST_STEP = "from the first step on"
"""What every panel but the first says before there is anything: once is enough."""


def waiting_text(snapshot: Snapshot) -> str:
    """What a panel without values is waiting for."""
    status = snapshot.status
    if status.ended:
        return "the run ended before this was measured"
    if snapshot.link.state in ("connecting", "lost"):
        return snapshot.link.message or "connecting to the run"
    if status.waiting_for:
        return f"waiting: {status.waiting_for}"
    return "waiting for the first step" if not status.step else "not measured yet"


def column(history: SeriesReader, name: str) -> int:
    """Number of the column called `name` (-1: there is none)."""
    for number, known in enumerate(history.table.columns):
        if known.name == name:
            return number
    return -1


def provisional(snapshot: Snapshot, history: SeriesReader) -> NDArray[np.float32] | None:
    """The values of the step in the making, while paused inside it: shape (columns,)."""
    report = snapshot.report
    if report is None or snapshot.status.state != "paused":
        return None
    for rows in report.rows:
        if rows.table == history.table.id:
            values = np.frombuffer(rows.values, "<f4")
            columns = len(history.table.columns)
            if len(values) >= columns:
                return values[-columns:]
    return None
