"""Decides which viewer controls the run and carries out its commands. Connects the breakpoints of
the run to its gate and recorder, and saves them in its directory."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tui_trainer.breakpoints.breakpoint_list import BreakpointError, Breakpoints
from tui_trainer.breakpoints.expression import ExpressionError
from tui_trainer.config.run_spec import RunSpec, save_breakpoints
from tui_trainer.protocol import PHASES
from tui_trainer.protocol.actions import (
    Action,
    AddBreakpoint,
    Back,
    Branch,
    ChangeBreakpoint,
    ChangeSettings,
    Checkpoint,
    DeleteBreakpoint,
    KeepSnapshots,
    Mark,
    Pause,
    Resume,
    RunToEpochEnd,
    Step,
    StepPhase,
    Stop,
    TakeControl,
    Throttle,
    UndoSettings,
)
from tui_trainer.protocol.events import Finding, Level, NoticeKind
from tui_trainer.protocol.messages import Breakpoint, BreakpointStop
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import single_line
from tui_trainer.record.recorder import Recorder
from tui_trainer.run.rank_control import RankControl
from tui_trainer.trace.gate import Gate, Refusal


class RunBreakpoints:
    """Creates the breakpoints of a run, and implements their `BreakpointHost`."""

    def __init__(self, spec: RunSpec, gate: Gate, recorder: Recorder) -> None:
        """Begins with the breakpoints of `spec`."""
        self._gate = gate
        self._recorder = recorder
        self._directory = spec.directory
        self.all = Breakpoints(self)
        gate.breakpoints = self.all
        self.all.restore(spec.breakpoints)

    def save(self) -> None:
        """Write the breakpoints into the run's directory. Not for the training thread."""
        try:
            save_breakpoints(self._directory, self.all.list())
        except OSError as error:
            self._recorder.fault("saving the breakpoints", error)

    @property
    def stopped_at(self) -> BreakpointStop | None:
        """The breakpoint at which the run is paused."""
        return self.all.stop if self._gate.mode == "paused" else None

    def forget_stop(self) -> None:
        """Forget the breakpoint at which the run is paused: a user moves the run on."""
        self.all.stop = None

    # ------------------------------------------------------------ `breakpoints.Run`

    def info(self) -> RunInfo:
        return self._recorder.info

    def findings(self) -> Sequence[Finding]:
        return self._recorder.findings

    def notice(self, kind: NoticeKind, text: str, level: Level, step: int) -> None:
        self._recorder.notice(kind, text, level, step)

    def breakpoints_changed(self, breakpoints: Breakpoints) -> None:
        self._gate.break_phases = breakpoints.phases
        self._gate.break_steps = breakpoints.steps
        self._recorder.needed_tables = breakpoints.tables
        self._recorder.on_record = breakpoints.observe if breakpoints.phases else None
        self._recorder.on_skip = breakpoints.observe_skip if breakpoints.phases else None


if TYPE_CHECKING:
    from tui_trainer.settings.edits import LiveEdits
    from tui_trainer.travel.time_travel import TimeTravel

MAX_STEPS = 10**12
MIN_STEPS_PER_SECOND, MAX_STEPS_PER_SECOND = 1e-3, 1e6
MARK_CHARACTERS = 500
AT_STEP = re.compile(rf"step == (\d{{1,15}})((?: at (?:{'|'.join(PHASES)}))?)")
"""The condition of a breakpoint at one step."""
LOGGED = (Mark, ChangeSettings, UndoSettings)
"""Commands whose handlers write the notice themselves."""
MOVES = (Resume, Step, StepPhase, RunToEpochEnd, Back)
"""Commands that move the run on from the breakpoint where it is paused."""


@dataclass(frozen=True)
class Viewer:
    """A connected viewer."""

    id: int
    name: str
    read_only: bool


@dataclass(frozen=True)
class CommandResult:
    """Whether a command was accepted, and a text about it for the viewer."""

    ok: bool
    message: str = ""
    hint: str = ""


class CommandHandler:
    """Knows the viewers, lets one of them control the run, and applies its commands to the gate.

    Thread-safe: each viewer's commands arrive on its own thread.
    """

    def __init__(
        self,
        gate: Gate,
        recorder: Recorder,
        stop: Callable[[bool], None],
        save_checkpoint: Callable[[], None],
        controls: RankControl | None = None,
        breakpoints: RunBreakpoints | None = None,
        edits: Callable[[], LiveEdits] | None = None,
        travel: Callable[[], TimeTravel] | None = None,
        start_branch: Callable[[Branch], str] | None = None,
    ) -> None:
        """`stop(checkpoint)` and `save_checkpoint()` carry out what the gate alone cannot.
        `controls` applies commands to all processes of the run; by default to this one. `edits()`,
        `travel()` and `start_branch()` raise Refusal where the run does not offer them."""
        self._edits = edits
        self._travel = travel
        self._branch = start_branch
        self._breakpoints = breakpoints
        self._gate = gate
        self._controls: Gate | RankControl = controls or gate
        self._recorder = recorder
        self._stop = stop
        self._save_checkpoint = save_checkpoint
        self._lock = threading.RLock()
        self._viewers: dict[int, Viewer] = {}
        self._controller: int | None = None

    def joined(self, viewer: Viewer) -> None:
        """Add a viewer; the first one that is not read-only gets control."""
        with self._lock:
            self._viewers[viewer.id] = viewer
            if self._controller is None and not viewer.read_only:
                self._controller = viewer.id
            self._publish()

    def left(self, viewer: Viewer) -> None:
        """Remove a viewer; if it had control, the next viewer that sends a command gets it."""
        with self._lock:
            self._viewers.pop(viewer.id, None)
            if self._controller == viewer.id:
                self._controller = None
            self._publish()
        self._recorder.viewer_gone(viewer.id)

    def perform(self, viewer: Viewer, action: Action) -> CommandResult:
        """Carry out a command, or refuse it with a reason."""
        refusal = self._refusal(viewer, action)
        if refusal is not None:
            return refusal
        try:
            text = self._apply(viewer, action)
        except ExpressionError as error:
            return CommandResult(False, error.pointed, error.hint)
        except (Refusal, BreakpointError) as refused:
            return CommandResult(False, refused.message, refused.hint)
        checked = isinstance(action, Branch) and action.only_check
        if not checked and not isinstance(action, LOGGED):
            # The gate's step: the recorder has not yet seen the steps in its queue.
            step = self._gate.completed
            kind: NoticeKind = "control" if isinstance(action, TakeControl) else "command"
            self._recorder.notice(kind, text, step=step, who=viewer.name)
        # For these commands the status shows the effect; a message would only repeat it.
        shown = isinstance(action, (Pause, Resume, Step, StepPhase))
        return CommandResult(True, "" if shown else text)

    def _refusal(self, viewer: Viewer, action: Action) -> CommandResult | None:
        """Why this viewer may not send this command now; None if it may."""
        if viewer.read_only:
            return CommandResult(
                False, "this viewer is read-only", "attach again without --read-only to control"
            )
        status = self._recorder.status
        if status.ended and not isinstance(action, TakeControl):
            ended = "been stopped" if status.state == "stopped" else status.state
            return CommandResult(False, f"the run has {ended}: there is nothing to control")
        if isinstance(action, (TakeControl, Mark)):
            return None
        with self._lock:
            if self._controller is None:
                self._take_control(viewer)
            if self._controller != viewer.id:
                controller = (
                    self._viewers[self._controller].name if self._controller else "another viewer"
                )
                return CommandResult(
                    False, f"{controller} holds control", "take control first: ctrl+t on a screen"
                )
        return None

    def _take_control(self, viewer: Viewer) -> None:
        self._controller = viewer.id
        self._publish()

    def _publish(self) -> None:
        names = tuple(viewer.name for viewer in self._viewers.values())
        self._recorder.set_status(viewers=names, controller=self._controller)

    def _apply(self, viewer: Viewer, action: Action) -> str:
        """Carry out `action`; returns a text for the log. Raises Refusal."""
        if self._breakpoints is not None and isinstance(action, MOVES):
            self._breakpoints.forget_stop()
        match action:
            case Pause():
                self._controls.pause()
                return "pause"
            case Resume():
                self._controls.resume()
                return "resume"
            case Step(count=count):
                return self._step(count)
            case StepPhase():
                self._controls.step_phase()
                return "one phase"
            case RunToEpochEnd():
                self._controls.run_to_epoch_end()
                return "run to the end of the epoch"
            case Throttle(steps_per_second=rate):
                return self._throttle(rate)
            case Stop(checkpoint=checkpoint):
                self._stop(checkpoint)
                return "stop, with a checkpoint" if checkpoint else "stop"
            case Checkpoint():
                self._save_checkpoint()
                return "checkpoint"
            case TakeControl():
                with self._lock:
                    self._take_control(viewer)
                return "take control"
            case Mark(text=text):
                mark = single_line(text, MARK_CHARACTERS)
                if not mark:
                    raise Refusal("a mark needs some text")
                step = self._gate.completed
                self._recorder.notice("mark", mark, step=step, who=viewer.name)
                return mark
            case ChangeSettings(changes=changes):
                return self._live_edits().change(changes, viewer.name)
            case Back():
                return self._go_back(action)
            case Branch():
                return self._start_branch(action)
            case KeepSnapshots(bytes=budget):
                return self._time_travel().keep(budget)
            case UndoSettings():
                return self._live_edits().undo(viewer.name)
            case AddBreakpoint() | ChangeBreakpoint() | DeleteBreakpoint():
                return self._change_breakpoints(action)

    def _live_edits(self) -> LiveEdits:
        if self._edits is None:
            raise Refusal("this run has no settings that can be changed")
        return self._edits()

    def _time_travel(self) -> TimeTravel:
        if self._travel is None:
            raise Refusal("this run cannot go back")
        return self._travel()

    def _start_branch(self, action: Branch) -> str:
        if self._branch is None:
            raise Refusal("this run cannot be continued by another one")
        return self._branch(action)

    def _go_back(self, action: Back) -> str:
        travel = self._time_travel()
        if not action.break_at or self._breakpoints is None:
            return travel.back(action.step, action.confirmed)
        if travel.task is None:
            return self._go_back_in_script(travel, action, self._breakpoints)
        breakpoints = self._breakpoints.all
        added = breakpoints.add(action.break_at, once=True)
        try:
            text = travel.back(action.step, action.confirmed)
        except Refusal:
            breakpoints.delete(added.number)
            raise
        self._breakpoints.save()
        return f"{text}; {breakpoint_text(added)}"

    def _go_back_in_script(
        self, travel: TimeTravel, action: Back, breakpoints: RunBreakpoints
    ) -> str:
        """Go back in a script. Its step numbers keep increasing, so the condition's step is
        shifted."""
        matched = AT_STEP.fullmatch(action.break_at)
        if matched is None:
            raise Refusal(
                "going back does not reset the step numbers of a script: "
                "the condition has to name a step"
            )

        def arrived(shift: int) -> None:
            step = int(matched[1]) + shift
            added = breakpoints.all.add(f"step == {step}{matched[2]}", once=True)
            breakpoints.save()
            self._recorder.notice("command", breakpoint_text(added), step=self._gate.completed)

        return travel.back(action.step, action.confirmed, arrived)

    def _change_breakpoints(
        self, action: AddBreakpoint | ChangeBreakpoint | DeleteBreakpoint
    ) -> str:
        if self._breakpoints is None:
            raise Refusal("this run has no breakpoints")
        breakpoints = self._breakpoints.all
        match action:
            case AddBreakpoint(condition=condition, ignore=ignore, once=once, log_only=log_only):
                changed = breakpoints.add(condition, ignore=ignore, once=once, log_only=log_only)
                text = breakpoint_text(changed)
            case ChangeBreakpoint(number, enabled, ignore, once, log_only):
                changed = breakpoints.change(
                    number, enabled=enabled, ignore=ignore, once=once, log_only=log_only
                )
                text = breakpoint_text(changed)
            case DeleteBreakpoint(number=number):
                text = f"deleted {breakpoint_text(breakpoints.delete(number))}"
        self._breakpoints.save()
        return text

    def _step(self, count: int) -> str:
        if not 1 <= count <= MAX_STEPS - (self._gate.run_to or 0):
            raise Refusal(f"cannot run {count:,} steps: give a number from 1 to {MAX_STEPS:,}")
        self._controls.step(count)
        return "one step" if count == 1 else f"{count} steps"

    def _throttle(self, rate: float | None) -> str:
        low, high = MIN_STEPS_PER_SECOND, MAX_STEPS_PER_SECOND
        if rate is not None and not low <= rate <= high:  # also false for nan
            raise Refusal(
                f"cannot run at {rate:g} steps/s: give a number from {low:g} to {high:,.0f}"
            )
        self._gate.throttle(rate)
        self._recorder.speed_limit_changed()
        return "full speed" if rate is None else f"at most {rate:g} steps/s"


def breakpoint_text(breakpoint: Breakpoint) -> str:
    """`breakpoint 2: loss > 5 (once, log only)`"""
    properties = [
        *(["disabled"] if not breakpoint.enabled else []),
        *(["once"] if breakpoint.once else []),
        *([f"ignores the first {breakpoint.ignore:,}"] if breakpoint.ignore else []),
        *(["log only"] if breakpoint.log_only else []),
    ]
    more = f" ({', '.join(properties)})" if properties else ""
    return f"breakpoint {breakpoint.number}: {breakpoint.condition}{more}"
