"""Where each attention layer has its columns: every optimizer has attention tables of its own.

`RunInfo.attention` lists the layers of all optimizers together, a table only those of its own.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

from tui_trainer.history.history import History
from tui_trainer.history.table import TableHistory
from tui_trainer.protocol import tables

STATISTICS = {
    tables.ATTENTION: tables.ATTENTION_STATISTICS,
    tables.ATTENTION_SPECTRUM: tables.SPECTRUM_STATISTICS,
    tables.ATTENTION_HEALTH: tables.HEALTH_STATISTICS,
    tables.ATTENTION_HEADS: tables.HEAD_STATISTICS,
}
"""What an attention table has of each layer, or of each head of each layer."""

_known: WeakKeyDictionary[TableHistory, dict[str, range]] = WeakKeyDictionary()


class Place(NamedTuple):
    """A layer in a table."""

    history: TableHistory
    columns: range
    """All that it has there: its statistics, or those of its heads one after the other."""


def attention_tables(history: History, name: str) -> list[TableHistory]:
    """The tables of this name, one for each optimizer that has attention layers; those without
    rows first, then in order of declaration: where two have the same layer, the last one counts (an
    optimizer that is made anew has tables of its own)."""
    found = [each for each in history.tables.values() if each.table.name == name]
    return sorted(found, key=lambda each: bool(each.rows))


def layers_in(table: TableHistory) -> dict[str, range]:
    """Layer to its columns in an attention table; found out once for each table."""
    known = _known.get(table)
    if known is None:
        known = _known[table] = _index(table)
    return known


def place_of(history: History, name: str, layer: str) -> Place | None:
    """Where `layer` is among the tables of this name; None: in none of them."""
    for table in reversed(attention_tables(history, name)):
        columns = layers_in(table).get(layer)
        if columns is not None:
            return Place(table, columns)
    return None


def _index(table: TableHistory) -> dict[str, range]:
    """Reads only the first name of each block of statistics: 10,000 layers have 220,000 columns."""
    names = STATISTICS[table.table.name]
    columns, width = table.table.columns, len(names)
    first = tuple(column.name.rpartition(".")[2] for column in columns[:width])
    if first != names or len(columns) % width:
        return {}  # recorded by a version that measured other statistics
    after = 2 if table.table.name == tables.ATTENTION_HEADS else 1  # layer.head.statistic
    found: dict[str, range] = {}
    for start in range(0, len(columns), width):
        layer = columns[start].name.rsplit(".", after)[0]
        begun = found.get(layer)
        found[layer] = range(begun.start if begun else start, start + width)
    return found
