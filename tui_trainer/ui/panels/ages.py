"""How old the newest values are, where they are not of the newest step, and what is stretched."""

from __future__ import annotations

from collections.abc import Iterable

from tui_trainer.history.table import TableHistory
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.panels.base import provisional


def how_often(every: int) -> str:
    """A cadence in words."""
    return "every step" if every == 1 else f"every {every:,} steps"


def ago(behind: int) -> str:
    """An age in words."""
    return f"{behind:,} step{'' if behind == 1 else 's'} ago"


def newest_step(snapshot: Snapshot) -> int:
    """The newest step of which there is anything."""
    steps = snapshot.history.of_every_optimizer(tables.STEP)
    return max((each.last_step or 0 for each in steps), default=0)


def age_of(snapshot: Snapshot, histories: Iterable[TableHistory]) -> str:
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
    return how_often(every) if every > 1 else ""


def stretched(info: RunInfo) -> list[tuple[str, str]]:
    """What is measured less often now than it naturally is: its name, and how often."""
    found = []
    for table in info.tables:
        if table.stretched:
            of = f", of {table.optimizer}" if table.optimizer else ""
            text = f"{how_often(table.every)}, naturally {how_often(table.natural)}{of}"
            found.append((table.name, text))
    return found
