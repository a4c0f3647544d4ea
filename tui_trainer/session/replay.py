"""A recorded run as a session: the same screens, with a cursor in time.

`Resume` plays, `Pause` stands still, `Step` moves the cursor, `Throttle` sets the speed; what would
change the run is refused. All of it happens on the thread that polls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import msgspec

from tui_trainer.history.store.moments import Moments
from tui_trainer.history.store.reader import RecordedHistory
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import (
    Ack,
    Action,
    Pause,
    Resume,
    RunToEpochEnd,
    Status,
    Step,
    StepPhase,
    Throttle,
)
from tui_trainer.session.api import ARTIFACTS_KEPT, EVENTS_KEPT, LOG_LINES_KEPT, Link, Snapshot

REFRESH_S = 1.0
"""How often a run that may still be living is looked at again."""


class ReplaySession:
    """Implements `session.api.Session` over a run's store, read-only.

    Opens at the end of what was recorded. Raises StoreFault when there is nothing to read.
    """

    def __init__(
        self, directory: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._history = RecordedHistory(directory)
        store = self._history.store
        self.moments = Moments(store)
        """Where something happened: what to jump to."""
        self._clock = clock
        self._info = store.info() or RunInfo(os.path.basename(os.fspath(directory)), "script")
        self._recorded = store.status() or Status()
        self._speed: float | None = None
        self._playing = False
        self._played_at = self._refreshed_at = clock()
        self._fraction = 0.0
        self._callback: Callable[[], None] | None = None
        self.cursor = self._history.last_step
        """The step that every panel shows."""
        self._follows = True
        self._snapshot = Snapshot(link=Link("replay", read_only=True), history=self._history)
        self._show()

    # ------------------------------------------------------------ the cursor

    @property
    def last_step(self) -> int:
        """The newest step recorded."""
        return self._history.last_step

    def seek(self, step: int) -> None:
        """Show the run as it was when `step` had been made (or the nearest step there is)."""
        self.cursor = min(max(step, 0), self.last_step)
        self._follows = self.cursor == self.last_step
        self._show()

    def play(self, steps_per_second: float | None = None) -> None:
        """Let the cursor run, at the recorded speed or at this one."""
        self._speed, self._playing, self._played_at = steps_per_second, True, self._clock()
        if self.cursor >= self.last_step and not self._living:
            self.cursor, self._follows = 0, False
        self._show()

    def stand(self) -> None:
        """Let the cursor stand."""
        self._playing = False
        self._show()

    @property
    def speed(self) -> float:
        """Steps a second at which the cursor runs when it plays."""
        recorded = self._recorded.steps_per_second or self.moments.steps_per_second()
        return self._speed or recorded or 10.0

    @property
    def _living(self) -> bool:
        return not self._recorded.ended

    # ------------------------------------------------------------ the session

    def poll(self) -> Snapshot:
        """See `Session.poll`."""
        now = self._clock()
        if self._living and now - self._refreshed_at >= REFRESH_S:
            self._refresh(now)
        if self._playing:
            self._fraction += (now - self._played_at) * self.speed
            self._played_at = now
            whole, self._fraction = int(self._fraction), self._fraction % 1
            if whole and self.cursor < self.last_step:
                self.seek(self.cursor + whole)
            elif self.cursor >= self.last_step and not self._living:
                self.stand()
        return self._snapshot

    def send(self, action: Action) -> Future[Ack]:
        """See `Session.send`."""
        refused = ""
        match action:
            case Pause():
                self.stand()
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
                refused = "this is a recording: it can be looked at, not changed"
        future: Future[Ack] = Future()
        future.set_result(Ack(0, not refused, self._snapshot.status, refused))
        if self._callback is not None:
            self._callback()
        return future

    def watch(self, topics: frozenset[str]) -> None:
        """See `Session.watch`; all that was recorded is there."""

    def set_rate(self, polls_per_second: float) -> None:
        """See `Session.set_rate`; the screen's own rate is what counts."""

    def on_arrival(self, callback: Callable[[], None] | None) -> None:
        """See `Session.on_arrival`."""
        self._callback = callback

    def close(self) -> None:
        """See `Session.close`."""
        self._callback = None
        self._history.close()

    # ------------------------------------------------------------ the picture

    def _refresh(self, now: float) -> None:
        self._refreshed_at = now
        self._history.refresh()
        store = self._history.store
        self._info = store.info() or self._info
        self._recorded = store.status() or self._recorded
        if self._follows and not self._playing:
            self.cursor = self.last_step
        self._show()

    def _to_epoch_end(self) -> str:
        length = self._info.steps_per_epoch
        if not length:
            return "this run has no epochs"
        self._playing = False
        self.seek((self.cursor // length + 1) * length)
        return ""

    def _show(self) -> None:
        self._history.seek(self.cursor)
        moments, cursor = self.moments, self.cursor
        fault = self._history.store.fault
        self._snapshot = replace(
            self._snapshot,
            link=Link("replay", fault, read_only=True),
            status=self._status(),
            info=self._info,
            events=moments.events(cursor, EVENTS_KEPT),
            log=moments.log(cursor, LOG_LINES_KEPT),
            artifacts=moments.artifacts(cursor, ARTIFACTS_KEPT),
            version=self._snapshot.version + 1,
        )

    def _status(self) -> Status:
        cursor, recorded = self.cursor, self._recorded
        at_end = cursor >= self.last_step
        if at_end and not self._playing:
            state = recorded.state if recorded.ended else "paused"
        else:
            state = "running" if self._playing else "paused"
        length = self._info.steps_per_epoch
        return msgspec.structs.replace(
            recorded,
            state=state,
            step=cursor,
            epoch=cursor / length if length else recorded.epoch,
            phase="step",
            reason=recorded.reason if at_end else "",
            hint=recorded.hint if at_end else "",
            run_to=None,
            throttle=self._speed,
            elapsed_s=recorded.elapsed_s if at_end else self.moments.elapsed_s(cursor),
            remaining_s=None,
            viewers=(),
            controller=None,
        )
