"""Follows the phases of a step: which one is open, how long each takes, where the gate is passed.

Rules:

* Time between a step and the next forward is `data`; time between a forward and its backward is
  `loss`. Between two calls of the same model, with no loss function called in between, it is `data`
  too: a rollout steps its environment there. Evaluations, and checkpoints that the script saves,
  are taken out of both.
* All other time between phases is `tracing` where our code runs and `other` where the script's
  does, so that the times add up to the duration of the step.
* A phase inside another one (a backward inside a forward, …) is part of the outer one; only inside
  a `step` with a closure are the closure's own phases counted.
* The boundary of `data` is the first of a step. It is passed where the model is called, when the
  batch is certainly there; the boundary of a `zero_grad` before that call follows it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tui_trainer.protocol import PHASES
from tui_trainer.protocol.absent import Absent, absent
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.phase_clocks import (
    BACKWARD,
    CHECKPOINT,
    CLIP,
    COLUMNS,
    DATA,
    EVAL,
    FORWARD,
    LOSS,
    OTHER,
    STEP,
    TRACING,
    ZERO_GRAD,
    CudaClock,
    HostClock,
    PhaseTimes,
)

STEPS_BEFORE_UNSEEN = 5
"""Steps after which a phase that never occurred is reported as missing."""

WHY_UNSEEN = {
    ZERO_GRAD: "this run never calls zero_grad",
    FORWARD: "no call of the model is visible: the whole step may be compiled, or `model.forward` "
    "called directly",
    BACKWARD: "backward is never called: gradients are computed in another way",
    CLIP: "this run never clips its gradients with torch.nn.utils",
}

_SHARED, _NO_PHASE = absent(Absent.SHARED), absent(Absent.NO_PHASE)


@dataclass(eq=False, slots=True)
class _Clip:
    """The time of a clipping, which counts for the next step of any of its owners."""

    owners: tuple[Any, ...]
    times: PhaseTimes
    wall_ms: float
    kept: bool = False
    """Whether the step of another optimizer, which does not count this time, came in between."""


class Reporter(Protocol):
    """Reports on a phase while the run is paused at its boundary."""

    holds_tensors: bool
    """Whether tensors are kept for a report."""

    def release(self) -> None:
        """The boundary was passed."""


class Phases:
    """The phases of one run, on its training thread."""

    def __init__(self, gate: Gate, reporter: Reporter) -> None:
        self.step = 1
        """The current optimizer step."""
        self.closure = False
        """Whether the open `step` evaluates a closure."""
        self.seen: set[int] = set()
        """The phases of the current step so far."""
        self._gate = gate
        self._reporter = reporter
        self._clock: HostClock | CudaClock = HostClock()
        self._may_change_clock = True
        """Whether the first step is still open: the model's device is known at its first call."""
        self._times: PhaseTimes = lambda: [0.0] * COLUMNS
        self._open: list[int] = []
        self._gap = OTHER
        """Column that counts the time between two phases, until the next phase begins."""
        self._data_due = True
        """Whether the next call of the model needs a new batch."""
        self._zero_grad_due = False
        """Whether the boundary of a `zero_grad` follows that of `data`."""
        self._next_began: tuple[Any, float, float] | None = None
        """(the clock's mark, time, time in the gate) at the beginning of a forward while gradients
        wait, which may be the next iteration's; kept until the next backward."""
        self._last_called: weakref.ref[torch.nn.Module] | None = None
        """The model of the last forward."""
        self._loss_called = False
        """Whether a loss function was called since the last forward, outside a phase."""
        self._clips: list[_Clip] = []
        self._clip_began = 0.0
        self._clip_ended = 0.0
        self._evaluating = False
        """Whether an evaluation has called a model since the last phase."""
        self._evaluated = False
        """Whether there was an evaluation since the last step."""
        self._last_end = 0.0
        self._idle_before = 0.0
        self._in_gate = False
        self._seen_ever: set[int] = set()
        self._reported_seen: set[int] = set()

    @property
    def open(self) -> int | None:
        """The innermost open phase."""
        return self._open[-1] if self._open else None

    @property
    def just_stepped(self) -> bool:
        """Whether nothing but the open phase has begun since the last step."""
        return self.step > 1 and not self._evaluated and self.seen <= set(self._open)

    @property
    def in_closure(self) -> bool:
        """Whether the innermost open phase is a `step` that evaluates a closure."""
        return self.closure and self.open == STEP

    @property
    def in_phase(self) -> bool:
        """Whether a call of a module now is part of a phase."""
        return bool(self._open) and not (self.closure and self._open[-1] == STEP)

    # ------------------------------------------------------------ one phase

    def enter(self, phase: int) -> bool:
        """Open a phase; False inside another one (a backward inside a forward, …)."""
        if self._open:
            if self._open[-1] != STEP:
                return False
            if not self.closure:
                if phase == STEP:
                    return False
                self._open.clear()  # an optimizer raised and the script continued
        now = self._clock.end_gap()
        if self._last_end == 0.0:
            self._last_end, self._idle_before = now, self._gate.idle_s
            self._clock.take()
        self._evaluating = False
        self._open.append(phase)
        self.seen.add(phase)
        return True

    def run(self) -> None:
        """Start the clock of the open phase, after our own preparations."""
        now = self._clock.switch(self._open[-1])
        if self._open[-1] == CLIP:
            self._clip_began = now

    def leave(self, gap: int | None = None, owners: tuple[Any, ...] | None = None) -> None:
        """Close the open phase and pass its boundary. `gap`: column that counts the time from here
        (None: as before). `owners`: the optimizers whose gradients the phase has clipped."""
        phase = self._open.pop()
        if owners is not None and not self.closure:
            wall_ms = (self._clip_ended - self._clip_began) * 1e3
            self._clips.append(_Clip(owners, self._clock.take_phase(phase), wall_ms))
        if gap is not None:
            self._gap = gap
        if phase == ZERO_GRAD and self._data_due and not self.closure:
            self._zero_grad_due = True
        else:
            self.boundary(phase)
        if self._open:
            self.resume_clock()
        else:
            self._clock.switch(self._gap)

    def close(self, phase: int) -> bool:
        """Close `phase` without a boundary; False where it is not open."""
        if not self._open or self._open[-1] != phase:
            return False
        self._open.pop()
        return True

    def fail(self) -> int | None:
        """Close the open phase, whose call raised, without a boundary, and return it."""
        phase = self._open.pop() if self._open else None
        self.resume_clock()
        return phase

    def close_all(self) -> bool:
        """Close every phase without a boundary; returns whether a `step` was among them."""
        stepping = STEP in self._open
        self._open.clear()
        return stepping

    def boundary(self, phase: int) -> None:
        """Pass the gate at the end of `phase`, with the clock stopped."""
        if self._clock.current != TRACING:
            self._clock.switch(TRACING)
        self._in_gate = True
        gate = self._gate
        idle = gate.idle_s
        try:
            name = PHASES[phase]
            if (
                gate.armed
                or (gate.break_phases and name in gate.break_phases)
                or (phase == STEP and gate.has_work_after(self.step))
            ):
                with torch.enable_grad():  # for work for others in the gate
                    gate.reached(name, self.step)
            else:
                gate.reached(name, self.step)
        finally:
            self._in_gate = False
            if gate.idle_s != idle:
                self._clock.discount(gate.idle_s - idle)
            if self._reporter.holds_tensors:
                self._reporter.release()

    def iteration_skipped(self) -> None:
        """A GradScaler has skipped the step: pause if a breakpoint is met."""
        self._clock.switch(TRACING)
        self._in_gate = True
        idle = self._gate.idle_s
        try:
            with torch.enable_grad():
                self._gate.iteration_skipped()
        finally:
            self._in_gate = False
            self._clock.discount(self._gate.idle_s - idle)
            if self._reporter.holds_tensors:
                self._reporter.release()
            self.resume_clock()

    def stop_clock(self) -> None:
        """Count the time from here as our own."""
        now = self._clock.switch(TRACING)
        if self._open and self._open[-1] == CLIP:
            self._clip_ended = now

    def begin_evaluation(self, phase: int = EVAL) -> None:
        """The model is called without gradients; `resume_clock` follows. `phase`: column that
        counts its time."""
        self._evaluated = True
        if self._evaluating:
            self._clock.relabel(phase)  # the next batch of the evaluation
        self._evaluating = True
        self._clock.switch(phase)

    def begin_checkpoint(self) -> None:
        """The script saves a checkpoint; `resume_clock` follows."""
        self._evaluating = False
        self._clock.switch(CHECKPOINT)

    def resume_clock(self) -> None:
        """Count the time from here as the script's."""
        between = not self._open or (self.in_closure and self._gap == LOSS)
        self._clock.switch(self._gap if between else self._open[-1])

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Around work that is not training: its time counts for no phase and no step."""
        current = self._open[-1] if self._open else self._gap
        if self._in_gate:  # the clock is stopped already
            yield
            return
        began = self._clock.switch(TRACING)
        try:
            yield
        finally:
            seconds = self._clock.switch(current) - began
            if self._last_end:  # 0 until the first phase has begun
                self._last_end += seconds
            self._clock.discount(seconds)

    # ------------------------------------------------------------ what precedes a phase

    def before_forward(self, module: torch.nn.Module, waiting: bool = False) -> None:
        """`forward` of `module` is open: its batch has been drawn. `waiting`: whether gradients
        wait for a step, which the script may still throw away."""
        if self._may_change_clock and isinstance(self._clock, HostClock):
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device.type == "cuda":
                self._clock = CudaClock()
        if waiting and self._next_began is None:
            self._next_began = (self._clock.mark(), self._clock.gap_began, self._gate.idle_s)
        again = self._last_called is not None and self._last_called() is module
        if again and self._gap == LOSS and not self._loss_called:
            self._clock.relabel_gap(DATA)
        self._last_called, self._loss_called = weakref.ref(module), False
        self._end_data()

    def loss_called(self) -> None:
        """A loss function was called."""
        if not self._open or self.in_closure:
            self._loss_called = True

    def before_backward(self) -> None:
        """`backward` is open: the loss was computed, even where no model was seen being called."""
        if not self.closure and not self.seen & {FORWARD, LOSS}:
            self._end_data()
        self.seen.add(LOSS)

    def before_step(self) -> None:
        """`step` is open, perhaps without a forward and a backward before it."""
        if self._gap == DATA and self.seen == {STEP}:
            self._clock.relabel_gap(OTHER)  # no batch is drawn for another optimizer's step
        if self._zero_grad_due:
            self._end_zero_grad()

    def after_backward(self) -> None:
        """The next call of the model needs a new batch."""
        self._data_due = True
        self._next_began = None

    def _end_data(self) -> None:
        if self._gap == OTHER and BACKWARD in self.seen:
            self._clock.relabel_gap(DATA)  # the next micro-batch of an accumulated step
        if self._data_due:
            self._data_due = False
            self.boundary(DATA)
        if self._zero_grad_due:
            self._end_zero_grad()

    def _end_zero_grad(self) -> None:
        self._zero_grad_due = False
        self.boundary(ZERO_GRAD)

    # ------------------------------------------------------------ one step

    def end_step_by_hand(self) -> None:
        """Count the time since the last phase as `step`: the script has updated the weights."""
        self._clock.relabel(STEP)
        self._clock.switch(TRACING)
        self.seen.add(STEP)
        if self._zero_grad_due:
            self._end_zero_grad()

    def complete_step(
        self, owner: Any, shared: bool = False, clipped: bool = False
    ) -> tuple[float, PhaseTimes]:
        """The step of optimizer `owner` has ended. Return its duration in milliseconds, and that of
        each phase. `shared`: its backward was counted in another optimizer's step, and if it
        `clipped`, so was the clipping."""
        own = [clip for clip in self._clips if owner in clip.owners] if self._clips else []
        step_ms, times = self._take(own, shared, clipped)
        self._times = times
        self.closure = False
        self._may_change_clock = False
        return step_ms, times

    def discard_iteration(self) -> tuple[float, PhaseTimes]:
        """An iteration ends without a step. Return its duration in milliseconds, and that of each
        phase. The next batch belongs to the same step."""
        if self._next_began is not None:
            return self._discard_until(*self._next_began)
        step_ms, times = self._take(self._clips, False, False)
        self.seen = set(self._open)
        self._gap = DATA
        return step_ms, times

    def _discard_until(self, mark: Any, ended: float, idle: float) -> tuple[float, PhaseTimes]:
        """Like `discard_iteration`, where the next forward has been called already."""
        self._clock.switch(TRACING)
        step_ms = (ended - self._last_end - (idle - self._idle_before)) * 1e3
        self._last_end, self._idle_before = ended, idle
        clips, self._clips = self._clips, []
        step_ms += sum(clip.wall_ms for clip in clips if clip.kept)
        self._next_began = None
        self._seen_ever |= self.seen
        self.seen = {FORWARD, LOSS, *self._open}
        taken = self._clock.take_until(mark)
        return step_ms, _step_times(taken, step_ms, clips, False, False)

    def _take(self, own: list[_Clip], shared: bool, clipped: bool) -> tuple[float, PhaseTimes]:
        now, idle = self._clock.switch(TRACING), self._gate.idle_s
        step_ms = (now - self._last_end - (idle - self._idle_before)) * 1e3
        self._last_end, self._idle_before = now, idle
        left = []
        for clip in self._clips:
            if clip in own:
                if clip.kept:
                    step_ms += clip.wall_ms
            else:
                if not clip.kept:
                    step_ms -= clip.wall_ms
                if clip.owners:
                    clip.kept = True
                    left.append(clip)
        self._clips = left
        self._seen_ever |= self.seen
        self.seen = set()
        self._data_due = True
        self._evaluated = False
        self._next_began = None
        return step_ms, _step_times(self._clock.take(), step_ms, own, shared, clipped)

    def rewind(self, step: int) -> None:
        """The training was taken back or forward: `step` comes next, from its beginning."""
        self.close_all()
        self.discard_iteration()
        self.step = step
        self.closure = self._evaluating = self._zero_grad_due = False
        self._clips = []
        self._last_end = 0.0
        self.resume_clock()

    def next_step(self) -> None:
        """Pass the boundary of the completed step and begin the next."""
        self._gap = DATA
        self.boundary(STEP)
        self.step += 1
        if self._open:
            self.resume_clock()
        else:
            self._clock.switch(DATA)

    def duration_ms(self, phase: int) -> float:
        """Time of a phase in this step so far, in milliseconds. Only while paused."""
        return self._times()[phase] if phase == STEP else self._clock.total_ms(phase)

    def unseen(self) -> dict[str, str] | None:
        """Phase → why this script does not have it; None where that is not known yet or has not
        changed."""
        if self.step < STEPS_BEFORE_UNSEEN or self._seen_ever == self._reported_seen:
            return None
        self._reported_seen = set(self._seen_ever)
        return {PHASES[p]: why for p, why in WHY_UNSEEN.items() if p not in self._reported_seen}


def _step_times(
    taken: PhaseTimes, step_ms: float, clips: list[_Clip], shared: bool, clipped: bool
) -> PhaseTimes:
    """The times of a step of `step_ms` milliseconds, its `clips` included."""
    times: list[float] = []

    def read() -> list[float]:
        if not times:
            found = list(taken())
            for clip in clips:
                found[CLIP] += clip.times()[CLIP]
            if math.isnan(found[OTHER]):
                found[OTHER] = max(0.0, step_ms - sum(found[:OTHER]))
            if shared:
                elsewhere = [p for p in range(EVAL) if found[p] <= 0 and (p != CLIP or clipped)]
                for phase in elsewhere:
                    found[phase] = _SHARED
            times.extend([_NO_PHASE if ms <= 0 else ms for ms in found])
        return times

    return read
