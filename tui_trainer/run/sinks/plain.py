"""Plain progress lines, for pipes, batch systems and terminals that cannot show more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from tui_trainer import __version__
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import count, duration, number
from tui_trainer.protocol.messages import NonFinite, Notice, Status, TextSample
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.events import (
    InfoChanged,
    Item,
    RowRecorded,
    RunEnded,
    StepRecorded,
    StepsDropped,
)
from tui_trainer.run.sinks import Output

EVERY_S = 1.0
NOTICE_CHARACTERS = 300
_IN_HEADER = ("parameters", "device", "threads")
"""Facts of a task that the header has in its own words."""
_QUIET = ("evaluation", "state", "cadence")
"""Kinds of notices that another line says already, or that concern nothing shown here."""


class PlainLines:
    """A header, a line about once a second, and a line for whatever else is worth one."""

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._info: RunInfo | None = None
        self._headed = False
        self._waiting_for = ""
        self._last: StepRecord | None = None
        self._said: StepRecord | None = None
        self._due = 0.0

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Write what is due."""
        lines: list[str] = []
        if self._info is None:
            lines += [title(item.info) for item in items[:1] if isinstance(item, InfoChanged)]
        if status.waiting_for != self._waiting_for and not self._headed:
            self._waiting_for = status.waiting_for
            if status.waiting_for:
                lines.append(f"{status.waiting_for} …")
        for item in items:
            self._one(item, status, lines)
        if self._last is not self._said and self._clock() >= self._due:
            self._progress(status, lines)
        if lines:
            text = "\n".join(lines) + "\n"
            self._output.write(text.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Close the output."""
        self._output.close()

    def _one(self, item: Item, status: Status, lines: list[str]) -> None:
        match item:
            case InfoChanged():
                self._info = item.info
            case StepRecorded():
                self._head(lines)
                self._last = item.record
            case RowRecorded():
                self._validation(item, status, lines)
            case NonFinite():
                where = f" in {item.parameter}" if item.parameter else ""
                text = f"the {item.quantity} is {item.value}{where}{item.seen}"
                lines.append(f"step {item.step}: {text}")
            case Notice() if item.kind not in _QUIET:
                lines.append(notice(item))
            case TextSample():
                sample = (item.prompt + item.text).strip().splitlines()
                lines += [f"step {item.step}: sample:", *(f"    {line}" for line in sample)]
            case StepsDropped():
                lines.append(f"{item.steps} steps are not shown: the output is too slow")
            case RunEnded():
                self._head(lines)
                if self._last is not self._said:
                    self._progress(item.status, lines)
                lines.append(ending(item.status, self._info.name if self._info else ""))

    def _head(self, lines: list[str]) -> None:
        if self._headed or self._info is None:
            return
        self._headed = True
        if self._info.parameters:
            lines.append(header(self._info))
            if self._info.facts:
                lines.append(facts(self._info))

    def _progress(self, status: Status, lines: list[str]) -> None:
        if self._last is not None and self._info is not None:
            self._said, self._due = self._last, self._clock() + EVERY_S
            lines.append(progress(self._info, self._last, status))

    def _validation(self, row: RowRecorded, status: Status, lines: list[str]) -> None:
        if self._info is None or self._info.tables[row.table].name != schema.VALIDATION:
            return
        if self._last is not self._said and self._last is not None:
            self._progress(status, lines)
        columns = self._info.tables[row.table].columns
        said = "  ".join(
            f"{column.name} {number(float(value), 0, 5)}"
            for column, value in zip(columns, row.values, strict=True)
            if not math.isnan(value) or column.name == "loss"
        )
        lines.append(f"step {row.step}: validation: {said}")


def title(info: RunInfo) -> str:
    """What this is, said at once."""
    return f"tui-trainer {__version__} · {info.title or info.task} · run {info.name}"


def header(info: RunInfo) -> str:
    """What is trained, and on what: known once the first step was made."""
    trained = sum(parameter.numel for parameter in info.parameters)
    device = info.device
    said = [f"{len(info.parameters)} parameter tensors, {trained:,} numbers"]
    if device is not None:
        plural = "" if device.threads == 1 else "s"
        threads = f", {device.threads} thread{plural}" if device.threads else ""
        said.append(f"{device.kind} ({device.name}{threads})")
    if info.optimizers:
        said.append(", ".join(info.optimizers))
    return " · ".join(said)


def facts(info: RunInfo) -> str:
    """What is known of the data, less what the header says already."""
    return " · ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in info.facts.items()
        if name not in _IN_HEADER
    )


def notice(item: Notice) -> str:
    """One line; a text of many lines is folded into it."""
    text = " ".join(item.text.split())
    if len(text) > NOTICE_CHARACTERS:
        text = text[:NOTICE_CHARACTERS] + " …"
    return f"step {item.step}: {text if item.level == 'info' else f'{item.level}: {text}'}"


def progress(info: RunInfo, record: StepRecord, status: Status) -> str:
    """One line about the newest step."""
    values: dict[str, float] = {}
    for table, row in record.rows:
        if info.tables[table].name == schema.STEP:
            names = (column.name for column in info.tables[table].columns)
            values = dict(zip(names, map(float, row), strict=True))
    total = info.total_steps
    width = len(str(total)) if total else 7
    parts = [f"step {record.step:>{width}}" + (f"/{total}" if total else "")]
    for name, label in (("loss", "loss"), ("learning_rate", "lr"), ("grad_norm_preclip", "grad")):
        if name in values:
            parts.append(f"{label} {number(values[name], 0, 5)}")
    if status.clipped_share is not None:
        parts.append(f"clipped {status.clipped_share:.0%}")
    if status.steps_per_second:
        speed = f"{status.steps_per_second:.3g} steps/s"
        if status.items_per_second:
            speed += f" ({count(status.items_per_second, 0)} {info.item_unit}/s)"
        parts.append(speed)
    if status.remaining_s:
        parts.append(f"ETA {duration(status.remaining_s, 0)}")
    return "  ".join(parts)


def ending(status: Status, name: str) -> str:
    """The last line, and a hint where stderr has not given it. `name` is the run's."""
    reason = f": {status.reason}" if status.reason else ""
    if status.refused or (status.state == "crashed" and not status.step):
        return f"it could not start{reason}"
    if status.state == "finished" and not status.step:
        return f"finished{reason}; it made no step of a torch optimizer"
    steps = "1 step" if status.step == 1 else f"{status.step} steps"
    said = f"{status.state} after {steps} in {duration(status.elapsed_s, 0)}{reason}"
    if status.state == "crashed":
        return f"{said}\nhint: tui-trainer show {name} shows what was measured"
    return f"{said}\nhint: {status.hint}" if status.hint else said
