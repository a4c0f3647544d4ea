"""JSON lines for programs, one object a line, as documented in docs/json-lines.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, why_absent
from tui_trainer.protocol.events import (
    Artifact,
    Clip,
    ConfusionMatrix,
    Finding,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    Skipped,
    TextSample,
    finding_object,
)
from tui_trainer.protocol.formatting import nonfinite as nonfinite_word
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.record.sink_items import (
    InfoChanged,
    Item,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    StepRecorded,
)
from tui_trainer.run.sinks import Output

SCHEMA_VERSION = 1
MAX_SHORTEST = 4096
"""Number of columns above which a row is written with more digits than float32 needs, which is
faster."""
MAX_HELD_BACK = 10_000

Object = dict[str, Any]


class JsonLines:
    """Writes the items of a run in their order, after a header.

    The header needs the parameters, which are known after the first step; earlier items, such as an
    evaluation at the start, are held back until then.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._encoder = msgspec.json.Encoder()
        self._info: RunInfo | None = None
        self._header: tuple[object, ...] | None = None
        self._held_back: list[Object] = []

    def take(self, items: Sequence[Item], status: Status) -> None:
        objects: list[Object] = []
        for item in items:
            objects += self._objects(item)
        if objects:
            self._output.write(self._encoder.encode_lines(objects))

    def close(self) -> None:
        self._output.close()

    def _objects(self, item: Item) -> list[Object]:
        match item:
            case InfoChanged():
                self._info = item.info
                return []
            case StepRecorded():
                assert self._info is not None, "InfoChanged comes first"
                return [*self._due_header(), step_object(self._info, item.record)]
            case RunEnded():
                return [*self._due_header(), end_object(item.status)]
            case Clip() | LogLine() | ItemsDropped(steps=0):
                return []  # a clip is part of its step; log lines are on stderr
        made = self._other_object(item)
        if self._header is None:
            self._held_back = [*self._held_back[-MAX_HELD_BACK:], made]
            return []
        return [made]

    def _other_object(
        self, item: RowRecorded | ItemsDropped | NonFinite | Skipped | Finding | Notice | Artifact
    ) -> Object:
        match item:
            case RowRecorded():
                assert self._info is not None, "InfoChanged comes first"
                return row_object(self._info, item)
            case ItemsDropped():
                return {"type": "lost", "steps": item.steps}
            case NonFinite() | Notice():
                return event_object(item)
            case Finding():
                return finding_event(item)
            case Skipped():
                assert self._info is not None, "InfoChanged comes first"
                return skipped_object(self._info, item)
            case _:
                return sample_object(item)

    def _due_header(self) -> list[Object]:
        """The header and the objects held back, the first time; the header alone when it has
        changed; otherwise nothing."""
        info = self._info
        if info is None:
            return []
        header = (
            *(info.parameters, info.attention, info.optimizers, info.device, info.total_steps),
            info.unseen,
        )
        if header == self._header:
            return []
        is_first, self._header = self._header is None, header
        held_back, self._held_back = self._held_back, []
        return [run_object(info), *held_back] if is_first else [run_object(info)]


# ---------------------------------------------------------------- objects


def run_object(info: RunInfo) -> Object:
    """The header: model, device, optimizers and configuration."""
    fields: Object = msgspec.to_builtins(info)
    for name in ("tables", "revision"):
        del fields[name]
    return {"type": "run", "schema": SCHEMA_VERSION, **fields}


def end_object(status: Status) -> Object:
    """The last line."""
    return {
        "type": "end",
        "reason": status.state,
        "message": status.reason,
        "hint": status.hint,
        "steps": status.step,
        "elapsed_s": round(status.elapsed_s, 3),
    }


@dataclass
class Notes:
    """Explanations of values that are null in JSON, by dotted path."""

    nonfinite: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, value: float) -> None:
        """Explain a `value` that is not finite."""
        why = why_absent(value)
        if why is None:
            self.nonfinite[path] = nonfinite_word(value)
        else:
            self.absent[path] = why.reason

    def add_to(self, made: Object) -> None:
        if self.nonfinite:
            made["nonfinite"] = self.nonfinite
        if self.absent:
            made["absent"] = self.absent


def event_object(event: NonFinite | Notice) -> Object:
    """An event; clips are part of their step."""
    common = {"type": "event", "step": event.step, "time": event.time}
    if isinstance(event, NonFinite):
        return {
            **common,
            "kind": "nonfinite",
            "level": "warning",
            "text": event.text,
            "quantity": event.quantity,
            "parameter": event.parameter or None,
            "value": event.value,
            "finite_at": event.finite_at,
        }
    return {
        **common,
        "kind": event.kind,
        "level": event.level,
        "text": event.text,
        "who": event.who or None,
    }


def finding_event(finding: Finding) -> Object:
    """A finding as an event."""
    return {
        "type": "event",
        "step": finding.step,
        "time": finding.time,
        "kind": "finding",
        **finding_object(finding),
    }


def sample_object(artifact: Artifact) -> Object:
    """A sample without its pixels."""
    common = {"type": "sample", "step": artifact.step}
    match artifact:
        case TextSample():
            return {**common, "kind": "text", "prompt": artifact.prompt, "text": artifact.text}
        case ImageSample():
            return {
                **common,
                "kind": "images",
                "predictions": artifact.predictions,
                "confidences": artifact.confidences,
                "truths": artifact.truths,
            }
        case ConfusionMatrix():
            return {
                **common,
                "kind": "confusion",
                "labels": artifact.labels,
                "counts": artifact.counts,
            }


def row_object(info: RunInfo, row: RowRecorded) -> Object:
    """A row measured outside a step: a validation, what the script logs, or another table's."""
    table = info.tables[row.table]
    if table.name == schema.LOGGED:
        return _logged_object(table, row)
    kind = "validation" if table.name == schema.VALIDATION else "measurement"
    made: Object = {"type": kind, "step": row.step, "time": row.time}
    if kind == "measurement":
        made["table"] = table.name
    values = _by_column(table.columns, row.values)
    if table.rank is not None:
        made["rank"] = table.rank
        values = {name: value for name, value in values.items() if why_absent(value) is None}
    notes = Notes()
    _add_values(made, notes, values)
    notes.add_to(made)
    return made


def _logged_object(table: Table, row: RowRecorded) -> Object:
    """Values of one call of `tui_trainer.log`, without other names of the same table."""
    values = _by_column(table.columns, row.values)
    given = {n: v for n, v in values.items() if why_absent(v) is not Absent.NOT_MEASURED}
    made: Object = {"type": "logged", "step": row.step, "time": row.time, "values": {}}
    notes = Notes()
    _add_values(made["values"], notes, given, "values.")
    notes.add_to(made)
    return made


def skipped_object(info: RunInfo, event: Skipped) -> Object:
    """An iteration without an optimizer step, with those fields of a step that exist."""
    rows = tuple((number, np.frombuffer(values, "<f4")) for number, values in event.rows)
    record = StepRecord(event.step, event.time, event.optimizer, rows)
    made = step_object(info, record)
    for name in ("lr", "own_ms", "attention"):
        del made[name]
    made.get("absent", {}).pop("lr", None)
    if not made.get("absent", True):
        del made["absent"]
    return {
        **made,
        "type": "skipped",
        "reason": event.reason,
        "text": event.text,
        "loss_scale": event.loss_scale,
    }


def step_object(info: RunInfo, record: StepRecord) -> Object:
    """One optimizer step."""
    made: Object = {
        "type": "step",
        "step": record.step,
        "time": record.time,
        "optimizer": record.optimizer or next(iter(info.optimizers), ""),
        **dict.fromkeys(("loss", "lr", "grad_norm_preclip", "step_ms", "clip")),
        "grad_norm": {},
        "attention": [],
        "phase_ms": {},
        "own_ms": round(record.own_ms, 4),
    }
    notes = Notes()
    layers: dict[str, Object] = {}
    for number, row in record.rows:
        table = info.tables[number]
        match table.name:
            case schema.STEP:
                values = _by_column(table.columns, row)
                values["lr"] = values.pop("learning_rate", math.nan)
                if why_absent(values.get("evaluations", math.nan)) is not None:
                    del values["evaluations"]
                _add_values(made, notes, values)
            case schema.CLIP:
                made["clip"] = _clip_object(info, table, record, row, notes)
            case schema.ATTENTION | schema.ATTENTION_SPECTRUM | schema.ATTENTION_HEALTH:
                _add_layers(layers, info, table, row, notes)
            case schema.ATTENTION_HEADS:
                pass  # measured only while a viewer shows it
            case schema.PHASE_MS:
                values = _by_column(table.columns, row)  # 0 or nan: not in this step
                made[table.name] = {name: value for name, value in values.items() if value > 0}
                shared = [n for n, value in values.items() if why_absent(value) is Absent.SHARED]
                if shared:
                    made["shared"] = shared
            case schema.MEMORY | schema.OVERHEAD:
                values = _by_column(table.columns, row)  # nan: does not exist here
                made[table.name] = {k: v for k, v in values.items() if math.isfinite(v)}
            case _:
                values = _by_column(table.columns, row)
                _add_values(made.setdefault(table.name, {}), notes, values, f"{table.name}.")
    made["attention"] = list(layers.values())
    notes.add_to(made)
    return made


def _clip_object(
    info: RunInfo, table: Table, record: StepRecord, row: Floats, notes: Notes
) -> Object:
    made: Object = {}
    _add_values(made, notes, _by_column(table.columns, row), "clip.")
    clip = record.clip
    made["clipped"] = clip is not None and clip.scale < 1.0
    if clip is not None and clip.scale < 1.0:
        made["kind"] = clip.kind
        made["dominant"] = [
            {"parameter": info.parameters[index].name, "share": round(share, 6)}
            for index, share in zip(clip.parameters, clip.shares, strict=True)
            if index < len(info.parameters)
        ]
    return made


def _add_layers(
    layers: dict[str, Object], info: RunInfo, table: Table, row: Floats, notes: Notes
) -> None:
    """Add the columns `layer.statistic` of a row to the objects of their layers."""
    noted = {found.layer: found for found in info.attention if found.note}
    for name, value in _by_column(table.columns, row).items():
        layer, _, statistic = name.rpartition(".")
        made = layers.setdefault(layer, {"layer": layer})
        made[statistic] = value if math.isfinite(value) else None
        if not math.isfinite(value):
            pair = statistic.rpartition("_")[2]
            if layer not in noted or noted[layer].comparable(pair) or math.isinf(value):
                notes.add(f"attention.{name}", value)


def _by_column(columns: tuple[Column, ...], row: Floats) -> dict[str, float]:
    """Column name to value, in the fewest digits that give the same float32."""
    values = row.tolist()
    if len(row) <= MAX_SHORTEST:
        values = [
            float(np.format_float_scientific(short)) if math.isfinite(value) else value
            for value, short in zip(values, row, strict=True)
        ]
    return dict(zip((column.name for column in columns), values, strict=True))


def _add_values(made: Object, notes: Notes, values: dict[str, float], prefix: str = "") -> None:
    """Add `values` to `made`; JSON has no nan or infinity, so they become null with a note."""
    for name, value in values.items():
        made[name] = value if math.isfinite(value) else None
        if not math.isfinite(value):
            notes.add(f"{prefix}{name}", value)
