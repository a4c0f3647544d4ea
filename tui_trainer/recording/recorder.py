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

import msgspec

from tui_trainer.history import History
from tui_trainer.history.records import Floats, StepRecord
from tui_trainer.protocol.describe import Column, RunInfo, Table
from tui_trainer.protocol.messages import (
    Artifact,
    LogLine,
    NonFinite,
    PhaseReport,
    Poll,
    Status,
    Update,
)
from tui_trainer.protocol.text import harmless, harmless_all
from tui_trainer.recording.answer import Answerer
from tui_trainer.recording.feed import Feed
from tui_trainer.recording.items import Described, Ended, Item, Lost, Rowed, Sink, Stepped
from tui_trainer.recording.pace import Pace
from tui_trainer.recording.telling import Tellings, in_short

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
        self._info = harmless_all(info)
        self._described = False
        self._cadences_said = True
        self._status = Status()
        self._live_status: Callable[[], dict[str, Any]] = dict
        self._paused_s: Callable[[], float] | None = None
        self._faults: set[str] = set()
        self._out: list[Item] = []
        self._feeds: list[Feed] = []
        self.history = History()
        self.pace = Pace()
        self.describe_along: Callable[[], dict[str, Any]] = dict
        """What more to describe when the parameters are described, asked on the training thread."""
        self._first_nonfinite: NonFinite | None = None
        self._told = Tellings(clock)
        self._answerer = Answerer(self.history, self._told)
        self._ended_at: float | None = None
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
        self._incoming.append((self._take_step, (record, excluded)))

    def row(self, table: int, step: int, values: Floats) -> None:
        """Take a row measured outside a step, such as a validation."""
        self._enqueue(self._take_row, Rowed(table, step, values, self._clock()))

    def notice(
        self, kind: str, text: str, level: str = "info", step: int | None = None, who: str = ""
    ) -> None:
        """Say something worth a line in the log; `kind` as in `Notice`."""
        said = harmless(text)
        self._enqueue(self._take_notice, kind, said, level, step, harmless(who), self._clock())

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
        self._enqueue(self._take_log, stream, harmless(text), self._clock())

    def artifact(self, artifact: Artifact) -> None:
        """Take a sample to show; its id is set here."""
        self._enqueue(self._take_artifact, harmless_all(artifact))

    def new_table(
        self, name: str, columns: Sequence[Column], every: int = 1, optimizer: str = ""
    ) -> int:
        """Declare a table under the next free id; returns the id."""
        with self._ids:
            number = self._next_table
            self._next_table += 1
        self._enqueue(self._take_tables, (Table(number, name, tuple(columns), every, optimizer),))
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
        self._enqueue(self._take_description, changes)

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
            return self._info

    @property
    def measured(self) -> bool:
        """Whether there is anything that somebody might look back at."""
        with self._lock:
            self._drain()
            rows = any(table.rows for table in self.history.tables.values())
            return rows or self._told.artifacts.next_id > 0

    @property
    def first_nonfinite(self) -> NonFinite | None:
        """The first NaN or infinity of the run."""
        with self._lock:
            self._drain()
            return self._first_nonfinite

    def follow(self, status: Callable[[], dict[str, Any]], paused_s: Callable[[], float]) -> None:
        """Ask `status` for the fields of `Status` that change by themselves (state, phase, …),
        and `paused_s` for the seconds that the training thread has been paused."""
        self._live_status = status
        self._paused_s = paused_s

    def status(self, **changes: Any) -> None:
        """Change fields of the status."""
        with self._lock:
            self._status = harmless_all(msgspec.structs.replace(self._status, **changes))

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
            return self._answerer.answer(poll, viewer, self._status_now(), self._info)

    def viewer_gone(self, viewer: int) -> None:
        """Forget what this viewer watched."""
        self._answerer.forget(viewer)

    def subscribe(self, sink: Sink) -> Feed:
        """Hand this sink everything from now on, in order, on a thread of its own."""
        feed = Feed(sink, lambda: self.state, self._sink_failed)
        with self._lock:
            self._drain()
            feed.put([Described(self._info)])
            self._feeds.append(feed)
        return feed

    def end(self, state: str, reason: str = "", hint: str = "", refused: bool = False) -> None:
        """The run has ended as `finished`, `stopped` or `crashed`; `refused` as in `Status`. Only
        the first call counts."""
        with self._lock:
            self._drain()
            if self._status.ended or self._forked:
                return
            self.pace.resume(self._clock())
            self._answerer.report = None
            self._ended_at = self._clock()
            self._live_status = dict
            said = {"state": state, "reason": reason, "hint": hint, "refused": refused}
            self.status(**said, waiting_for="", run_to=None)
            self._described = self._described and self._cadences_said
            self._say_description()
            self._out.append(Ended(self._status_now()))
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
                    self._take_notice("fault", harmless(text), "error")
        if self._overflow > self._overflow_said:
            lost, self._overflow_said = self._overflow - self._overflow_said, self._overflow
            self._out.append(Lost(lost))
            self._take_notice("fault", f"{lost} steps came too fast to be recorded", "warning")
        self._hand_out()

    def _hand_out(self) -> None:
        if self._out:
            out, self._out = self._out, []
            for feed in self._feeds:
                feed.put(out)

    def _say_description(self) -> None:
        if not self._described:
            self._described = True
            self._out.append(Described(self._info))

    def _take_step(self, record: StepRecord, excluded_s: float) -> None:
        record = in_short(record)
        self._say_description()
        tables = self.history.tables
        for table, values in record.rows:
            tables[table].append(record.step, values)
        self._status = msgspec.structs.replace(
            self._status, step=max(self._status.step, record.step)
        )
        self.pace.add(record.step, record.time, self._step_ms(record), record.own_ms, excluded_s)
        clip = self._told.clip_in_force(record, self._info.tables)
        if clip is not None:
            self.pace.add_clip(clip)
        self._out.append(Stepped(record))
        events = self._told.events_of(record)
        self._out.extend(events)
        if self._first_nonfinite is None:
            self._first_nonfinite = next((e for e in events if isinstance(e, NonFinite)), None)

    def _step_ms(self, record: StepRecord) -> float:
        for table, values in record.rows:
            if self._info.tables[table].name == "step":
                # A step cannot have begun before the run did.
                return min(float(values[3]), (record.time - self._info.started_at) * 1e3)
        return 0.0

    def _take_row(self, row: Rowed) -> None:
        self._say_description()
        self.history.tables[row.table].append(row.step, row.values)
        self._out.append(row)

    def _take_notice(
        self,
        kind: str,
        text: str,
        level: str = "info",
        step: int | None = None,
        who: str = "",
        when: float | None = None,
    ) -> None:
        at = self._status.step if step is None else step
        when = self._clock() if when is None else when
        self._out.append(self._told.notice(kind, text, level, at, who, when))

    def _take_log(self, stream: str, text: str, when: float) -> None:
        line = LogLine(self._told.log.next_id, when, self._status.step, stream, text)
        self._told.log.append(line)
        self._out.append(line)

    def _take_artifact(self, artifact: Artifact) -> None:
        self._out.append(self._told.artifact(artifact))

    def _take_tables(self, declared: tuple[Table, ...]) -> None:
        tables = list(self._info.tables)
        for table in declared:
            while table.id >= len(tables):  # ids reserved but not declared yet
                tables.append(Table(len(tables), "", ()))
            known = tables[table.id]
            if table.columns is not known.columns:
                table = harmless_all(table)
            tables[table.id] = table
            if not known.name or known.columns != table.columns:
                self.history.declare(table)
        cadences = tuple(table.every for table in tables)
        if self._info.with_cadences(cadences).tables == tuple(tables):
            self._info = self._info.with_cadences(cadences)
            self._cadences_said = False
        else:
            self._take_description({"tables": tuple(tables)})
        row_bytes = sum(4 * len(table.columns) + 64 for table in tables)
        self._capacity = max(64, min(QUEUE_STEPS, QUEUE_BYTES // max(1, row_bytes)))

    def _take_description(self, changes: dict[str, Any]) -> None:
        changes = {name: harmless_all(value) for name, value in changes.items()}
        changed = msgspec.structs.replace(self._info, **changes)
        if changed != self._info:
            self._info = msgspec.structs.replace(changed, revision=self._info.revision + 1)
            self._described = False

    # ------------------------------------------------------------ status

    def _status_now(self) -> Status:
        now = self._clock() if self._ended_at is None else self._ended_at
        info, pace, step = self._info, self.pace, self._status.step
        speed = pace.steps_per_second(None if self._ended_at else now)
        left = info.total_steps - step if info.total_steps is not None else None
        status = msgspec.structs.replace(
            self._status,
            epoch=step / info.steps_per_epoch if info.steps_per_epoch else 0.0,
            steps_per_second=speed,
            items_per_second=speed * info.items_per_step if speed and info.items_per_step else None,
            elapsed_s=pace.elapsed_s(now),
            remaining_s=pace.remaining_s(left, now) if left and left > 0 else left and 0.0,
            cost_share=pace.cost_share()
            if self._status.cost_share is None
            else self._status.cost_share,
            clipped_share=pace.clipped_share(),
        )
        try:
            live = self._live_status()
            return msgspec.structs.replace(status, **live) if live else status
        except Exception as fault:
            self.fault("status", fault)
            return status

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


def _after_fork(recorder: Recorder) -> None:
    reference = weakref.ref(recorder)

    def forget() -> None:
        found = reference()
        if found is not None:
            found._forget_parent()

    os.register_at_fork(after_in_child=forget)
