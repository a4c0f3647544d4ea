"""JSON objects of the JSON-lines output, as described in docs/json-lines.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import nonfinite as nonfinite_word
from tui_trainer.protocol.messages import (
    Artifact,
    Clip,
    ConfusionMatrix,
    ImageSample,
    LogLine,
    NonFinite,
    Notice,
    Status,
    TextSample,
)
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.record.events import (
    InfoChanged,
    Item,
    RowRecorded,
    RunEnded,
    StepRecorded,
    StepsDropped,
)
from tui_trainer.run.sinks import Output

SCHEMA_VERSION = 1
SHORTEST_UP_TO = 4096
"""Rows wider than this are written with more digits than float32 needs: it is faster."""

Object = dict[str, Any]


def run_object(info: RunInfo) -> Object:
    """The header: what is trained, on what, and with what."""
    whole: Object = msgspec.to_builtins(info)
    for name in ("tables", "revision"):
        del whole[name]
    return {"type": "run", "schema": SCHEMA_VERSION, **whole}


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


def event_object(event: NonFinite | Notice) -> Object:
    """A line for something that happened; clips are part of their step."""
    shared = {"type": "event", "step": event.step, "time": event.time}
    if isinstance(event, NonFinite):
        return {
            **shared,
            "kind": "nonfinite",
            "level": "warning",
            "text": f"{event.quantity} is {event.value}{event.seen}",
            "quantity": event.quantity,
            "parameter": event.parameter or None,
            "value": event.value,
            "finite_at": event.finite_at,
        }
    return {
        **shared,
        "kind": event.kind,
        "level": event.level,
        "text": event.text,
        "who": event.who or None,
    }


def sample_object(artifact: Artifact) -> Object:
    """A sample without its pixels."""
    shared = {"type": "sample", "step": artifact.step}
    match artifact:
        case TextSample():
            return {**shared, "kind": "text", "prompt": artifact.prompt, "text": artifact.text}
        case ImageSample():
            return {
                **shared,
                "kind": "images",
                "predictions": artifact.predictions,
                "confidences": artifact.confidences,
                "truths": artifact.truths,
            }
        case ConfusionMatrix():
            return {
                **shared,
                "kind": "confusion",
                "labels": artifact.labels,
                "counts": artifact.counts,
            }


def row_object(info: RunInfo, row: RowRecorded) -> Object:
    """A row measured outside a step: a validation, or another table by its name."""
    table = info.tables[row.table]
    kind = "validation" if table.name == schema.VALIDATION else "measurement"
    made: Object = {"type": kind, "step": row.step, "time": row.time}
    if kind == "measurement":
        made["table"] = table.name
    return _finished(made, {}, _named(table.columns, row.values))


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
    nonfinite: dict[str, str] = {}
    layers: dict[str, Object] = {}
    for number, values in record.rows:
        table = info.tables[number]
        match table.name:
            case schema.STEP:
                named = _named(table.columns, values)
                named["lr"] = named.pop("learning_rate", math.nan)
                _finished(made, nonfinite, named)
            case schema.CLIP:
                made["clip"] = _clip(info, table, record, values, nonfinite)
            case schema.ATTENTION | schema.ATTENTION_SPECTRUM | schema.ATTENTION_HEALTH:
                _by_layer(layers, info, table, values, nonfinite)
            case schema.ATTENTION_HEADS:
                pass  # measured only while somebody looks at them
            case schema.PHASE_MS:
                named = _named(table.columns, values)  # a phase that did not happen took no time
                made[table.name] = {k: v for k, v in named.items() if v > 0}
            case schema.MEMORY | schema.OVERHEAD:
                named = _named(table.columns, values)  # what does not exist here is NaN
                made[table.name] = {k: v for k, v in named.items() if math.isfinite(v)}
            case _:
                named = _named(table.columns, values)
                made[table.name] = _finished({}, nonfinite, named, f"{table.name}.")
    made["attention"] = list(layers.values())
    if nonfinite:
        made["nonfinite"] = nonfinite
    return made


def _clip(
    info: RunInfo, table: Table, record: StepRecord, values: Floats, nonfinite: dict[str, str]
) -> Object:
    made = _finished({}, nonfinite, _named(table.columns, values), "clip.")
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


def _by_layer(
    layers: dict[str, Object],
    info: RunInfo,
    table: Table,
    values: Floats,
    nonfinite: dict[str, str],
) -> None:
    noted = {found.layer: found for found in info.attention if found.note}
    for name, value in _named(table.columns, values).items():
        layer, _, statistic = name.rpartition(".")
        place = layers.setdefault(layer, {"layer": layer})
        place[statistic] = value if math.isfinite(value) else None
        if not math.isfinite(value):
            part = statistic.rpartition("_")[2]
            if layer not in noted or noted[layer].comparable(part) or math.isinf(value):
                nonfinite[f"attention.{name}"] = nonfinite_word(value)


def _named(columns: tuple[Column, ...], values: Floats) -> dict[str, float]:
    """Column name to value, in the fewest digits that give the same float32 again."""
    if len(values) > SHORTEST_UP_TO:
        plain = values.tolist()
    else:
        plain = [float(np.format_float_scientific(value)) for value in values]
    return dict(zip((column.name for column in columns), plain, strict=True))


def _finished(
    made: Object, nonfinite: dict[str, str], named: dict[str, float], prefix: str = ""
) -> Object:
    """Add `named` to `made` with null for what JSON cannot say, which goes to `nonfinite`."""
    missed: dict[str, str] = {}
    for name, value in named.items():
        made[name] = value if math.isfinite(value) else None
        if not math.isfinite(value):
            missed[f"{prefix}{name}"] = nonfinite_word(value)
    nonfinite.update(missed)
    if made.get("type") in ("validation", "measurement") and missed:
        made["nonfinite"] = missed
    return made


# ---- jsonlines
# One JSON object a line, for programs. The schema is docs/json-lines.md.


HELD_BACK = 10_000


class JsonLines:
    """The header comes first, so what happens before the first step (evaluations at the start,
    notices) is held back until the parameters are known; nothing is reordered."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._encoder = msgspec.json.Encoder()
        self._info: RunInfo | None = None
        self._headed: tuple[object, ...] | None = None
        self._waiting: list[Object] = []

    def take(self, items: Sequence[Item], status: Status) -> None:
        """Write these items."""
        objects: list[Object] = []
        for item in items:
            objects += self._objects(item)
        if objects:
            self._output.write(self._encoder.encode_lines(objects))

    def close(self) -> None:
        """Close the output."""
        self._output.close()

    def _objects(self, item: Item) -> list[Object]:
        match item:
            case InfoChanged():
                self._info = item.info
                return []
            case StepRecorded():
                assert self._info is not None, "the recorder describes before it tells"
                return [*self._head(), step_object(self._info, item.record)]
            case RunEnded():
                return [*self._head(), end_object(item.status)]
            case Clip() | LogLine():
                return []  # part of the step; on stderr
        made = self._other(item)
        if self._headed is None:
            self._waiting = [*self._waiting[-HELD_BACK:], made]
            return []
        return [made]

    def _other(
        self,
        item: RowRecorded
        | StepsDropped
        | NonFinite
        | Notice
        | TextSample
        | ImageSample
        | ConfusionMatrix,
    ) -> Object:
        match item:
            case RowRecorded():
                assert self._info is not None, "the recorder describes before it tells"
                return row_object(self._info, item)
            case StepsDropped():
                return {"type": "lost", "steps": item.steps}
            case NonFinite() | Notice():
                return event_object(item)
            case _:
                return sample_object(item)

    def _head(self) -> list[Object]:
        """The header when it is due: at first, and again when what it says of the model or the
        optimizers has changed."""
        info = self._info
        if info is None:
            return []
        said = (
            *(info.parameters, info.attention, info.optimizers, info.device, info.total_steps),
            info.unseen,
        )
        if said == self._headed:
            return []
        first, self._headed = self._headed is None, said
        held, self._waiting = self._waiting, []
        return [run_object(info), *held] if first else [run_object(info)]
