"""The places that a training can be taken back to."""

from __future__ import annotations

from typing import Literal

import msgspec

PlaceKind = Literal["snapshot", "checkpoint", "edit"]


class TravelPlace(msgspec.Struct, frozen=True, array_like=True):
    """A step with a snapshot, a checkpoint or a change of settings."""

    step: int
    kind: PlaceKind
    text: str = ""
    """Of an edit what it changed."""


class Timeline(msgspec.Struct, tag="timeline", frozen=True, array_like=True):
    """The steps of a training that are kept, and the changes of its settings, by step."""

    places: tuple[TravelPlace, ...]
    now: int
    newest: int
    exact: bool
    """Whether any step can be reached; a script can only get the state of a snapshot."""
    bytes: int = 0
    """Memory that the snapshots take."""
    budget: int = 0
    step_s: float | None = None
    """Seconds that a step takes; None where none was measured yet."""
    snapshot_bytes: int = 0
    """Memory that one snapshot takes."""


class ReadTimeline(msgspec.Struct, tag="read_timeline", frozen=True):
    """Asks for the timeline."""
