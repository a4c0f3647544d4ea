"""The recorder: takes measurements off the training thread, and gives them to viewers and sinks.

The training thread only appends to a queue, which is bounded except for descriptions and notices,
of which there are few; it never takes a lock that is held during other work, and never waits for a
viewer, a disk or a socket. The recorder's own thread drains the queue
twenty times a second; every answer to a viewer drains it too and is therefore never stale.
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
from typing import Any, TypeVar

import msgspec
import numpy as np

from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.history import MemoryHistory
from tui_trainer.history.records import Floats, SkipRecord, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import (
    Artifact,
    Event,
    Finding,
    Level,
    LogLine,
    NonFinite,
    NoticeKind,
    Stream,
)
from tui_trainer.protocol.messages import EndState, PhaseReport, Poll, Status, Update
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.protocol.text import sanitize, sanitize_message
from tui_trainer.record.event_log import EventLog
from tui_trainer.record.sink_items import (
    InfoChanged,
    Item,
    ItemsDropped,
    RowRecorded,
    RunEnded,
    Sink,
    StepRecorded,
    rounded_for_storage,
)
from tui_trainer.record.sink_thread import SinkThread
from tui_trainer.record.throughput import Throughput
from tui_trainer.record.viewer_updates import PollHandler

T = TypeVar("T")

DRAIN_EVERY_S = 0.05
QUEUE_STEPS = 4096
QUEUE_BYTES = 64 * 1024 * 1024
MIN_QUEUE_STEPS = 64
QUEUE_OTHERS = 100_000
"""Length of the queue at which printed lines, samples and rows outside a step are dropped."""
MAX_REPORTED_FAULTS = 200
AFTER_FINDING = frozenset((schema.UPDATE_RATIO, schema.WEIGHT_NORM))
"""Tables that are measured at every step for STEPS_AFTER_FINDING steps after a new finding."""
STEPS_AFTER_FINDING = 10
REPEATED_ROWS = 100_000
"""Number of newest recorded rows that repeated steps are compared with."""
READER_GONE = "the reader closed the output; the training continues without it"


class Recorder:
    """Everything that is known of one run. Thread-safe.

    `clock` returns seconds since the epoch.
    """

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.history = MemoryHistory()
        self.throughput = Throughput()
        self._extra_info: Callable[[], dict[str, Any]] = dict
        self._regular_calls: list[Callable[[], None]] = []
        self.on_record: Callable[[StepRecord], None] | None = None
        """Called with every step before it is queued, mostly on the training thread."""
        self.on_skip: Callable[[SkipRecord], None] | None = None
        """Called with every skipped iteration, likewise."""
        self.repeating_until = -1
        """Steps up to this one are recorded already: the training was rewound and repeats them.
        Set by `rewind`."""
        self.needed_tables: frozenset[str] = frozenset()
        """Tables that breakpoints need, which have to be measured in every step."""
        self._dense_until = -1
        """The last of the STEPS_AFTER_FINDING steps in which AFTER_FINDING are measured. Set on the
        recorder's thread only."""

        # Shared with the training thread without a lock.
        self._queue: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._capacity = QUEUE_STEPS
        self._dropped = 0
        self._dropped_others = 0
        self._ids = threading.Lock()
        self._next_table = len(info.tables)
        self._differences = 0
        """Repeated steps that differed."""
        self._faults: set[str] = set()
        self._paused_s: Callable[[], float] | None = None
        self._current_step: Callable[[], int] | None = None
        self._forked = False

        # Used under the lock only.
        self._lock = threading.RLock()
        self._info = sanitize_message(info)
        self._info_sent = False
        self._cadences_sent = True
        self._status = Status()
        self._live_status: Callable[[], dict[str, Any]] = dict
        self._ended_at: float | None = None
        self._events = EventLog()
        self._first_nonfinite: NonFinite | None = None
        self._found: set[int] = set()
        """Numbers of the findings that are warnings or errors."""
        self._engine: FindingsEngine | None = None
        self._reported_dropped = 0
        self._reported_others = 0
        self._out: list[Item] = []
        self._sinks: list[SinkThread] = []
        self._polls = PollHandler(self.history, self._events)

        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tui-trainer recorder", daemon=True)
        self._thread.start()
        _forget_in_children(self)

    # ------------------------------------------------------------ for the training thread

    def record(self, record: StepRecord) -> None:
        """Queue the record of one optimizer step in O(1); it is dropped when the queue is full."""
        if self._forked:
            return
        if record.step <= self.repeating_until:
            if len(self._queue) < self._capacity:
                self._queue.append((self._repeat_step, (record,)))
            return
        if self.on_record is not None:
            self.on_record(record)
        if len(self._queue) >= self._capacity:
            self._dropped += 1
            return
        self._queue.append((self._add_step, (record, self._excluded_s())))

    def skip(self, record: SkipRecord) -> None:
        """Record an iteration whose gradients no optimizer used."""
        if record.step <= self.repeating_until:
            return
        if self.on_skip is not None:
            self.on_skip(record)
        if len(self._queue) >= self._capacity:
            self._dropped += 1
            return
        self._enqueue(self._add_skip, record)

    def row(self, table: int, step: int, values: Floats) -> None:
        """Record a row measured outside a step, such as a validation."""
        if step <= self.repeating_until:
            return
        self._enqueue_or_drop(
            self._add_row, RowRecorded(table, step, values, round(self._clock(), 6))
        )

    def notice(
        self,
        kind: NoticeKind,
        text: str,
        level: Level = "info",
        step: int | None = None,
        who: str = "",
    ) -> None:
        """Add a notice to the log."""
        text, who = sanitize(text), sanitize(who)
        self._enqueue(self._add_notice, kind, text, level, step, who, self._clock())

    def fault(self, where: str, error: BaseException) -> None:
        """Report a failure of the tool itself, once for each distinct text."""
        if text := self._new_fault(where, error):
            self.notice("fault", text, "error")

    def log(self, stream: Stream, text: str) -> None:
        """Record a line that the script or a library printed."""
        step = self._current_step() if self._current_step else None
        self._enqueue_or_drop(self._add_log_line, stream, sanitize(text), self._clock(), step)

    def artifact(self, artifact: Artifact) -> None:
        """Record a sample; its id is set here."""
        self._enqueue_or_drop(self._add_artifact, sanitize_message(artifact))

    def rewind(self, step: int, newest: int) -> None:
        """The training is rewound to the end of `step`; `newest` is the last recorded step."""
        self.repeating_until = newest
        self._differences = 0
        self._enqueue(self._rewound, step)

    def new_table(
        self,
        name: str,
        columns: Sequence[Column],
        every: int = 1,
        optimizer: str = "",
        natural: int = 0,
        rank: int | None = None,
    ) -> int:
        """Declare a table under the next free id and return the id."""
        with self._ids:
            number = self._next_table
            self._next_table += 1
        table = Table(number, name, tuple(columns), every, optimizer, natural, rank)
        self._enqueue(self._declare, (table,))
        return number

    def declare(self, tables: Sequence[Table]) -> None:
        """Declare tables before their first rows, or change the cadence of known ones."""
        with self._ids:
            self._next_table = max([self._next_table, *(table.id + 1 for table in tables)])
        self._enqueue(self._declare, tuple(tables))

    def describe(self, **changes: Any) -> None:
        """Change fields of the `RunInfo` and raise its revision."""
        if "parameters" in changes:
            changes = {**self._extra_info(), **changes}
        self._enqueue(self._change_info, changes)

    def describe_with(self, extra: Callable[[], dict[str, Any]]) -> None:
        """Whenever parameters are described, also change the fields that `extra()` returns. It is
        called on the training thread."""
        self._extra_info = extra

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave an evaluation or a checkpoint on the training thread out of the throughput."""
        began = self._clock()
        try:
            yield
        finally:
            if not self.throughput.paused:
                self.throughput.excluded_s += max(0.0, self._clock() - began)

    def pause_began(self) -> None:
        self.throughput.pause(self._clock())

    def pause_ended(self) -> None:
        self.throughput.resume(self._clock())

    def speed_limit_changed(self) -> None:
        """Restart the measurement of speed and remaining time."""
        at = None if self.throughput.paused else self._clock() - self._excluded_s()
        self._queue.append((self.throughput.restart_window, (at,)))

    def _excluded_s(self) -> float:
        """Seconds so far in pauses, evaluations and checkpoints."""
        paused = self._paused_s() if self._paused_s else self.throughput.paused_s
        return paused + self.throughput.excluded_s

    def watched(self, step: int) -> frozenset[str]:
        """The topics on viewers' screens, and `needed:NAME` for each table that breakpoints need
        or that is measured at every step after a finding. Called once in each `step` of an
        optimizer; takes no lock."""
        needed = self.needed_tables
        if 0 <= self._dense_until - step < STEPS_AFTER_FINDING:  # false while steps are repeated
            needed = needed | AFTER_FINDING
        if not needed:
            return self._polls.watched
        return self._polls.watched.union(f"needed:{name}" for name in needed)

    # ------------------------------------------------------------ state

    @property
    def info(self) -> RunInfo:
        with self._lock:
            self._drain()
            return self._info

    @property
    def status(self) -> Status:
        with self._lock:
            self._drain()
            return self._current_status()

    @property
    def measured(self) -> bool:
        """Whether any row or artifact has been recorded."""
        with self._lock:
            self._drain()
            rows = any(table.rows for table in self.history.tables.values())
            return rows or self._events.artifacts.next_id > 0

    @property
    def longest_step_s(self) -> float:
        """As `Throughput.longest_step_s`."""
        with self._lock:
            self._drain()
            return self.throughput.longest_step_s

    @property
    def first_nonfinite(self) -> NonFinite | None:
        """The first nan or inf of the run."""
        with self._lock:
            self._drain()
            return self._first_nonfinite

    @property
    def findings(self) -> Sequence[Finding]:
        """The findings so far, each as it was last reported."""
        with self._lock:
            self._drain()
            return tuple(self._engine.findings) if self._engine is not None else ()

    def read(self, read: Callable[[MemoryHistory], T]) -> T:
        """The result of `read(history)`, which must be quick: recording waits for it."""
        with self._lock:
            self._drain()
            return read(self.history)

    def set_status(self, **changes: Any) -> None:
        """Change fields of the status."""
        with self._lock:
            self._change_status(**changes)

    def follow(
        self,
        status: Callable[[], dict[str, Any]],
        paused_s: Callable[[], float],
        current_step: Callable[[], int] | None = None,
    ) -> None:
        """Set the sources of values that change continuously: fields of `Status`, the seconds that
        the training thread has been paused, and the step in progress, to which a printed line
        belongs (completed steps are recorded a moment later)."""
        self._live_status = status
        self._current_step = current_step
        self._paused_s = paused_s

    def call_regularly(self, callback: Callable[[], None]) -> None:
        """Call `callback()` every DRAIN_EVERY_S on the recorder's thread."""
        self._regular_calls.append(callback)

    def evaluate_with(self, engine: FindingsEngine) -> None:
        """Evaluate the rules of `engine` after every step from now on, on the recorder's thread."""
        with self._lock:
            self._drain()
            self._engine = engine
            engine.describe(self._info)

    def report(self, report: PhaseReport | None) -> None:
        """Set the report of the phase that has just ended; None once training continues."""
        self._polls.report = sanitize_message(report)

    # ------------------------------------------------------------ viewers and sinks

    def update_for(self, poll: Poll, viewer: int = 0) -> Update:
        """The answer to a viewer's poll, with rows of at most `poll.budget` bytes."""
        with self._lock:
            self._drain()
            return self._polls.answer(poll, viewer, self._current_status(), self._info)

    def viewer_gone(self, viewer: int) -> None:
        with self._lock:
            self._polls.forget(viewer)

    def subscribe(self, sink: Sink) -> SinkThread:
        """Hand `sink` all items from now on, in order, on its own thread."""
        thread = SinkThread(sink, lambda: self.status, self._sink_failed)
        with self._lock:
            self._drain()
            thread.put([InfoChanged(self._info)])
            self._sinks.append(thread)
        return thread

    def unsubscribe(self, thread: SinkThread) -> None:
        """Hand a sink no further items. Its thread closes it once it has taken the earlier ones."""
        with self._lock:
            self._drain()
            if thread in self._sinks:
                self._sinks.remove(thread)
        thread.close(0.0)

    def end(self, state: EndState, reason: str = "", hint: str = "", refused: bool = False) -> None:
        """Record the end of the run; only the first call counts. `refused` as in `Status`."""
        with self._lock:
            self._drain()
            if self._status.ended or self._forked:
                return
            self._polls.report = None
            self._live_status = dict
            self.throughput.resume(self._clock())
            self._ended_at = self._clock()
            self._change_status(
                state=state, reason=reason, hint=hint, refused=refused, waiting_for="", run_to=None
            )
            self._info_sent = self._info_sent and self._cadences_sent
            self._send_info()
            self._out.append(RunEnded(self._status_at({})))
            self._hand_out()

    def flush(self, timeout: float | None = None) -> bool:
        """Drain the queue and wait until every sink has taken it; False after `timeout` seconds."""
        with self._lock:
            self._drain()
            sinks = list(self._sinks)
        done = [sink.flush(timeout) for sink in sinks]
        return all(done)

    def close(self, timeout: float | None = None) -> bool:
        """Flush, close the sinks and stop the threads; False after `timeout` seconds."""
        self._closing.set()
        with self._lock:
            self._drain()
            sinks, self._sinks = self._sinks, []
        done = [sink.close(timeout) for sink in sinks]
        return all(done)

    # ------------------------------------------------------------ draining, under the lock

    def _work(self) -> None:
        while not self._closing.wait(DRAIN_EVERY_S):
            for call in tuple(self._regular_calls):
                try:
                    call()
                except Exception as error:
                    self.fault("recorder", error)
            try:
                with self._lock:
                    self._drain()
                    self._polls.expire()
            except Exception as error:
                self.fault("recorder", error)

    def _enqueue(self, add: Callable[..., None], *arguments: Any) -> None:
        if not self._forked:
            self._queue.append((add, arguments))

    def _enqueue_or_drop(self, add: Callable[..., None], *arguments: Any) -> None:
        if len(self._queue) < QUEUE_OTHERS:
            self._enqueue(add, *arguments)
        else:
            self._dropped_others += 1

    def _drain(self) -> None:
        for _ in range(len(self._queue)):
            add, arguments = self._queue.popleft()
            try:
                add(*arguments)
            except Exception as error:
                if text := self._new_fault("recorder", error):
                    self._add_notice("fault", sanitize(text), "error")
        if self._dropped > self._reported_dropped:
            dropped = self._dropped - self._reported_dropped
            self._reported_dropped += dropped
            self._out.append(ItemsDropped(dropped))
            text = f"{dropped} steps were dropped: they arrived faster than they can be recorded"
            self._add_notice("fault", text, "warning")
        if self._dropped_others > self._reported_others:
            dropped = self._dropped_others - self._reported_others
            self._reported_others += dropped
            text = f"{dropped} printed lines, samples or rows were dropped: they arrived too fast"
            self._add_notice("fault", text, "warning")
        self._hand_out()

    def _hand_out(self) -> None:
        if self._out:
            out, self._out = self._out, []
            for sink in self._sinks:
                sink.put(out)

    def _add_step(self, record: StepRecord, excluded_s: float) -> None:
        record = rounded_for_storage(record)
        self._send_info()
        for table, values in record.rows:
            self.history.tables[table].append(record.step, values)
        step = max(self._status.step, record.step)
        self._status = msgspec.structs.replace(self._status, step=step)
        step_ms = self._step_ms(record)
        self.throughput.add(record.step, record.time, step_ms, record.own_ms, excluded_s)
        clipped = record.clip is not None and record.clip.scale < 1.0
        if clipped or any(self._info.tables[n].name == schema.CLIP for n, _ in record.rows):
            self.throughput.add_clip(clipped)
        self._out.append(StepRecorded(record))
        self._add_events(self._events.add_step(record))
        if self._engine is not None:
            self._add_findings(self._engine.step(record))

    def _rewound(self, step: int) -> None:
        self._status = msgspec.structs.replace(self._status, step=step)
        self.throughput.restart_window()

    def _repeat_step(self, record: StepRecord) -> None:
        """Compare a repeated step with the recorded one, and warn of the first difference. The
        step is not recorded again."""
        self._status = msgspec.structs.replace(self._status, step=record.step)
        if record.producer is not None and self._engine is not None:
            text = f"step {record.step:,} was repeated: {self._engine.origin(record.producer)}"
            self.notice("state", text, "warning", record.step)
        for table, values in rounded_for_storage(record).rows:
            if self._info.tables[table].name != schema.STEP or self._differences:
                continue
            steps, recorded = self.history.tables[table].tail(REPEATED_ROWS)
            row = int(np.searchsorted(steps, record.step))
            if row < len(steps) and steps[row] == record.step:
                column = schema.STEP_INDEX["loss"]
                loss, again = recorded[row, column], values[column]
                if not (loss == again or (np.isnan(loss) and np.isnan(again))):
                    self._differences += 1
                    text = (
                        f"step {record.step:,} differs when repeated: its loss was "
                        f"{loss:.7g} and is {again:.7g}, so this training is not deterministic"
                    )
                    self._add_notice("state", text, "warning", record.step)

    def _add_skip(self, record: SkipRecord) -> None:
        self._send_info()
        self._add_events(self._events.add_skip(record))
        if self._engine is not None:
            self._add_findings(self._engine.skipped(record))

    def _add_events(self, events: Sequence[Event]) -> None:
        for event in events:
            self._out.append(event)
            if self._first_nonfinite is None and isinstance(event, NonFinite):
                self._first_nonfinite = event

    def _add_findings(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            if finding.level != "info" and finding.number not in self._found:
                self._found.add(finding.number)
                # The training thread is ahead of the recorder.
                now = self._current_step() if self._current_step else self._status.step
                self._dense_until = now + STEPS_AFTER_FINDING
            self._out.append(self._events.add_finding(sanitize_message(finding)))

    def _step_ms(self, record: StepRecord) -> float:
        for table, values in record.rows:
            if self._info.tables[table].name == schema.STEP:
                # A step cannot have begun before the run.
                since_start_ms = (record.time - self._info.started_at) * 1e3
                return min(float(values[schema.STEP_INDEX["step_ms"]]), since_start_ms)
        return 0.0

    def _add_row(self, row: RowRecorded) -> None:
        self._send_info()
        self.history.tables[row.table].append(row.step, row.values)
        self._out.append(row)
        if self._engine is not None:
            self._add_findings(self._engine.row(row.table, row.step, row.values, row.time))

    def _add_notice(
        self,
        kind: NoticeKind,
        text: str,
        level: Level = "info",
        step: int | None = None,
        who: str = "",
        when: float | None = None,
    ) -> None:
        step = self._status.step if step is None else step
        when = self._clock() if when is None else when
        self._out.append(self._events.add_notice(kind, text, level, step, who, when))

    def _add_log_line(self, stream: Stream, text: str, when: float, step: int | None) -> None:
        step = self._status.step if step is None else step
        line = LogLine(self._events.log.next_id, when, step, stream, text)
        self._events.log.append(line)
        self._out.append(line)

    def _add_artifact(self, artifact: Artifact) -> None:
        self._out.append(self._events.add_artifact(artifact))

    def _declare(self, declared: tuple[Table, ...]) -> None:
        tables = list(self._info.tables)
        for table in declared:
            while table.id >= len(tables):  # ids that are reserved but not declared yet
                tables.append(Table(len(tables), "", ()))
            known = tables[table.id]
            if table.columns is not known.columns:
                table = sanitize_message(table)
            tables[table.id] = table
            if not known.name or known.columns != table.columns:
                self.history.declare(table)
        with_cadences = self._info.with_cadences(tuple(table.every for table in tables))
        if with_cadences.tables == tuple(tables):
            # Cadences change often: `Update.cadences` carries them, without a new revision.
            self._info = with_cadences
            self._cadences_sent = False
        else:
            self._change_info({"tables": tuple(tables)})
        record_bytes = sum(4 * len(table.columns) + 64 for table in tables)
        fitting = QUEUE_BYTES // max(1, record_bytes)
        self._capacity = max(MIN_QUEUE_STEPS, min(QUEUE_STEPS, fitting))

    def _change_info(self, changes: dict[str, Any]) -> None:
        changes = {name: sanitize_message(value) for name, value in changes.items()}
        changed = msgspec.structs.replace(self._info, **changes)
        if changed != self._info:
            self._info = msgspec.structs.replace(changed, revision=self._info.revision + 1)
            self._info_sent = False

    def _send_info(self) -> None:
        if not self._info_sent:
            self._info_sent = True
            self._out.append(InfoChanged(self._info))
            if self._engine is not None:
                self._engine.describe(self._info)

    # ------------------------------------------------------------ status, under the lock

    def _change_status(self, **changes: Any) -> None:
        self._status = sanitize_message(msgspec.structs.replace(self._status, **changes))

    def _current_status(self) -> Status:
        try:
            return self._status_at(self._live_status())
        except Exception as error:
            self.fault("status", error)
            return self._status_at({})

    def _status_at(self, live: dict[str, Any]) -> Status:
        now = self._clock() if self._ended_at is None else self._ended_at
        ended = self._ended_at is not None
        status = self.throughput.complete(self._status, self._info, now, ended)
        return msgspec.structs.replace(status, **live)

    # ------------------------------------------------------------ faults and forks

    def _new_fault(self, where: str, error: BaseException) -> str:
        text = f"{where}: {type(error).__name__}: {error}"
        if text in self._faults or len(self._faults) >= MAX_REPORTED_FAULTS:
            return ""
        self._faults.add(text)
        return text

    def _sink_failed(self, sink: Sink, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):  # `| head` ends the lines, not the training
            message = READER_GONE
        else:
            name = type(sink).__name__
            self.fault(name, error)
            message = f"{name} has failed, the training continues: {error}"
        with contextlib.suppress(OSError, ValueError):
            print(f"tui-trainer: {message}", file=sys.stderr, flush=True)

    def _forget_parent(self) -> None:
        """In a forked child the threads do not exist and the lock may be held forever."""
        self._forked = True
        self._lock = threading.RLock()
        self._queue.clear()
        self._sinks.clear()


def _forget_in_children(recorder: Recorder) -> None:
    reference = weakref.ref(recorder)

    def forget() -> None:
        if (found := reference()) is not None:
            found._forget_parent()

    os.register_at_fork(after_in_child=forget)
