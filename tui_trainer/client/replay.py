"""A recorded run as a session: the same screens, with a cursor in time.

`Resume` plays, `Pause` stops playing, `Step` moves the cursor, `Throttle` sets the speed; commands
that would change the run are refused. Everything happens on the polling thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from tui_trainer.client.api import ARTIFACTS_KEPT, EVENTS_KEPT, LOG_LINES_KEPT, Link, Snapshot
from tui_trainer.history import History
from tui_trainer.history.loss_spikes import Spike, find_spikes
from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.actions import (
    Action,
    Pause,
    Resume,
    RunToEpochEnd,
    Step,
    StepPhase,
    Throttle,
)
from tui_trainer.protocol.inspection import Inspected, InspectionRequest
from tui_trainer.protocol.messages import Ack, Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.runs.recording import end_status, reported_info, reported_status, with_end
from tui_trainer.store.events import StoredEvents
from tui_trainer.store.reader import StoredHistory

SPEED_ROWS = 20
"""Steps before the cursor whose median duration gives the speed."""
LAST_STEP = 2**62
REFRESH_S = 1.0
"""How often a run that may still be live is read again."""


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
    """The status to show with the cursor at `step`; `history` is positioned there.

    `recorded` is the last status that the run recorded, which is shown `at_end`; elsewhere the run
    is `paused`, or `running` while the cursor plays.
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
    """Steps per second of the steps before the cursor, without pauses."""
    took = _newest(history, schema.STEP, "step_ms", SPEED_ROWS)
    took = took[np.isfinite(took) & (took > 0)]
    return float(1000 / np.median(took)) if len(took) else None


def _clipped_share(history: History, window: int) -> float | None:
    """Share of the last `window` steps before the cursor that were clipped."""
    scales = _newest(history, schema.CLIP, "scale", window)
    return float((scales < 1).mean()) if len(scales) else None


def _newest(history: History, name: str, column: str, count: int) -> Floats:
    """The newest `count` values of a column over all tables called `name`, one per optimizer."""
    steps, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for table in history.tables_named(name):
        place = table.column(column)
        if place is not None and table.rows:
            at, rows = table.tail(count)
            steps.append(at)
            values.append(rows[:, place])
    order = np.argsort(np.concatenate(steps), kind="stable")
    return np.concatenate(values)[order][-count:]


NO_TENSORS = "a recording holds what was measured, not the tensors"
NO_TENSORS_HINT = "attach to a live run to inspect its tensors: tui-trainer attach"


class ReplaySession:
    """Implements `client.api.Session` over a run's store, read-only.

    The cursor starts at the last recorded step. Raises StoreError when there is nothing to read.
    """

    def __init__(
        self, directory: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = Path(directory)
        end = end_status(self._directory)
        self._over = end is not None
        self._history = StoredHistory(directory, ended=self._over)
        store = self._history.store
        self.moments = StoredEvents(store)
        """Recorded events, log lines and samples."""
        self._clock = clock
        self._info = store.info() or reported_info(self._directory)
        self._recorded = with_end(store.status() or reported_status(self._directory), end)
        self._spikes: tuple[int, list[Spike]] = (-1, [])
        self._speed: float | None = None
        self._playing = False
        self._played_at = self._refreshed_at = clock()
        self._fraction = 0.0
        self._callback: Callable[[], None] | None = None
        self.cursor = self._history.last_step
        """The step that is shown."""
        self._follows = True
        self._snapshot = Snapshot(link=Link("replay", read_only=True), history=self._history)
        self._show()

    # ------------------------------------------------------------ the cursor

    @property
    def history(self) -> StoredHistory:
        """The recorded history, up to the cursor."""
        return self._history

    @property
    def last_step(self) -> int:
        return self._history.last_step

    @property
    def first_step(self) -> int:
        """The first position of the cursor, before the first recorded step."""
        return self._info.branch_step or 0

    def seek(self, step: int) -> None:
        """Move the cursor to the end of `step`, or to the nearest recorded step."""
        self.cursor = min(max(step, self.first_step), self.last_step)
        self._fraction = 0.0
        self._follows = self.cursor == self.last_step
        self._show()

    def play(self, steps_per_second: float | None = None) -> None:
        """Play at `steps_per_second`, or at the recorded speed. At the end of a live run the cursor
        follows the run; at the end of a finished run it starts again from the beginning."""
        self._speed, self._playing, self._played_at = steps_per_second, True, self._clock()
        if self.cursor >= self.last_step:
            if self.live:
                self._follows, self._playing = True, False
            else:
                self.cursor, self._follows = self.first_step, False
        self._show()

    def stop_playing(self) -> None:
        self._playing = self._follows = False
        self._show()

    @property
    def playing(self) -> bool:
        """Whether the cursor moves, by itself or because it follows a live run."""
        return self._playing or self.follows

    @property
    def follows(self) -> bool:
        """Whether the cursor stays at the end of a live run."""
        return self._follows and self.live and not self._playing

    @property
    def recorded_speed(self) -> float:
        """Steps per second of the whole run, pauses included."""
        return (
            self._history.step_times.steps_per_second() or self._recorded.steps_per_second or 10.0
        )

    @property
    def speed(self) -> float:
        """Steps per second at which the cursor plays."""
        return self._speed or self.recorded_speed

    @property
    def factor(self) -> float:
        """`speed` as a multiple of the recorded speed."""
        return self.speed / self.recorded_speed

    @factor.setter
    def factor(self, times: float) -> None:
        self._speed = times * self.recorded_speed
        self._show()

    def spikes(self) -> list[Spike]:
        """The worst spikes of the loss over the whole run, worst first (see `find_spikes`)."""
        if self._spikes[0] != self.last_step:
            found: list[Spike] = []
            table = self._history.table(schema.STEP)
            if table is not None:
                self._history.seek(self.last_step)
                found = find_spikes(table, "loss")
                self._history.seek(self.cursor)
            self._spikes = (self.last_step, found)
        return self._spikes[1]

    @property
    def live(self) -> bool:
        """Whether more steps may come."""
        return not self._over and not self._recorded.ended

    # ------------------------------------------------------------ the session

    def poll(self) -> Snapshot:
        now = self._clock()
        if self.live and now - self._refreshed_at >= REFRESH_S:
            self._refresh(now)
        if self._playing:
            self._fraction += (now - self._played_at) * self.speed
            self._played_at = now
            whole, self._fraction = int(self._fraction), self._fraction % 1
            if whole and self.cursor < self.last_step:
                fraction = self._fraction
                self.seek(self.cursor + whole)
                self._fraction = fraction
            elif self.cursor >= self.last_step:
                self._playing = False  # follows the run from here, if it is live
                self._show()
        return self._snapshot

    def send(self, action: Action) -> Future[Ack]:
        refused = ""
        match action:
            case Pause():
                self.stop_playing()
            case Resume():
                self.play(self._speed)
            case Step():
                self._playing = False
                self.seek(self.cursor + action.count)
            case StepPhase():
                refused = "a recording holds whole steps, not phases"
            case RunToEpochEnd():
                refused = self._to_epoch_end()
            case Throttle():
                self._speed = action.steps_per_second
            case _:
                refused = "this is a recording, which cannot be changed"
        future: Future[Ack] = Future()
        future.set_result(Ack(0, not refused, self._snapshot.status, refused))
        if self._callback is not None:
            self._callback()
        return future

    def inspect(self, request: InspectionRequest) -> Future[Inspected]:
        """A recording has no tensors."""
        answer: Future[Inspected] = Future()
        answer.set_result(Inspected(0, "failed", message=NO_TENSORS, hint=NO_TENSORS_HINT))
        return answer

    def watch(self, topics: frozenset[str]) -> None:
        """Nothing to do: every recorded table is there."""

    def set_rate(self, polls_per_second: float) -> None:
        """Nothing to do: there is no run to poll."""

    def on_arrival(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def close(self) -> None:
        self._callback = None
        self._history.close()

    # ------------------------------------------------------------ the snapshot

    def _refresh(self, now: float) -> None:
        self._refreshed_at = now
        self._history.refresh()  # `store.fault` describes any damage
        store = self._history.store
        end = end_status(self._directory)
        self._over = end is not None
        self._info = store.info() or self._info
        self._recorded = with_end(store.status() or self._recorded, end)
        if self._follows and not self._playing:
            self.cursor = self.last_step
        self._show()

    def _to_epoch_end(self) -> str:
        length = self._info.steps_per_epoch
        if not length:
            why = self._info.unseen.get("epochs", "")
            return f"this run has no epochs: {why}" if why else "this run has no epochs"
        self._playing = False
        self.seek((self.cursor // length + 1) * length)
        return ""

    def _show(self) -> None:
        self._history.seek(self.cursor)
        moments, cursor = self.moments, self.cursor
        # At the end, include the events of a step that never completed: skipped, or cut off by a
        # crash.
        until = cursor if cursor < self.last_step else LAST_STEP
        self._snapshot = replace(
            self._snapshot,
            status=status_at(
                cursor,
                self._history,
                self._info,
                self._recorded,
                playing=self.playing,
                at_end=cursor >= self.last_step,
                elapsed_s=self._history.step_times.elapsed_s(cursor),
            ),
            info=self._info,
            events=moments.events(until, EVENTS_KEPT),
            log=moments.log(cursor, LOG_LINES_KEPT),
            artifacts=moments.artifacts(cursor, ARTIFACTS_KEPT),
            version=self._snapshot.version + 1,
        )
        # Last, since damage is found by reading.
        link = Link("replay", self._history.store.fault, read_only=True)
        self._snapshot = replace(self._snapshot, link=link)
