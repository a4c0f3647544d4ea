"""After the screen has closed: what became of the run, in one line, and the exit status."""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass, replace

from tui_trainer.cli.errors import FAULT, USAGE
from tui_trainer.config.spec import RunSpec
from tui_trainer.config.state import RunState, read_state
from tui_trainer.protocol import tables
from tui_trainer.session.api import Snapshot


@dataclass(frozen=True)
class Outcome:
    """How a run stood when its screen closed."""

    state: str
    """As `Status.state`."""
    step: int = 0
    loss: float | None = None
    reason: str = ""
    hint: str = ""
    pid: int = 0
    refused: bool = False
    """As `Status.refused`."""
    exit_status: int | None = None
    """Of the run process; None while it lives."""

    @property
    def ended(self) -> bool:
        """Whether no further step will come."""
        return self.state in ("finished", "stopped", "crashed")


def outcome_of(
    snapshot: Snapshot, kept: RunState | None, process: subprocess.Popen[bytes]
) -> Outcome:
    """The newest of what the session showed last and what the run left on disk; a process that is
    gone without having said so has crashed."""
    status = snapshot.status
    code = process.poll()
    told = Outcome(status.state, status.step, _last_loss(snapshot))
    told = replace(told, reason=status.reason, hint=status.hint, refused=status.refused)
    if kept is not None and (kept.ended or kept.step > told.step) and not told.ended:
        told = Outcome(kept.state, kept.step, kept.loss)
        told = replace(told, reason=kept.reason, hint=kept.hint, refused=kept.refused)
    if code is not None and not told.ended:
        died = f"its process ended without a word ({_ending(code)})"
        told = replace(told, state="crashed", reason=told.reason or died)
    return replace(told, pid=process.pid, exit_status=_as_status(code))


def _last_loss(snapshot: Snapshot) -> float | None:
    table = snapshot.history.table(tables.STEP)
    latest = table.latest() if table is not None else None
    return float(latest[1][0]) if latest is not None else None


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _as_status(code: int | None) -> int | None:
    return 128 - code if code is not None and code < 0 else code


def exit_status(spec: RunSpec, outcome: Outcome) -> int:
    """The script's own for `run`. For a task 0, 1 where it crashed or its last loss was not finite,
    2 where it could not be run as asked."""
    if spec.task == "script" and outcome.ended and outcome.exit_status is not None:
        return outcome.exit_status
    if outcome.state == "finished":
        return outcome.exit_status or 0  # its loss may not have been finite
    if outcome.state != "crashed":
        return 0
    return USAGE if outcome.exit_status == USAGE else FAULT


def farewell(spec: RunSpec, outcome: Outcome) -> str:
    """One line for the shell's screen."""
    at = f"step {outcome.step:,}"
    if outcome.loss is not None:
        at += (
            f", loss {outcome.loss:.4g}"
            if math.isfinite(outcome.loss)
            else f", loss {outcome.loss}"
        )
    match outcome.state:
        case "finished" | "stopped":
            said = f"{outcome.state} at {at}"
        case "crashed" if outcome.refused or (not outcome.step and outcome.reason):
            said = f"could not start: {outcome.reason}"
        case "crashed":
            said = f"crashed at {at}" + (f": {outcome.reason}" if outcome.reason else "")
        case "paused":
            said = f"still paused at {at}; tui-trainer attach {spec.name} comes back to it"
        case _:
            said = f"still training at {at}; tui-trainer attach {spec.name} comes back to it"
    kept = "" if outcome.refused else f" · {spec.directory}"
    return f"{spec.name} {' '.join(said.split())}{kept}"


def last_told(spec: RunSpec) -> RunState | None:
    """What the run last left on disk about itself."""
    return read_state(spec.directory)
