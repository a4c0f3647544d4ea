"""A run's store, and whether anybody still writes to it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tui_trainer.config.spec import read_spec
from tui_trainer.config.state import RunState, process_identity, read_state, this_place
from tui_trainer.history.store.reader import RecordedHistory
from tui_trainer.protocol.describe import DeviceInfo, RunInfo
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.text import harmless, harmless_all
from tui_trainer.session.registry import look_at


def open_history(directory: Path) -> RecordedHistory:
    """What a run has recorded, opened so that reading leaves no trace. Raises StoreFault."""
    return RecordedHistory(directory, ended=how_it_is(directory)[0])


def how_it_is(directory: Path) -> tuple[bool, Status | None]:
    """Whether nobody writes to a run's store any more, and how it ended if it could not say so."""
    run = look_at(directory)
    if run is None or run.live:
        return False, None
    said = run.said
    if said.place == this_place() and said.began and process_identity(said.pid) == said.began:
        return False, None  # it has ended, and is writing down the last of it
    return True, Status(state=run.state, step=said.step, reason=run.note or said.reason)


def known_of(directory: Path) -> RunInfo:
    """What there is to know of a run whose own description cannot be read: what was asked for, and
    what it last said of itself."""
    said = read_state(directory) or RunState(name=directory.name, task="script")
    said = harmless_all(said)
    info = RunInfo(
        said.name,
        said.task,
        said.title,
        directory=str(directory),
        host=said.host,
        pid=said.pid,
        started_at=said.started_at,
        device=DeviceInfo("", said.device) if said.device else None,
        total_steps=said.total_steps,
        item_unit=said.item_unit,
        parent=said.parent,
        branch_step=said.branch_step,
    )
    try:
        spec = harmless_all(read_spec(directory))
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


def last_said(directory: Path) -> Status:
    """How a run last said that it was, where its store does not."""
    said = read_state(directory)
    if said is None:
        return Status()
    return Status(
        state=said.state,
        step=said.step,
        epoch=said.epoch,
        steps_per_second=said.steps_per_second,
        items_per_second=said.items_per_second,
        elapsed_s=said.elapsed_s,
        reason=harmless(said.reason),
        hint=harmless(said.hint),
        refused=said.refused,
    )


def with_end(recorded: Status, end: Status | None) -> Status:
    """A killed run could not record how it ended."""
    if end is None or recorded.ended:
        return recorded
    return msgspec.structs.replace(recorded, state=end.state, reason=end.reason)
