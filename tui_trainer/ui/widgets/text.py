"""One line that says what is below it: pieces in their colours, cut at the right edge."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rich.cells import cell_len
from rich.segment import Segment
from textual.geometry import Size
from textual.widgets import Static

from tui_trainer.client.api import Snapshot
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import cadence
from tui_trainer.protocol.messages import Notice, Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.panels.base import provisional
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.chart import Layer, Marks
from tui_trainer.ui.widgets.lines import Lines, Row

Piece = tuple[str, str]
"""A text and its meaning in the palette."""


class Caption(Lines):
    """Pieces of text with a gap between them."""

    DEFAULT_CSS = """
    Caption { height: 1; width: 1fr; }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._pieces: tuple[Piece, ...] = ()
        self._right = ""
        self._yielding = False

    def say(self, pieces: Iterable[Piece], right: str = "", *, yielding: bool = False) -> None:
        """Show these; `right` at the right edge, for which they are cut, or, where it is
        `yielding`, only where there is room."""
        self._pieces, self._right, self._yielding = tuple(pieces), right, yielding
        self.update_rows()

    def rows(self, size: Size) -> list[Row]:
        """The one row."""
        row: Row = []
        for text, meaning in self._pieces:
            if row:
                row.append(Segment("  ", self.palette.text))
            row.append(Segment(text, getattr(self.palette, meaning)))
        room = max(0, size.width - cell_len(self._right) - 2)
        used = sum(segment.cell_length for segment in row)
        if not self._right or (self._yielding and used > room):
            return [row]
        if used > room:
            row = list(Segment.adjust_line_length(row, max(0, room - 1), pad=False))
            row.append(Segment(self.glyphs.ellipsis[:1], self.palette.dim))
            used = sum(segment.cell_length for segment in row)
        gap = " " * (size.width - used - cell_len(self._right))
        row += [Segment(gap, self.palette.text), Segment(self._right, self.palette.dim)]
        return [row]


# ---- empty
# What stands where nothing can be shown: what is awaited, or why nothing will come.


class EmptyState(Static):
    """A line or two in the middle of an empty place; hidden while there is nothing to say."""

    DEFAULT_CSS = """
    EmptyState { width: 1fr; height: 1fr; content-align: center middle; text-align: center;
        color: $text-muted; display: none; background: $background; }
    EmptyState.-said { display: block; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__("", id=id, markup=False)
        self.said = ("", "")

    def say(self, what: str, hint: str = "") -> None:
        """Show this; "" hides it."""
        if (what, hint) != self.said:
            self.said = (what, hint)
            self.set_class(bool(what), "-said")
            self.update(f"{what}\n\n{hint}" if hint else what)


def awaited(snapshot: Snapshot, otherwise: str, *topics: str) -> tuple[str, str]:
    """(what, hint) for a place that has no data: the run's own reason for one of `topics`, what a
    run that has not begun is busy with, else `otherwise`."""
    if snapshot.info is not None:
        for topic in topics:
            if topic in snapshot.info.unseen:
                return snapshot.info.unseen[topic], ""
    status = snapshot.status
    if snapshot.link.state in ("lost", "closed") and snapshot.info is None:
        return snapshot.link.message or "no connection to the run", snapshot.link.hint
    if status.ended:
        return _ended(status), status.hint
    if snapshot.info is None or status.step == 0:
        doing = (
            f"waiting: {status.waiting_for}" if status.waiting_for else "waiting for the first step"
        )
        return f"{doing} …", ""
    return otherwise, ""


def _ended(status: Status) -> str:
    reason = f": {status.reason}" if status.reason else ""
    return f"the run {status.state} at step {status.step:,}{reason}"


# ---- ages
# How old the newest values are, where they are not of the newest step, and what is stretched.


def ago(behind: int) -> str:
    """An age in words."""
    return f"{behind:,} step{'' if behind == 1 else 's'} ago"


def newest_step(snapshot: Snapshot) -> int:
    """The newest step of which there is anything."""
    steps = snapshot.history.tables_named(schema.STEP)
    return max((each.last_step or 0 for each in steps), default=0)


def age_of(snapshot: Snapshot, histories: Iterable[SeriesReader]) -> str:
    """What to say of the age of the newest values of these tables (of one quantity): how often it
    is measured, which does not change from frame to frame; or since when it was not, where that is
    longer ago than a cadence. "" where they are of the newest step, or of the one in the making."""
    measured = [each for each in histories if each.rows]
    if not measured or any(provisional(snapshot, each) is not None for each in measured):
        return ""
    behind = newest_step(snapshot) - max(each.last_step or 0 for each in measured)
    every = max(each.table.every for each in measured)
    if behind > 0 and behind >= every:
        return ago(behind)
    return cadence(every) if every > 1 else ""


def stretched(info: RunInfo) -> list[tuple[str, str]]:
    """What is measured less often now than it naturally is: its name, and how often."""
    found = []
    for table in info.tables:
        if table.stretched:
            of = f", of {table.optimizer}" if table.optimizer else ""
            text = f"{cadence(table.every)}, naturally {cadence(table.natural)}{of}"
            found.append((table.name, text))
    return found


# ---- deeds
# What people did to a run, as marks on the axis of its charts: it may be why a curve bends.


DEEDS = ("command", "mark")
"""Kinds of `Notice` that somebody caused."""


def user_marks(
    snapshot: Snapshot, steps: tuple[int, int], buckets: int, palette: Palette, glyphs: Glyphs
) -> list[Layer]:
    """Marks on a chart of `steps` (start <= step < stop) that is `buckets` dot columns wide."""
    start, stop = steps
    found = [
        event.step
        for event in snapshot.events
        if isinstance(event, Notice) and event.kind in DEEDS and start <= event.step < stop
    ]
    if not found:
        return []
    columns = (np.array(found, np.int64) - start) * buckets // max(1, stop - start)
    return [Marks(palette.accent, columns, glyphs.deed)]
