"""What a call of a clipping function tells."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.amp.grad_scaler import OptState

from tui_trainer.history.buckets import Floats, StepRecord
from tui_trainer.protocol.messages import ClipKind
from tui_trainer.trace.phases import Times
from tui_trainer.trace.probe import ClipMeasurement, StepFacts
from tui_trainer.trace.schedule import ActiveProbe
from tui_trainer.trace.transfer import HostTransfer


@dataclass
class ClipCall:
    """A call of a clipping function, its figures still where they were computed."""

    kind: ClipKind
    measurers: list[object]
    """Of the optimizers whose gradients it clipped and that have not stepped since."""
    max_norm: float
    readings: tuple[torch.Tensor, ...]
    """Norm before; for clipping by value also the norm after."""
    parameters: int
    two_norm: bool


def clip_call(
    kind: ClipKind,
    parameters: Any,
    limit: Any,
    norm_type: Any,
    readings: tuple[torch.Tensor, ...],
    measurers: list[object],
    captured: Captured,
) -> ClipCall:
    """The record of a call that clipped `parameters`, which `measurers` measure, to `limit`."""
    count = captured.count
    if not count:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        count = sum(p.grad is not None for p in given)
    return ClipCall(
        kind=kind,
        measurers=measurers,
        max_norm=float(limit),
        readings=tuple(scalar(reading) for reading in readings),
        parameters=count,
        two_norm=kind == "norm" and float(norm_type) == 2.0,
    )


FULL = (torch.float32, torch.float64)


class Captured:
    """The 2-norms of single gradients that a clipping function computes for its total, caught on
    the way: reading all gradients once more would cost as much as everything else we do."""

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = []
        """(tensors, their 2-norms, each 0-d)."""
        self._stacked: torch.Tensor | None = None
        """All of them as one vector, as the total is computed from."""

    def __enter__(self) -> Captured:
        original: Any = torch._foreach_norm
        self._original = original

        def foreach_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(tensors, *args, **kwargs)
            if not kwargs and (not args or (len(args) == 1 and float(args[0]) == 2.0)):
                self.calls.append((tensors, result))
            return result

        of_vector: Any = torch.linalg.vector_norm
        self._of_vector = of_vector

        def vector_norm(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self.calls and self._stacked is None:
                self._stacked = x
            return of_vector(x, *args, **kwargs)

        self._ours: Any = foreach_norm
        self._ours_of_vector: Any = vector_norm
        vars(torch)["_foreach_norm"] = foreach_norm
        vars(torch.linalg)["vector_norm"] = vector_norm
        return self

    def __exit__(self, *exc: object) -> None:
        if torch._foreach_norm is self._ours:
            vars(torch)["_foreach_norm"] = self._original
        if torch.linalg.vector_norm is self._ours_of_vector:
            vars(torch.linalg)["vector_norm"] = self._of_vector
        # They refer to us: without them we, and the gradients, go as soon as nobody needs us, and
        # not only when the garbage collector comes by. Gradients of several steps alive at once
        # cost their memory, and 5 % of time on a CPU, whose caches then never see a block again.
        self._ours = self._ours_of_vector = None

    @property
    def count(self) -> int:
        """Of how many gradients."""
        count = 0
        for tensors, _ in self.calls:
            count += len(tensors)
        return count

    def norms_of(
        self, clipped: Any, parameters: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor] | None:
        """Of the gradients of `parameters` (flattened, one each), where just these were `clipped`
        in this order and have a gradient each, as for a model on one device; else None."""
        if len(self.calls) != 1 or type(clipped) is not list:
            return None
        tensors, norms = self.calls[0]
        if not len(tensors) == len(clipped) == len(parameters) or norms[0].dtype not in FULL:
            return None
        if not all(map(is_, clipped, parameters)):
            return None
        vector = self._stacked
        if vector is not None and vector.dim() == 1 and vector.shape[0] == len(norms):
            return (vector,)
        return norms

    def by_gradient(self) -> dict[int, torch.Tensor]:
        """id(gradient) to its norm, in float32 or better."""
        return {
            id(tensor): norm
            for tensors, norms in self.calls
            for tensor, norm in zip(tensors, norms, strict=True)
            if norm.dtype in FULL
        }


def scalar(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one element as a 0-d one, without its graph."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.reshape(()) if tensor.dim() else tensor


def total_norm(parameters: Any) -> torch.Tensor:
    """√Σ‖gᵢ‖² over the gradients of `parameters` (0-d)."""
    with torch.no_grad():
        return _total_norm(parameters)


def _total_norm(parameters: Any) -> torch.Tensor:
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [p.grad for p in given if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    stacked = torch.stack([norm.to(norms[0].device) for norm in norms])
    total: torch.Tensor = torch.linalg.vector_norm(stacked)
    return total


# ---- made
# Steps that are made: what is known of them, and the records that they become on the host.


NO_READINGS: Floats = np.empty(0, dtype=np.float32)


@dataclass(slots=True)
class FinishedStep:
    """What the tracer knows of a step that has just been made."""

    step: int
    losses: Sequence[torch.Tensor]
    learning_rate: float | torch.Tensor
    step_ms: float
    times: Times
    clips: Sequence[ClipCall]


@dataclass(slots=True)
class CompletedStep:
    """A step that is made, its values on their way to the host: header, then one part for each of
    the slots that read something."""

    optimizer: str
    """Its key: "" for the run's first."""
    recorded_by: Callable[[CompletedStep], float]
    """Makes its rows and records them; returns the seconds that the probes took."""
    arrival: HostTransfer
    slots: Sequence[ActiveProbe]
    finished: FinishedStep
    time: float
    own_ms: dict[str, float]
    scaled: bool
    with_gradient: int

    def record(self) -> float:
        """See `outbox.Step`."""
        return self.recorded_by(self)

    def facts(self, header: Floats, skipped: Callable[[float], None]) -> StepFacts:
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
        return StepFacts(
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


def _clip_seen(call: ClipCall, values: Iterator[float], with_gradient: int) -> ClipMeasurement:
    before, *after = (next(values) for _ in call.readings)
    return ClipMeasurement(
        kind=call.kind,
        max_norm=call.max_norm,
        norm_before=before,
        norm_after=after[0] if after else float("nan"),
        complete=call.two_norm and call.parameters == with_gradient,
    )


def record_of(
    made: CompletedStep,
    facts: StepFacts,
    parts: Sequence[Floats],
    failed: Callable[[ActiveProbe, Exception], None],
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


# ---- making
# The step in the making: the losses and the clippings that its record will tell of.


MOST = 64
"""Losses and clippings that are kept apart within one step."""


class PendingStep:
    """What the loop has done since its last optimizer step.

    The loss of a step is the sum of the scalars that `backward` was called on since the step before
    (before any GradScaler): exactly the objective whose gradient the optimizer uses. With a closure
    it is the closure's first evaluation. An optimizer that steps without a backward of its own (two
    optimizers for one model) shows the loss of the step before.
    """

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        """0-d each."""
        self._last: list[torch.Tensor] = []
        self._clips: list[ClipCall] = []

    def add_losses(self, losses: Sequence[torch.Tensor], closure: bool) -> None:
        """`backward` is called on these, one element each."""
        if closure and self.losses:
            return  # the first evaluation of the closure is the one at the step's own weights
        self.losses += [scalar(loss) for loss in losses]
        if len(self.losses) > MOST:
            self.losses = [torch.stack([loss.float() for loss in self.losses]).sum()]

    def add_clip(self, call: ClipCall) -> None:
        """Gradients were clipped."""
        self._clips.append(call)
        del self._clips[:-MOST]

    def take(self, measurer: object) -> tuple[list[torch.Tensor], list[ClipCall]]:
        """The optimizer that `measurer` measures has stepped: its losses, and the clippings of its
        gradients; those of other optimizers' wait for their own step."""
        if self.losses:
            self._last, self.losses = self.losses, []
        mine: list[ClipCall] = []
        if self._clips:
            mine = [call for call in self._clips if measurer in call.measurers]
            for call in mine:
                call.measurers.remove(measurer)
            self._clips = [call for call in self._clips if call.measurers]
        return self._last, mine

    def forget(self) -> None:
        """The step is not made: its scaler skipped it."""
        self.losses, self._clips = [], []


# ---- scaling
# What a GradScaler does to losses and gradients, so that we can undo it in what we show.


class GradScaling:
    """Losses that were scaled in this step, and which optimizers' gradients still are."""

    def __init__(self) -> None:
        self._losses: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []
        self._scaler: weakref.ref[Any] | None = None

    def scaled(self, scaler: Any, original: Any, result: Any) -> None:
        """`scaler.scale(original)` gave `result`. Keeps the value alone, never the graph."""
        self._scaler = weakref.ref(scaler)
        if isinstance(original, torch.Tensor) and isinstance(result, torch.Tensor):
            self._losses.append((weakref.ref(result), original.detach()))
        elif isinstance(original, (list, tuple)) and isinstance(result, (list, tuple)):
            for before, after in zip(original, result, strict=True):
                self.scaled(scaler, before, after)
        del self._losses[:-64]

    def original(self, loss: torch.Tensor) -> torch.Tensor:
        """What `loss` was before it was scaled; itself when it was not."""
        for reference, before in self._losses:
            if reference() is loss:
                return before
        return loss

    def gradient_scale(self, optimizer: torch.optim.Optimizer | None) -> torch.Tensor | None:
        """The factor (0-d) that is still on this optimizer's gradients; None: there is none."""
        scaler = self._scaler() if self._scaler is not None else None
        if scaler is None:
            return None
        states = scaler._per_optimizer_states
        if optimizer is not None:
            if id(optimizer) in states and states[id(optimizer)]["stage"] is not OptState.READY:
                return None
        elif any(state["stage"] is not OptState.READY for state in states.values()):
            return None
        scale = scaler._scale
        return scale if isinstance(scale, torch.Tensor) else None

    def loss_scale(self) -> torch.Tensor:
        """The factor (0-d) that losses are scaled by now; NaN where that is not known."""
        scaler = self._scaler() if self._scaler is not None else None
        scale = scaler._scale if scaler is not None else None
        return scale if isinstance(scale, torch.Tensor) else torch.tensor(float("nan"))

    def last_scale(self) -> float:
        """The loss scale now, for people. Waits for the device: the scaler itself just did."""
        scaler = self._scaler() if self._scaler is not None else None
        return float(scaler.get_scale()) if scaler is not None else float("nan")

    def step_over(self) -> None:
        """The losses of this step have been counted."""
        self._losses.clear()

    def updated(self) -> None:
        """`scaler.update()`: no gradient is scaled until `scale` is called again."""
        self._scaler = None
