from __future__ import annotations

import itertools
import os
import threading
import time

import numpy as np
import pytest

from tests.rows import clip_row, step_row
from tui_trainer.findings.engine import FindingsEngine
from tui_trainer.findings.rule import Found, Rule
from tui_trainer.history import MemoryHistory
from tui_trainer.history.records import ClipRecord, StepRecord
from tui_trainer.protocol.events import Clip, LogLine, NonFinite, Notice, TextSample
from tui_trainer.protocol.messages import PhaseReport, Poll, Status
from tui_trainer.protocol.schema import CLIP_COLUMNS, STEP_COLUMNS, Column, RunInfo, Table
from tui_trainer.record import viewer_updates
from tui_trainer.record.recorder import STEPS_AFTER_FINDING, Recorder
from tui_trainer.record.sink_items import InfoChanged, ItemsDropped, RunEnded, StepRecorded
from tui_trainer.run.sinks.jsonlines import event_object
from tui_trainer.store.codec import decode_event, encode
from tui_trainer.ui.panels.log import entry_of_event


class Collector:
    """A sink that keeps everything, and can be made to block."""

    def __init__(self):
        self.items = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def take(self, items, status: Status):
        self.gate.wait()
        self.items.extend(items)

    def close(self):
        self.closed = True


def make(columns=3):
    recorder = Recorder(RunInfo(name="r", task="gpt"))
    recorder.declare(
        [
            Table(0, "step", STEP_COLUMNS),
            Table(1, "grad_norm", tuple(Column(f"p{i}") for i in range(columns))),
            Table(2, "clip", CLIP_COLUMNS),
        ]
    )
    return recorder


def step(number, time=None, columns=3, clip=None, nonfinite=(), own_ms=0.1, optimizer=""):
    rows = (
        (0, step_row(1.0 / number, 1e-3, 2.0, 10.0)),
        (1, np.full(columns, number, np.float32)),
        (2, clip_row(1.0, 2.0, 1.0, 0.5)),
    )
    when = 1000.0 + number * 0.01 if time is None else time
    return StepRecord(number, when, optimizer, rows, clip, nonfinite, own_ms)


@pytest.fixture
def recorder():
    made = make()
    yield made
    made.close(240)


def test_an_update_holds_everything_since_the_cursor(recorder):
    for number in range(1, 11):
        recorder.record(step(number))
    first = recorder.update_for(Poll())
    assert first.info is not None
    assert first.status.step == 10
    assert {rows.table: rows.count for rows in first.rows} == {0: 10, 1: 10, 2: 10}
    values = np.frombuffer(next(r for r in first.rows if r.table == 1).values, "<f4")
    assert values.reshape(10, 3)[:, 0].tolist() == list(range(1, 11))
    recorder.record(step(11))
    second = recorder.update_for(Poll(revision=first.info.revision, rows=(10, 10, 10)))
    assert second.info is None
    assert {rows.table: (rows.first, rows.count) for rows in second.rows} == {
        0: (10, 1),
        1: (10, 1),
        2: (10, 1),
    }


def test_a_small_budget_summarises_and_still_covers_every_row():
    recorder = make(columns=50)
    for number in range(1, 2001):
        recorder.record(step(number, columns=50))
    viewer, info, more = MemoryHistory(), recorder.info, True
    for table in info.tables:
        viewer.declare(table)
    while more:
        update = recorder.update_for(Poll(rows=viewer.cursors(), budget=20_000))
        sent = sum(len(r.values) + len(r.low) + len(r.high) for r in update.rows)
        assert sent <= 40_000
        for rows in update.rows:
            viewer.apply(rows)
        more = update.more
    assert viewer.cursors() == (2000, 2000, 2000)
    recorder.close(240)


@pytest.mark.parametrize(
    "poll",
    [
        Poll(rows=(-5, 2**63, 7, 8, 9, 10)),
        Poll(event=-1, log=2**62, artifact=-(2**60)),
        Poll(budget=-1),
        Poll(budget=2**60),
        Poll(watch=("nonsense",) * 1000, report=(2**60, "x"), revision=2**60),
    ],
)
def test_absurd_polls_are_answered(recorder, poll):
    for number in range(1, 5):
        recorder.record(step(number))
    recorder.update_for(poll)
    assert recorder.watched(1) == frozenset()


def test_events_are_dense_and_typed(recorder):
    recorder.notice("mark", "hello", who="me")
    recorder.record(step(1, clip=ClipRecord(1.0, 2.0, 0.5, (0,), (0.9,))))
    recorder.record(step(2, nonfinite=(("loss", "", "nan", 1),)))
    recorder.record(step(3, clip=ClipRecord(1.0, 0.5, 1.0, (), ())))
    events = recorder.update_for(Poll()).events
    assert [event.id for event in events] == [0, 1, 2]
    assert isinstance(events[1], Clip)
    assert isinstance(events[2], NonFinite)
    assert recorder.update_for(Poll(event=2)).events == events[2:]
    assert recorder.status.clipped_share == pytest.approx(1 / 3)


def test_a_value_that_may_have_been_non_finite_before_has_its_last_finite_step(recorder):
    late, at_once, never = (
        ("gradient", "a", "inf", 4),
        ("loss", "", "nan", 6),
        ("weight", "", "nan", None),
    )
    recorder.record(step(7, nonfinite=(late, at_once, never)))
    events = recorder.update_for(Poll()).events
    assert [event.seen for event in events] == [", seen at step 7, finite at step 4", "", ""]
    assert entry_of_event(events[0], None).text.endswith("in a, seen at step 7, finite at step 4")
    assert entry_of_event(events[1], None).text == "loss became nan"
    event = event_object(events[0])
    assert event["text"] == "gradient became inf in a, seen at step 7, finite at step 4"
    assert event["finite_at"] == 4
    assert decode_event(encode(events[0])) == events[0]


def test_memory_of_logs_is_bounded_and_numbers_stay_dense(recorder):
    for number in range(60_000):
        recorder.log("stdout", f"line {number}")
    cursor, seen, more = 0, [], True
    while more:
        update = recorder.update_for(Poll(log=cursor))
        seen += [line.id for line in update.log]
        cursor, more = seen[-1] + 1, update.more
    assert seen == list(range(seen[0], 60_000))
    assert 10_000 <= len(seen) <= 25_000  # more than a viewer keeps
    assert len(recorder._events.log.since(0, 60_000)[0]) <= 25_000


def test_artifacts_are_numbered(recorder):
    recorder.artifact(TextSample(99, 0, "a", "b"))
    recorder.artifact(TextSample(99, 0, "a", "c"))
    assert [a.id for a in recorder.update_for(Poll()).artifacts] == [0, 1]


def test_a_sink_gets_every_step_in_order_with_its_description(recorder):
    sink = Collector()
    feed = recorder.subscribe(sink)
    for number in range(1, 3001):
        recorder.record(step(number))
        if number % 500 == 0:
            assert recorder.flush(240)
    recorder.end("finished")
    assert recorder.flush(240)
    assert isinstance(sink.items[0], InfoChanged)
    steps = [item.record.step for item in sink.items if isinstance(item, StepRecorded)]
    assert steps == list(range(1, 3001))
    assert isinstance(sink.items[-1], RunEnded)
    assert feed.close(240)
    assert sink.closed


def test_the_status_that_a_sink_gets_is_not_ahead_of_its_items():
    """So that the loss in `status.json` is that of its step."""
    made, given, done = make(), [], threading.Event()

    class Both(Collector):
        def take(self, items, status):
            super().take(items, status)
            steps = [item.record.step for item in self.items if isinstance(item, StepRecorded)]
            given.append((status.step, steps[-1] if steps else 0))
            if status.step >= 3:
                done.set()

    number = itertools.count(1)
    feed = made.subscribe(Both())
    feed._status = lambda: made.record(step(next(number))) or made.status
    assert done.wait(240)
    made.close(240)
    assert all(status <= taken for status, taken in given)


def test_a_blocked_sink_costs_nothing_and_its_loss_is_reported(recorder):
    sink = Collector()
    sink.gate.clear()
    feed = recorder.subscribe(sink)
    feed._limit = 20_000
    for number in range(1, 1001):
        recorder.record(step(number))
    assert recorder.status.step == 1000  # the recorder itself continued
    sink.gate.set()
    recorder.end("finished")
    assert recorder.flush(240)
    steps = [item.record.step for item in sink.items if isinstance(item, StepRecorded)]
    lost = sum(item.steps for item in sink.items if isinstance(item, ItemsDropped))
    assert lost > 0
    assert len(steps) + lost == 1000


def test_lines_for_a_blocked_sink_are_bounded_and_its_bytes_return_to_zero(recorder):
    sink = Collector()
    sink.gate.clear()
    feed = recorder.subscribe(sink)
    feed._limit = 100_000
    for number in range(1, 201):
        recorder.record(step(number))
        recorder.log("stdout", "x" * 1000)
        recorder.artifact(TextSample(0, number, "To", "be"))
    recorder.notice("mark", "look here")
    with recorder._lock:
        recorder._drain()
    assert feed._bytes < 110_000
    sink.gate.set()
    recorder.end("finished")
    assert recorder.flush(240)
    assert feed._bytes == 0
    lost = [item for item in sink.items if isinstance(item, ItemsDropped)]
    for kind, held in (("steps", StepRecorded), ("lines", LogLine), ("samples", TextSample)):
        missing = sum(getattr(item, kind) for item in lost)
        assert missing > 0
        assert missing + sum(isinstance(item, held) for item in sink.items) == 200
    assert any(isinstance(item, Notice) for item in sink.items)


def test_a_failing_sink_is_reported_once_and_the_others_continue(recorder):
    class Failing(Collector):
        def take(self, items, status):
            raise ValueError("no")

    good = Collector()
    recorder.subscribe(Failing())
    recorder.subscribe(good)
    for number in range(1, 11):
        recorder.record(step(number))
        recorder.flush(240)
    faults = [e for e in recorder.update_for(Poll()).events if e.kind == "fault"]
    assert len(faults) == 1
    assert "no" in faults[0].text
    assert sum(isinstance(item, StepRecorded) for item in good.items) == 10


def test_the_queue_is_bounded_and_overflow_is_counted():
    recorder = make()
    recorder.flush()
    with recorder._lock:  # nothing can drain now
        for number in range(1, 6001):
            recorder.record(step(number))
        assert len(recorder._queue) <= 4096
    update = recorder.update_for(Poll())
    assert any("1904 steps" in event.text for event in update.events)
    recorder.close(240)


def test_printed_lines_and_repeated_steps_in_the_queue_are_bounded(monkeypatch):
    monkeypatch.setattr("tui_trainer.record.recorder.QUEUE_OTHERS", 5000)
    recorder = make()
    recorder.flush()
    with recorder._lock:  # nothing can drain now
        for number in range(6000):
            recorder.log("stdout", f"line {number}")
        assert len(recorder._queue) == 5000
        recorder.repeating_until = 10
        recorder.record(step(1))
        assert len(recorder._queue) == 5000
    update = recorder.update_for(Poll())
    assert any("1000 printed lines" in event.text for event in update.events)
    recorder.close(240)


def test_a_wrong_row_is_a_fault_reported_once_not_a_crash(recorder):
    bad = StepRecord(1, 1.0, "", ((0, np.zeros(9, np.float32)),))
    recorder.record(bad)
    recorder.record(bad)
    recorder.record(step(2))
    update = recorder.update_for(Poll())
    assert update.status.step == 2
    assert len([e for e in update.events if e.kind == "fault"]) == 1


def test_watch_is_the_union_of_live_viewers(recorder, monkeypatch):
    monkeypatch.setattr(viewer_updates, "WATCH_TIMEOUT_S", 600.0)
    recorder.update_for(Poll(watch=("attention_heads",)), 1)
    recorder.update_for(Poll(watch=("attention_spectrum",)), 2)
    assert recorder.watched(1) == {"attention_heads", "attention_spectrum"}
    recorder.viewer_gone(1)
    assert recorder.watched(1) == {"attention_spectrum"}
    recorder.update_for(Poll(), 2)
    assert recorder.watched(1) == frozenset()


class AtThree(Rule):
    name = "at-three"
    title = "step 3"
    needs = explanation = advice = source = "nothing"

    def step(self, seen):
        return [Found(3, f"since step 3, at {seen.step}")] if seen.step >= 3 else []


CLOSELY = {"needed:update_ratio", "needed:weight_norm"}


def test_update_ratios_are_measured_at_every_step_after_a_finding(recorder):
    recorder.evaluate_with(FindingsEngine(rules=[AtThree]))
    for number in range(1, 3):
        recorder.record(step(number))
    recorder.flush()
    assert recorder.watched(3) == frozenset()
    for number in range(3, 5):
        recorder.record(step(number))
        recorder.flush()  # a finding that was known is no reason
    # Asked once for each of two optimizers.
    dense = [n for n in range(1, 30) for _ in range(2) if recorder.watched(n) == CLOSELY]
    assert dense == [n for n in range(4, 4 + STEPS_AFTER_FINDING) for _ in range(2)]


def test_steps_after_a_finding_are_counted_from_the_one_in_progress(recorder):
    recorder.follow(dict, lambda: 0.0, lambda: 50)
    recorder.evaluate_with(FindingsEngine(rules=[AtThree]))
    recorder.record(step(3))
    recorder.flush()
    dense = [n for n in range(1, 100) if recorder.watched(n) == CLOSELY]
    assert dense == list(range(51, 51 + STEPS_AFTER_FINDING))


def test_a_viewer_is_forgotten_under_the_lock(recorder, monkeypatch):
    """The recorder's thread iterates over the viewers meanwhile."""
    owned = []
    forget = recorder._polls.forget

    def checked(viewer):
        owned.append(recorder._lock._is_owned())
        forget(viewer)

    monkeypatch.setattr(recorder._polls, "forget", checked)
    recorder.viewer_gone(1)
    assert owned == [True]


def test_the_thread_of_the_recorder_survives_a_fault(recorder, monkeypatch):
    failed, continued = threading.Event(), threading.Event()

    def fail():
        if failed.is_set():
            continued.set()
        failed.set()
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(recorder._polls, "expire", fail)
    assert continued.wait(120)
    (fault,) = [e for e in recorder.update_for(Poll()).events if e.kind == "fault"]
    assert "dictionary changed size" in fault.text


def test_a_report_is_sent_once_to_each_viewer_and_again_when_remade(recorder):
    recorder.report(PhaseReport(3, "backward", 1.0, "gradients"))
    assert recorder.update_for(Poll(), 1).report is not None
    assert recorder.update_for(Poll(report=(3, "backward")), 1).report is None
    assert recorder.update_for(Poll(), 2).report is not None
    recorder.report(PhaseReport(3, "backward", 2.0, "gradients of the next micro-batch"))
    assert recorder.update_for(Poll(report=(3, "backward")), 1).report is not None
    recorder.report(None)
    assert recorder.update_for(Poll(), 1).report is None


def test_changing_the_cadence_of_a_table_keeps_its_history(recorder):
    recorder.record(step(1))
    before = recorder.info.revision
    recorder.declare([Table(1, "grad_norm", tuple(Column(f"p{i}") for i in range(3)), every=10)])
    assert recorder.info.revision == before  # a viewer receives only the cadences
    update = recorder.update_for(Poll(revision=before))
    assert update.info is None
    assert update.cadences == tuple(table.every for table in recorder.info.tables)
    assert update.cadences[1] == 10
    assert recorder.info.tables[1].every == 10
    assert recorder.history.tables[1].rows == 1


def test_new_tables_get_free_ids(recorder):
    assert recorder.new_table("validation", (Column("loss"),)) == 3
    recorder.declare([Table(7, "memory", (Column("a"),))])
    assert recorder.new_table("x", ()) == 8
    recorder.row(3, 5, np.array([1.5], np.float32))
    assert [r.table for r in recorder.update_for(Poll()).rows] == [3]


def test_nothing_counts_after_the_end(recorder):
    recorder.record(step(1))
    recorder.end("crashed", "it broke", "mend it")
    recorder.end("finished")
    status = recorder.status
    assert (status.state, status.reason, status.hint) == ("crashed", "it broke", "mend it")
    assert status.ended


def test_a_forked_child_drops_everything_and_cannot_deadlock(recorder):
    with recorder._lock:
        child = os.fork()
        if child == 0:
            try:
                recorder.record(step(1))
                recorder.notice("mark", "child")
                recorder.end("crashed")
                assert not recorder._queue
                os._exit(0)
            finally:
                os._exit(1)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    assert done
    assert os.waitstatus_to_exitcode(code) == 0
    assert not recorder.status.ended


@pytest.mark.parametrize("share", [1 / 3, float("nan"), float("inf")])
def test_a_clip_keeps_its_measured_digits(recorder, share):
    clip = ClipRecord(1.0, 1 / 3, share, (1, 0), (share, 0.0))
    collector = Collector()
    recorder.subscribe(collector)
    recorder.record(step(1, clip=clip))
    assert recorder.flush(240)
    (recorded,) = [item.record.clip for item in collector.items if isinstance(item, StepRecorded)]
    assert recorded.norm_before == np.float32(1 / 3)
    assert recorded.shares == pytest.approx((share, 0.0), abs=1 / 8192, nan_ok=True)
    assert recorded.scale == pytest.approx(share, rel=1e-7, nan_ok=True)


def test_own_cost_has_the_digits_that_the_store_keeps(recorder):
    collector = Collector()
    recorder.subscribe(collector)
    recorder.record(step(1, own_ms=1.42335))
    assert recorder.flush(240)
    (recorded,) = [item.record.own_ms for item in collector.items if isinstance(item, StepRecorded)]
    assert recorded == float(np.float32(1.42335)) != 1.42335
