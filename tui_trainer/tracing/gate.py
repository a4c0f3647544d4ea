"""The gate at every phase boundary: where the training thread can be stopped, and where it works
for others.

The training thread calls `Gate.reached` after every phase; when nothing is asked of it that costs
one attribute read. Any other thread controls it. Whatever has to touch tensors is handed to the
training thread here and never run from another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tui_trainer.tracing.controls import Controls, Refusal, next_multiple

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

    def reached(self, phase: str, step: int) -> None:
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

    def _arrive(self, phase: str, step: int) -> None:
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

    def _serve(self, phase: str) -> None:
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

    def _raise_if_stopping(self, phase: str) -> None:
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

    def _must_stop(self, phase: str, step: int) -> bool:
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

    def _stop_here(self, phase: str, step: int) -> None:
        self._tell(self.on_stop_here, phase, step)
        self._wait(phase)
        self._raise_if_stopping(phase)

    def _wait(self, phase: str) -> None:
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

    def _servable(self, phase: str) -> bool:
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
