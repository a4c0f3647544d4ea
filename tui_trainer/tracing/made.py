"""Steps that are made: what is known of them, and the records that they become on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.tracing.clips import ClipCall
from tui_trainer.tracing.probe import ClipSeen, Facts
from tui_trainer.tracing.readout import Arrival
from tui_trainer.tracing.slots import Slot
from tui_trainer.tracing.timing import Times

NO_READINGS: Floats = np.empty(0, dtype=np.float32)


@dataclass(slots=True)
class Finished:
    """What the tracer knows of a step that has just been made."""

    step: int
    losses: Sequence[torch.Tensor]
    learning_rate: float | torch.Tensor
    step_ms: float
    times: Times
    clips: Sequence[ClipCall]


@dataclass(slots=True)
class Made:
    """A step that is made, its values on their way to the host: header, then one part for each of
    the slots that read something."""

    optimizer: str
    """Its key: "" for the run's first."""
    recorded_by: Callable[[Made], float]
    """Makes its rows and records them; returns the seconds that the probes took."""
    arrival: Arrival
    slots: Sequence[Slot]
    finished: Finished
    time: float
    own_ms: dict[str, float]
    scaled: bool
    with_gradient: int

    def record(self) -> float:
        """See `outbox.Step`."""
        return self.recorded_by(self)

    def facts(self, header: Floats, skipped: Callable[[float], None]) -> Facts:
        """What its rows are made of. `skipped` is told the loss scale of a step that a fused
        optimizer has skipped by itself."""
        finished = self.finished
        values = iter(header.tolist())
        losses = [next(values) for _ in finished.losses]
        rate = finished.learning_rate
        learning_rate = next(values) if isinstance(rate, torch.Tensor) else rate
        clips = [_clip_seen(call, values, self.with_gradient) for call in finished.clips]
        scale = next(values) if self.scaled else 1.0
        if next(values, 0.0) > 0:  # `Meter.skip`, where there is one
            skipped(next(values))
        return Facts(
            step=finished.step,
            time=self.time,
            loss=float(sum(losses)) if losses else float("nan"),
            loss_known=bool(losses),
            learning_rate=learning_rate,
            step_ms=finished.step_ms,
            phase_ms=finished.times(),
            clips=clips,
            gradient_scale=scale or 1.0,
            own_ms=self.own_ms,
        )


def _clip_seen(call: ClipCall, values: Iterator[float], with_gradient: int) -> ClipSeen:
    before, *after = (next(values) for _ in call.readings)
    return ClipSeen(
        kind=call.kind,
        max_norm=call.max_norm,
        norm_before=before,
        norm_after=after[0] if after else float("nan"),
        complete=call.two_norm and call.parameters == with_gradient,
    )


def record_of(
    made: Made,
    facts: Facts,
    parts: Sequence[Floats],
    failed: Callable[[Slot, Exception], None],
) -> tuple[StepRecord, float]:
    """The rows that the probes make of a step, and the seconds that they took.

    `parts`: the values of each slot that read something. `failed` is told of one that raises.
    """
    rows: list[tuple[int, Floats]] = []
    own_ms = facts.own_ms
    read = iter(parts)
    first = began = perf_counter()
    for slot in made.slots:
        values = next(read) if slot.does else NO_READINGS
        if slot.off:
            continue
        try:
            found = slot.probe.rows(values, facts)
        except Exception as fault:
            failed(slot, fault)
            continue
        if found:
            for table, row in zip(slot.tables, found, strict=False):
                if row is not None:
                    rows.append((table.id, row))
        ended = perf_counter()
        own_ms[slot.name] = own_ms.get(slot.name, 0.0) + (ended - began) * 1e3
        began = ended
    record = StepRecord(
        step=facts.step,
        time=facts.time,
        optimizer=made.optimizer,
        rows=tuple(rows),
        clip=facts.clip,
        nonfinite=tuple(facts.nonfinite),
        own_ms=sum(own_ms.values()),
    )
    return record, began - first
