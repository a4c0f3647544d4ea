"""How old the newest values of a quantity are, and which quantities are measured less often to stay
within the overhead budget."""

from __future__ import annotations

from collections.abc import Iterable

from tui_trainer.client.api import Snapshot
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import cadence, counted
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.ui.panels.base import provisional_row


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
