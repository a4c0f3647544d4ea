"""One look at a run: what is known of it, as one object, whatever it is shown as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from tui_trainer.cli.runs.listing import as_object
from tui_trainer.history import History
from tui_trainer.history.layers import attention_tables
from tui_trainer.history.reading import Reading
from tui_trainer.history.store.schema import STORE_FILE, StoreFault
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Clip, Event, NonFinite, Notice, Status
from tui_trainer.session.ask import Conversation
from tui_trainer.session.registry import Run
from tui_trainer.session.replay import ReplaySession
from tui_trainer.session.trust import RunError

CURVE_POINTS = 60
EVENTS_SHOWN = 8
ATTENTION_SHOWN = ("cos_qk", "cos_qv", "cos_kv", "drift_q", "drift_k", "drift_v")


class Curve(msgspec.Struct, frozen=True):
    """A series over the whole run, in at most CURVE_POINTS stretches of steps."""

    steps: tuple[int, ...] = ()
    """The first step of each stretch."""
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    last: float | None = None


class Look(msgspec.Struct, frozen=True):
    """How a run is now."""

    run: dict[str, Any]
    """As `tui-trainer ls --json` has it."""
    loss_curve: Curve = Curve()
    grad_norm_curve: Curve = Curve()
    grad_norm_preclip: float | None = None
    learning_rate: float | None = None
    validation: dict[str, float | None] = {}
    clipped_share: float | None = None
    phase_ms: dict[str, float | None] = {}
    attention: tuple[dict[str, Any], ...] = ()
    phase: str = ""
    parameters: int | None = None
    """Numbers in all trainable parameters."""
    viewers: tuple[str, ...] = ()
    recording: str = ""
    """What is wrong with recording to disk; "" while all is well."""
    events: tuple[dict[str, Any], ...] = ()
    """The newest, oldest of them first."""


def look(run: Run) -> Look:
    """Ask a live run; of one that has ended, or does not answer, what it has recorded."""
    if not run.live:
        return look_at_record(run)
    try:
        with Conversation.with_run(run, "tui-trainer show", read_only=True) as talk:
            return look_through(run, talk)
    except RunError as fault:
        seen = look_at_record(run)
        seen.run["note"] = seen.run["note"] or fault.message
        return seen


def look_at_record(run: Run) -> Look:
    """What a run has recorded, or, where that cannot be read, what it last said of itself."""
    try:
        replay = ReplaySession(run.directory)
    except StoreFault as fault:
        there = (run.directory / STORE_FILE).exists()
        return Look(as_object(run), recording=str(fault) if there else "")
    except OSError:
        return Look(as_object(run))
    try:
        snapshot = replay.poll()
        if snapshot.info is None:
            return Look(as_object(run))
        seen = _put_together(run, snapshot.history, snapshot.info, snapshot.status, snapshot.events)
    finally:
        replay.close()
    # How it is now, its directory knows: a run that was killed did not record that.
    seen.run.update(state=run.state, note=run.note)
    if run.said.step > seen.run["step"]:
        last = as_object(run)
        seen.run.update({name: last[name] for name in ("step", "loss", "loss_text")})
    seen.run.update(steps_per_second=None, items_per_second=None, remaining_s=None)
    recording = "; ".join(text for text in (seen.recording, snapshot.link.message) if text)
    return msgspec.structs.replace(seen, viewers=(), recording=recording)


def look_through(run: Run, talk: Conversation) -> Look:
    """Ask for all that is new, and put together how the run is. Raises RunError."""
    update = talk.poll()
    while update.more:
        update = talk.poll()
    assert talk.info is not None
    return _put_together(run, talk.history, talk.info, update.status, talk.events)


def _put_together(
    run: Run, history: History, info: RunInfo, status: Status, events: Sequence[Event]
) -> Look:
    step = history.table(tables.STEP)
    loss = _curve(step, "loss")
    seen = as_object(run)
    seen |= {
        "state": "paused" if status.state == "paused" else seen["state"],
        "step": status.step,
        "total_steps": info.total_steps,
        "loss": _finite(loss.last) if loss.last is not None else None,
        "loss_text": None if loss.last is None or math.isfinite(loss.last) else str(loss.last),
        "steps_per_second": status.steps_per_second,
        "items_per_second": status.items_per_second,
        "item_unit": info.item_unit,
        "title": info.title or info.task,
        "elapsed_s": status.elapsed_s,
        "remaining_s": status.remaining_s,
        "device": info.device.name if info.device else seen["device"],
        "note": status.reason or status.waiting_for,
    }
    if status.ended:
        seen["state"] = status.state
    trainable = sum(p.numel for p in info.parameters if p.trainable)
    return Look(
        seen,
        msgspec.structs.replace(loss, last=_finite(loss.last)),
        _curve(step, "grad_norm_preclip"),
        _newest(step).get("grad_norm_preclip"),
        _newest(step).get("learning_rate"),
        _newest(history.table(tables.VALIDATION)),
        status.clipped_share,
        _newest(history.table(tables.PHASE_MS)),
        _attention(info, history),
        status.phase,
        trainable or None,
        status.viewers,
        status.recording,
        tuple(_as_object(event) for event in events[-EVENTS_SHOWN:]),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _newest(table: Reading | None) -> dict[str, float | None]:
    latest = table.latest() if table is not None else None
    if table is None or latest is None:
        return {}
    names = [column.name for column in table.table.columns]
    return {n: _finite(float(v)) for n, v in zip(names, latest[1], strict=True)}


def _curve(table: Reading | None, name: str) -> Curve:
    names = [column.name for column in table.table.columns] if table is not None else []
    if table is None or name not in names or table.first_step is None or table.last_step is None:
        return Curve()
    column = names.index(name)
    buckets = max(1, min(CURVE_POINTS, table.rows))
    window = table.window([column], table.first_step, table.last_step + 1, buckets)
    kept = np.flatnonzero(window.filled)
    latest = table.latest()
    return Curve(
        tuple(int(window.edges[i]) for i in kept),
        tuple(_finite(float(window.low[i, 0])) for i in kept),
        tuple(_finite(float(window.high[i, 0])) for i in kept),
        float(latest[1][column]) if latest is not None else None,
    )


def _attention(info: RunInfo, history: History) -> tuple[dict[str, Any], ...]:
    newest: dict[str, float | None] = {}
    for table in attention_tables(history, tables.ATTENTION):
        newest |= _newest(table)
    if not newest:
        return ()
    return tuple(
        {
            "layer": each.layer,
            **{name: newest.get(f"{each.layer}.{name}") for name in ATTENTION_SHOWN},
        }
        for each in info.attention
    )


def _as_object(event: Event) -> dict[str, Any]:
    made: dict[str, Any] = {"step": event.step, "time": event.time}
    match event:
        case Clip():
            text = f"clipped: norm {event.norm_before:.4g} over {event.max_norm:.4g}"
            return made | {"kind": "clip", "text": text, "scale": event.scale}
        case NonFinite():
            where = f" in {event.parameter}" if event.parameter else ""
            text = f"{event.value} in the {event.quantity}{where}{event.seen}"
            return made | {"kind": "nonfinite", "text": text}
        case Notice():
            who = f" ({event.who})" if event.who else ""
            return made | {"kind": event.kind, "text": event.text + who, "level": event.level}
