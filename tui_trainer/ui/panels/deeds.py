"""What people did to a run, as marks on the axis of its charts: it may be why a curve bends."""

from __future__ import annotations

import numpy as np

from tui_trainer.protocol.messages import Notice
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.layers import Layer, Marks

DEEDS = ("command", "mark")
"""Kinds of `Notice` that somebody caused."""


def deeds(
    snapshot: Snapshot, steps: tuple[int, int], buckets: int, palette: Palette, glyphs: Glyphs
) -> list[Layer]:
    """Marks on a chart of `steps` (start <= step < stop) that is `buckets` dot columns wide."""
    start, stop = steps
    found = [
        event.step
        for event in snapshot.events
        if isinstance(event, Notice) and event.kind in DEEDS and start <= event.step < stop
    ]
    if not found:
        return []
    columns = (np.array(found, np.int64) - start) * buckets // max(1, stop - start)
    return [Marks(palette.accent, columns, glyphs.deed)]
