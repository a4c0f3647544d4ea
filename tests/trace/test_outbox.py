"""Steps on their way to the recorder: in order, by whichever thread, and never by two at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from tests.trace.support import KeepingRecorder, mlp
from tui_trainer.probes import PROBES
from tui_trainer.trace import transfer
from tui_trainer.trace import transfer as outboxes
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.probe import Options
from tui_trainer.trace.schedule import WINDOW
from tui_trainer.trace.tracer import Tracer
from tui_trainer.trace.transfer import AT_ONCE, UNWRITTEN, HostTransfer, StepQueue, TransferPart


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(outboxes, "perf_counter", clock)
    monkeypatch.setattr(transfer, "perf_counter", clock)
    return clock


class Step:
    def __init__(self, number, recorded, on_record=lambda: None):
        self.number, self.recorded, self.on_record = number, recorded, on_record
        self.arrival = HostTransfer([TransferPart([torch.tensor(1.0)], False)], True)

    def record(self):
        self.on_record()
        self.recorded.append(self.number)
        return 0.25


def test_what_waits_for_company_is_recorded_when_no_step_follows(clock):
    recorded = []
    outbox = StepQueue()
    for number in range(1, AT_ONCE + 10):
        outbox.put(Step(number, recorded), at_once=False)
    waiting = AT_ONCE + 9 - len(recorded)
    assert waiting > 1
    outbox.drain_meanwhile()  # the training thread may put the next at any moment
    assert len(recorded) == AT_ONCE + 9 - waiting
    clock.now += 1.0
    outbox.take_accounted_s()
    outbox.drain_meanwhile()
    assert recorded == list(range(1, AT_ONCE + 10))
    assert outbox.take_accounted_s() == 0.0  # it was not the training thread's time


def test_the_training_thread_gets_its_turn_after_each_step(clock):
    recorded = []
    outbox = StepQueue()
    trains = threading.Thread(target=lambda: outbox.put(Step(4, recorded), at_once=True))

    def next_step_comes():
        clock.now += 0.01
        if not trains.ident:
            trains.start()
            while outbox._put < clock.now:  # it has put its step, and waits for us
                pass

    outbox.put(Step(0, recorded), at_once=True)
    for number in (1, 2, 3):
        outbox.put(Step(number, recorded, next_step_comes), at_once=False)
    clock.now += 1.0
    outbox.drain_meanwhile()
    trains.join()
    assert recorded == [0, 1, 2, 3, 4]


def test_a_copy_has_landed_a_moment_after_its_end_was_seen(clock):
    arrival = HostTransfer([TransferPart([torch.tensor(1.0)], False)], True)
    assert arrival.landed()
    memory = np.array([1.0, UNWRITTEN], np.float32)
    arrival._landings.append(memory)
    clock.now += 1.0
    assert not arrival.landed()
    memory[1] = 2.0
    assert not arrival.landed()  # seen for the first time: the rest of it may follow
    clock.now += 2 * transfer.SETTLED_S
    assert arrival.landed()


def test_a_forked_child_records_nothing_of_its_parent(clock):
    recorded = []
    outbox = StepQueue()
    outbox.put(Step(0, recorded), at_once=True)
    outbox.put(Step(1, recorded), at_once=False)
    outbox._recording.acquire()  # by a thread that the child has not
    outbox.forget_parent()
    outbox.drain(everything=True)
    assert recorded == [0]


def test_every_step_is_recorded_once_in_order_while_two_threads_record(monkeypatch):
    """With a governor that changes cadences all the time: it decides on either thread."""
    monkeypatch.setattr(outboxes, "NO_STEP_FOR_S", 0.0)
    recorder, steps = KeepingRecorder(), 6 * WINDOW
    tracer = Tracer(recorder, Gate(), PROBES, Options(budget=1e-6))
    over = threading.Event()

    def meanwhile():
        while not over.is_set():
            tracer.flush_idle()

    other = threading.Thread(target=meanwhile)
    other.start()
    try:
        with tracer:
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(steps):
                optimizer.zero_grad()
                model(torch.randn(8, 6)).square().mean().backward()
                optimizer.step()
    finally:
        over.set()
        other.join()
    assert recorder.said("fault") == []
    assert [record.step for record in recorder.records] == list(range(1, steps + 1))
    assert recorder.said("cadence")
    loss = recorder.series("step", "loss")
    assert len(loss) == steps
