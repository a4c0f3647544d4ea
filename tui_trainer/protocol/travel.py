"""Where a training can be taken back to."""

from __future__ import annotations

from typing import Literal

import msgspec

PlaceKind = Literal["snapshot", "checkpoint", "edit"]


class TravelPlace(msgspec.Struct, frozen=True, array_like=True):
    """A step that something is known of."""

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
    """Whether any step can be arrived at: a script gets the state of a snapshot only."""
    bytes: int = 0
    """Memory that the snapshots take."""
    budget: int = 0
    step_s: float | None = None
    """Seconds that a step takes; None where none was measured yet."""
    snapshot_bytes: int = 0
    """Memory that one snapshot takes."""


class ReadTimeline(msgspec.Struct, tag="read_timeline", frozen=True):
    """Asks where the training can be taken back to."""
