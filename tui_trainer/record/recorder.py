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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from tui_trainer.history import History
from tui_trainer.history.buckets import Floats, StepRecord
from tui_trainer.protocol.messages import (
    Artifact,
    EndState,
    Level,
    LogLine,
    NonFinite,
    NoticeKind,
    PhaseReport,
    Poll,
    Status,
    Stream,
    Update,
)
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.protocol.text import sanitize, sanitize_message
from tui_trainer.record.events import (
    EventLog,
    InfoChanged,
    Item,
    RowRecorded,
    RunEnded,
    Sink,
    StepRecorded,
    StepsDropped,
    in_short,
)
from tui_trainer.record.polling import PollHandler
from tui_trainer.record.sinks import SinkThread
from tui_trainer.record.throughput import Throughput

# ---- ledger
# What is known of a run, as it grows: items are taken in, in order, and made ready for sinks.


class Ledger:
    """All that has been taken in. Used under the recorder's lock."""

    def __init__(self, info: RunInfo, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.info = sanitize_message(info)
        self.status = Status()
        """As it was last set; see `status_now`."""
        self.history = History()
        self.pace = Throughput()
        self.told = EventLog(clock)
        self.out: list[Item] = []
        """What sinks have not been handed yet."""
        self.first_nonfinite: NonFinite | None = None
        self.row_bytes = 0
        """About what a record with a row of every table holds."""
        self._described = False
        self._cadences_said = True
        self._ended_at: float | None = None

    @property
    def measured(self) -> bool:
        """Whether there is anything that somebody might look back at."""
        rows = any(table.rows for table in self.history.tables.values())
        return rows or self.told.artifacts.next_id > 0

    def end(self, **said: Any) -> None:
        """The run has ended, with these changes of its status."""
        self.pace.resume(self._clock())
        self._ended_at = self._clock()
        self.change_status(**said, waiting_for="", run_to=None)
        self._described = self._described and self._cadences_said
        self._say_description()
        self.out.append(RunEnded(self.status_now({})))

    def change_status(self, **changes: Any) -> None:
        """Change fields of the status."""
        self.status = sanitize_message(msgspec.structs.replace(self.status, **changes))

    def _say_description(self) -> None:
        if not self._described:
            self._described = True
            self.out.append(InfoChanged(self.info))

    def take_step(self, record: StepRecord, excluded_s: float) -> None:
        """One optimizer step; `excluded_s` as in `Pace.add`."""
        record = in_short(record)
        self._say_description()
        tables = self.history.tables
        for table, values in record.rows:
            tables[table].append(record.step, values)
        self.status = msgspec.structs.replace(self.status, step=max(self.status.step, record.step))
        self.pace.add(record.step, record.time, self._step_ms(record), record.own_ms, excluded_s)
        clip = self.told.clip_in_force(record, self.info.tables)
        if clip is not None:
            self.pace.add_clip(clip)
        self.out.append(StepRecorded(record))
        events = self.told.events_of(record)
        self.out.extend(events)
        if self.first_nonfinite is None:
            self.first_nonfinite = next((e for e in events if isinstance(e, NonFinite)), None)

    def _step_ms(self, record: StepRecord) -> float:
        for table, values in record.rows:
            if self.info.tables[table].name == "step":
                # A step cannot have begun before the run did.
                return min(float(values[3]), (record.time - self.info.started_at) * 1e3)
        return 0.0

    def take_row(self, row: RowRecorded) -> None:
        """A row measured outside a step."""
        self._say_description()
        self.history.tables[row.table].append(row.step, row.values)
        self.out.append(row)

    def take_notice(
        self,
        kind: NoticeKind,
        text: str,
        level: Level = "info",
        step: int | None = None,
        who: str = "",
        when: float | None = None,
    ) -> None:
        """Something worth a line in the log."""
        at = self.status.step if step is None else step
        when = self._clock() if when is None else when
        self.out.append(self.told.notice(kind, text, level, at, who, when))

    def take_log(self, stream: Stream, text: str, when: float) -> None:
        """A line that was printed."""
        line = LogLine(self.told.log.next_id, when, self.status.step, stream, text)
        self.told.log.append(line)
        self.out.append(line)

    def take_artifact(self, artifact: Artifact) -> None:
        """A sample."""
        self.out.append(self.told.artifact(artifact))

    def take_tables(self, declared: tuple[Table, ...]) -> None:
        """Tables, new ones or with another cadence."""
        tables = list(self.info.tables)
        for table in declared:
            while table.id >= len(tables):  # ids reserved but not declared yet
                tables.append(Table(len(tables), "", ()))
            known = tables[table.id]
            if table.columns is not known.columns:
                table = sanitize_message(table)
            tables[table.id] = table
            if not known.name or known.columns != table.columns:
                self.history.declare(table)
        cadences = tuple(table.every for table in tables)
        if self.info.with_cadences(cadences).tables == tuple(tables):
            self.info = self.info.with_cadences(cadences)
            self._cadences_said = False
        else:
            self.take_description({"tables": tuple(tables)})
        self.row_bytes = sum(4 * len(table.columns) + 64 for table in tables)

    def take_description(self, changes: dict[str, Any]) -> None:
        """Changes of the description."""
        changes = {name: sanitize_message(value) for name, value in changes.items()}
        changed = msgspec.structs.replace(self.info, **changes)
        if changed != self.info:
            self.info = msgspec.structs.replace(changed, revision=self.info.revision + 1)
            self._described = False

    def status_now(self, live: dict[str, Any]) -> Status:
        """The status at this moment; `live`: the fields that change by themselves."""
        now = self._clock() if self._ended_at is None else self._ended_at
        info, pace, step = self.info, self.pace, self.status.step
        speed = pace.steps_per_second(None if self._ended_at else now)
        left = info.total_steps - step if info.total_steps is not None else None
        return msgspec.structs.replace(
            self.status,
            epoch=step / info.steps_per_epoch if info.steps_per_epoch else 0.0,
            steps_per_second=speed,
            items_per_second=speed * info.items_per_step if speed and info.items_per_step else None,
            elapsed_s=pace.elapsed_s(now),
            remaining_s=pace.remaining_s(left, now) if left and left > 0 else left and 0.0,
            cost_share=pace.cost_share()
            if self.status.cost_share is None
            else self.status.cost_share,
            clipped_share=pace.clipped_share(),
            **live,
        )


# ---- intake
# What the training thread tells of a run: taken at once into a bounded queue, looked at later.
#
# The training thread only ever appends here; it never takes a lock that others hold while they
# work,
# and never waits for a viewer, a disk or a socket.


QUEUE_STEPS = 4096
QUEUE_BYTES = 64 * 1024 * 1024
FAULTS_SAID = 200


class Intake:
    """The near end of the recorder: what it offers is for the training thread."""

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ids = threading.Lock()
        self._next_table = len(info.tables)
        self._incoming: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._capacity = QUEUE_STEPS
        self._overflow = 0
        self._overflow_said = 0
        self._ledger = Ledger(info, clock)
        self._paused_s: Callable[[], float] | None = None
        self._faults: set[str] = set()
        self._forked = False
        self.pace = self._ledger.pace
        self.describe_along: Callable[[], dict[str, Any]] = dict
        """What more to describe when the parameters are described, asked on the training thread."""

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
        self._enqueue(self._ledger.take_row, RowRecorded(table, step, values, self._clock()))

    def notice(
        self,
        kind: NoticeKind,
        text: str,
        level: Level = "info",
        step: int | None = None,
        who: str = "",
    ) -> None:
        """Say something worth a line in the log; `kind` as in `Notice`."""
        said = sanitize(text)
        self._enqueue(
            self._ledger.take_notice, kind, said, level, step, sanitize(who), self._clock()
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

    def log(self, stream: Stream, text: str) -> None:
        """Take a line that the script or a library printed."""
        self._enqueue(self._ledger.take_log, stream, sanitize(text), self._clock())

    def artifact(self, artifact: Artifact) -> None:
        """Take a sample to show; its id is set here."""
        self._enqueue(self._ledger.take_artifact, sanitize_message(artifact))

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

    # ------------------------------------------------------------ taking in, by whoever drains it

    def _enqueue(self, take: Callable[..., None], *arguments: Any) -> None:
        if not self._forked:
            self._incoming.append((take, arguments))

    def _take_in(self) -> None:
        """Enter what waits into the ledger; one thread at a time."""
        incoming = self._incoming
        for _ in range(len(incoming)):
            take, arguments = incoming.popleft()
            try:
                take(*arguments)
            except Exception as fault:
                if text := self._new_fault("recorder", fault):
                    self._ledger.take_notice("fault", sanitize(text), "error")
        if self._overflow > self._overflow_said:
            lost, self._overflow_said = self._overflow - self._overflow_said, self._overflow
            self._ledger.out.append(StepsDropped(lost))
            self._ledger.take_notice(
                "fault", f"{lost} steps came too fast to be recorded", "warning"
            )

    def _take_tables(self, declared: tuple[Table, ...]) -> None:
        self._ledger.take_tables(declared)
        fitting = QUEUE_BYTES // max(1, self._ledger.row_bytes)
        self._capacity = max(64, min(QUEUE_STEPS, fitting))


DRAIN_EVERY_S = 0.05


class Recorder(Intake):
    """Everything that is known of one run, growing. Thread-safe."""

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.time) -> None:
        super().__init__(info, clock)
        self._lock = threading.RLock()
        self._live_status: Callable[[], dict[str, Any]] = dict
        self._feeds: list[SinkThread] = []
        self.history = self._ledger.history
        self.meanwhile: Callable[[], None] = _nothing
        """Called some twenty times a second, on the recorder's thread: to record what waits with
        whoever measures."""
        self._answerer = PollHandler(self.history, self._ledger.told)
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
        self._answerer.report = sanitize_message(report)

    def update_for(self, poll: Poll, viewer: int = 0) -> Update:
        """The answer to a viewer's poll, its rows within `poll.budget` bytes."""
        with self._lock:
            self._drain()
            return self._answerer.answer(poll, viewer, self._status_now(), self._ledger.info)

    def viewer_gone(self, viewer: int) -> None:
        """Forget what this viewer watched."""
        self._answerer.forget(viewer)

    def subscribe(self, sink: Sink) -> SinkThread:
        """Hand this sink everything from now on, in order, on a thread of its own."""
        feed = SinkThread(sink, lambda: self.state, self._sink_failed)
        with self._lock:
            self._drain()
            feed.put([InfoChanged(self._ledger.info)])
            self._feeds.append(feed)
        return feed

    def end(self, state: EndState, reason: str = "", hint: str = "", refused: bool = False) -> None:
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
