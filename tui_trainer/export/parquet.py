"""Parquet: the same tables as in CSV, typed and compressed. Needs pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tui_trainer.export.delimited import file_stem
from tui_trainer.export.reading import (
    Times,
    blocks,
    column_names,
    joined,
    per_step,
    title,
    wide,
)
from tui_trainer.history.store.reader import RecordedHistory, RecordedTable

ROW_GROUP = 8192
"""Rows written at once; in a wide table fewer."""
GROUP_VALUES = 4_000_000


def write_parquet(history: RecordedHistory, folder: Path) -> list[Path]:
    """`steps.parquet` and a file for each wide table, with the run's description as their metadata
    (`tui_trainer.run`, JSON). Null: not measured at that step. Raises ImportError and OSError."""

    written = [_write_steps(history, per_step(history), folder)]
    return written + [_write_table(history, table, folder) for table in wide(history)]


def _schema(history: RecordedHistory, fields: list[tuple[str, Any]]) -> Any:
    import msgspec
    import pyarrow

    info = history.store.info()
    about = {"tui_trainer.run": msgspec.json.encode(info)} if info else None
    return pyarrow.schema(fields, metadata=about)


def _write_steps(history: RecordedHistory, chosen: list[RecordedTable], folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    names = [name for table in chosen for name in column_names(table)]
    fields = [("step", pyarrow.int64()), ("time", pyarrow.float64())]
    schema = _schema(history, [*fields, *((name, pyarrow.float32()) for name in names)])
    path = folder / "steps.parquet"
    times = Times(history)
    places = np.cumsum([0, *(table.columns for table in chosen)])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        steps: list[int] = []
        values = np.zeros((ROW_GROUP, len(names)), np.float32)
        known = np.zeros((ROW_GROUP, len(names)), np.bool_)

        def write() -> None:
            count = len(steps)
            when = np.array([times.at(step) for step in steps], np.float64)
            columns = [pyarrow.array(steps, pyarrow.int64())]
            columns.append(pyarrow.array(when, mask=np.isnan(when)))
            columns += [
                pyarrow.array(values[:count, i], mask=~known[:count, i]) for i in range(len(names))
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            steps.clear()
            known[:] = False

        for step, rows in joined(chosen):
            at = len(steps)
            steps.append(step)
            for place, row in rows.items():
                values[at, places[place] : places[place + 1]] = row
                known[at, places[place] : places[place + 1]] = True
            if len(steps) == ROW_GROUP:
                write()
        if steps:
            write()
    return path


def _write_table(history: RecordedHistory, table: RecordedTable, folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    names = [column.name for column in table.table.columns]
    fields = [("step", pyarrow.int64()), *((name, pyarrow.float32()) for name in names)]
    schema = _schema(history, fields)
    path = folder / f"{file_stem(title(table))}.parquet"
    rows = max(512, min(ROW_GROUP, GROUP_VALUES // max(1, len(names))))
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        steps: list[np.ndarray[Any, Any]] = []
        values: list[np.ndarray[Any, Any]] = []

        def write() -> None:
            joined_values = np.concatenate(values)
            columns = [pyarrow.array(np.concatenate(steps))]
            columns += [
                pyarrow.array(np.ascontiguousarray(joined_values[:, i])) for i in range(len(names))
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            steps.clear()
            values.clear()

        for block in blocks(table):
            steps.append(block.steps)
            values.append(block.values)
            if sum(map(len, steps)) >= rows:
                write()
        if steps:
            write()
    return path
