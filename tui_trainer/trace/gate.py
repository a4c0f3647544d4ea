"""What any thread may ask of the one that trains: pause, go on, steps, a rate, an end, work."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from tui_trainer.protocol import Phase


class Refusal(ValueError):
    """A control that cannot be obeyed now, and why, for people."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.hint = hint
        """What they could do instead."""


@dataclass(frozen=True)
class _Request:
    work: Callable[[], Any]
    future: Future[Any]
    mid_step: bool

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except Exception as fault:
            self.future.set_exception(fault)


class Controls:
    """The half of the gate that is spoken to; the other half is passed by the training thread.

    Every control returns at once and may be called from any thread; it raises `Refusal` when it
    has no meaning now.
    """

    def __init__(self, paused: bool = False, steps_per_epoch: int | None = None) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.phase: Phase | Literal[""] = ""
        """The phase whose end was reached last."""
        self.step_in_progress = 1
        """The optimizer step that phase belongs to, counted from 1."""
        self.completed = 0
        """Optimizer steps completed."""
        self.idle_s = 0.0
        """Seconds the training thread spent here instead of training: paused, throttled, and at
        work for others. Phase and step times leave it out."""
        self.paused_s = 0.0
        """The part of `idle_s` in which it was paused."""
        self.between_steps: list[Callable[[int], None]] = []
        """Called on the training thread after every step with the number of steps completed
        (evaluations, periodic checkpoints). An exception in one goes to `on_fault`."""
        self.leave_checkpoint: Callable[[int], object] = _nothing
        """Training thread, with the number of steps completed: the run stops here, and whoever
        stopped it has asked for a checkpoint. An exception goes to `on_fault`."""
        self._regular: list[tuple[Sequence[int], Callable[[int], None]]] = []
        self._next_regular: float = math.inf
        """The step after which one of them is due."""
        self.on_stop_here: Callable[[Phase, int], None] = _nothing
        """Training thread, `(phase, step)`: it is about to wait; make the phase report."""
        self.on_change: Callable[[], None] = _nothing
        """Any thread: mode, target or throttle changed."""
        self.on_fault: Callable[[str, BaseException], None] = _nothing
        self.before_work: Callable[[], None] = _nothing
        """Training thread: work between steps is about to be done, which may tell of the steps so
        far; what is known of them is to be told first."""
        self.working: Callable[[], AbstractContextManager[Any]] = nullcontext
        """What to enter around work for others (the tracer's `suspended`)."""
        self.arrived = False
        """Whether the training thread is in the gate: waiting, or at work for others."""
        self._condition = threading.Condition()
        self._requests: deque[_Request] = deque()
        self._waiting = False
        self._ended = False
        self._stopping = False
        self._checkpoint = False
        self._boundaries_left = 1 if paused else 0
        self._target: int | None = None
        self._target_is_epoch = False
        self._rate: float | None = None
        self._next_step_at = 0.0
        self.armed = paused
        """Whether the next boundary may take more time than a look. Set here alone."""

    def work_every(self, cadences: Sequence[int], work: Callable[[int], None]) -> None:
        """Like `between_steps`, but after multiples of any of the `cadences` (steps) alone; in
        between it costs a comparison. For the thread that trains, before it does."""
        wanted = tuple(every for every in cadences if every > 0)
        if wanted:
            self._regular.append((wanted, work))
            self._next_regular = min(self._next_regular, next_multiple(wanted, self.completed))

    def works_after(self, step: int) -> bool:
        """Whether there is any work to be done after this step."""
        return step >= self._next_regular or bool(self.between_steps)

    @property
    def mode(self) -> str:
        """`running`, `paused`, `stopping` (finishing its last step) or `ended`."""
        if self._ended:
            return "ended"
        if self._stopping:
            return "stopping"
        return "paused" if self._waiting else "running"

    @property
    def pausing(self) -> bool:
        """Running, but told to pause at the next boundary."""
        return not self._waiting and self._boundaries_left > 0

    @property
    def stops_with_checkpoint(self) -> bool:
        """Whether whoever told it to stop has asked for a checkpoint."""
        return self._checkpoint

    @property
    def run_to(self) -> int | None:
        """The step after which it pauses by itself; None: none is set."""
        return self._target

    @property
    def rate(self) -> float | None:
        """At most so many steps a second; None: full speed."""
        return self._rate

    def pause(self) -> None:
        """Stop at the next phase boundary. Does nothing when paused."""
        with self._changing():
            self._target = None
            if not self._waiting:
                self._boundaries_left = 1

    def resume(self) -> None:
        """Run freely; forgets any target."""
        with self._changing():
            self._target = None
            self._go(boundaries=0)

    def step(self, count: int = 1) -> None:
        """Pause after the `step` phase of exactly `count` more optimizer steps, from whatever phase
        this is. While such steps are still being made, `count` more are added to them."""
        if count < 1:
            raise Refusal("the number of steps must be at least 1")
        with self._changing():
            stepping = self._target is not None and not self._target_is_epoch
            first = self._target if stepping and self._target is not None else self.completed
            self._target, self._target_is_epoch = first + count, False
            self._go(boundaries=0)

    def step_phase(self) -> None:
        """Go to the next phase boundary; each further call before it is reached goes one on."""
        with self._changing():
            self._target = None
            self._go(boundaries=self._boundaries_left + 1 if not self._waiting else 1)

    def run_to_epoch_end(self) -> None:
        """Pause after the last step of the epoch that the next completed step belongs to."""
        if not self.steps_per_epoch:
            raise Refusal("this run has no epochs")
        with self._changing():
            epoch = self.completed // self.steps_per_epoch
            self._target = (epoch + 1) * self.steps_per_epoch
            self._target_is_epoch = True
            self._go(boundaries=0)

    def throttle(self, steps_per_second: float | None) -> None:
        """At most so many steps a second; None lifts it."""
        if steps_per_second is not None and not 0 < steps_per_second < float("inf"):
            raise Refusal("the number of steps a second must be above 0")
        with self._changing():
            self._rate = steps_per_second
            if steps_per_second is not None:
                self._next_step_at = time.monotonic() + 1.0 / steps_per_second

    def stop(self, checkpoint: bool = False) -> None:
        """Finish the running step, write the `checkpoint` if asked for, then raise `StopTraining`
        on the training thread."""
        with self._changing():
            self._stopping = True
            self._checkpoint = checkpoint or self._checkpoint
            self._target = None
            self._go(boundaries=0)

    def call_soon(self, work: Callable[[], Any], mid_step: bool = False) -> Future[Any]:
        """Run `work()` on the training thread: between two steps, or with `mid_step` at the next
        boundary of any phase; also while paused there. The future has its result."""
        future: Future[Any] = Future()
        with self._condition:
            if self._ended:
                raise Refusal("the training has ended")
            self._requests.append(_Request(work, future, mid_step))
            self._rearm()
            self._condition.notify_all()
        return future

    def end(self) -> None:
        """The training is over: nothing waits here any more, and no control is taken."""
        with self._condition:
            self._ended = True
            self._waiting = self.armed = False
            left = list(self._requests)
            self._requests.clear()
            self._condition.notify_all()
        for request in left:
            request.future.cancel()
        self._tell(self.on_change)

    # ------------------------------------------------------------ within

    def _changing(self) -> _Change:
        return _Change(self)

    def _go(self, boundaries: int) -> None:
        self._boundaries_left = boundaries
        self._waiting = False

    def _rearm(self) -> None:
        """With the condition held: whether the next boundary needs more than a look."""
        self.armed = bool(
            self._boundaries_left
            or self._target is not None
            or self._stopping
            or self._waiting
            or self._rate is not None
            or self._requests
        )

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        """Call what others registered; their faults never reach the training."""
        try:
            callback(*args)
        except Exception as fault:
            if callback is not self.on_fault:
                self._tell(self.on_fault, "gate", fault)


class _Change:
    """Holds the condition while a control is applied, then wakes the thread and tells."""

    def __init__(self, gate: Controls) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate._condition.acquire()
        if self._gate._ended:
            self._gate._condition.release()
            raise Refusal("the training has ended")

    def __exit__(self, *exc: object) -> None:
        gate = self._gate
        gate._rearm()
        gate._condition.notify_all()
        gate._condition.release()
        gate._tell(gate.on_change)


def _nothing(*_: Any) -> None:
    """The default of every callback."""


def next_multiple(cadences: Sequence[int], step: int) -> int:
    """The first step after `step` that is a multiple of any of them."""
    return min((step // every + 1) * every for every in cadences)


# ---- gate
# The gate at every phase boundary: where the training thread can be stopped, and where it works
# for others.
#
# The training thread calls `Gate.reached` after every phase; when nothing is asked of it that
# costs
# one attribute read. Any other thread controls it. Whatever has to touch tensors is handed to the
# training thread here and never run from another thread.


__all__ = ["Gate", "Refusal", "StopTraining"]


class StopTraining(KeyboardInterrupt):
    """Raised on the training thread at the end of a step when the run is told to stop.

    A `KeyboardInterrupt`, so that a script which saves its model on Ctrl-C does so.
    """

    def __init__(self, checkpoint: bool = False) -> None:
        super().__init__("stopped at the end of a step")
        self.checkpoint = checkpoint
        """Whether whoever stopped the run asked for a checkpoint."""


class Gate(Controls):
    """Pauses, steps, throttles and stops one training thread at its phase boundaries.

    `paused=True` stops it at the very first boundary (after the `data` phase of step 1).
    """

    def reached(self, phase: Phase, step: int) -> None:
        """A phase of optimizer step `step` has ended. May wait; raises `StopTraining` to stop."""
        self.phase = phase
        self.step_in_progress = step
        if phase == "step":
            self.completed = step
            if self.armed or self.works_after(step):
                self._arrive(phase, step)
        elif self.armed:
            self._arrive(phase, step)

    @property
    def stops_soon(self) -> bool:
        """Whether it is likely to stop within the step in progress: what only a phase report needs
        is worth keeping just then."""
        target = self._target
        return self._boundaries_left > 0 or (target is not None and target <= self.completed + 1)

    def _arrive(self, phase: Phase, step: int) -> None:
        began = time.perf_counter()
        self.arrived = True
        try:
            if phase == "step":
                self._work_between_steps(step)
            self._serve(phase)
            self._raise_if_stopping(phase)
            if self._must_stop(phase, step):
                self._stop_here(phase, step)
            if phase == "step":
                self._keep_rate()
                self._raise_if_stopping(phase)
        finally:
            self.arrived = False
            self.idle_s += time.perf_counter() - began

    def _work_between_steps(self, step: int) -> None:
        if self.works_after(step):
            self._tell(self.before_work)
        for work in tuple(self.between_steps):
            self._work("between steps", work, step)
        if step < self._next_regular:
            return
        for cadences, work in self._regular:
            if any(step % every == 0 for every in cadences):
                self._work("between steps", work, step)
        self._next_regular = min(next_multiple(cadences, step) for cadences, _ in self._regular)

    def _work(self, name: str, work: Callable[[int], object], step: int) -> None:
        with self.working():
            try:
                work(step)
            except Exception as fault:
                self._tell(self.on_fault, name, fault)

    def _serve(self, phase: Phase) -> None:
        """Run what was handed to this thread and may run at this boundary."""
        while True:
            with self._condition:
                chosen = next((r for r in self._requests if r.mid_step or phase == "step"), None)
                if chosen is None:
                    self._rearm()
                    return
                self._requests.remove(chosen)
            if not chosen.mid_step:
                self._tell(self.before_work)
            with self.working():
                chosen.run()

    def _raise_if_stopping(self, phase: Phase) -> None:
        # At the end of `data` nothing of the step has happened yet; but a batch is drawn, which a
        # checkpoint would lose.
        if self._stopping and (phase == "step" or (phase == "data" and not self._checkpoint)):
            if self._checkpoint:  # now: a script may catch what is raised
                self._work("the last checkpoint", self.leave_checkpoint, self.completed)
            with self._condition:
                # Once: a script that catches it, to save or to evaluate, is left to do so.
                self._ended = True
                self._stopping = self._waiting = self.armed = False
            self._tell(self.on_change)
            raise StopTraining(self._checkpoint)

    def _must_stop(self, phase: Phase, step: int) -> bool:
        with self._condition:
            if self._stopping or self._ended:
                return False
            if self._boundaries_left:
                self._boundaries_left -= 1
                if not self._boundaries_left:
                    return True
            if phase == "step" and self._target is not None and step >= self._target:
                self._target = None
                return True
            self._rearm()
            return False

    def _stop_here(self, phase: Phase, step: int) -> None:
        self._tell(self.on_stop_here, phase, step)
        self._wait(phase)
        self._raise_if_stopping(phase)

    def _wait(self, phase: Phase) -> None:
        with self._condition:
            # A control that came while the report was made has already set us going again.
            if self._boundaries_left or self._target is not None or self._stopping or self._ended:
                self._rearm()
                return
            self._waiting = True
            self.armed = True
        self._tell(self.on_change)
        began = time.perf_counter()
        while self._waiting:
            self._serve(phase)
            with self._condition:
                if self._waiting and not self._servable(phase):
                    self._condition.wait()
        self.paused_s += time.perf_counter() - began

    def _servable(self, phase: Phase) -> bool:
        return any(request.mid_step or phase == "step" for request in self._requests)

    def _keep_rate(self) -> None:
        """Sleep until the next step may begin; any control cuts it short."""
        with self._condition:
            while self._rate is not None and not (
                self._stopping or self._ended or self._boundaries_left
            ):
                now = time.monotonic()
                # Never "catch up" after a pause: the next step is one interval after this one.
                due = min(self._next_step_at, now + 1.0 / self._rate)
                if now >= due:
                    self._next_step_at = now + 1.0 / self._rate
                    return
                self._condition.wait(due - now)
