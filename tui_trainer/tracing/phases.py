"""Where in a step the training is: which phase is open, what lies between two of them, how long
each has taken, and which of them this script has at all.

* What lies between a step and the next forward is `data`, wherever `zero_grad` falls in it; what
  lies between a forward and its backward is `loss`.
* A phase inside another one (a backward inside a forward, …) is part of it; only inside a `step`
  with a closure the closure's own phases are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from tui_trainer.protocol import PHASES
from tui_trainer.tracing.gate import Gate
from tui_trainer.tracing.sight import Sight
from tui_trainer.tracing.timing import OUTSIDE, Clock, HostClock, Times, clock_for

DATA, ZERO_GRAD, FORWARD, LOSS, BACKWARD, CLIP, STEP = range(len(PHASES))
STEPS_BEFORE_UNSEEN = 5

WHY_UNSEEN = {
    ZERO_GRAD: "this run never calls zero_grad",
    FORWARD: "the model is never called from outside in a way that can be seen: the whole step may "
    "be compiled, or `model.forward` called directly",
    BACKWARD: "backward is never called: gradients are made in another way",
    CLIP: "this run never clips its gradients by torch.nn.utils",
}


class Phases:
    """The phases of one run, on the thread that trains."""

    def __init__(self, gate: Gate, on_passed: Callable[[], None]) -> None:
        """`on_passed` is called after each passage of the gate."""
        self.step = 1
        """The optimizer step in the making."""
        self.closure = False
        """Whether the open `step` evaluates a closure."""
        self.seen: set[int] = set()
        """The phases that the step in the making has had so far."""
        self._gate = gate
        self._on_passed = on_passed
        self._clock: Clock = HostClock()
        self._clock_due = True
        """Where the models are is not known before the first of them is called."""
        self._times: Times = lambda: [0.0] * OUTSIDE
        self._open: list[int] = []
        self._gap = OUTSIDE
        self._batch_due = True
        self._sight = Sight()
        self._last_end = 0.0
        self._idle_before = 0.0
        self._in_gate = False
        self._seen_ever: set[int] = set()
        self._said: set[int] = set()

    @property
    def open(self) -> int | None:
        """The innermost phase that is open."""
        return self._open[-1] if self._open else None

    # ------------------------------------------------------------ one phase

    def enter(self, phase: int) -> bool:
        """Begin a phase; False when another is already open (a backward inside a forward, …)."""
        if self._open:
            if self._open[-1] != STEP:
                return False
            if not self.closure:
                if phase == STEP:
                    return False
                self._open.clear()  # an optimizer raised and the script went on
        if self._last_end == 0.0:
            self._last_end, self._idle_before = perf_counter(), self._gate.idle_s
        self._open.append(phase)
        self.seen.add(phase)
        return True

    def run(self) -> None:
        """The phase just entered begins to run now, after whatever we did first."""
        self._clock.switch(self._open[-1])

    def leave(self, gap: int | None = None) -> None:
        """The open phase has ended; what follows it is `gap` until something else is known (None:
        what it was before)."""
        phase = self._open.pop()
        if gap is not None:
            self._gap = gap
        self.boundary(phase)
        self.go_on()

    def end(self, phase: int) -> bool:
        """`phase` has ended and no boundary is passed yet; False where it is not open."""
        if self.open != phase:
            return False
        self._open.pop()
        return True

    def fail(self) -> int | None:
        """What the script called raised: the phase is over, and it is no boundary. Which it was."""
        phase = self._open.pop() if self._open else None
        self.go_on()
        return phase

    def drop(self) -> None:
        """Nothing is open any more."""
        self._open.clear()

    def boundary(self, phase: int) -> None:
        """Through the gate at the end of `phase`; nothing is timed there."""
        self._clock.switch(OUTSIDE)
        self._in_gate = True
        gate = self._gate
        try:
            if gate.armed or (phase == STEP and gate.works_after(self.step)):
                with torch.enable_grad():  # for what others have the gate do here
                    gate.reached(PHASES[phase], self.step)
            else:
                gate.reached(PHASES[phase], self.step)
        finally:
            self._in_gate = False
            self._on_passed()

    def pause_clock(self) -> None:
        """What comes now is ours."""
        self._clock.switch(OUTSIDE)

    def go_on(self) -> None:
        """Back to the script."""
        self._clock.switch(self._open[-1] if self._open else self._gap)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around work that is not training: it belongs to no phase and to no step's time."""
        current = self._open[-1] if self._open else self._gap
        began = perf_counter()
        if not self._in_gate:  # there nothing is timed anyway
            self._clock.switch(OUTSIDE)
        try:
            yield
        finally:
            if not self._in_gate:
                if self._last_end:  # 0 until the first phase has begun
                    self._last_end += perf_counter() - began
                self._clock.switch(current)

    # ------------------------------------------------------------ the batch

    def zeroing(self, thing: Any) -> None:
        """`zero_grad` of this is open: the batch is there already where a script is known to zero
        after it has drawn one."""
        if self._batch_due and not self.closure and self._sight.batch_is_there(thing):
            self._data_ends()

    def forwarding(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """`forward` of this model is open: the batch is there."""
        if self._sight.waiting:
            self._sight.called(args, kwargs)
        if self._clock_due and isinstance(self._clock, HostClock):
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device.type == "cuda":
                self._clock = clock_for(parameter.device)
        self._data_ends()

    def losing(self) -> None:
        """`backward` is open: the batch is there, even where no model was seen to be called."""
        if self._batch_due and not self.closure and not self.seen & {FORWARD, LOSS}:
            self._data_ends()
        self.seen.add(LOSS)

    def batch_used(self) -> None:
        """A backward is made: the next forward needs another batch."""
        self._batch_due = True

    def _data_ends(self) -> None:
        if self._gap == OUTSIDE and BACKWARD in self.seen:
            self._clock.relabel(DATA)  # the next micro-batch of an accumulated step
        if self._batch_due:
            self._batch_due = False
            self.boundary(DATA)

    # ------------------------------------------------------------ one step

    def step_made(self) -> tuple[float, Times]:
        """The step has ended: the milliseconds it took, and those of each phase."""
        now, idle = perf_counter(), self._gate.idle_s
        step_ms = (now - self._last_end - (idle - self._idle_before)) * 1e3
        self._last_end, self._idle_before = now, idle
        self.closure = False
        self._batch_due = True
        self._clock_due = False
        self._seen_ever |= self.seen
        self.seen = set()
        self._times = self._clock.take()
        return step_ms, self._times

    def step_skipped(self) -> None:
        """The optimizer was not let to step; the next batch belongs to the same step."""
        self._batch_due = True
        self._gap = DATA

    def next_step(self) -> None:
        """Past the boundary of the step that was made."""
        self._gap = DATA
        self.boundary(STEP)
        self.step += 1
        self.go_on()

    def duration_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far. Only while stopped."""
        return self._times()[phase] if phase == STEP else self._clock.total_ms(phase)

    def unseen(self) -> dict[str, str] | None:
        """Phases that this script does not have, and why they cannot be shown; None where that is
        not known yet or has been told before."""
        if self.step < STEPS_BEFORE_UNSEEN or self._seen_ever == self._said:
            return None
        self._said = set(self._seen_ever)
        return {PHASES[p]: why for p, why in WHY_UNSEEN.items() if p not in self._said}
