"""The gate: where the training thread pauses, steps, slows down, stops and does work for others.

The training thread calls `Gate.reached` at the end of every phase, which costs one attribute read
unless something was requested. Any other thread may call the controls. Work that touches tensors is
handed to the training thread with `call_soon` and never runs on another thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tui_trainer.breakpoints.breakpoint_list import Breakpoints
from tui_trainer.protocol import PHASES, Phase
from tui_trainer.protocol.errors import UserError

Mode = Literal["running", "paused", "stopping", "ended"]
Boundary = tuple[int, int]
SHARED_FIELDS = 4
NEVER = 10**15
"""Steps until work that has failed is called again."""
_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}


class Refusal(UserError):
    """A control that is not possible now; the message says why."""


class StopTraining(KeyboardInterrupt):
    """Raised on the training thread at the end of a step when the run is asked to stop.

    A `KeyboardInterrupt`, so that a script which saves its model on Ctrl-C does so.
    """

    def __init__(self, checkpoint: bool = False) -> None:
        super().__init__("stopped at the end of a step")
        self.checkpoint = checkpoint
        """Whether the request to stop includes a checkpoint."""


def _do_nothing(*_: Any) -> None:
    pass


@dataclass
class GateHooks:
    """Callbacks of the gate. An exception in one goes to `fault` and never to the training."""

    pausing: Callable[[Phase, int], None] = _do_nothing
    """Training thread, `(phase, step)`: about to pause; the moment for the phase report."""
    leaving: Callable[[Phase, int], None] = _do_nothing
    """Training thread, `(phase, step)`: continues from this boundary, to pause within one step; the
    moment to read what the next phase will change."""
    changed: Callable[[], None] = _do_nothing
    """Any thread: mode, target or rate changed."""
    fault: Callable[[str, BaseException], None] = _do_nothing
    """Training thread: a hook or a piece of work raised."""
    before_work: Callable[[], None] = _do_nothing
    """Training thread: work between steps is about to run; completed steps should be recorded
    first, since the work may add records of its own."""
    breakpoint_reached: Callable[[], None] | None = None
    """Training thread: pause at this boundary; `Gate.pause` unless set."""
    save_checkpoint: Callable[[int], object] = _do_nothing
    """Training thread, with the number of completed steps: the run stops here and a checkpoint was
    requested."""
    work_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around work for others (the tracer's `suspended`)."""


@dataclass(frozen=True)
class _QueuedCall:
    work: Callable[[], Any]
    future: Future[Any]
    mid_step: bool
    when_paused: bool

    def may_run(self, phase: Phase, paused: bool) -> bool:
        return phase == "step" or self.mid_step or (self.when_paused and paused)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except Exception as fault:
            self.future.set_exception(fault)


class Gate:
    """Pauses, steps, throttles and stops one training thread at its phase boundaries.

    The controls return at once and are thread-safe; they raise `Refusal` where they make no sense.
    With `paused=True` the thread pauses at its first boundary, after the `data` phase of step 1.
    """

    def __init__(self, paused: bool = False, steps_per_epoch: int | None = None) -> None:
        self.hooks = GateHooks()
        self.steps_per_epoch = steps_per_epoch
        self.no_epochs = ""
        """Why this run has no epochs, as far as is known; "" otherwise."""
        self.phase: Phase | Literal[""] = ""
        """The phase that ended last."""
        self.step_in_progress = 1
        """The optimizer step that `phase` belongs to, counted from 1."""
        self.completed = 0
        """Number of completed optimizer steps."""
        self.boundary: Boundary = (0, 0)
        """The boundary that was reached last: (step, number within the step, from 1)."""
        self.passed: tuple[Boundary, Phase | Literal[""]] = (self.boundary, "")
        """The last boundary that the thread has left, and the phase that ended there."""
        self.reached_at = 0.0
        """When `boundary` was reached, in seconds on the monotonic clock; 0.0 unless
        `times_boundaries` is set."""
        self.times_boundaries = False
        self.shared: memoryview | None = None
        """Where another process reads step, boundary, phase and time (`SHARED_FIELDS` int64), if
        `times_boundaries` is set."""
        self.idle_s = 0.0
        """Seconds that the training thread spent here: paused, throttled or working for others.
        Phase and step times exclude them."""
        self.paused_s = 0.0
        """The part of `idle_s` spent paused."""
        self.rewinds = 0
        """How often the training was rewound."""
        self.after_step: list[Callable[[int], None]] = []
        """Called on the training thread after every step with the number of completed steps."""
        self.in_gate = False
        """Whether the training thread is in the gate: waiting, or working for others."""
        self.armed = paused
        """Whether the next boundary has anything to do. Only set in this class."""
        self.breakpoints: Breakpoints | None = None
        self.break_phases: frozenset[Phase] = frozenset()
        """The phases at whose end breakpoints are evaluated."""
        self.break_steps: frozenset[int] = frozenset()
        """Steps that are known beforehand to pause at a breakpoint."""
        self.ignores_breakpoints = False
        """Whether breakpoints are not evaluated, since steps are being repeated."""
        self._scheduled: list[tuple[Sequence[int], Callable[[int], None]]] = []
        self._due: dict[Callable[[int], int], int] = {}
        """Work → the step after which it is due."""
        self._next_scheduled: float = math.inf
        self._condition = threading.Condition()
        self._requests: deque[_QueuedCall] = deque()
        self._waiting = False
        self._pausing = False
        """Whether the thread is about to pause: set before the phase report, and cleared by any
        control that lets the thread run."""
        self._ended = False
        self._stopping = False
        self._checkpoint = False
        self._boundaries_left = 1 if paused else 0
        self._target: int | None = None
        self._target_is_epoch = False
        self._target_counts = False
        """Whether `_target` was given as a number of steps from `completed`."""
        self._hold: Boundary | None = None
        self._rate: float | None = None
        self._next_step_at = 0.0
        self._skipped_at: Boundary | None = None

    # ------------------------------------------------------------ state, for any thread

    @property
    def mode(self) -> Mode:
        """`stopping`: finishing the last step."""
        if self._ended:
            return "ended"
        if self._stopping:
            return "stopping"
        return "paused" if self._waiting else "running"

    @property
    def within_step(self) -> bool:
        """Whether a phase of the step in progress has ended, and the step has not."""
        return self.phase not in ("", "step")

    @property
    def current_step(self) -> int:
        """The step to which an event in the script belongs now: within an iteration the one in
        progress, otherwise the last completed one."""
        return self.step_in_progress if self.within_step else self.completed

    @property
    def pause_requested(self) -> bool:
        """Whether the thread is running and will pause at the next boundary."""
        return not self._waiting and self._boundaries_left > 0

    def may_pause_at(self, phase: Phase) -> bool:
        """Whether the thread may pause at the next boundary, if that is the end of `phase`."""
        return self.armed or phase in self.break_phases

    @property
    def checkpoint_on_stop(self) -> bool:
        """Whether a request to stop includes a checkpoint."""
        return self._checkpoint

    @property
    def run_to(self) -> int | None:
        """The step after which the thread pauses by itself; None without a target."""
        return self._target

    @property
    def rate(self) -> float | None:
        """Maximum number of steps a second; None: unlimited."""
        return self._rate

    @property
    def stops_soon(self) -> bool:
        """Whether the thread will probably pause within the current step, so that values that only
        a phase report needs should be kept."""
        if self._boundaries_left > 0 or self._hold is not None:
            return True
        target, step = self._target, self.completed + 1
        return step in self.break_steps or (target is not None and target <= step)

    @property
    def pauses_next(self) -> bool:
        """Whether the thread is to pause at the next boundary, as in stepping by phases."""
        step, number = self.boundary
        following = (step + 1, 1) if self.phase == "step" else (step, number + 1)
        return self._boundaries_left == 1 or (self._hold is not None and self._hold <= following)

    # ------------------------------------------------------------ controls, for any thread

    def pause(self) -> None:
        """Pause at the next phase boundary, or at this one if the thread is about to pause here."""
        with self._control():
            self._target = None
            if not (self._waiting or self._pausing):
                self._boundaries_left = 1

    def resume(self) -> None:
        """Run freely and forget any target."""
        with self._control():
            self._target = None
            self._release()

    def step(self, count: int = 1) -> None:
        """Pause after `count` more optimizer steps have completed. While earlier steps of this kind
        are still running, `count` is added to them."""
        if count < 1:
            raise Refusal("the number of steps must be at least 1")
        with self._control():
            stepping = self._target is not None and not self._target_is_epoch
            first = self._target if stepping and self._target is not None else self.completed
            self._target_counts = not stepping or self._target_counts
            self._target, self._target_is_epoch = first + count, False
            self._release()

    def step_phase(self) -> None:
        """Run to the next phase boundary; each call before it is reached adds one boundary."""
        with self._control():
            self._target = None
            self._release(boundaries=self._boundaries_left + 1 if not self._waiting else 1)

    def pause_at(self, boundary: Boundary) -> None:
        """Pause at the first boundary that does not precede `boundary`. A thread that is paused
        before it continues up to it. Several processes are stopped at one boundary in this way."""
        with self._control():
            self._target = None
            if not (self._waiting and self.boundary >= boundary):
                self._release()
                self._hold = boundary

    def run_until(self, step: int) -> None:
        """Pause at the end of optimizer step `step`, or at once if that step has passed."""
        with self._control():
            if not (self._waiting and self.phase == "step" and self.completed >= step):
                self._release()
                self._target, self._target_is_epoch = step, False
                self._target_counts = False

    def run_to_epoch_end(self) -> None:
        """Pause after the last step of the current epoch."""
        if not self.steps_per_epoch:
            raise Refusal("this run has no epochs", self.no_epochs)
        with self._control():
            epoch = self.completed // self.steps_per_epoch
            self._target = (epoch + 1) * self.steps_per_epoch
            self._target_is_epoch, self._target_counts = True, False
            self._release()

    def throttle(self, steps_per_second: float | None) -> None:
        """Limit the number of steps a second; None lifts the limit."""
        if steps_per_second is not None and not 0 < steps_per_second < float("inf"):
            raise Refusal("the number of steps a second must be above 0")
        with self._control():
            self._rate = steps_per_second
            if steps_per_second is not None:
                self._next_step_at = time.monotonic() + 1.0 / steps_per_second

    def stop(self, checkpoint: bool = False) -> None:
        """Finish the current step, save a checkpoint if asked to, then raise `StopTraining` on the
        training thread."""
        with self._control():
            self._stopping = True
            self._checkpoint = checkpoint or self._checkpoint
            self._target = None
            self._release()

    def call_soon(
        self, work: Callable[[], Any], mid_step: bool = False, when_paused: bool = False
    ) -> Future[Any]:
        """Run `work()` on the training thread between two steps, also while it is paused there.
        With `mid_step` at any phase boundary; with `when_paused` at one where it is paused."""
        future: Future[Any] = Future()
        with self._condition:
            if self._ended:
                raise Refusal("the training has ended")
            self._requests.append(_QueuedCall(work, future, mid_step, when_paused))
            self._rearm()
            self._condition.notify_all()
        return future

    def end(self) -> None:
        """The training is over: releases a paused thread, cancels requests, refuses controls."""
        with self._condition:
            self._ended = True
            self._waiting = self.armed = False
            cancelled = list(self._requests)
            self._requests.clear()
            self._condition.notify_all()
        for request in cancelled:
            request.future.cancel()
        self._call_hook(self.hooks.changed)

    @contextmanager
    def _control(self) -> Iterator[None]:
        """Around a change of the state: wakes the training thread and calls `changed`."""
        with self._condition:
            if self._ended:
                raise Refusal("the training has ended")
            yield
            self._rearm()
            self._condition.notify_all()
        self._call_hook(self.hooks.changed)

    def _release(self, boundaries: int = 0) -> None:
        """Let the thread run; pause it again after this many boundaries (0: never)."""
        self._boundaries_left = boundaries
        self._hold = None
        self._waiting = self._pausing = False

    def _rearm(self) -> None:
        """Update `armed`. Called with the condition held."""
        self.armed = bool(
            self._boundaries_left
            or self._target is not None
            or self._hold is not None
            or self._stopping
            or self._waiting
            or self._rate is not None
            or self._requests
        )

    def _call_hook(self, hook: Callable[..., None], *args: Any) -> None:
        try:
            hook(*args)
        except Exception as fault:
            if hook is not self.hooks.fault:
                self._call_hook(self.hooks.fault, "gate", fault)

    # ------------------------------------------------------------ training thread

    def call_every(self, cadences: Sequence[int], work: Callable[[int], None]) -> None:
        """Like `after_step`, but only after multiples of any of the `cadences` (0: never); other
        steps cost one comparison. To be called before training begins."""
        wanted = tuple(every for every in cadences if every > 0)
        if wanted:
            self._scheduled.append((wanted, work))
            self._next_scheduled = min(self._next_scheduled, next_multiple(wanted, self.completed))

    def call_when_due(self, work: Callable[[int], int]) -> None:
        """Like `after_step`, but after the steps that `work` chooses: it returns the next one. It
        is called for the first time after the next step."""
        self.due_after(work, self.completed + 1)

    def due_after(self, work: Callable[[int], int], step: int) -> None:
        """Call `work` after this step."""
        self._due[work] = step
        self._next_scheduled = min(self._next_scheduled, step)

    def continue_from(self, step: int) -> None:
        """The training starts after optimizer step `step`. A number of steps that was requested
        before this call is counted from `step`."""
        with self._condition:
            if self._target is not None and self._target_counts:
                self._target += step - self.completed
            self.completed, self.step_in_progress = step, step + 1

    def rewind(self, step: int) -> None:
        """The training is taken to the end of step `step`. Called on the training thread, which is
        not paused afterwards; targets at which it was to pause are forgotten."""
        with self._condition:
            self.completed, self.step_in_progress = step, step + 1
            self.phase, self.boundary = "step", (step, 0)
            self.rewinds += 1
            self._waiting = self._pausing = False
            self._boundaries_left, self._target, self._hold = 0, None, None
            self._due = dict.fromkeys(self._due, step + 1)
            self._plan_work(step)
            self._rearm()
        self._call_hook(self.hooks.changed)

    def has_work_after(self, step: int) -> bool:
        """Whether any work is due after this step."""
        return step >= self._next_scheduled or bool(self.after_step)

    def reached(self, phase: Phase, step: int) -> None:
        """A phase of optimizer step `step` has ended. May wait; raises `StopTraining` to stop."""
        self.phase = phase
        number = self.boundary[1] + 1 if step == self.step_in_progress else 1
        self.step_in_progress = step
        self.boundary = (step, number)  # before `armed` is read: see `pause_at`
        if self.times_boundaries:
            self._note_time(phase, step, number)
        if phase != "step":
            if self.break_phases and phase in self.break_phases:
                self._evaluate_breakpoints(phase, step)
            if self.armed:
                self._enter(phase, step)
            self._leave(phase)
            return
        self.completed = step
        if phase in self.break_phases:
            self._evaluate_breakpoints(phase, step)
        if self.armed or step >= self._next_scheduled or self.after_step:
            self._enter(phase, step)
        self._leave(phase)

    def _leave(self, phase: Phase) -> None:
        self.passed = self.boundary, phase
        # A process that follows rank 0 may have reported the boundary before this one and been told
        # since to stop here: it reports that it has passed, before it waits for the others.
        if self.times_boundaries and self.armed:
            self._call_hook(self.hooks.changed)

    def _note_time(self, phase: Phase, step: int, number: int) -> None:
        self.reached_at = time.monotonic()
        if (shared := self.shared) is not None:
            shared[0], shared[1], shared[2] = step, number, _NUMBERS[phase]
            shared[3] = time.monotonic_ns()

    def _evaluate_breakpoints(self, phase: Phase, step: int) -> None:
        """Pause at this boundary if a condition is met."""
        if self.ignores_breakpoints or self.breakpoints is None:
            return
        if not self.breakpoints.reached(phase, step):
            return
        if not (self._stopping or self._ended):
            self._call_hook(self.hooks.breakpoint_reached or self.pause)

    def iteration_skipped(self) -> None:
        """A GradScaler has skipped the step after the last boundary. Pause there, with the
        gradients still in place, if a breakpoint at the end of the step is met."""
        phase, step = self.phase, self.step_in_progress
        if self.breakpoints is None or "step" not in self.break_phases or self.ignores_breakpoints:
            return
        if phase == "" or phase == "step" or self._skipped_at == self.boundary:
            return  # the last condition: a further optimizer of the same iteration
        self._skipped_at = self.boundary
        if self.breakpoints.skipped(phase, step) and not (self._stopping or self._ended):
            self._call_hook(self.hooks.breakpoint_reached or self.pause)
            if self.armed:
                self._enter(phase, step)

    def _enter(self, phase: Phase, step: int) -> None:
        began = time.perf_counter()
        self.in_gate = True
        try:
            if phase == "step":
                self._work_after_step(step)
            self._serve_requests(phase)
            self._stop_if_asked(phase)
            if self._should_pause(phase, step):
                self._call_hook(self.hooks.pausing, phase, step)
                self._pause(phase)
                self._stop_if_asked(phase)
            if phase == "step":
                self._wait_for_rate()
                self._stop_if_asked(phase)
            if self.stops_soon and not self._stopping:
                with self.hooks.work_context():
                    self._call_hook(self.hooks.leaving, phase, step)
        finally:
            self.in_gate = False
            self.idle_s += time.perf_counter() - began

    def _work_after_step(self, step: int) -> None:
        if self.has_work_after(step):
            self._call_hook(self.hooks.before_work)
        for work in tuple(self.after_step):
            self._work("after a step", work, step)
        if step < self._next_scheduled:
            return
        for cadences, work in self._scheduled:
            if any(step % every == 0 for every in cadences):
                self._work("after a step", work, step)
        for due, when in tuple(self._due.items()):
            if step >= when:
                self._work("after a step", partial(self._call_due, due), step)
        self._plan_work(step)

    def _call_due(self, work: Callable[[int], int], step: int) -> None:
        self._due[work] = step + NEVER  # stays so if the call raises
        self._due[work] = max(step + 1, work(step))

    def _plan_work(self, step: int) -> None:
        """Find the next step after which any work is due."""
        cadences = [next_multiple(cadences, step) for cadences, _ in self._scheduled]
        self._next_scheduled = min([*cadences, *self._due.values()], default=math.inf)

    def _work(self, name: str, work: Callable[[int], object], step: int) -> None:
        with self.hooks.work_context():
            try:
                work(step)
            except Exception as fault:
                self._call_hook(self.hooks.fault, name, fault)

    def _serve_requests(self, phase: Phase) -> None:
        """Run the requests that are allowed at this boundary."""
        while True:
            with self._condition:
                paused = self._waiting
                request = next((r for r in self._requests if r.may_run(phase, paused)), None)
                if request is None:
                    self._rearm()
                    return
                self._requests.remove(request)
            if not request.mid_step:
                self._call_hook(self.hooks.before_work)
            with self.hooks.work_context():
                request.run()

    def _stop_if_asked(self, phase: Phase) -> None:
        # At the end of `data` nothing of the step has happened yet, but a checkpoint would lose the
        # batch that was drawn.
        if self._stopping and (phase == "step" or (phase == "data" and not self._checkpoint)):
            if self._checkpoint:  # before raising: the script may catch the exception
                self._work("the last checkpoint", self.hooks.save_checkpoint, self.completed)
            with self._condition:
                # A script that catches the exception to save or evaluate is not interrupted again.
                self._ended = True
                self._stopping = self._waiting = self.armed = False
            self._call_hook(self.hooks.changed)
            raise StopTraining(self._checkpoint)

    def _should_pause(self, phase: Phase, step: int) -> bool:
        with self._condition:
            if self._stopping or self._ended:
                return False
            if self._boundaries_left:
                self._boundaries_left -= 1
                if not self._boundaries_left:
                    self._pausing = True
                    return True
            if self._hold is not None and self.boundary >= self._hold:
                self._hold = None
                self._pausing = True
                return True
            if phase == "step" and self._target is not None and step >= self._target:
                self._target = None
                self._pausing = True
                return True
            self._rearm()
            return False

    def _pause(self, phase: Phase) -> None:
        with self._condition:
            # A control that came during the phase report has already released the thread.
            if self._hold is not None and self.boundary >= self._hold:
                self._hold, self._pausing = None, True
            onward = self._boundaries_left or self._target is not None or self._hold is not None
            if onward or not self._pausing or self._stopping or self._ended:
                self._pausing = False
                self._rearm()
                return
            began = time.perf_counter()  # before any other thread sees that it is paused
            self._waiting, self._pausing = True, False
            self.armed = True
        self._call_hook(self.hooks.changed)
        while self._waiting:
            self._serve_requests(phase)
            with self._condition:
                if self._waiting and not any(r.may_run(phase, True) for r in self._requests):
                    self._condition.wait()
        self.paused_s += time.perf_counter() - began

    def _wait_for_rate(self) -> None:
        """Sleep until the next step may begin; any control ends the sleep."""
        with self._condition:
            while self._rate is not None and not (
                self._stopping or self._ended or self._boundaries_left or self._hold is not None
            ):
                now = time.monotonic()
                # No catching up after a pause: the next step is one interval after this one.
                due = min(self._next_step_at, now + 1.0 / self._rate)
                if now >= due:
                    self._next_step_at = now + 1.0 / self._rate
                    return
                self._condition.wait(due - now)


def next_multiple(cadences: Sequence[int], step: int) -> int:
    """The first step after `step` that is a multiple of any of the cadences."""
    return min((step // every + 1) * every for every in cadences)
