"""Plain progress lines, for pipes, batch systems and simple terminals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from tui_trainer import __version__
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, why_absent
from tui_trainer.protocol.events import Finding, NonFinite, Notice, NoticeKind, Skipped, TextSample
from tui_trainer.protocol.formatting import count, counted, duration, number, percent, scalar
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.sink_items import (
    InfoChanged,
    Item,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    StepRecorded,
)
from tui_trainer.run.sinks import Output

PROGRESS_EVERY_S = 1.0
NOTICE_CHARACTERS = 300
FACTS_IN_HEADER = ("parameters", "device", "threads")
SILENT_KINDS: tuple[NoticeKind, ...] = ("evaluation", "state", "cadence")
"""Kinds of notices that repeat another line, or concern nothing that is printed."""


class PlainLines:
    """A header, about one progress line a second, and a line for every event worth one."""

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._info: RunInfo | None = None
        self._has_header = False
        self._waiting_for = ""
        self._newest: StepRecord | None = None
        self._shown: StepRecord | None = None
        self._next_progress = 0.0
        self._norms: dict[int, float] = {}
        """The last measured total gradient norm, by table."""

    def take(self, items: Sequence[Item], status: Status) -> None:
        lines: list[str] = []
        if self._info is None:
            lines += [title(item.info) for item in items[:1] if isinstance(item, InfoChanged)]
        if status.waiting_for != self._waiting_for and not self._has_header:
            self._waiting_for = status.waiting_for
            if status.waiting_for:
                lines.append(f"{status.waiting_for} …")
        for item in items:
            self._add(item, status, lines)
        if self._newest is not self._shown and self._clock() >= self._next_progress:
            self._add_progress(status, lines)
        if lines:
            text = "\n".join(lines) + "\n"
            self._output.write(text.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        self._output.close()

    def _add(self, item: Item, status: Status, lines: list[str]) -> None:
        match item:
            case InfoChanged():
                self._info = item.info
            case StepRecorded():
                self._add_header(lines)
                self._newest = item.record
                self._keep_norm(item.record)
            case RowRecorded():
                self._add_row(item, status, lines)
            case NonFinite():
                lines.append(f"step {item.step}: {item.text}")
            case Skipped():
                lines.append(f"before step {item.step}: {item.text}")
            case Finding() if item.cause is None:
                lines.append(f"step {item.step}: {item.level}: {item.title}: {item.text}")
            case Notice() if item.kind not in SILENT_KINDS:
                lines.append(notice(item))
            case TextSample():
                sample = (item.prompt + item.text).strip().splitlines()
                lines += [f"step {item.step}: sample:", *(f"    {line}" for line in sample)]
            case ItemsDropped():
                if item.steps:
                    lines.append(f"{item.steps} steps omitted: the output is too slow")
            case RunEnded():
                self._add_header(lines)
                if self._newest is not self._shown:
                    self._add_progress(item.status, lines)
                lines.append(summary(item.status, self._info.name if self._info else ""))

    def _add_header(self, lines: list[str]) -> None:
        if self._has_header or self._info is None:
            return
        self._has_header = True
        if self._info.parameters:
            lines.append(header(self._info))
            if self._info.facts:
                lines.append(facts(self._info))

    def _add_progress(self, status: Status, lines: list[str]) -> None:
        if self._newest is not None and self._info is not None:
            self._shown, self._next_progress = self._newest, self._clock() + PROGRESS_EVERY_S
            lines.append(progress(self._info, self._newest, status, self._norms))

    def _keep_norm(self, record: StepRecord) -> None:
        tables = self._info.tables if self._info is not None else ()
        for table, row in record.rows:
            if tables and tables[table].name == schema.STEP:
                norm = float(row[schema.STEP_INDEX["grad_norm_preclip"]])
                if why_absent(norm) is not Absent.NOT_MEASURED:
                    self._norms[table] = norm

    def _add_row(self, row: RowRecorded, status: Status, lines: list[str]) -> None:
        if self._info is None or self._info.tables[row.table].name != schema.VALIDATION:
            return
        if self._newest is not self._shown and self._newest is not None:
            self._add_progress(status, lines)
        columns = self._info.tables[row.table].columns
        metrics = "  ".join(
            f"{column.name} {number(float(value), 0, 5)}"
            for column, value in zip(columns, row.values, strict=True)
            if not math.isnan(value) or column.name == "loss"
        )
        lines.append(f"step {row.step}: validation: {metrics}")


def title(info: RunInfo) -> str:
    """The first line."""
    return f"tui-trainer {__version__} · {info.title or info.task} · run {info.name}"


def header(info: RunInfo) -> str:
    """The model, the device and the optimizers, which are known after the first step."""
    trained = sum(parameter.numel for parameter in info.parameters)
    device = info.device
    parts = [f"{len(info.parameters)} parameter tensors, {trained:,} numbers"]
    if device is not None:
        threads = f", {counted(device.threads, 'thread')}" if device.threads else ""
        parts.append(f"{device.kind} ({device.name}{threads})")
    if info.optimizers:
        parts.append(", ".join(info.optimizers))
    return " · ".join(parts)


def facts(info: RunInfo) -> str:
    """The facts of the data, such as `data handwritten digits · images 1,797`."""
    return " · ".join(
        f"{name} {scalar(value)}"
        for name, value in info.facts.items()
        if name not in FACTS_IN_HEADER
    )


def notice(item: Notice) -> str:
    """A notice on one line of bounded length."""
    text = " ".join(item.text.split())
    if len(text) > NOTICE_CHARACTERS:
        text = text[:NOTICE_CHARACTERS] + " …"
    return f"step {item.step}: {text if item.level == 'info' else f'{item.level}: {text}'}"


def progress(info: RunInfo, record: StepRecord, status: Status, norms: Mapping[int, float]) -> str:
    """The newest step, the speed and the remaining time. `norms`: last measured gradient norm by
    table, for steps at which it was not measured; it is at most a few steps old."""
    values: dict[str, float] = {}
    for table, row in record.rows:
        if info.tables[table].name == schema.STEP:
            names = (column.name for column in info.tables[table].columns)
            values = dict(zip(names, map(float, row), strict=True))
            if why_absent(values["grad_norm_preclip"]) is Absent.NOT_MEASURED:
                values["grad_norm_preclip"] = norms.get(table, values["grad_norm_preclip"])
    total = info.total_steps
    width = len(str(total)) if total else 7
    parts = [f"step {record.step:>{width}}" + (f"/{total}" if total else "")]
    for name, label in (("loss", "loss"), ("learning_rate", "lr"), ("grad_norm_preclip", "grad")):
        if name in values:
            parts.append(f"{label} {number(values[name], 0, 5)}")
    if status.clipped_share is not None:
        parts.append(f"clipped {percent(status.clipped_share, 0, 0)}")
    if status.steps_per_second:
        speed = f"{status.steps_per_second:.3g} steps/s"
        if status.items_per_second:
            speed += f" ({count(status.items_per_second, 0)} {info.item_unit}/s)"
        parts.append(speed)
    if status.remaining_s:
        parts.append(f"ETA {duration(status.remaining_s, 0)}")
    return "  ".join(parts)


def summary(status: Status, name: str) -> str:
    """How the run called `name` ended, with a hint unless stderr has one."""
    reason = f": {status.reason}" if status.reason else ""
    if status.refused or (status.state == "crashed" and not status.step):
        return f"could not start{reason}"
    if status.state == "finished" and not status.step:
        return f"finished{reason}, without a step of a torch optimizer"
    steps = counted(status.step, "step")
    text = f"{status.state} after {steps} in {duration(status.elapsed_s, 0)}{reason}"
    if status.state == "crashed":
        return f"{text}\nhint: tui-trainer show {name} shows what was measured"
    return f"{text}\nhint: {status.hint}" if status.hint else text
