"""The history of a run: one `TableHistory` per declared table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tui_trainer.history.series import MemorySeries
from tui_trainer.protocol.messages import Rows
from tui_trainer.protocol.schema import Table


class History:
    """All measurements of a run, in bounded memory. Not safe for use from several threads."""

    def __init__(self, tables: Iterable[Table] = ()) -> None:
        self.tables: dict[int, MemorySeries] = {}
        self.version = 0
        """Grows with everything taken in by `declare` and `apply`."""
        for table in tables:
            self.declare(table)

    def declare(self, table: Table) -> MemorySeries:
        """Make place for a table, or take over its new cadence. A table that is declared again
        with other columns begins anew."""
        known = self.tables.get(table.id)
        if known is None or known.table.columns != table.columns:
            known = self.tables[table.id] = MemorySeries(table)
            self.version += 1
        elif known.table is not table:
            known.table = table
        return known

    def apply(self, rows: Rows) -> None:
        """Take in rows from the other side. Raises ValueError for an undeclared table or rows that
        do not fit."""
        table = self.tables.get(rows.table)
        if table is None:
            raise ValueError(f"rows of table {rows.table}, which was not declared")
        table.apply(rows)
        self.version += 1

    def table(self, name: str, optimizer: str = "") -> MemorySeries | None:
        """The table of that name; with several optimizers and none named, the first one's."""
        for history in self.tables.values():
            if history.table.name == name and optimizer in ("", history.table.optimizer):
                return history
        return None

    def of_every_optimizer(self, name: str) -> list[MemorySeries]:
        """The tables of that name: one, or one for each of several optimizers."""
        return [each for each in self.tables.values() if each.table.name == name]

    def cursors(self) -> tuple[int, ...]:
        """Rows held of each table, by table id: `Poll.rows`."""
        if not self.tables:
            return ()
        held = [0] * (max(self.tables) + 1)
        for number, history in self.tables.items():
            held[number] = history.rows
        return tuple(held)

    def rows_since(self, cursors: Sequence[int], budget: int) -> tuple[tuple[Rows, ...], bool]:
        """What a viewer with these cursors lacks of every table, in about `budget` bytes, and
        whether there is more. Narrow tables first: the loss is never behind 10,000 norms."""
        behind = sorted(
            (h for h in self.tables.values() if _cursor(cursors, h) != h.rows),
            key=lambda h: h.columns,
        )
        pieces: list[Rows] = []
        left, more = budget, False
        for place, history in enumerate(behind):
            share = left // (len(behind) - place)
            row = _cursor(cursors, history)
            while row != history.rows:
                piece = history.rows_since(row, share)
                cost = len(piece.values) + len(piece.low) + len(piece.high) + len(piece.steps)
                if pieces and cost > left:
                    break
                pieces.append(piece)
                left, share = left - cost, share - cost
                row = piece.first + piece.count
                if share <= 0:
                    break
            more = more or row != history.rows
        return tuple(pieces), more


def _cursor(cursors: Sequence[int], history: MemorySeries) -> int:
    number = history.table.id
    return cursors[number] if number < len(cursors) else 0
