"""Decides from a run's directory whether the run is live, paused, finished, stopped or crashed.

No run is contacted. `status.json` holds what the run last reported, about once a second, and
identifies its process: a run that reported no end and whose process is gone has crashed. A process
on another machine cannot be looked up; its run counts as crashed once its status is too old.
`run/outcome.py` decides how the training of a live process ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tui_trainer.config.run_spec import (
    SPEC_FILE,
    RunState,
    find_socket,
    machine_identity,
    process_identity,
    read_spec,
    read_state,
)
from tui_trainer.protocol.formatting import rough_duration
from tui_trainer.protocol.messages import END_STATES, EndState, EntryState
from tui_trainer.protocol.text import sanitize, sanitize_message
from tui_trainer.runs.boot_log import fatal_error
from tui_trainer.runs.security import answers

STARTING_S = 30.0
"""Age up to which a run without a `status.json` counts as starting."""
SILENT_S = 15.0
"""Age of the last status at which a run on another machine counts as crashed."""
LONG_SILENT_S = 3600.0
"""Age of the last status at which a run on another machine may be removed from this one."""

LIVE_STATES: tuple[EntryState, ...] = ("live", "paused")


@dataclass(frozen=True)
class RunEntry:
    """One run, as seen from its directory."""

    name: str
    directory: Path
    state: EntryState
    """`refused`: the contents of the directory cannot be trusted."""
    reported: RunState
    """The last `status.json`."""
    note: str = ""
    """Why the run is in this state, where that needs an explanation."""
    hint: str = ""
    """What to do about a refused run."""

    @property
    def live(self) -> bool:
        """Whether the run's process exists."""
        return self.state in LIVE_STATES

    @property
    def end_state(self) -> EndState:
        """How a run without a process ended; `crashed` where its directory cannot be trusted."""
        return self.state if self.state in END_STATES else "crashed"

    @property
    def branched_from(self) -> str:
        """The checkpoint that the run resumed from, as `RUN@STEP` for `--resume`; "" for none."""
        if not self.reported.parent:
            return ""
        name, step = Path(self.reported.parent).name, self.reported.branch_step
        return name if step is None else f"{name}@{step}"


def inspect_run(directory: Path) -> RunEntry | None:
    """The run in `directory` and its state; None when there is no run."""
    reported = read_state(directory)
    if reported is None:
        return _without_status(directory)
    state, note = determine_state(reported)
    if state == "crashed" and not reported.ended and (fatal := fatal_error(directory)):
        note = f"it died: {fatal}"
    return RunEntry(directory.name, directory, state, sanitize_message(reported), sanitize(note))


def _without_status(directory: Path) -> RunEntry | None:
    """A run without a readable status: it is starting, or died before it wrote one."""
    try:
        created_at = (directory / SPEC_FILE).stat().st_mtime
        spec = read_spec(directory)
    except (OSError, ValueError):
        return None
    reported = RunState(
        name=spec.name,
        task=spec.task,
        title=spec.title,
        started_at=created_at,
        parent=spec.parent,
        branch_step=spec.branch_step,
    )
    # The clock of a file server may be ahead of this machine's.
    if abs(time.time() - created_at) < STARTING_S:
        return RunEntry(directory.name, directory, "live", reported, "starting")
    fatal = fatal_error(directory)
    note = f"it died: {fatal}" if fatal else "it died before it wrote a status"
    return RunEntry(directory.name, directory, "crashed", reported, sanitize(note))


def determine_state(reported: RunState) -> tuple[EntryState, str]:
    """(state, reason) of a run whose last status is `reported`."""
    if reported.state in END_STATES:
        refused = f"could not start: {reported.reason}"
        return reported.state, refused if reported.refused else reported.reason
    alive: EntryState = "paused" if reported.state == "paused" else "live"
    if reported.machine == machine_identity():
        if process_exists(reported):
            return alive, reported.reason
        return "crashed", "its process exited without recording an end"
    silence = time.time() - reported.written_at
    if silence < SILENT_S:
        return alive, reported.reason
    host = reported.host or "another machine"
    return "crashed", f"no sign of life from {host} for {rough_duration(silence)}"


def process_exists(reported: RunState) -> bool:
    """Whether the process that wrote this status runs on this machine. The start time distinguishes
    it from a later process with the same pid."""
    return (
        reported.machine == machine_identity()
        and reported.process != ""
        and process_identity(reported.pid) == reported.process
    )


def may_be_running(run: RunEntry) -> str:
    """Why the run may still be running regardless of its state; "" when it is certainly over.

    For use before anything irreversible: a lost or late status does not prove that a run has ended.
    """
    if run.live:
        return f"it is {run.state}"
    if answers(find_socket(run.directory)):
        return "a process still answers on its socket"
    reported = run.reported
    silence = time.time() - reported.written_at
    elsewhere = reported.machine not in ("", machine_identity())
    if not reported.ended and elsewhere and silence < LONG_SILENT_S:
        host = reported.host or "another machine"
        return (
            f"its last status came from {host} {rough_duration(silence)} ago, and processes there "
            "cannot be looked up from here"
        )
    return ""
