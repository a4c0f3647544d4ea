"""The recorder: takes what is measured off the training thread and keeps it for viewers and sinks.

The training thread only ever appends to a bounded queue; it never takes a lock that others hold
while they work, and never waits for a viewer, a disk or a socket. A thread of the recorder's own
drains the queue some twenty times a second; so does each answer to a viewer, which is therefore
never stale. Everything but `record`, `row`, `notice`, `log`, `artifact`, `declare`, `describe`,
`fault` and `watched` is for other threads.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol.describe import Column, RunInfo, Table
from tui_trainer.protocol.messages import (
    Artifact,
    NonFinite,
    PhaseReport,
    Poll,
    Status,
    Update,
)
from tui_trainer.protocol.text import harmless, harmless_all
from tui_trainer.recording.answer import Answerer
from tui_trainer.recording.feed import Feed
from tui_trainer.recording.items import Described, Lost, Rowed, Sink
from tui_trainer.recording.ledger import Ledger

DRAIN_EVERY_S = 0.05
QUEUE_STEPS = 4096
QUEUE_BYTES = 64 * 1024 * 1024
FAULTS_SAID = 200


class Recorder:
    """Everything that is known of one run, growing. Thread-safe."""

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._ids = threading.Lock()
        self._next_table = len(info.tables)
        self._incoming: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._capacity = QUEUE_STEPS
        self._overflow = 0
        self._overflow_said = 0
        self._ledger = Ledger(info, clock)
        self._live_status: Callable[[], dict[str, Any]] = dict
        self._paused_s: Callable[[], float] | None = None
        self._faults: set[str] = set()
        self._feeds: list[Feed] = []
        self.history = self._ledger.history
        self.pace = self._ledger.pace
        self.describe_along: Callable[[], dict[str, Any]] = dict
        """What more to describe when the parameters are described, asked on the training thread."""
        self.meanwhile: Callable[[], None] = _nothing
        """Called some twenty times a second, on the recorder's thread: to record what waits with
        whoever measures."""
        self._answerer = Answerer(self.history, self._ledger.told)
        self._forked = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tui-trainer recorder", daemon=True)
        self._thread.start()
        _after_fork(self)

    # ------------------------------------------------------------ from the training thread

    def record(self, record: StepRecord) -> None:
        """Take the record of one optimizer step, in O(1); over the bound it is counted as lost."""
        if self._forked:
            return
        if len(self._incoming) >= self._capacity:
            self._overflow += 1
            return
        paused = self._paused_s() if self._paused_s else self.pace.paused_s
        excluded = paused + self.pace.aside_s
        self._incoming.append((self._ledger.take_step, (record, excluded)))

    def row(self, table: int, step: int, values: Floats) -> None:
        """Take a row measured outside a step, such as a validation."""
        self._enqueue(self._ledger.take_row, Rowed(table, step, values, self._clock()))

    def notice(
        self, kind: str, text: str, level: str = "info", step: int | None = None, who: str = ""
    ) -> None:
        """Say something worth a line in the log; `kind` as in `Notice`."""
        said = harmless(text)
        self._enqueue(
            self._ledger.take_notice, kind, said, level, step, harmless(who), self._clock()
        )

    def fault(self, where: str, fault: BaseException) -> None:
        """Say once that something of ours failed; training goes on."""
        if text := self._new_fault(where, fault):
            self.notice("fault", text, "error")

    def _new_fault(self, where: str, fault: BaseException) -> str:
        text = f"{where}: {type(fault).__name__}: {fault}"
        if text in self._faults or len(self._faults) >= FAULTS_SAID:
            return ""
        self._faults.add(text)
        return text

    def log(self, stream: str, text: str) -> None:
        """Take a line that the script or a library printed."""
        self._enqueue(self._ledger.take_log, stream, harmless(text), self._clock())

    def artifact(self, artifact: Artifact) -> None:
        """Take a sample to show; its id is set here."""
        self._enqueue(self._ledger.take_artifact, harmless_all(artifact))

    def new_table(
        self,
        name: str,
        columns: Sequence[Column],
        every: int = 1,
        optimizer: str = "",
        natural: int = 0,
    ) -> int:
        """Declare a table under the next free id; returns the id."""
        with self._ids:
            number = self._next_table
            self._next_table += 1
        table = Table(number, name, tuple(columns), every, optimizer, natural)
        self._enqueue(self._take_tables, (table,))
        return number

    def declare(self, tables: Sequence[Table]) -> None:
        """Announce tables before their first rows, or change the cadence of known ones."""
        with self._ids:
            self._next_table = max([self._next_table, *(table.id + 1 for table in tables)])
        self._enqueue(self._take_tables, tuple(tables))

    def describe(self, **changes: Any) -> None:
        """Change fields of the `RunInfo`; its revision grows by itself."""
        if "parameters" in changes:
            changes = {**self.describe_along(), **changes}
        self._enqueue(self._ledger.take_description, changes)

    def watched(self) -> frozenset[str]:
        """The topics that viewers have on their screens now."""
        return self._answerer.watched

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around an evaluation or a checkpoint on the training thread: not counted in the speed."""
        began = self._clock()
        try:
            yield
        finally:
            if not self.pace.paused:
                self.pace.aside_s += max(0.0, self._clock() - began)

    def pause_began(self) -> None:
        """The training thread has stopped at a gate."""
        self.pace.pause(self._clock())

    def pause_ended(self) -> None:
        """The training thread goes on."""
        self.pace.resume(self._clock())

    # ------------------------------------------------------------ from any other thread

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

    def _enqueue(self, take: Callable[..., None], *arguments: Any) -> None:
        if not self._forked:
            self._incoming.append((take, arguments))

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
        incoming = self._incoming
        for _ in range(len(incoming)):
            take, arguments = incoming.popleft()
            try:
                take(*arguments)
            except Exception as fault:
                if text := self._new_fault("recorder", fault):
                    self._ledger.take_notice("fault", harmless(text), "error")
        if self._overflow > self._overflow_said:
            lost, self._overflow_said = self._overflow - self._overflow_said, self._overflow
            self._ledger.out.append(Lost(lost))
            self._ledger.take_notice(
                "fault", f"{lost} steps came too fast to be recorded", "warning"
            )
        self._hand_out()

    def _hand_out(self) -> None:
        if self._ledger.out:
            out, self._ledger.out = self._ledger.out, []
            for feed in self._feeds:
                feed.put(out)

    def _take_tables(self, declared: tuple[Table, ...]) -> None:
        self._ledger.take_tables(declared)
        fitting = QUEUE_BYTES // max(1, self._ledger.row_bytes)
        self._capacity = max(64, min(QUEUE_STEPS, fitting))

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
