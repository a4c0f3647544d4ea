"""Writers of a recorded run: CSV, JSON lines, Parquet and TensorBoard event files."""

from __future__ import annotations

import csv
import heapq
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import absent_mask, why_absent
from tui_trainer.protocol.events import Clip, Finding, NonFinite, Notice, Skipped
from tui_trainer.protocol.messages import Status
from tui_trainer.record.sink_items import InfoChanged
from tui_trainer.run.sinks import Output
from tui_trainer.run.sinks.jsonlines import JsonLines
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.recorded_items import replay_items
from tui_trainer.store.series import StoredSeries


def write_csv(history: StoredHistory, folder: Path) -> list[Path]:
    """Write `steps.csv`, a file for each wide table and `events.csv`; return their paths.

    A value that is absent at a step is empty; what is not finite is `nan`, `inf` or `-inf`.
    Raises OSError.
    """
    written = [_write_steps(history, per_step(history), folder)]
    written += [_write_table(history, table, folder) for table in wide(history)]
    written.append(_write_events(history, folder))
    return written


def _write_steps(history: StoredHistory, chosen: list[StoredSeries], folder: Path) -> Path:
    path = folder / "steps.csv"
    names = [name for table in chosen for name in column_names(table)]
    blank = [[""] * table.columns for table in chosen]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "time", *names])
        for step, rows in joined(chosen):
            when = history.step_times.time_of(step)
            line = [str(step), "" if math.isnan(when) else repr(when)]
            for place in range(len(chosen)):
                line += shortest(rows[place]) if place in rows else blank[place]
            writer.writerow(line)
    return path


def _write_table(history: StoredHistory, table: StoredSeries, folder: Path) -> Path:
    path = folder / f"{_stem(history, table)}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(column.name for column in table.table.columns)])
        for block in table.blocks():
            for step, values in zip(block.step.tolist(), block.value, strict=True):
                writer.writerow([step, *shortest(values)])
    return path


def _write_events(history: StoredHistory, folder: Path) -> Path:
    """Write all events, in order, without reading measurements."""
    path = folder / "events.csv"
    info = history.store.info()
    names = [parameter.name for parameter in info.parameters] if info else []
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "time", "kind", "level", "text", "who"])
        for item in replay_items(history, measured=False):
            match item:
                case InfoChanged():
                    names = [parameter.name for parameter in item.info.parameters] or names
                case Clip():
                    blamed = [names[i] for i in item.parameters if i < len(names)]
                    text = f"norm {item.norm_before:g} over {item.max_norm:g}, scale {item.scale:g}"
                    text += f", mostly {', '.join(blamed)}" if blamed else ""
                    writer.writerow([item.step, repr(item.time), "clip", "info", text, ""])
                case NonFinite():
                    line = [item.step, repr(item.time), "nonfinite", "warning"]
                    writer.writerow([*line, item.text, ""])
                case Skipped():
                    line = [item.step, repr(item.time), "skipped", "warning"]
                    writer.writerow([*line, item.text, ""])
                case Finding():
                    line = [item.step, repr(item.time), "finding", item.level]
                    writer.writerow([*line, f"{item.rule}: {item.text}", ""])
                case Notice():
                    line = [item.step, repr(item.time), item.kind, item.level]
                    writer.writerow([*line, item.text, item.who])
    return path


def _stem(history: StoredHistory, table: StoredSeries) -> str:
    """File name of a table, with its id if it continues another table with other columns."""
    same = [other for other in wide(history) if title(other) == title(table)]
    stem = file_stem(title(table))
    return stem if same[0].table.id == table.table.id else f"{stem}.{table.table.id}"


def file_stem(name: str) -> str:
    """`name` without characters that some file systems do not allow in file names."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in name) or "table"


# ---------------------------------------------------------------- JSON lines

ITEMS_PER_WRITE = 256


def write_jsonl(history: StoredHistory, descriptor: int) -> None:
    """Write the lines that `--json` prints to `descriptor`, which is then closed.

    Raises OSError and StoreError.
    """
    lines = JsonLines(Output(descriptor))
    status = history.store.status() or Status()
    try:
        batch = []
        for item in replay_items(history):
            batch.append(item)
            if len(batch) == ITEMS_PER_WRITE:
                lines.take(batch, status)
                batch = []
        lines.take(batch, status)
    finally:
        lines.close()


# ---------------------------------------------------------------- Parquet

ROW_GROUP = 8192
"""Rows per row group; fewer in a wide table."""
GROUP_VALUES = 4_000_000


def write_parquet(history: StoredHistory, folder: Path) -> list[Path]:
    """Write the tables of `write_csv` with the run's description as metadata (`tui_trainer.run`,
    JSON); return their paths. Null means not measured. Raises ImportError (pyarrow) and OSError.
    """
    written = [_write_parquet_steps(history, per_step(history), folder)]
    return written + [_write_parquet_table(history, table, folder) for table in wide(history)]


def _schema(history: StoredHistory, fields: list[tuple[str, Any]]) -> Any:
    import msgspec
    import pyarrow

    info = history.store.info()
    about = {"tui_trainer.run": msgspec.json.encode(info)} if info else None
    return pyarrow.schema(fields, metadata=about)


def _write_parquet_steps(history: StoredHistory, chosen: list[StoredSeries], folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    names = [name for table in chosen for name in column_names(table)]
    fields = [("step", pyarrow.int64()), ("time", pyarrow.float64())]
    schema = _schema(history, [*fields, *((name, pyarrow.float32()) for name in names)])
    path = folder / "steps.parquet"
    places = np.cumsum([0, *(table.columns for table in chosen)])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        steps: list[int] = []
        values = np.zeros((ROW_GROUP, len(names)), np.float32)
        known = np.zeros((ROW_GROUP, len(names)), np.bool_)

        def write() -> None:
            count = len(steps)
            when = np.array([history.step_times.time_of(step) for step in steps], np.float64)
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
                known[at, places[place] : places[place + 1]] = ~absent_mask(row)
            if len(steps) == ROW_GROUP:
                write()
        if steps:
            write()
    return path


def _write_parquet_table(history: StoredHistory, table: StoredSeries, folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    names = [column.name for column in table.table.columns]
    fields = [("step", pyarrow.int64()), *((name, pyarrow.float32()) for name in names)]
    schema = _schema(history, fields)
    path = folder / f"{_stem(history, table)}.parquet"
    rows = max(512, min(ROW_GROUP, GROUP_VALUES // max(1, len(names))))
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        steps: list[np.ndarray[Any, Any]] = []
        values: list[np.ndarray[Any, Any]] = []

        def write() -> None:
            joined_values = np.concatenate(values)
            missing = absent_mask(joined_values)
            columns = [pyarrow.array(np.concatenate(steps))]
            columns += [
                pyarrow.array(np.ascontiguousarray(joined_values[:, i]), mask=missing[:, i])
                for i in range(len(names))
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            steps.clear()
            values.clear()

        for block in table.blocks():
            steps.append(block.step)
            values.append(block.value)
            if sum(map(len, steps)) >= rows:
                write()
        if steps:
            write()
    return path


# ---------------------------------------------------------------- TensorBoard

TRAIN = "train"
"""Group of the tags of table `step`."""


def write_tensorboard(history: StoredHistory, folder: Path) -> list[Path]:
    """Write one event file with every series as scalars; return its path.

    Tags: `train/loss`, `validation/loss`, `grad_norm/<parameter>`,
    `attention/<layer>.<statistic>`, … Each point has the step and the time at which it was
    measured. A nan is written as such; TensorBoard shows it as a triangle. Raises ImportError
    (tensorboard; TensorFlow is not needed) and OSError.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    chosen = measured(history)
    names = [tags(table) for table in chosen]
    info = history.store.info()
    when = info.started_at if info else 0.0
    writer = EventFileWriter(str(folder))
    try:
        for step, rows in joined(chosen):
            found = history.step_times.time_of(step)
            when = when if math.isnan(found) else found
            summary = Summary()
            for place, row in rows.items():
                for tag, value in zip(names[place], row.tolist(), strict=True):
                    if why_absent(value) is None:
                        summary.value.add(tag=tag, simple_value=value)
            writer.add_event(Event(wall_time=when, step=step, summary=summary))
    finally:
        writer.close()
    return sorted(folder.glob("events.out.tfevents.*"))


def tags(table: StoredSeries) -> list[str]:
    """Tags of the columns of a table; TensorBoard groups them by what precedes the slash."""
    group = title(table)
    if table.table.name == schema.STEP:
        group = TRAIN + group.removeprefix(schema.STEP)
    return [f"{group}/{column.name}" for column in table.table.columns]


# ---------------------------------------------------------------- reading a recording in order

PER_STEP = (
    schema.STEP,
    schema.CLIP,
    schema.PHASE_MS,
    schema.MEMORY,
    schema.OVERHEAD,
    schema.VALIDATION,
    schema.LOGGED,
)
"""Tables with few columns, which are exported as one row for each step."""


def measured(history: StoredHistory) -> list[StoredSeries]:
    """The tables that have rows."""
    return [table for table in history.tables.values() if table.columns and table.rows]


def per_step(history: StoredHistory) -> list[StoredSeries]:
    """The tables in PER_STEP that have rows, in that order."""
    found = [table for table in measured(history) if table.table.name in PER_STEP]
    return sorted(found, key=lambda table: PER_STEP.index(table.table.name))


def wide(history: StoredHistory) -> list[StoredSeries]:
    """The other tables, which are exported as a file each."""
    return [table for table in measured(history) if table.table.name not in PER_STEP]


def title(table: StoredSeries) -> str:
    """Name of a table, with its rank or optimizer if the run has several."""
    named = table.table
    if named.rank is not None:
        return f"{named.name}.{named.rank}"
    return f"{named.name}.{named.optimizer}" if named.optimizer else named.name


def column_names(table: StoredSeries) -> list[str]:
    """Names of a table's columns in a joined row: `loss` for table `step`, `clip.scale` for
    others."""
    bare = table.table.name == schema.STEP and not table.table.optimizer
    names = [column.name for column in table.table.columns]
    return names if bare else [f"{title(table)}.{name}" for name in names]


class JoinedRows(NamedTuple):
    """The rows of several tables for one step."""

    step: int
    rows: dict[int, Floats]
    """Index of a table in the joined list → its row of shape (columns,)."""


def joined(chosen: Sequence[StoredSeries]) -> Iterator[JoinedRows]:
    """The rows of several tables, step by step. Of two rows for the same step the later one counts,
    except where its values are absent."""

    def rows(place: int, table: StoredSeries) -> Iterator[tuple[int, int, Floats]]:
        for block in table.blocks():
            for step, values in zip(block.step.tolist(), block.value, strict=True):
                yield step, place, values

    merged = heapq.merge(
        *(rows(place, table) for place, table in enumerate(chosen)), key=lambda row: row[:2]
    )
    current: JoinedRows | None = None
    for step, place, values in merged:
        if current is None or current.step != step:
            if current is not None:
                yield current
            current = JoinedRows(step, {})
        known = current.rows.get(place)
        if known is not None and (missing := absent_mask(values)).any():
            values = np.where(missing, known, values)  # values that were logged one by one
        current.rows[place] = values
    if current is not None:
        yield current


def shortest(values: Floats) -> list[str]:
    """Each float32 with the fewest digits that parse to the same value; "" where it is absent."""
    values = np.ascontiguousarray(values, np.float32)
    texts: list[str] = values.astype("U32").tolist()
    for place in absent_mask(values).nonzero()[0].tolist():
        texts[place] = ""
    return texts
