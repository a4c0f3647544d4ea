"""The history of a run: one series per declared table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tui_trainer.history.series import MemorySeries, SeriesReader
from tui_trainer.history.sync import apply_rows, rows_since
from tui_trainer.protocol.messages import Rows
from tui_trainer.protocol.schema import Table


class History:
    """All measurements of a run, for reading. Not thread-safe."""

    tables: Mapping[int, SeriesReader]
    """Series by table id."""
    version: int
    """Grows with every change."""

    def table(self, name: str, optimizer: str = "") -> SeriesReader | None:
        """The table called `name` of `optimizer`, or of the first optimizer if none is named."""
        for series in self.tables.values():
            if series.table.name == name and optimizer in ("", series.table.optimizer):
                return series
        return None

    def find(self, name: str, column: str) -> tuple[SeriesReader, int] | None:
        """The first table called `name` that has rows and `column`, and the column's index."""
        for table in self.tables_named(name):
            index = table.column(column)
            if table.rows and index is not None:
                return table, index
        return None

    def tables_named(self, name: str) -> list[SeriesReader]:
        """The tables called `name`, one for each optimizer."""
        return [series for series in self.tables.values() if series.table.name == name]

    def cursors(self) -> tuple[int, ...]:
        """Number of rows of each table, by table id, as in `Poll.rows`."""
        if not self.tables:
            return ()
        held = [0] * (max(self.tables) + 1)
        for number, series in self.tables.items():
            held[number] = series.rows
        return tuple(held)

    def rows_since(self, cursors: Sequence[int], budget: int) -> tuple[tuple[Rows, ...], bool]:
        """The rows that a viewer with `cursors` lacks, in about `budget` bytes, and whether there
        are more. Narrow tables come first, so that the loss never waits for 10,000 norms."""
        behind = sorted(
            (s for s in self.tables.values() if _cursor(cursors, s) != s.rows),
            key=lambda s: s.columns,
        )
        pieces: list[Rows] = []
        left, more = budget, False
        for place, series in enumerate(behind):
            share = left // (len(behind) - place)
            row = _cursor(cursors, series)
            while row != series.rows:
                piece = rows_since(series, row, share)
                cost = len(piece.values) + len(piece.low) + len(piece.high) + len(piece.steps)
                if pieces and cost > left:
                    break
                pieces.append(piece)
                left, share = left - cost, share - cost
                row = piece.first + piece.count
                if share <= 0:
                    break
            more = more or row != series.rows
        return tuple(pieces), more


class MemoryHistory(History):
    """A history that grows in bounded memory."""

    tables: dict[int, MemorySeries]

    def __init__(self, tables: Iterable[Table] = ()) -> None:
        self.tables = {}
        self.version = 0
        for table in tables:
            self.declare(table)

    def declare(self, table: Table) -> MemorySeries:
        """Add a table, or update the cadence of a known one. A table that is declared again
        with other columns starts empty."""
        known = self.tables.get(table.id)
        if known is None or known.table.columns != table.columns:
            known = self.tables[table.id] = MemorySeries(table)
            self.version += 1
        elif known.table is not table:
            known.table = table
        return known

    def apply(self, rows: Rows) -> None:
        """Add rows that `rows_since` made on the sending side. Raises ValueError for an undeclared
        table or rows that do not fit."""
        series = self.tables.get(rows.table)
        if series is None:
            raise ValueError(f"rows of table {rows.table}, which was not declared")
        apply_rows(series, rows)
        self.version += 1


def _cursor(cursors: Sequence[int], series: SeriesReader) -> int:
    number = series.table.id
    return cursors[number] if number < len(cursors) else 0
