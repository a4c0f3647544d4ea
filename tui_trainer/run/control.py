"""Who may command the run, and what each command does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from tui_trainer.protocol.messages import (
    TAKE_CONTROL_TEXT,
    Action,
    Checkpoint,
    Mark,
    Pause,
    Resume,
    RunToEpochEnd,
    Step,
    StepPhase,
    Stop,
    TakeControl,
    Throttle,
)
from tui_trainer.protocol.text import single_line
from tui_trainer.record.recorder import Recorder
from tui_trainer.trace.gate import Gate, Refusal

MOST_STEPS = 10**12
LEAST_STEPS_PER_SECOND, MOST_STEPS_PER_SECOND = 1e-3, 1e6
MARK_CHARACTERS = 500


@dataclass(frozen=True)
class Viewer:
    """One connected viewer."""

    id: int
    name: str
    read_only: bool


@dataclass(frozen=True)
class CommandResult:
    """Whether a command was accepted, and what to say about it."""

    ok: bool
    message: str = ""
    hint: str = ""


class CommandHandler:
    """Keeps the viewers apart and maps what the controlling one says to the gate."""

    def __init__(
        self,
        gate: Gate,
        recorder: Recorder,
        stop: Callable[[bool], None],
        checkpoint: Callable[[], None],
    ) -> None:
        self._gate = gate
        self._recorder = recorder
        self._stop = stop
        self._checkpoint = checkpoint
        self._lock = threading.RLock()
        self._viewers: dict[int, Viewer] = {}
        self._controller: int | None = None

    def joined(self, viewer: Viewer) -> None:
        """A viewer has been welcomed; the first that may control does."""
        with self._lock:
            self._viewers[viewer.id] = viewer
            if self._controller is None and not viewer.read_only:
                self._controller = viewer.id
            self._tell()

    def left(self, viewer: Viewer) -> None:
        """A viewer has gone; control falls to nobody until somebody uses or takes it."""
        with self._lock:
            self._viewers.pop(viewer.id, None)
            if self._controller == viewer.id:
                self._controller = None
            self._tell()
        self._recorder.viewer_gone(viewer.id)

    def perform(self, viewer: Viewer, action: Action) -> CommandResult:
        """Do what this viewer asks, or say why not."""
        refusal = self._refusal(viewer, action)
        if refusal is not None:
            return refusal
        try:
            said = self._do(viewer, action)
        except Refusal as refused:
            return CommandResult(False, str(refused), refused.hint)
        if not isinstance(action, Mark):
            # The gate's own step: the recorder's lags by the steps that wait to be recorded.
            step = self._gate.completed
            self._recorder.notice("command", said, step=step, who=viewer.name)
        return CommandResult(True, said)

    def _refusal(self, viewer: Viewer, action: Action) -> CommandResult | None:
        if viewer.read_only:
            return CommandResult(
                False, "this viewer is read-only", "attach again without --read-only to control"
            )
        state = self._recorder.status
        if state.ended and not isinstance(action, TakeControl):
            return CommandResult(
                False, f"the run has {_ended(state.state)}: nothing is left to control"
            )
        if isinstance(action, (TakeControl, Mark)):
            return None
        with self._lock:
            if self._controller is None:
                self._take(viewer)
            if self._controller != viewer.id:
                holder = self._viewers[self._controller].name if self._controller else "nobody"
                return CommandResult(
                    False, f"{holder} holds control", "take control first: ctrl+t on a screen"
                )
        return None

    def _take(self, viewer: Viewer) -> None:
        self._controller = viewer.id
        self._tell()

    def _tell(self) -> None:
        names = tuple(viewer.name for viewer in self._viewers.values())
        self._recorder.set_status(viewers=names, controller=self._controller)

    def _do(self, viewer: Viewer, action: Action) -> str:
        gate = self._gate
        match action:
            case Pause():
                gate.pause()
                return "pause"
            case Resume():
                gate.resume()
                return "resume"
            case Step(count=count):
                return self._step(count)
            case StepPhase():
                gate.step_phase()
                return "one phase"
            case RunToEpochEnd():
                gate.run_to_epoch_end()
                return "run to the end of the epoch"
            case Throttle(steps_per_second=rate):
                return self._throttle(rate)
            case Stop(checkpoint=checkpoint):
                self._stop(checkpoint)
                return "stop, with a checkpoint" if checkpoint else "stop"
            case Checkpoint():
                self._checkpoint()
                return "checkpoint"
            case TakeControl():
                with self._lock:
                    self._take(viewer)
                return TAKE_CONTROL_TEXT
            case Mark(text=text):
                said = single_line(text, MARK_CHARACTERS)
                if not said:
                    raise Refusal("a mark needs some text")
                step = self._gate.completed
                self._recorder.notice("mark", said, step=step, who=viewer.name)
                return said

    def _step(self, count: int) -> str:
        if not 1 <= count <= MOST_STEPS - (self._gate.run_to or 0):
            raise Refusal(f"cannot run {count:,} steps: give a number from 1 to {MOST_STEPS:,}")
        self._gate.step(count)
        return "one step" if count == 1 else f"{count} steps"

    def _throttle(self, rate: float | None) -> str:
        least, most = LEAST_STEPS_PER_SECOND, MOST_STEPS_PER_SECOND
        if rate is not None and not least <= rate <= most:  # as NaN is not either
            raise Refusal(
                f"cannot hold {rate:g} steps a second: give a number from {least:g} to {most:,.0f}"
            )
        self._gate.throttle(rate)
        return "full speed" if rate is None else f"at most {rate:g} steps a second"


def _ended(state: str) -> str:
    return {"stopped": "been stopped"}.get(state, state)
