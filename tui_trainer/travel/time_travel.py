"""Goes back in a training: restores a snapshot, and repeats the steps from there to the wanted one.

A shipped task is rewound exactly. Its loop is left; its state and its position in the data become
those of the nearest snapshot (or checkpoint) at or before the wanted step; and the steps between
are repeated, with the changes of settings that were made at them. They are not recorded twice.

A script's own variables cannot be rewound. Weights, optimizers, schedulers, scalers and random
generators become those of the snapshot, and the script continues where it is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from torch.amp.grad_scaler import GradScaler

from tui_trainer.inspector.rerun import StepCapture
from tui_trainer.protocol.errors import UserError
from tui_trainer.protocol.formatting import bytes_, counted, rough_duration
from tui_trainer.protocol.schema import STEP, STEP_INDEX
from tui_trainer.protocol.text import single_line
from tui_trainer.protocol.travel import (
    LONG_S,
    Experiment,
    ExperimentCost,
    ExperimentResult,
    MeasureLandscape,
    Timeline,
    TravelPlace,
)
from tui_trainer.record.recorder import Recorder
from tui_trainer.settings.edits import LiveEdits, SettingEdit
from tui_trainer.settings.learning_rates import KnownSchedulers
from tui_trainer.tasks.definition import Training
from tui_trainer.trace.gate import Gate, Refusal
from tui_trainer.trace.optimizer_registry import Optimizer
from tui_trainer.trace.script_frames import objects_of_script
from tui_trainer.trace.tracer import Tracer
from tui_trainer.travel.experiments import Experiments
from tui_trainer.travel.memory import (
    HOST,
    estimate_cost,
    free_bytes,
    require_memory,
    require_room,
)
from tui_trainer.travel.script_landscape import measure_landscape
from tui_trainer.travel.snapshots import (
    SnapshotStore,
    Stateful,
    TrainingParts,
    TrainingSnapshot,
    TrainingState,
    interval,
)

T = TypeVar("T")
NEVER = 10**15
MAX_REASON = 200
"""Characters of the reason for a failure."""
SCRIPT_STATE = (
    "weights, buffers, optimizers, schedulers, GradScaler, random generators and changed settings; "
    "not the script's own variables, data order, DataLoader workers and threads, which continue"
)
NOT_FOR_SCRIPTS = (
    "the steps of a script cannot be made twice: its variables and its place in the data continue",
    "landscape is possible; to try other settings, use back and set, then compare the new branch",
)
RECENT_STEPS = 50
"""Newest steps whose median duration is taken."""
NO_SNAPSHOTS = "no snapshot of an earlier step is kept"
HOW_TO_KEEP = (
    "tui-trainer back RUN --keep 1GB keeps them from here on; --snapshots 1GB from the start"
)


@dataclass(frozen=True)
class RescueCopy:
    """A copy of the present state, to return to if another state cannot be restored."""

    step: int
    """Completed steps."""
    state: TrainingState
    edits: Any
    position: int | None
    """Batches drawn up to the end of `step`; None if unknown."""


@dataclass(frozen=True)
class RewindTarget:
    """The step to go to."""

    wanted: int
    nearest: int
    """The nearest step at or before `wanted` whose state is kept."""
    saved: Any = None
    """A checkpoint of `nearest`, if there is no snapshot of it."""
    experiment: Callable[[], None] | None = None
    """An experiment to run at the present step instead of going back."""
    rescue: RescueCopy | None = None


class RewindRequested(KeyboardInterrupt):
    """Raised on the training thread to leave the loop of a task, which then begins at another step.

    A `KeyboardInterrupt`, as `StopTraining` is: code that handles `Exception` does not catch it.
    """

    def __init__(self, target: RewindTarget) -> None:
        super().__init__(f"going to step {target.wanted}")
        self.target = target


class SavedStates(Protocol):
    """The checkpoints of the run on disk."""

    def steps(self) -> Sequence[int]: ...

    def load(self, step: int) -> Any:
        """Read the checkpoint of `step`. Raises ConfigurationError."""

    def restore(self, checkpoint: Any) -> dict[str, Any]:
        """Load model, optimizer, data and generators; returns the state of the changes of
        settings."""


class TimeTravel:
    """Keeps snapshots of one training, and goes back to them."""

    def __init__(
        self,
        tracer: Tracer,
        gate: Gate,
        recorder: Recorder,
        edits: LiveEdits,
        budget_bytes: int = 0,
    ) -> None:
        self._tracer = tracer
        self._gate = gate
        self._recorder = recorder
        self._edits = edits
        self.snapshots = SnapshotStore(budget_bytes)
        self.task: Training | None = None
        """None for a script."""
        self.checkpoints: SavedStates | None = None
        self.capture: StepCapture | None = None
        """Re-runs a script's forward pass, to measure losses along a direction."""
        self.every: int | None = None
        """Steps between snapshots; None: chosen so that their cost stays small."""
        self._copy_s = 0.0
        self._last = 0.0
        self._last_step = 0
        self._schedulers = KnownSchedulers()
        self._announced = 0
        """Bytes of two snapshots at the last announcement of their size."""
        self._edit_history: list[SettingEdit] = []
        """All changes of settings up to the newest step."""
        self.went_back: Callable[[int, int], str] | None = None
        """Called with (step at which a script was rewound, step whose state was restored);
        returns the name of the branch that records its next steps."""
        self.restored: tuple[int, int] = (-1, -1)
        """The two steps of the last rewind of a script, as for `went_back`."""
        self._target: int | None = None
        """The step up to which steps are being repeated."""
        if budget_bytes:
            gate.call_when_due(self._after_step)
        edits.check = self._check_edit

    # ------------------------------------------------------------ any thread

    @property
    def newest(self) -> int:
        """The newest step of this training."""
        return max(self._gate.completed, self._recorder.repeating_until)

    @property
    def in_the_past(self) -> bool:
        """Whether steps after the present one are recorded already."""
        return self._gate.completed < self._recorder.repeating_until

    def keep(self, budget_bytes: int) -> str:
        """Keep snapshots in up to `budget_bytes` from here on; 0: none. Raises Refusal."""
        available = free_bytes(HOST) or 0
        if budget_bytes > available:
            raise Refusal(
                f"{bytes_(budget_bytes, 0)} is more than the {bytes_(available, 0)} that are free",
                "give less memory",
            )
        self.snapshots.budget_bytes = budget_bytes
        self._announced = 0
        if not budget_bytes:
            self.snapshots = SnapshotStore(0)
            return "no more snapshots are kept"
        self._gate.call_soon(self._take_now)
        each = self._state_bytes()
        many = f", {bytes_(each, 0)} each: up to {budget_bytes // each:,}" if each else ""
        return f"snapshots are kept in at most {bytes_(budget_bytes, 0)}{many}"

    @property
    def state_step(self) -> int:
        """The step whose state the training has now, between steps."""
        at, restored = self.restored
        return restored if at == self._gate.completed else self._gate.completed

    def has_state_for(self, step: int) -> bool:
        """Whether a script's present state is the one that going back to `step` restores."""
        snapshot = self.snapshots.before(step)
        return snapshot is not None and snapshot.step == self.state_step

    def back(
        self,
        step: int | None = None,
        confirmed: bool = False,
        arrived: Callable[[int], None] = lambda shift: None,
    ) -> str:
        """Go to the end of `step`, by default one step back, and pause there; returns a message.

        Raises Refusal, also if this takes long and is not `confirmed`. `arrived(shift)` is called
        once a script has been rewound: `shift` is its step number minus that of the restored state.
        """
        gate = self._gate
        if step is None:
            within = gate.mode == "paused" and gate.within_step
            present = self.state_step if self.task is None else gate.completed
            step = present if within else present - 1
        if step < 0:
            raise Refusal("there is no step before the first one")
        if step > self.newest:
            raise Refusal(
                f"the run has not been at step {step:,} yet",
                f"its newest step is {self.newest:,}; tui-trainer step RUN continues it",
            )
        if self.task is None:
            return self._back_in_script(step, arrived)
        nearest = self._nearest(step)
        if nearest is None:
            earliest = min([*self.snapshots.steps, *self._saved_steps()], default=None)
            if earliest is None:
                raise Refusal(NO_SNAPSHOTS, HOW_TO_KEEP)
            raise Refusal(
                f"nothing is kept from before step {earliest:,}",
                f"the earliest step is {earliest:,}",
            )
        repeated, step_s = step - nearest, self._step_s()
        took = f"about {rough_duration(math.ceil(repeated * step_s))}" if step_s else ""
        text = f"{counted(repeated, 'step')} from step {nearest:,}"
        if repeated and step_s and repeated * step_s > LONG_S and not confirmed:
            raise Refusal(
                f"going to step {step:,} repeats {text}, which takes {took}",
                "tui-trainer back --yes confirms it, in the app enter on the timeline",
            )
        gate.call_soon(lambda: self._leave_loop(step), mid_step=True).add_done_callback(
            lambda done: self._report_failure(done.exception())
        )
        if not repeated:
            return f"back to step {step:,}"
        return f"back to step {step:,}, repeating {text}{f', {took}' if took else ''}"

    def _step_s(self) -> float | None:
        """Median duration of the newest steps, in seconds; None if unknown."""
        table = self._recorder.read(lambda history: history.table(STEP))
        if table is None or not table.rows:
            return None
        recent = self._recorder.read(lambda _: table.tail(RECENT_STEPS)[1])
        known = recent[np.isfinite(recent[:, STEP_INDEX["step_ms"]]), STEP_INDEX["step_ms"]]
        return float(np.median(known)) / 1e3 if len(known) else None

    def _state_bytes(self) -> int:
        """The bytes of a snapshot; 0 while this thread cannot determine them."""
        try:
            return self._parts().nbytes()
        except RuntimeError:  # an optimizer is adding to its state
            return 0

    def cost(self, experiment: Experiment) -> ExperimentCost:
        """The cost of an experiment. Called on the training thread. Raises Refusal."""
        task, left = self.task, None
        if task is not None:
            left = max(0, task.total_steps - self._gate.completed)
        elif not isinstance(experiment, MeasureLandscape):
            raise Refusal(*NOT_FOR_SCRIPTS)
        return estimate_cost(experiment, self._parts(), left, self._step_s())

    def _leave_loop(self, step: int) -> None:
        """Leave the loop of a task by raising RewindRequested. Raises Refusal or ConfigurationError
        if the state is no longer kept, and Refusal if there is too little memory."""
        nearest = self._nearest(step)
        if nearest is None:
            raise Refusal(NO_SNAPSHOTS, HOW_TO_KEEP)
        saved = None
        if nearest not in self.snapshots.steps and self.checkpoints is not None:
            saved = self.checkpoints.load(nearest)
        raise RewindRequested(RewindTarget(step, nearest, saved, rescue=self._rescue_copy()))

    def _rescue_copy(self) -> RescueCopy:
        """Copy the present state. Raises Refusal where there is too little memory."""
        gate, position = self._gate, None
        require_room(self._parts())
        batches = self.task.stateful.get("batches") if self.task is not None else None
        if isinstance(drawn := getattr(batches, "position", None), int):
            position = drawn - gate.within_step
        state = TrainingState.take(self._parts())
        return RescueCopy(gate.completed, state, self._edits.snapshot(), position)

    def _report_failure(self, error: BaseException | None) -> None:
        if isinstance(error, UserError):
            text = f"the run stays where it is: {error.message}"
            self._recorder.notice("state", text, "error", self._gate.completed)
        elif error is not None:
            self._recorder.fault("going back", error)

    def _saved_steps(self) -> Sequence[int]:
        return self.checkpoints.steps() if self.checkpoints is not None else ()

    def _nearest(self, step: int) -> int | None:
        """The nearest step at or before `step` whose state is kept."""
        kept = [each for each in (*self.snapshots.steps, *self._saved_steps()) if each <= step]
        return max(kept, default=None)

    def experiment(
        self, experiment: Experiment, answered: Callable[[ExperimentResult], T]
    ) -> Future[T]:
        """Run an experiment from the present state, between two steps, and pause there. Raises
        Refusal."""
        task, gate = self.task, self._gate
        if task is None:
            return self._landscape_of_script(experiment, answered)
        if gate.mode == "paused" and gate.within_step:
            raise Refusal(
                f"paused after {gate.phase} of step {gate.step_in_progress:,}: an experiment "
                "begins at the end of a step",
                "finish the step first: s on the screen, or tui-trainer step",
            )
        found: Future[T] = Future()

        def wanted() -> bool:
            return not found.cancelled() and gate.mode not in ("stopping", "ended")

        def run() -> None:
            try:
                with self._tracer.suspended(), self._recorder.excluded():
                    require_memory(self.cost(experiment))
                    experiments = Experiments(
                        task, self._edits, self._parts(), self.snapshots, wanted
                    )
                    result = answered(experiments.run(experiment))
            except Exception as error:
                with contextlib.suppress(InvalidStateError):  # the viewer has left
                    found.set_exception(error)
                return
            with contextlib.suppress(InvalidStateError):
                found.set_result(result)

        def leave() -> None:
            if not wanted():
                return
            step = gate.completed
            raise RewindRequested(RewindTarget(step, step, experiment=run))

        gate.call_soon(leave).add_done_callback(
            lambda done: found.cancel() if done.cancelled() else None
        )
        return found

    def _landscape_of_script(
        self, experiment: Experiment, answered: Callable[[ExperimentResult], T]
    ) -> Future[T]:
        """Measure a script's loss along a direction: while paused at once, otherwise at the end of
        the step. Raises Refusal."""
        capture, gate = self.capture, self._gate
        if not isinstance(experiment, MeasureLandscape) or capture is None:
            raise Refusal(*NOT_FOR_SCRIPTS)
        found: Future[T] = Future()

        def wanted() -> bool:
            return not found.cancelled() and gate.mode not in ("stopping", "ended")

        def run() -> None:
            if not wanted():
                return
            try:
                with self._tracer.suspended(), self._recorder.excluded():
                    require_memory(self.cost(experiment))
                    optimizers = self._parts().optimizers
                    result = measure_landscape(
                        capture, optimizers, self.snapshots, experiment, wanted
                    )
                gate.pause()
                answer = answered(result)
            except Exception as error:
                with contextlib.suppress(InvalidStateError):  # the viewer has left
                    found.set_exception(error)
                return
            with contextlib.suppress(InvalidStateError):
                found.set_result(answer)

        gate.call_soon(run, when_paused=True).add_done_callback(
            lambda done: found.cancel() if done.cancelled() else None
        )
        return found

    def timeline(self) -> Timeline:
        """The steps that the training can be taken to."""
        edits = self._edit_history if self.in_the_past else self._edits.state.log
        places = [
            *(TravelPlace(step, "snapshot") for step in self.snapshots.steps),
            *(TravelPlace(step, "checkpoint") for step in self._saved_steps()),
            *(TravelPlace(each.step, "edit", each.text) for each in edits),
        ]
        places.sort(key=lambda place: place.step)
        snapshots = self.snapshots
        exact = self.task is not None
        return Timeline(
            tuple(places),
            self._gate.completed,
            self.newest,
            exact,
            snapshots.nbytes,
            snapshots.budget_bytes,
            self._step_s(),
            self._state_bytes(),
        )

    # ------------------------------------------------------------ keeping snapshots

    def _after_step(self, step: int) -> int:
        """Take a snapshot after a step; returns the step after which this is called again."""
        if not self.snapshots.budget_bytes:
            return NEVER
        now = time.perf_counter()
        steps = step - self._last_step
        step_s = (now - self._last) / steps if steps > 0 and self._last else 0.0
        if step not in self.snapshots.steps:
            self._take(step)
        self._last, self._last_step = time.perf_counter(), step
        return step + (self.every or interval(self._copy_s, step_s))

    def start(self) -> None:
        """Take a snapshot before the first step of a task."""
        if self.snapshots.budget_bytes:
            self._take(self._gate.completed)

    def _take_now(self) -> None:
        """Take a snapshot of the present step, unless one is kept or a script has the state of
        another step."""
        step = self._gate.completed
        if step in self.snapshots.steps or self.state_step != step:
            self._gate.due_after(self._after_step, step + (self.every or 1))
        else:
            self._take(step)

    def _take(self, step: int) -> None:
        """Take a snapshot between two steps."""
        parts = self._parts()
        if not self._announce(parts):
            return
        began = time.perf_counter()
        before = self.snapshots.before(step)
        with self._recorder.excluded():
            state = TrainingState.take(parts, before.state if before is not None else None)
            self.snapshots.add(TrainingSnapshot(step, state, self._edits.snapshot()))
        self._copy_s = time.perf_counter() - began
        self._gate.due_after(self._after_step, step + (self.every or 1))

    def _announce(self, parts: TrainingParts) -> bool:
        """Announce how much memory snapshots will take, and again after this has grown: optimizers
        allocate their state at the first step. False where not even two snapshots fit."""
        budget, size = self.snapshots.budget_bytes, parts.nbytes()
        two = size + parts.changing_nbytes()
        if two <= self._announced:
            return True
        self._announced = two
        each, most = bytes_(size, 0), bytes_(budget, 0)
        if two > budget:
            self.snapshots = SnapshotStore(0)
            text = f"no snapshots are kept: one takes {each}, and two do not fit in {most}"
            self._recorder.notice("state", text, "warning", self._gate.completed)
            return False
        text = f"snapshots take at most {most} of memory, {each} each"
        self._recorder.notice("state", text, step=self._gate.completed)
        return True

    def _parts(self) -> TrainingParts:
        if self.task is not None:
            stateful = self.task.stateful.values()
            optimizers = [each for each in stateful if isinstance(each, Optimizer)]
            others = [each for each in stateful if not isinstance(each, Optimizer)]
            return TrainingParts([self.task.model], optimizers, others)
        optimizers = [optimizer for _, optimizer in self._tracer.registry.existing()]
        found: list[Stateful] = [
            *self._schedulers.of(optimizers), *objects_of_script(GradScaler),
        ]  # fmt: skip
        return TrainingParts(list(self._tracer.roots), optimizers, found)

    # ------------------------------------------------------------ a task

    def go(self, to: RewindTarget) -> None:
        """Restore the end of the wanted step, or arrange to run up to it; the caller then calls the
        task's loop again. Called on the training thread, outside of the loop."""
        if to.experiment is not None:
            return self._experiment_at(to)
        recorder, gate, target, nearest = self._recorder, self._gate, to.wanted, to.nearest
        if not self.in_the_past:
            self._edit_history = list(self._edits.state.log)
        newest = self.newest
        self._tracer.rewind(nearest)
        gate.rewind(nearest)
        recorder.rewind(nearest, newest)
        try:
            self._restore(to)
        except Exception as error:
            if to.rescue is None:
                raise
            self._stay(to, to.rescue, newest, error)
            return
        if self._after_repeated not in gate.after_step:
            gate.after_step.append(self._after_repeated)
        self._reapply(nearest)
        self._target = target
        if nearest < target:
            gate.ignores_breakpoints = True
            recorder.set_status(waiting_for=f"repeating steps {nearest + 1:,} to {target:,}")
            gate.run_until(target)
            return
        self._arrived()
        gate.pause()
        if target:
            gate.reached("step", target)

    def _stay(self, to: RewindTarget, rescue: RescueCopy, newest: int, error: Exception) -> None:
        """Return to the state of `rescue`, since another one could not be restored, and pause."""
        recorder, gate = self._recorder, self._gate
        self._tracer.rewind(rescue.step)
        gate.rewind(rescue.step)
        recorder.rewind(rescue.step, newest)
        rescue.state.restore()
        self._edits.restore(rescue.edits)
        if rescue.position is not None and self.task is not None:
            self.task.stateful["batches"].position = rescue.position
        self._target = None
        gate.ignores_breakpoints = False
        text = f"the run stays where it is: step {to.nearest:,} could not be restored"
        recorder.notice("state", f"{text}: {_reason(error)}", "error", rescue.step)
        gate.pause()
        if rescue.step:
            gate.reached("step", rescue.step)

    def _experiment_at(self, to: RewindTarget) -> None:
        """Run an experiment between two steps, and pause afterwards."""
        assert to.experiment is not None
        self._tracer.rewind(to.wanted)
        self._gate.rewind(to.wanted)
        to.experiment()
        self._gate.pause()
        if to.wanted:
            self._gate.reached("step", to.wanted)

    def _restore(self, to: RewindTarget) -> None:
        snapshot = self.snapshots.before(to.nearest)
        if to.saved is not None and self.checkpoints is not None:
            self._edits.restore_saved(self.checkpoints.restore(to.saved), self._edit_history)
        else:
            assert snapshot is not None
            snapshot.state.restore()
            self._edits.restore(snapshot.edits)
        if self.task is not None:
            self.task.model.zero_grad(set_to_none=True)

    def _reapply(self, step: int) -> None:
        """Repeat the changes of settings that were made at the end of `step`."""
        made = len(self._edits.state.log)
        for entry in self._edit_history[made:]:
            if entry.step == step:
                self._edits.apply(entry, silent=True)

    def _after_repeated(self, step: int) -> None:
        """Called on the training thread after each repeated step: repeat the changes of settings,
        and end the repetition at the target."""
        if step > self._recorder.repeating_until:
            self._gate.after_step.remove(self._after_repeated)
            return
        self._reapply(step)
        if self._target is not None and step >= self._target:
            self._arrived()

    def _arrived(self) -> None:
        self._target = None
        self._recorder.set_status(waiting_for="")
        self._gate.ignores_breakpoints = False

    def _check_edit(self) -> None:
        """Raises Refusal where a change would make the training differ from the recorded one."""
        if self.task is not None and self.in_the_past:
            raise Refusal(
                f"step {self._gate.completed:,} is in the past of this run, which has been at step "
                f"{self.newest:,}",
                "tui-trainer branch RUN lr=3e-4, or ctrl+b in the settings of the app, makes a "
                "new run from here",
            )

    # ------------------------------------------------------------ a script

    def _back_in_script(self, step: int, arrived: Callable[[int], None]) -> str:
        snapshot = self.snapshots.before(step)
        if snapshot is None:
            raise Refusal(NO_SNAPSHOTS, HOW_TO_KEEP)
        gate = self._gate

        def restore() -> None:
            self._restore_script(snapshot)
            gate.pause()
            arrived(gate.completed - snapshot.step)

        gate.call_soon(restore).add_done_callback(
            lambda done: self._report_failure(done.exception())
        )
        within = gate.within_step
        when = f"at the end of step {gate.step_in_progress:,} " if within else ""
        return f"back {when}to the state of step {snapshot.step:,}: {SCRIPT_STATE}"

    def _restore_script(self, snapshot: TrainingSnapshot) -> None:
        """Restore a snapshot. Raises Refusal, and changes nothing, if it no longer fits."""
        require_room(snapshot.state.parts)
        rescue, edits = TrainingState.take(snapshot.state.parts), self._edits.snapshot()
        try:
            snapshot.state.restore()
            self._edits.restore(snapshot.edits)
        except Exception as error:
            rescue.restore()
            self._edits.restore(edits)
            text = f"step {snapshot.step:,} could not be restored: {_reason(error)}"
            raise Refusal(text) from error
        now = self._gate.completed
        text = f"back to the state of step {snapshot.step:,}: {SCRIPT_STATE}"
        if self.went_back is not None:
            text += f"; what follows is branch {self.went_back(now, snapshot.step)}"
        self.restored = now, snapshot.step
        self._gate.rewinds += 1
        self._recorder.notice("edit", text, step=now)


def _reason(error: Exception) -> str:
    return single_line(f"{type(error).__name__}: {error}", MAX_REASON)
