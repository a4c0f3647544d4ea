"""The recorder: keeps what is measured for viewers and sinks, away from the training thread.

What the training thread tells (`intake.py`) waits in a queue. A thread of the recorder's own drains
it some twenty times a second; so does each answer to a viewer, which is therefore never stale. What
is here takes a lock, held while a queue is drained or a viewer answered; on the training thread it
is asked between steps at most. `watched` takes none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import (
    NonFinite,
    PhaseReport,
    Poll,
    Status,
    Update,
)
from tui_trainer.protocol.text import harmless_all
from tui_trainer.recording.answer import Answerer
from tui_trainer.recording.feed import Feed
from tui_trainer.recording.intake import Intake
from tui_trainer.recording.items import Described, Sink

DRAIN_EVERY_S = 0.05


class Recorder(Intake):
    """Everything that is known of one run, growing. Thread-safe."""

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.time) -> None:
        super().__init__(info, clock)
        self._lock = threading.RLock()
        self._live_status: Callable[[], dict[str, Any]] = dict
        self._feeds: list[Feed] = []
        self.history = self._ledger.history
        self.meanwhile: Callable[[], None] = _nothing
        """Called some twenty times a second, on the recorder's thread: to record what waits with
        whoever measures."""
        self._answerer = Answerer(self.history, self._ledger.told)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tui-trainer recorder", daemon=True)
        self._thread.start()
        _after_fork(self)

    # ------------------------------------------------------------ what is asked of it

    def watched(self) -> frozenset[str]:
        """The topics that viewers have on their screens now."""
        return self._answerer.watched

    @property
    def info(self) -> RunInfo:
        """The description of the run now."""
        with self._lock:
            self._drain()
            return self._ledger.info

    @property
    def measured(self) -> bool:
        """Whether there is anything that somebody might look back at."""
        with self._lock:
            self._drain()
            return self._ledger.measured

    @property
    def longest_step_s(self) -> float:
        """Of the recent ones, as `Pace.longest_step_s`."""
        with self._lock:
            self._drain()
            return self.pace.longest_step_s

    @property
    def first_nonfinite(self) -> NonFinite | None:
        """The first NaN or infinity of the run."""
        with self._lock:
            self._drain()
            return self._ledger.first_nonfinite

    def follow(self, status: Callable[[], dict[str, Any]], paused_s: Callable[[], float]) -> None:
        """Ask `status` for the fields of `Status` that change by themselves (state, phase, …),
        and `paused_s` for the seconds that the training thread has been paused."""
        self._live_status = status
        self._paused_s = paused_s

    def status(self, **changes: Any) -> None:
        """Change fields of the status."""
        with self._lock:
            self._ledger.change_status(**changes)

    @property
    def state(self) -> Status:
        """The state of the run now."""
        with self._lock:
            self._drain()
            return self._status_now()

    def report(self, report: PhaseReport | None) -> None:
        """What the phase that has just ended produced; None once the training goes on."""
        self._answerer.report = harmless_all(report)

    def update_for(self, poll: Poll, viewer: int = 0) -> Update:
        """The answer to a viewer's poll, its rows within `poll.budget` bytes."""
        with self._lock:
            self._drain()
            return self._answerer.answer(poll, viewer, self._status_now(), self._ledger.info)

    def viewer_gone(self, viewer: int) -> None:
        """Forget what this viewer watched."""
        self._answerer.forget(viewer)

    def subscribe(self, sink: Sink) -> Feed:
        """Hand this sink everything from now on, in order, on a thread of its own."""
        feed = Feed(sink, lambda: self.state, self._sink_failed)
        with self._lock:
            self._drain()
            feed.put([Described(self._ledger.info)])
            self._feeds.append(feed)
        return feed

    def end(self, state: str, reason: str = "", hint: str = "", refused: bool = False) -> None:
        """The run has ended as `finished`, `stopped` or `crashed`; `refused` as in `Status`. Only
        the first call counts."""
        with self._lock:
            self._drain()
            if self._ledger.status.ended or self._forked:
                return
            self._answerer.report = None
            self._live_status = dict
            self._ledger.end(state=state, reason=reason, hint=hint, refused=refused)
            self._hand_out()

    def flush(self, timeout: float | None = None) -> bool:
        """Take in what waits and let every sink write it; whether all was done in time."""
        with self._lock:
            self._drain()
            feeds = list(self._feeds)
        done = [feed.flush(timeout) for feed in feeds]
        return all(done)

    def close(self, timeout: float | None = None) -> bool:
        """Flush, close the sinks and stop the recorder's threads."""
        self._closing.set()
        with self._lock:
            self._drain()
            feeds, self._feeds = self._feeds, []
        done = [feed.close(timeout) for feed in feeds]
        return all(done)

    # ------------------------------------------------------------ taking in, under the lock

    def _work(self) -> None:
        while not self._closing.wait(DRAIN_EVERY_S):
            try:
                self.meanwhile()
            except Exception as fault:
                self.fault("recorder", fault)
            with self._lock:
                self._drain()
                self._answerer.expire()

    def _drain(self) -> None:
        self._take_in()
        self._hand_out()

    def _hand_out(self) -> None:
        if self._ledger.out:
            out, self._ledger.out = self._ledger.out, []
            for feed in self._feeds:
                feed.put(out)

    def _status_now(self) -> Status:
        try:
            return self._ledger.status_now(self._live_status())
        except Exception as fault:
            self.fault("status", fault)
            return self._ledger.status_now({})

    def _sink_failed(self, sink: Sink, fault: Exception) -> None:
        if isinstance(fault, BrokenPipeError):
            return  # the reader went away: no fault of anybody
        self.fault(type(sink).__name__, fault)
        with contextlib.suppress(OSError, ValueError):
            said = f"tui-trainer: {type(sink).__name__} has failed, the training goes on: {fault}"
            print(said, file=sys.stderr, flush=True)

    def _forget_parent(self) -> None:
        """In a forked child: the threads are not here and the lock may be held for ever."""
        self._forked = True
        self._lock = threading.RLock()
        self._incoming.clear()
        self._feeds.clear()


def _nothing() -> None:
    """Nobody measures yet."""


def _after_fork(recorder: Recorder) -> None:
    reference = weakref.ref(recorder)

    def forget() -> None:
        found = reference()
        if found is not None:
            found._forget_parent()

    os.register_at_fork(after_in_child=forget)
