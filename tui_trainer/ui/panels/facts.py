"""One dim line on the data: how many images or characters, batches per epoch, updates in all."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.protocol.describe import RunInfo, Scalar
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.panels.plain import clean
from tui_trainer.ui.widgets.lines import Row

IN_HEADER = ("device", "threads")
"""Facts that the header says in its own words."""


class FactsLine(Panel):
    """What a task says of its data, as many facts as fit: counts first, in the task's order, then
    texts such as a path. A run that has nothing to say of it has no such line."""

    DEFAULT_CSS = """
    FactsLine { height: 1; display: none; }
    FactsLine.-known { display: block; }
    """

    def show(self, snapshot: Snapshot) -> None:
        """Take the room before the facts are known: nothing moves when they come."""
        info = snapshot.info
        to_come = info is not None and info.task != "script" and snapshot.status.state == "starting"
        self.set_class(bool(info and info.facts) or to_come, "-known")
        super().show(snapshot)

    def rows(self, size: Size) -> Sequence[Row]:
        """The one row."""
        palette, info = self.palette, self.snapshot.info
        row: Row = [Segment(" ", palette.text)]
        left = size.width - 2
        for name, value in facts_of(info) if info else ():
            between = f" {self.glyphs.separator} " if len(row) > 1 else ""
            cost = cell_len(f"{between}{name} {value}")
            if cost > left:
                break
            row.append(Segment(f"{between}{name} {value}", palette.dim))
            left -= cost
        return [row]


def facts_of(info: RunInfo) -> list[tuple[str, str]]:
    """The facts that are worth a line, in the order in which they are left out last."""
    facts = [(n, value) for n, value in info.facts.items() if n not in IN_HEADER]
    facts.sort(key=lambda fact: isinstance(fact[1], str))
    return [(clean(name), clean(written(value))) for name, value in facts]


def written(value: Scalar) -> str:
    """A fact as people write it: 494,149."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
