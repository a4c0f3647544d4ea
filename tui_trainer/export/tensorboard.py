"""TensorBoard's event files. Needs the tensorboard package, not TensorFlow."""

from __future__ import annotations

import math
from pathlib import Path

from tui_trainer.export.reading import Times, joined, measured, title
from tui_trainer.history.store.reader import RecordedHistory, RecordedTable
from tui_trainer.protocol import tables

TRAIN = "train"
"""Group of the tags of a step's own figures."""


def write_tensorboard(history: RecordedHistory, folder: Path) -> list[Path]:
    """One event file in `folder` with every series as scalars; returns it.

    Tags: `train/loss`, `validation/loss`, `grad_norm/<parameter>`,
    `attention/<layer>.<statistic>`, … Each point has the step and the time at which it was
    measured. A NaN is written as such: TensorBoard shows it as a triangle. Raises ImportError and
    OSError.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    chosen = measured(history)
    names = [tags(table) for table in chosen]
    info = history.store.info()
    when = info.started_at if info else 0.0
    times = Times(history)
    writer = EventFileWriter(str(folder))
    try:
        for step, rows in joined(chosen):
            found = times.at(step)
            when = when if math.isnan(found) else found
            summary = Summary()
            for place, row in rows.items():
                for tag, value in zip(names[place], row.tolist(), strict=True):
                    summary.value.add(tag=tag, simple_value=value)
            writer.add_event(Event(wall_time=when, step=step, summary=summary))
    finally:
        writer.close()
    return sorted(folder.glob("events.out.tfevents.*"))


def tags(table: RecordedTable) -> list[str]:
    """What TensorBoard calls the columns of a table: what stands before the / is a group."""
    group = title(table)
    if table.table.name == tables.STEP:
        group = TRAIN + group.removeprefix(tables.STEP)
    return [f"{group}/{column.name}" for column in table.table.columns]
