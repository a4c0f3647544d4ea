"""After the app has closed: the state of the run in one line, and the exit status."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace

from tui_trainer.cli.errors import FAULT, USAGE
from tui_trainer.client.api import Snapshot
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.config.run_state import RunState, read_state
from tui_trainer.protocol import schema
from tui_trainer.protocol.formatting import number
from tui_trainer.protocol.messages import END_STATES, State


@dataclass(frozen=True)
class ExitState:
    """The state of a run when its screen was closed."""

    state: State
    step: int = 0
    loss: float | None = None
    reason: str = ""
    hint: str = ""
    pid: int = 0
    refused: bool = False
    """As `Status.refused`."""
    exit_status: int | None = None
    """Exit status of the run process; None while it is running."""

    @property
    def ended(self) -> bool:
        return self.state in END_STATES


def final_outcome(
    snapshot: Snapshot, on_disk: RunState | None, process: subprocess.Popen[bytes]
) -> ExitState:
    """The newer of the session's last snapshot and the run's status file. A process that is gone
    without an end record has crashed."""
    status = snapshot.status
    code = process.poll()
    outcome = ExitState(status.state, status.step, _last_loss(snapshot))
    outcome = replace(outcome, reason=status.reason, hint=status.hint, refused=status.refused)
    if on_disk is not None and (on_disk.ended or on_disk.step > outcome.step) and not outcome.ended:
        outcome = ExitState(on_disk.state, on_disk.step, on_disk.loss)
        outcome = replace(
            outcome, reason=on_disk.reason, hint=on_disk.hint, refused=on_disk.refused
        )
    if code is not None and not outcome.ended:
        died = f"its process exited without writing its status ({_ending(code)})"
        outcome = replace(outcome, state="crashed", reason=outcome.reason or died)
    return replace(outcome, pid=process.pid, exit_status=_as_status(code))


def _last_loss(snapshot: Snapshot) -> float | None:
    table = snapshot.history.table(schema.STEP)
    return table.newest("loss") if table is not None else None


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _as_status(code: int | None) -> int | None:
    return 128 - code if code is not None and code < 0 else code


def exit_status(spec: RunSpec, outcome: ExitState) -> int:
    """The script's own exit status for `run`. For a task: 0, 1 after a crash or when the last loss
    is not finite, 2 when it could not start as requested."""
    if spec.is_script and outcome.ended and outcome.exit_status is not None:
        return outcome.exit_status
    if outcome.state == "finished":
        return outcome.exit_status or 0  # 1 when the last loss is not finite
    if outcome.state != "crashed":
        return 0
    return USAGE if outcome.exit_status == USAGE else FAULT


def exit_summary(spec: RunSpec, outcome: ExitState) -> str:
    """One line for the shell after the app has closed."""
    at = f"step {outcome.step:,}"
    if outcome.loss is not None:
        at += f", loss {number(outcome.loss, 0)}"
    match outcome.state:
        case "finished" | "stopped":
            text = f"{outcome.state} at {at}"
        case "crashed" if outcome.refused or (not outcome.step and outcome.reason):
            text = f"could not start: {outcome.reason}"
        case "crashed":
            text = f"crashed at {at}" + (f": {outcome.reason}" if outcome.reason else "")
        case "paused":
            text = f"paused at {at}; tui-trainer attach {spec.name} opens it again"
        case _:
            text = f"still training at {at}; tui-trainer attach {spec.name} opens it again"
    where = "" if outcome.refused else f" · {spec.directory}"
    return f"{spec.name} {' '.join(text.split())}{where}"


def status_on_disk(spec: RunSpec) -> RunState | None:
    """The run's status file; None without one."""
    return read_state(spec.directory)
