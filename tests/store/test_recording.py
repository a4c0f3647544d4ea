"""The store fed by the recorder itself, as a run does."""

from __future__ import annotations

import threading

import numpy as np

from tests.client.scripted import until
from tui_trainer.client.replay import ReplaySession
from tui_trainer.history.records import StepRecord
from tui_trainer.protocol.events import TextSample
from tui_trainer.protocol.schema import Column, RunInfo, Table
from tui_trainer.record.recorder import Recorder
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.writer import StoreWriter


def step_values(step):
    return np.array([1 / step, 0.1, step, 5.0], np.float32)


def table():
    names = ("loss", "learning_rate", "grad_norm_preclip", "step_ms")
    return Table(0, "step", tuple(Column(name) for name in names))


def record(recorder, steps):
    for step in steps:
        rows = ((0, step_values(step)),)
        recorder.record(StepRecord(step, 1000.0 + step, "", rows))
        if step % 500 == 0:
            recorder.flush(240)


def test_a_recorded_run_is_replayed(tmp_path):
    recorder = Recorder(RunInfo("quiet-otter", "gpt"))
    recorder.subscribe(StoreWriter(tmp_path, lambda text: recorder.set_status(recording=text)))
    recorder.declare([table()])
    record(recorder, range(1, 3001))
    recorder.log("stdout", "hello")
    recorder.notice("mark", "look here")
    recorder.artifact(TextSample(0, 3000, "To", "be"))
    recorder.end("finished", "all steps made")
    assert recorder.close(240)
    assert recorder.status.recording == ""
    seen = ReplaySession(tmp_path).poll()
    assert (seen.status.state, seen.status.step) == ("finished", 3000)
    assert seen.info.name == "quiet-otter"
    assert [line.text for line in seen.log] == ["hello"]
    assert "look here" in [getattr(event, "text", "") for event in seen.events]
    assert seen.artifacts[0].text == "be"
    held = seen.history.table("step")
    assert held.rows == 3000
    window = held.window([0, 2], 1, 3001, 100)
    assert window.high[0, 0] == 1
    assert window.high[-1, 1] == 3000
    np.testing.assert_array_equal(held.at(1234), step_values(1234))


def test_a_disk_that_refuses_does_not_hold_up_the_training(tmp_path):
    before = set(threading.enumerate())
    recorder = Recorder(RunInfo("quiet-otter", "gpt"))
    place = tmp_path / "run"
    recorder.subscribe(StoreWriter(place, lambda text: recorder.set_status(recording=text)))
    recorder.declare([table()])
    record(recorder, range(1, 1001))
    until(lambda: "not recording" in recorder.status.recording)
    assert "training continues" in recorder.status.recording
    place.mkdir()
    until(lambda: not recorder.status.recording)
    recorder.end("finished")
    assert recorder.close(240)
    assert StoredHistory(place).tables[0].rows == 1000
    assert len(set(threading.enumerate()) - before) < 5
