"""However much is printed or recorded, an answer is no larger than the viewer asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tui_trainer.client.api import SnapshotBuilder
from tui_trainer.client.connection import next_poll
from tui_trainer.history.records import ClipRecord, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import LogLine
from tui_trainer.protocol.framing import encode
from tui_trainer.protocol.messages import Poll, Update
from tui_trainer.protocol.schema import Column, RunInfo
from tui_trainer.record import viewer_updates
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.viewer_updates import (
    BACKLOG_BYTES,
    BURST_BYTES,
    BYTES_PER_SECOND,
    TokenBucket,
)

LINE = "epoch 3 batch 1200 loss 0.4183 accuracy 0.8712 lr 3.0e-04 éè"


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def monotonic(self):
        return self.now


class Watched:
    """A recorder, and a viewer that keeps everything it receives."""

    def __init__(self, recorder, clock, budget, viewer):
        self.recorder, self.clock, self.budget, self.viewer = recorder, clock, budget, viewer
        self.next_poll, self.builder = Poll(budget=budget), SnapshotBuilder()
        self.sizes, self.answers = [], 0

    def poll(self):
        update = self.recorder.update_for(self.next_poll, self.viewer)
        self.next_poll = next_poll(self.next_poll, update)
        self.builder.apply(update)
        if update.info is None:  # the description is sent whole, when it changes
            self.sizes.append(len(encode(update)))
        self.answers += 1
        return update

    def catch_up(self):
        while self.poll().more:
            assert self.answers < 10_000, "it never catches up"

    @property
    def log(self):
        return self.builder.snapshot.log


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(viewer_updates, "time", clock)
    return clock


@pytest.fixture
def recorder():
    recorder = Recorder(RunInfo(name="r", task="script"))
    yield recorder
    recorder.close()


def left_out(log):
    return [line.text for line in log if "left out" in line.text]


@pytest.mark.parametrize("budget", [4 * 1024, 64 * 1024, 256 * 1024])
@pytest.mark.slow
def test_a_flood_of_lines_stays_within_the_budget_and_its_newest_come(recorder, clock, budget):
    viewer = Watched(recorder, clock, budget, 1)
    viewer.catch_up()
    numbers = itertools.count()
    for _ in range(40):  # 10 seconds of 6,000 lines a second
        for _ in range(1_500):
            recorder.log("stdout", f"{LINE} {next(numbers)}")
        clock.now += 0.25
        for _ in range(1 + viewer_updates.PARTS * 2):
            if not viewer.poll().more:
                break
    viewer.catch_up()
    assert max(viewer.sizes) < 1.25 * budget + 1_000
    sent = sum(viewer.sizes)
    allowed = (
        BACKLOG_BYTES + 10 * min(BYTES_PER_SECOND, budget) + 41 * budget / viewer_updates.PARTS
    )
    assert sent < allowed + viewer.answers * 600
    assert viewer.log[-1].text == f"{LINE} {next(numbers) - 1}"
    gaps = left_out(viewer.log)
    assert gaps
    assert "tui-trainer logs" in gaps[-1]
    # Ids show which lines are there; each gap is reported with its size.
    for before, line in itertools.pairwise(viewer.log):
        if "left out" in line.text:
            assert int(line.text.split()[1].replace(",", "")) == line.id - before.id
        else:
            assert line.id == before.id + 1


def test_a_burst_comes_whole(recorder, clock):
    viewer = Watched(recorder, clock, 64 * 1024, 1)
    viewer.catch_up()
    for number in range(1_200):  # a long traceback, and what came with it
        recorder.log("stderr", f"{LINE} {number}")
    clock.now += 0.25
    viewer.catch_up()
    assert [line.text for line in viewer.log] == [f"{LINE} {n}" for n in range(1_200)]
    assert max(viewer.sizes) < 1.25 * 64 * 1024


def test_a_late_viewer_gets_the_lines_printed_before(recorder, clock):
    for number in range(4_000):
        recorder.log("stdout", f"{LINE} {number}")
    viewer = Watched(recorder, clock, 64 * 1024, 1)
    viewer.catch_up()
    assert [line.text for line in viewer.log] == [f"{LINE} {n}" for n in range(4_000)]


def test_lines_printed_long_before_are_reported_as_left_out(recorder, clock):
    for number in range(9_000):
        recorder.log("stdout", f"{LINE} {number} {'x' * 100}")
    viewer = Watched(recorder, clock, 256 * 1024, 1)
    viewer.catch_up()
    first, *rest = viewer.log
    assert "left out" in first.text
    assert int(first.text.split()[1].replace(",", "")) + len(rest) == 9_000


def test_no_event_is_lost_however_small_the_answers(recorder, clock):
    recorder.new_table(schema.CLIP, [Column("norm")])
    for step in range(1, 1_501):
        clip = ClipRecord(1.0, 2.0, 0.5, (1, 2, 3), (0.5, 0.3, 0.1), "norm")
        rows = ((0, np.array([1.0], np.float32)),)
        recorder.record(StepRecord(step, 0.0, "", rows, clip))
        if step % 100 == 0:
            recorder.notice("mark", f"at {step}", step=step)
            recorder.flush()
    viewer = Watched(recorder, clock, 4 * 1024, 1)
    seen = []
    while True:
        update = viewer.poll()
        seen += [event.id for event in update.events]
        if not update.more:
            break
    assert seen == list(range(1_515))
    assert viewer.answers > 20
    assert max(viewer.sizes) < 1.5 * 4 * 1024 + 1_000


def test_rows_come_beside_a_flood(recorder, clock):
    recorder.new_table("figures", [Column(f"c{i}") for i in range(20)])
    viewer = Watched(recorder, clock, 4 * 1024, 1)
    viewer.catch_up()
    for step in range(1, 41):
        rows = ((0, np.full(20, step, np.float32)),)
        recorder.record(StepRecord(step, 0.0, "", rows))
        for _ in range(300):
            recorder.log("stdout", LINE)
        clock.now += 0.25
        viewer.poll()
        table = viewer.builder.history.table("figures")
        assert table.last_step == step


def test_an_allowance_grows_to_a_burst_and_keeps_its_backlog():
    bucket = TokenBucket(0.0)
    assert bucket.available(10.0, 1 << 20) == BACKLOG_BYTES
    bucket.spend(BACKLOG_BYTES)
    assert bucket.available(11.0, 1 << 20) == BYTES_PER_SECOND
    assert bucket.available(1_000.0, 1 << 20) == BURST_BYTES
    bucket.spend(10 * BURST_BYTES)
    assert bucket.available(1_000.0, 1 << 20) == 0


def test_the_session_reports_the_end_of_a_gap():
    builder = SnapshotBuilder()
    empty = Update(status=builder.snapshot.status)
    lines = tuple(LogLine(i, 1.0, 7, "stdout", f"line {i}") for i in (3, 4, 9))
    builder.apply(type(empty)(status=empty.status, log=lines))
    assert [line.id for line in builder.snapshot.log] == [2, 3, 4, 8, 9]
    assert [t.split()[1] for t in left_out(builder.snapshot.log)] == ["3", "4"]
