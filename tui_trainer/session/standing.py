"""How a recorded run stood at a step: its status then, from what was measured by then."""

from __future__ import annotations

import msgspec
import numpy as np

from tui_trainer.history import History
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Status

SPEED_ROWS = 20
"""Steps before the cursor that the speed there is taken over."""


def status_at(
    step: int,
    history: History,
    info: RunInfo,
    recorded: Status,
    *,
    playing: bool,
    at_end: bool,
    elapsed_s: float,
) -> Status:
    """The status to show with the cursor at `step`, up to which `history` is seen.

    `recorded` is the last status that the run recorded, which is shown `at_end`; elsewhere the run
    is `paused`, or `running` where the cursor plays.
    """
    if at_end and recorded.ended and not playing:
        state = recorded.state
    else:
        state = "running" if playing else "paused"
    speed = _speed(history)
    items = info.items_per_step
    length = info.steps_per_epoch
    return msgspec.structs.replace(
        recorded,
        state=state,
        step=step,
        epoch=step / length if length else recorded.epoch,
        phase="step",
        reason=recorded.reason if at_end else "",
        hint=recorded.hint if at_end else "",
        run_to=None,
        throttle=None,
        waiting_for="",
        steps_per_second=speed,
        items_per_second=speed * items if speed and items else None,
        clipped_share=_clipped_share(history, recorded.clip_window),
        cost_share=recorded.cost_share if at_end else None,
        elapsed_s=recorded.elapsed_s if at_end else elapsed_s,
        remaining_s=None,
        viewers=(),
        controller=None,
    )


def _speed(history: History) -> float | None:
    """Steps a second of the newest steps seen, pauses not counted."""
    table = history.table(tables.STEP)
    if table is None or not table.rows:
        return None
    names = [column.name for column in table.table.columns]
    if "step_ms" not in names:
        return None
    _, values = table.tail(SPEED_ROWS)
    took = values[:, names.index("step_ms")]
    took = took[np.isfinite(took) & (took > 0)]
    return float(1000 / np.median(took)) if len(took) else None


def _clipped_share(history: History, window: int) -> float | None:
    """Of the newest steps seen that could be clipped, those that were."""
    table = history.table(tables.CLIP)
    if table is None or not table.rows:
        return None
    _, values = table.tail(window)
    if not len(values):  # a damaged recording
        return None
    return float((values[:, 3] < 1).mean())
