from __future__ import annotations

import numpy as np
import pytest

from tests.history.test_series import check_window, series
from tests.store.test_store import INFO, TABLES, Clock, stepped, wide
from tui_trainer.client.replay import ReplaySession
from tui_trainer.protocol.actions import (
    Pause,
    Resume,
    RunToEpochEnd,
    Step,
    StepPhase,
    Stop,
    Throttle,
)
from tui_trainer.protocol.events import Clip, LogLine, TextSample
from tui_trainer.protocol.messages import Status
from tui_trainer.record.sink_items import InfoChanged, RunEnded
from tui_trainer.store.schema import StoreError
from tui_trainer.store.writer import StoreWriter

STEPS = 1000


@pytest.fixture
def recorded(tmp_path):
    """A run of 1,000 steps at 10 a second, with an event, a line and a sample every 100 steps."""
    _, values = series(1, STEPS)
    sink = StoreWriter(tmp_path)
    info = INFO.__class__("quiet-otter", "gpt", tables=TABLES, steps_per_epoch=300)
    items = [InfoChanged(info)]
    for step in range(1, STEPS + 1):
        items.append(stepped(step, values[step - 1], wide(step), when=1000 + step / 10))
        if step % 100 == 0:
            number = step // 100 - 1
            items.append(Clip(number, step, 0.0, 1.0, 2.0, 0.5))
            items.append(LogLine(number, 0.0, step, "stdout", f"step {step}"))
            items.append(TextSample(number, step, "To", str(step)))
            sink.take(items, Status(state="running", step=step))
            sink.commit()
            items = []
    sink.take([RunEnded(Status(state="crashed", step=STEPS, reason="killed"))], Status())
    sink.close()
    return tmp_path, values


def test_opens_at_the_end_and_shows_any_step(recorded):
    directory, values = recorded
    replay = ReplaySession(directory, Clock())
    seen = replay.poll()
    assert (seen.link.state, seen.status.state, seen.status.step) == ("replay", "crashed", STEPS)
    assert seen.status.reason == "killed"
    assert seen.info.name == "quiet-otter"
    assert len(seen.events) == len(seen.log) == len(seen.artifacts) == 10
    replay.seek(250)
    now = replay.poll()
    assert now.version > seen.version
    assert (now.status.state, now.status.step, now.status.reason) == ("paused", 250, "")
    assert [event.step for event in now.events] == [100, 200]
    assert [line.text for line in now.log] == ["step 100", "step 200"]
    assert [sample.text for sample in now.artifacts] == ["100", "200"]
    table = now.history.table("step")
    assert table.rows == table.last_step == 250
    steps = np.arange(1, 251)
    check_window(table, steps, values[:250], 1, 251, 20)
    np.testing.assert_equal(table.latest()[1], values[249])
    assert replay.moments.next_event("clip", 250) == 300
    assert replay.moments.next_event("clip", 250, backwards=True) == 200
    assert replay.moments.next_event("nonfinite", 250) is None
    assert replay.poll() is now


def test_events_of_a_step_that_was_never_completed_are_shown_at_the_end(recorded):
    """As of a GradScaler that skips every step, or of a crash in the middle of one."""
    directory, _ = recorded
    sink = StoreWriter(directory)
    sink.take([Clip(10, STEPS + 1, 0.0, 1.0, 2.0, 0.5)], Status())
    sink.close()
    replay = ReplaySession(directory, Clock())
    assert [event.step for event in replay.poll().events][-2:] == [STEPS, STEPS + 1]
    replay.seek(STEPS - 1)
    assert replay.poll().events[-1].step == STEPS - 100


def test_the_keys_of_a_live_run_move_the_cursor(recorded):
    clock = Clock()
    replay = ReplaySession(recorded[0], clock)
    replay.seek(100)
    assert replay.send(Step(5)).result().ok
    assert replay.poll().status.step == 105
    assert replay.send(RunToEpochEnd()).result().ok
    assert replay.poll().status.step == 300
    ack = replay.send(Resume()).result()
    assert ack.status.state == "running"
    clock.now += 3
    replay.poll()
    assert replay.poll().status.step == 330  # at the recorded speed
    replay.send(Throttle(100))
    clock.now += 1
    assert replay.poll().status.step == 430
    replay.send(Pause())
    clock.now += 5
    assert replay.poll().status.step == 430
    assert not replay.send(StepPhase()).result().ok
    refused = replay.send(Stop()).result()
    assert not refused.ok
    assert "recording" in refused.message
    replay.send(Resume())
    clock.now += 100
    replay.poll()
    assert replay.poll().status.step == STEPS
    assert replay.poll().status.state == "crashed"


def test_the_time_of_a_step_is_known(recorded):
    replay = ReplaySession(recorded[0], Clock())
    replay.seek(600)
    assert replay.poll().status.elapsed_s == pytest.approx(59.9)  # from the first step
    assert replay.speed == pytest.approx(10)


def test_follows_a_live_run(tmp_path):
    sink = StoreWriter(tmp_path)
    three = np.ones(3, np.float32)
    sink.take([InfoChanged(INFO), stepped(1, three)], Status(state="running", step=1))
    clock = Clock()
    replay = ReplaySession(tmp_path, clock)
    assert replay.poll().status.step == 1
    sink.take([stepped(2, three)], Status(state="running", step=2))
    sink.commit()
    clock.now += 2
    assert replay.poll().status.step == 2
    replay.seek(1)
    sink.take([stepped(3, three)], Status(state="running", step=3))
    sink.commit()
    clock.now += 2
    assert replay.poll().status.step == 1  # the cursor stays where it was put
    assert replay.last_step == 3
    sink.close()


def test_nothing_to_replay(tmp_path):
    with pytest.raises(StoreError, match="nothing was recorded"):
        ReplaySession(tmp_path)
