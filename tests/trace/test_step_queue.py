"""Completed steps on their way to the recorder: in order, recorded once, by either thread."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from tests.trace.support import KeepingRecorder, mlp
from tui_trainer.probes import PROBES
from tui_trainer.trace import transfer
from tui_trainer.trace.gate import Gate
from tui_trainer.trace.governor import WINDOW
from tui_trainer.trace.probe import ProbeOptions
from tui_trainer.trace.tracer import Tracer
from tui_trainer.trace.transfer import BATCH, UNWRITTEN, HostTransfer, StepQueue


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(transfer, "perf_counter", clock)
    monkeypatch.setattr(transfer, "perf_counter", clock)
    return clock


class Step:
    def __init__(self, number):
        self.number = number
        self.transfer = HostTransfer([([torch.tensor(1.0)], False)], True)


def raise_fault(where, fault):
    raise fault


class NumberRecorder:
    """Records the numbers of steps."""

    def __init__(self):
        self.numbers = []
        self.on_record = lambda: None

    def record(self, step):
        self.on_record()
        self.numbers.append(step.number)
        return 0.25


def test_steps_that_wait_for_a_batch_are_recorded_when_no_step_follows(clock):
    recorded = NumberRecorder()
    queue = StepQueue(raise_fault)
    for number in range(1, BATCH + 10):
        queue.put(recorded, Step(number), at_once=False)
    waiting = BATCH + 9 - len(recorded.numbers)
    assert waiting > 1
    queue.drain_idle()  # the training thread may put the next step at any moment
    assert len(recorded.numbers) == BATCH + 9 - waiting
    clock.now += 1.0
    queue.take_accounted_s()
    queue.drain_idle()
    assert recorded.numbers == list(range(1, BATCH + 10))
    assert queue.take_accounted_s() == 0.0  # it was not the training thread's time


def test_the_training_thread_gets_the_lock_after_each_step(clock):
    recorded = NumberRecorder()
    queue = StepQueue(raise_fault)
    trains = threading.Thread(target=lambda: queue.put(recorded, Step(4), at_once=True))

    def next_step_comes():
        clock.now += 0.01
        if not trains.ident:
            trains.start()
            while queue._last_put < clock.now:  # it has put its step, and waits for the lock
                pass

    queue.put(recorded, Step(0), at_once=True)
    for number in (1, 2, 3):
        queue.put(recorded, Step(number), at_once=False)
    recorded.on_record = next_step_comes
    clock.now += 1.0
    queue.drain_idle()
    trains.join()
    assert recorded.numbers == [0, 1, 2, 3, 4]


def test_a_copy_has_arrived_a_moment_after_its_end_was_seen(clock):
    transferred = HostTransfer([([torch.tensor(1.0)], False)], True)
    assert transferred.arrived_on_host()
    memory = np.array([1.0, UNWRITTEN], np.float32)
    transferred._pinned.append(memory)
    clock.now += 1.0
    assert not transferred.arrived_on_host()
    memory[1] = 2.0
    assert not transferred.arrived_on_host()  # seen for the first time: the rest may follow
    clock.now += 2 * transfer.SETTLE_S
    assert transferred.arrived_on_host()


def test_a_forked_child_records_nothing_of_its_parent(clock):
    recorded = NumberRecorder()
    queue = StepQueue(raise_fault)
    queue.put(recorded, Step(0), at_once=True)
    queue.put(recorded, Step(1), at_once=False)
    queue._recording.acquire()  # by a thread that the child does not have
    queue.reset_after_fork()
    queue.drain(everything=True)
    assert recorded.numbers == [0]


def test_every_step_is_recorded_once_in_order_while_two_threads_record(monkeypatch):
    """With a governor that changes cadences all the time: it decides on either thread."""
    monkeypatch.setattr(transfer, "IDLE_S", 0.0)
    recorder, steps = KeepingRecorder(), 6 * WINDOW
    tracer = Tracer(recorder, Gate(), PROBES, ProbeOptions(budget=1e-6))
    over = threading.Event()

    def flush_while_training():
        while not over.is_set():
            tracer.flush_idle()

    other = threading.Thread(target=flush_while_training)
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
    assert recorder.notices_of("fault") == []
    assert [record.step for record in recorder.records] == list(range(1, steps + 1))
    assert recorder.notices_of("cadence")
    loss = recorder.series("step", "loss")
    assert len(loss) == steps
