from __future__ import annotations

import math
import os
import sqlite3

import numpy as np
import pytest

from tests.rows import clip_row, step_row
from tui_trainer.history.records import ClipRecord, StepRecord
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import TextSample
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import Column, ParameterInfo, RunInfo
from tui_trainer.record.recorder import Recorder
from tui_trainer.record.sink_items import InfoChanged, StepRecorded
from tui_trainer.run.sinks import Output
from tui_trainer.run.sinks.jsonlines import JsonLines
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.recorded_items import replay_items
from tui_trainer.store.schema import STORE_FILE
from tui_trainer.store.writer import StoreWriter


def lines_to(path):
    return JsonLines(Output(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)))


def train(recorder, steps):
    """Two optimizers, a cadence, clips, infinities, samples, evaluations, lines, descriptions."""
    step = recorder.new_table(schema.STEP, schema.STEP_COLUMNS)
    clip = recorder.new_table(schema.CLIP, schema.CLIP_COLUMNS)
    norms = recorder.new_table(schema.GRAD_NORM, [Column(f"p{i}") for i in range(40)])
    other = recorder.new_table(schema.STEP, schema.STEP_COLUMNS, optimizer="second")
    evaluated = recorder.new_table(schema.VALIDATION, [Column("loss"), Column("accuracy")])
    parameters = tuple(ParameterInfo(f"p{i}", (2,), "float32", 2) for i in range(40))
    recorder.row(evaluated, 0, np.float32([9, 0.5]))
    recorder.notice("state", "begun")
    recorder.describe(parameters=parameters, versions={"torch": "2"})
    random = np.random.default_rng(1)
    for n in range(1, steps + 1):
        rows = [(step, step_row(*random.standard_normal(4)))]
        rows.append((clip, clip_row(1, 2, 1, 0.5)))
        if n % 3 == 0:
            rows.append((norms, random.standard_normal(40).astype(np.float32)))
        if n == 7:
            rows[0][1][0] = np.nan
        clipped = ClipRecord(1.0, 2.0, 0.5, (3, 1), (0.5, 0.25)) if n % 4 == 0 else None
        if n == 2:
            clipped = ClipRecord(1.0, math.inf, 0.0, (3, 1), (1.0, math.nan))
        bad = (("loss", "p0", "nan"),) if n == 7 else ()
        when = 1.7e9 + n * 0.0437123
        recorder.record(StepRecord(n, when, "", tuple(rows), clipped, bad, n / 7))
        pair = ((other, step_row(*random.standard_normal(4))),)
        recorder.record(StepRecord(n, when + 1e-3, "second", pair))
        if n % 10 == 0:
            recorder.row(evaluated, n, np.float32([1 / n, np.inf]))
            recorder.artifact(TextSample(0, n, "To", "be"))
            recorder.log("stdout", f"line {n}")
        if n == 12:
            recorder.describe(total_steps=steps)
        if n % 300 == 0:
            recorder.flush(240)


@pytest.mark.parametrize("steps", [3, 25, 1500])
def test_a_run_is_replayed_exactly(tmp_path, steps):
    recorder = Recorder(RunInfo("quiet-otter", "gpt"))
    recorder.subscribe(lines_to(tmp_path / "live"))
    recorder.subscribe(StoreWriter(tmp_path))
    train(recorder, steps)
    recorder.end("finished", "all steps made")
    assert recorder.close(240)
    history = StoredHistory(tmp_path, ended=True)
    again = lines_to(tmp_path / "again")
    for item in replay_items(history):
        again.take([item], Status())
    assert history.store.fault == ""
    live = (tmp_path / "live").read_bytes()
    assert live.count(b'"type":"step"') == 2 * steps
    assert (tmp_path / "again").read_bytes() == live


def test_of_a_living_run_as_much_as_is_there(tmp_path):
    recorder = Recorder(RunInfo("quiet-otter", "gpt"))
    sink = StoreWriter(tmp_path)
    recorder.subscribe(sink)
    train(recorder, 300)
    history = StoredHistory(tmp_path)
    items = list(replay_items(history))
    assert isinstance(items[0], InfoChanged)
    steps = [item.record for item in items if isinstance(item, StepRecorded)]
    assert all(len(record.rows) >= 1 for record in steps)
    recorder.end("finished")
    recorder.close(240)


def test_damaged_records_are_left_out(tmp_path):
    recorder = Recorder(RunInfo("quiet-otter", "gpt"))
    recorder.subscribe(StoreWriter(tmp_path))
    train(recorder, 900)
    recorder.end("finished")
    assert recorder.close(240)
    with sqlite3.connect(tmp_path / STORE_FILE) as writer:
        writer.execute("UPDATE part SET data = x'00' WHERE chunk = 1")
    history = StoredHistory(tmp_path)
    steps = [item for item in replay_items(history) if isinstance(item, StepRecorded)]
    assert 0 < len(steps) <= 1800
    assert "cannot be read" in history.store.fault
