"""Reads a run's recording without contacting the run: history, description, last status.

A run that was killed could not record how it ended; this is derived from its directory.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tui_trainer.config.run_spec import RunState, read_spec, read_state
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import SCRIPT, DeviceInfo, RunInfo
from tui_trainer.protocol.text import sanitize, sanitize_message
from tui_trainer.runs.liveness import inspect_run, process_exists
from tui_trainer.store.reader import StoredHistory


def open_history(directory: Path) -> StoredHistory:
    """The recorded history, opened so that reading it leaves no trace. Raises StoreError."""
    return StoredHistory(directory, ended=end_status(directory) is not None)


def end_status(directory: Path) -> Status | None:
    """How a run that no longer writes to its store ended; None while it may still write."""
    run = inspect_run(directory)
    if run is None or run.live:
        return None
    reported = run.reported
    if process_exists(reported):
        return None  # it has ended and is writing the last of its records
    return Status(state=run.end_state, step=reported.step, reason=run.note or reported.reason)


def with_end(recorded: Status, end: Status | None) -> Status:
    """The recorded status, with the state and reason of `end` if it does not contain the end."""
    if end is None or recorded.ended:
        return recorded
    return msgspec.structs.replace(recorded, state=end.state, reason=end.reason)


def reported_status(directory: Path) -> Status:
    """The status in `status.json`, for a store that has none."""
    reported = read_state(directory)
    if reported is None:
        return Status()
    return Status(
        state=reported.state,
        step=reported.step,
        epoch=reported.epoch,
        steps_per_second=reported.steps_per_second,
        items_per_second=reported.items_per_second,
        elapsed_s=reported.elapsed_s,
        reason=sanitize(reported.reason),
        hint=sanitize(reported.hint),
        refused=reported.refused,
    )


def reported_info(directory: Path) -> RunInfo:
    """The description of a run from `run.json` and `status.json`, for a store that has none."""
    reported = read_state(directory) or RunState(name=directory.name, task=SCRIPT)
    reported = sanitize_message(reported)
    info = RunInfo(
        reported.name,
        reported.task,
        reported.title,
        directory=str(directory),
        host=reported.host,
        pid=reported.pid,
        started_at=reported.started_at,
        device=DeviceInfo("", reported.device) if reported.device else None,
        total_steps=reported.total_steps,
        item_unit=reported.item_unit,
        parent=reported.parent,
        branch_step=reported.branch_step,
    )
    try:
        spec = sanitize_message(read_spec(directory))
    except (OSError, ValueError):
        return info
    return msgspec.structs.replace(
        info,
        name=spec.name,
        task=spec.task,
        title=info.title or spec.title,
        command=spec.command,
        configuration=spec.configuration,
        working_directory=spec.working_directory,
        parent=spec.parent,
        branch_step=spec.branch_step,
    )
