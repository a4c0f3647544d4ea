"""Where each attention layer has its columns.

`RunInfo.attention` lists the layers of all optimizers; a table has only those of its optimizer.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

from tui_trainer.history.history import History
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import schema

STATISTICS = {
    schema.ATTENTION: schema.ATTENTION_STATISTICS,
    schema.ATTENTION_SPECTRUM: schema.SPECTRUM_STATISTICS,
    schema.ATTENTION_HEALTH: schema.HEALTH_STATISTICS,
    schema.ATTENTION_HEADS: schema.HEAD_STATISTICS,
}
"""What an attention table measures of each layer, or of each head of each layer."""
_indexes: WeakKeyDictionary[SeriesReader, dict[str, range]] = WeakKeyDictionary()


class LayerLocation(NamedTuple):
    """The columns of a layer in a table."""

    history: SeriesReader
    columns: range
    """Its statistics, or those of its heads one after the other."""


def attention_tables(history: History, name: str) -> list[SeriesReader]:
    """The tables of this name, one for each optimizer that has attention layers.

    Those without rows come first, then in order of declaration: where two have the same layer (an
    optimizer that is created again has new tables), the last one counts.
    """
    return sorted(history.tables_named(name), key=lambda series: bool(series.rows))


def layers_in(series: SeriesReader) -> dict[str, range]:
    """Columns of each layer in an attention table, cached."""
    known = _indexes.get(series)
    if known is None:
        known = _indexes[series] = _index_layers(series)
    return known


def location_of(history: History, name: str, layer: str) -> LayerLocation | None:
    """Where `layer` is among the tables of this name; None if it is in none of them."""
    for series in reversed(attention_tables(history, name)):
        columns = layers_in(series).get(layer)
        if columns is not None:
            return LayerLocation(series, columns)
    return None


def _index_layers(series: SeriesReader) -> dict[str, range]:
    """Reads only the first name of each block of statistics: 10,000 layers have 220,000 columns."""
    names = STATISTICS[series.table.name]
    columns, width = series.table.columns, len(names)
    first = tuple(column.name.rpartition(".")[2] for column in columns[:width])
    if first != names or len(columns) % width:
        return {}  # recorded by a version that measured other statistics
    suffixes = 2 if series.table.name == schema.ATTENTION_HEADS else 1  # layer.head.statistic
    found: dict[str, range] = {}
    for start in range(0, len(columns), width):
        layer = columns[start].name.rsplit(".", suffixes)[0]
        begun = found.get(layer)
        found[layer] = range(begun.start if begun else start, start + width)
    return found
