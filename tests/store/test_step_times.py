"""Times of steps, and the order of everything, as the store keeps them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.store.test_store import INFO, stepped
from tui_trainer.protocol.events import LogLine, Notice, TextSample
from tui_trainer.protocol.messages import Status
from tui_trainer.record.sink_items import InfoChanged, ItemsDropped, RowRecorded, StepRecorded
from tui_trainer.store import step_times
from tui_trainer.store.codec import StepTimes, pack_step_times, unpack_step_times
from tui_trainer.store.reader import StoredHistory
from tui_trainer.store.recorded_items import replay_items
from tui_trainer.store.writer import StoreWriter

THREE = np.ones(3, np.float32)
START = 1_795_222_856.734476


def at(step):
    return round(START + 0.0437123 * step, 6)


def record(directory, steps, *before):
    sink = StoreWriter(directory)
    sink.take([InfoChanged(INFO), *before], Status())
    sink.take([stepped(step, THREE, when=at(step)) for step in steps], Status())
    sink.close()


def test_packed_times_are_exact():
    piece = StepTimes(
        np.array([3, 4, 9]), np.array([1, 2, 2]), np.array([at(1), at(2), 0.0]),
        np.float32([0.5, math.nan, 3]),
    )  # fmt: skip
    for packed, original in zip(unpack_step_times(pack_step_times(piece)), piece, strict=True):
        np.testing.assert_array_equal(packed, original)


def test_the_time_of_every_step_is_read_back(tmp_path):
    steps = range(1, 2001, 2)
    record(tmp_path, steps)
    times = StoredHistory(tmp_path).step_times
    assert times.first_step == (1, at(1))
    assert [times.time_of(step) for step in steps] == [at(step) for step in steps]
    assert math.isnan(times.time_of(2))  # was not recorded
    assert math.isnan(times.time_of(3000))
    np.testing.assert_allclose(
        times.times(np.array([0, 2, 1000, 3000])), [at(1), at(2), at(1000), at(1999)], atol=1e-5
    )
    assert times.elapsed_s(1001) == pytest.approx(0.0437123 * 1000)
    assert times.steps_per_second() == pytest.approx(1 / 0.0437123)


def test_times_of_a_long_run_are_interpolated(tmp_path, monkeypatch):
    monkeypatch.setattr(step_times, "MAX_PIECES", 2)
    steps = np.arange(1, 4001)
    record(tmp_path, steps.tolist())
    found = StoredHistory(tmp_path).step_times.times(steps)
    np.testing.assert_allclose(found, [at(step) for step in steps.tolist()], atol=1e-4)


def test_a_row_outside_a_step_may_overtake_steps(tmp_path):
    early = RowRecorded(0, 0, THREE, at(0))
    sink = StoreWriter(tmp_path)
    sink.take([InfoChanged(INFO), early, stepped(1, THREE, when=at(1))], Status())
    overtaking = RowRecorded(1, 600, np.zeros(35, np.float32), at(599.5))
    sink.take([overtaking, *(stepped(n, THREE, when=at(n)) for n in range(2, 900))], Status())
    sink.close()
    times = StoredHistory(tmp_path).step_times
    assert [times.time_of(n) for n in range(900)] == [at(n) for n in range(900)]
    assert times.first_step == (1, at(1))
    assert times.elapsed_s(0) == 0.0


def test_a_reader_follows_the_step_times_of_a_running_run(tmp_path):
    sink = StoreWriter(tmp_path, clock=iter(range(10**6)).__next__)
    sink.take([InfoChanged(INFO), stepped(1, THREE, when=at(1))], Status())
    history = StoredHistory(tmp_path)
    for first in range(2, 1500, 100):
        steps = range(first, first + 100)
        sink.take([stepped(n, THREE, when=at(n)) for n in steps], Status())
        history.refresh()
        assert [history.step_times.time_of(n) for n in steps] == [at(n) for n in steps]
    sink.close()


def test_a_second_writer_continues_the_order(tmp_path):
    """Two writers, one after the other, in one store."""
    items = [
        InfoChanged(INFO),
        Notice(0, 0, 1.0, "state", "begun"),
        stepped(1, THREE, when=at(1)),
        LogLine(0, 1.5, 1, "stdout", "hello"),
        ItemsDropped(3),
        TextSample(0, 1, "To", "be"),
        RowRecorded(1, 1, np.zeros(35, np.float32), at(1)),
        stepped(5, THREE, when=at(5)),
        Notice(1, 5, 2.0, "mark", "here"),
    ]
    for part in (items[:5], [items[0], *items[5:]]):
        sink = StoreWriter(tmp_path)
        sink.take(part, Status(state="running"))
        sink.close()
    replayed = list(replay_items(StoredHistory(tmp_path)))
    kinds = [type(item) for item in replayed]
    second = [type(item) for item in (items[0], *items[5:])]
    assert kinds == [*(type(item) for item in items[:5]), *second]
    steps = [item.record.step for item in replayed if isinstance(item, StepRecorded)]
    assert steps == [1, 5]
