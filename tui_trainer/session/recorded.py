"""A run's store, and whether anybody still writes to it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tui_trainer.config.state import process_identity, this_place
from tui_trainer.history.store.reader import RecordedHistory
from tui_trainer.protocol.messages import Status
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


def with_end(recorded: Status, end: Status | None) -> Status:
    """A killed run could not record how it ended."""
    if end is None or recorded.ended:
        return recorded
    return msgspec.structs.replace(recorded, state=end.state, reason=end.reason)
