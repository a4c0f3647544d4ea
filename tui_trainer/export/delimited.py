"""CSV: `steps.csv` with a row a step, and a file for each wide table."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from tui_trainer.export.reading import (
    Times,
    blocks,
    column_names,
    joined,
    per_step,
    shortest,
    title,
    wide,
)
from tui_trainer.history.store.reader import RecordedHistory, RecordedTable
from tui_trainer.recording.items import Described
from tui_trainer.recording.retelling import retell


def write_csv(history: RecordedHistory, folder: Path) -> list[Path]:
    """Write the files of a run into `folder`; returns them. Raises OSError.

    A value that was not measured at a step is empty; a measured NaN is `nan`, infinities are `inf`
    and `-inf`.
    """
    written = [_write_steps(history, per_step(history), folder)]
    written += [_write_table(table, folder) for table in wide(history)]
    written.append(_write_events(history, folder))
    return written


def _write_steps(history: RecordedHistory, chosen: list[RecordedTable], folder: Path) -> Path:
    path = folder / "steps.csv"
    times = Times(history)
    names = [name for table in chosen for name in column_names(table)]
    blank = [[""] * table.columns for table in chosen]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "time", *names])
        for step, rows in joined(chosen):
            when = times.at(step)
            line = [str(step), "" if math.isnan(when) else repr(when)]
            for place in range(len(chosen)):
                line += shortest(rows[place]) if place in rows else blank[place]
            writer.writerow(line)
    return path


def _write_table(table: RecordedTable, folder: Path) -> Path:
    path = folder / f"{file_stem(title(table))}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(column.name for column in table.table.columns)])
        for block in blocks(table):
            for step, values in zip(block.steps.tolist(), block.values, strict=True):
                writer.writerow([step, *shortest(values)])
    return path


def _write_events(history: RecordedHistory, folder: Path) -> Path:
    """Clips and what else happened, in order."""
    from tui_trainer.protocol.messages import Clip, NonFinite, Notice

    path = folder / "events.csv"
    info = history.store.info()
    names = [parameter.name for parameter in info.parameters] if info else []
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "time", "kind", "level", "text", "who"])
        for item in retell(history):
            match item:
                case Described():
                    names = [parameter.name for parameter in item.info.parameters] or names
                case Clip():
                    blamed = [names[i] for i in item.parameters if i < len(names)]
                    text = f"norm {item.norm_before:g} over {item.max_norm:g}, scale {item.scale:g}"
                    text += f", mostly {', '.join(blamed)}" if blamed else ""
                    writer.writerow([item.step, repr(item.time), "clip", "info", text, ""])
                case NonFinite():
                    text = " ".join(("the", item.quantity, item.parameter, "is", item.value))
                    text += item.seen
                    line = [item.step, repr(item.time), "nonfinite", "warning"]
                    writer.writerow([*line, " ".join(text.split()), ""])
                case Notice():
                    line = [item.step, repr(item.time), item.kind, item.level]
                    writer.writerow([*line, item.text, item.who])
    return path


def file_stem(name: str) -> str:
    """`name` with nothing in it that a file's name cannot hold everywhere."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in name) or "table"
