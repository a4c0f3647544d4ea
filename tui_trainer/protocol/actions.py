"""The actions that a viewer can ask of a run: pause, step, stop, go back, change settings, …"""

from __future__ import annotations

import msgspec

from tui_trainer.protocol.settings import SettingChange


class Pause(msgspec.Struct, tag="pause", frozen=True):
    """Stop at the next phase boundary."""


class Resume(msgspec.Struct, tag="resume", frozen=True):
    """Run freely."""


class Step(msgspec.Struct, tag="step", frozen=True):
    """Run `count` optimizer steps, then pause after the `step` phase of the last one."""

    count: int = 1


class StepPhase(msgspec.Struct, tag="step_phase", frozen=True):
    """Run to the next phase boundary, then pause."""


class RunToEpochEnd(msgspec.Struct, tag="run_to_epoch_end", frozen=True):
    """Run to the last step of the current epoch, then pause."""


class Throttle(msgspec.Struct, tag="throttle", frozen=True):
    """Limit the steps per second, for watching; None lifts the limit."""

    steps_per_second: float | None = None


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Finish the running step, optionally write a checkpoint, then end the run."""

    checkpoint: bool = False


class Checkpoint(msgspec.Struct, tag="checkpoint", frozen=True):
    """Write a checkpoint at the next step boundary and continue."""


class TakeControl(msgspec.Struct, tag="take_control", frozen=True):
    """Become the viewer that may command; the other viewers see a notice of kind `control`."""


class Mark(msgspec.Struct, tag="mark", frozen=True):
    """Add a note at the current step, shown in the log and on the charts."""

    text: str


class AddBreakpoint(msgspec.Struct, tag="add_breakpoint", frozen=True):
    """Pause whenever a condition is met; the fields are those of `Breakpoint`."""

    condition: str
    ignore: int = 0
    once: bool = False
    log_only: bool = False


class ChangeBreakpoint(msgspec.Struct, tag="change_breakpoint", frozen=True):
    """Change a breakpoint; None leaves a field as it is."""

    number: int
    enabled: bool | None = None
    ignore: int | None = None
    once: bool | None = None
    log_only: bool | None = None


class DeleteBreakpoint(msgspec.Struct, tag="delete_breakpoint", frozen=True):
    """Delete a breakpoint."""

    number: int


class ChangeSettings(msgspec.Struct, tag="change_settings", frozen=True):
    """Change settings of the training at the next step boundary, all at once or none."""

    changes: tuple[SettingChange, ...]


class Back(msgspec.Struct, tag="back", frozen=True):
    """Go back to the end of a step, and pause there."""

    step: int | None = None
    """None: one step back."""
    confirmed: bool = False
    """Whether to go back even if repeating the steps takes long."""
    break_at: str = ""
    """Condition of a breakpoint that is set at that step and met once; "": none."""


class KeepSnapshots(msgspec.Struct, tag="keep_snapshots", frozen=True):
    """Keep snapshots of the training from here on, in this much host memory; 0: none."""

    bytes: int


class Branch(msgspec.Struct, tag="branch", frozen=True):
    """Start a new run that continues from the current step of this one, with other settings."""

    changes: tuple[SettingChange, ...] = ()
    name: str = ""
    """"": the name of this run and a number."""
    paused: bool = False
    only_check: bool = False
    """Check the name and the changes without starting the run."""
    back_to: int | None = None
    """The step that a script was asked to go back to just before. The branch is refused if the
    state of that step is not available."""


class UndoSettings(msgspec.Struct, tag="undo_settings", frozen=True):
    """Undo the latest change of settings that is not undone yet."""


Action = (
    Pause
    | Resume
    | Step
    | StepPhase
    | RunToEpochEnd
    | Throttle
    | Stop
    | Checkpoint
    | TakeControl
    | Mark
    | AddBreakpoint
    | ChangeBreakpoint
    | DeleteBreakpoint
    | ChangeSettings
    | UndoSettings
    | Back
    | KeepSnapshots
    | Branch
)
