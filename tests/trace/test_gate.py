"""Pausing, stepping, throttling and stopping a thread at its phase boundaries."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.runs.starting import until
from tui_trainer.protocol import PHASES
from tui_trainer.trace.gate import Gate, Refusal, StopTraining


class Loop:
    """A thread that passes the gate after each of the seven phases of many steps."""

    def __init__(self, gate: Gate, steps: int = 100_000) -> None:
        self.gate = gate
        self.stopped: StopTraining | None = None
        self.over = False
        self.thread = threading.Thread(target=self._run, args=(steps,), daemon=True)
        self.changed = threading.Condition()
        gate.hooks.changed = self._changed

    def _run(self, steps: int) -> None:
        try:
            for step in range(1, steps + 1):
                for phase in PHASES:
                    self.gate.reached(phase, step)
                if self.over:
                    break
        except StopTraining as stop:
            self.stopped = stop
        self.gate.end()

    def _changed(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def until(self, mode: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.gate.mode == mode, timeout=240)

    @property
    def where(self) -> tuple[int, str]:
        return self.gate.step_in_progress, self.gate.phase


@contextmanager
def running(gate: Gate) -> Iterator[Loop]:
    loop = Loop(gate)
    loop.thread.start()
    try:
        yield loop
    finally:
        loop.over = True
        gate.end()
        loop.thread.join(240)
        assert not loop.thread.is_alive()


def test_starts_paused_at_the_data_of_the_first_step():
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        assert loop.where == (1, "data")
        assert gate.completed == 0


def test_one_phase_at_a_time_goes_through_all_seven():
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        seen = [loop.where]
        for _ in range(8):
            gate.step_phase()
            loop.until("paused")
            seen.append(loop.where)
    assert seen == [*((1, phase) for phase in PHASES), (2, "data"), (2, "zero_grad")]


@given(phases=st.integers(0, 9), counts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=examples(25))
def test_exact_number_of_steps_from_any_phase(phases, counts):
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        for _ in range(phases):
            gate.step_phase()
            loop.until("paused")
        completed = gate.completed
        for count in counts:
            gate.step(count)
            loop.until("paused")
            completed += count
            assert gate.completed == completed
            assert loop.where == (completed, "step")


def test_steps_asked_for_while_stepping_are_added():
    gate = Gate(paused=True)
    hold = threading.Event()
    gate.after_step.append(lambda step: hold.wait(240) and None)
    with running(gate) as loop:
        loop.until("paused")
        for _ in range(3):
            gate.step()
        hold.set()
        loop.until("paused")
        assert gate.completed == 3


def test_phases_asked_for_while_one_runs_are_added():
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        with gate._condition:  # the thread cannot move between the two
            gate.step_phase()
            gate.step_phase()
        loop.until("paused")
        assert loop.where == (1, "forward")


def test_pause_stops_and_the_count_stands_still():
    gate = Gate()
    with running(gate) as loop:
        gate.pause()
        loop.until("paused")
        before = loop.where
        time.sleep(0.05)
        assert loop.where == before
        gate.resume()
        assert gate.mode == "running"


def test_to_the_end_of_the_epoch():
    gate = Gate(paused=True, steps_per_epoch=7)
    with running(gate) as loop:
        loop.until("paused")
        for epoch in (1, 2):
            gate.run_to_epoch_end()
            loop.until("paused")
            assert gate.completed == 7 * epoch


def test_no_epochs_no_end_of_one():
    gate = Gate()
    gate.no_epochs = "the loop counts steps"
    with pytest.raises(Refusal, match="no epochs") as refused:
        gate.run_to_epoch_end()
    assert refused.value.hint == "the loop counts steps"


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
def test_throttle_refuses_what_is_no_rate(rate):
    with pytest.raises(Refusal):
        Gate().throttle(rate)


def test_step_refuses_none():
    with pytest.raises(Refusal):
        Gate().step(0)


def test_throttle_sleeps_between_steps_and_lets_itself_be_interrupted():
    gate = Gate()
    gate.throttle(0.001)
    with running(gate) as loop:
        deadline = time.monotonic() + 240
        while gate.completed < 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert gate.completed == 1  # the next would come after a thousand seconds
        gate.throttle(None)
        gate.step(5)
        loop.until("paused")
        assert gate.completed >= 6


def test_throttled_rate_is_kept():
    gate = Gate(paused=True)
    gate.throttle(100)
    with running(gate) as loop:
        loop.until("paused")
        began = time.monotonic()
        gate.step(11)
        loop.until("paused")
        assert time.monotonic() - began >= 0.09


@pytest.mark.parametrize("phase", [p for p in PHASES if p not in ("data", "step")])
def test_stop_in_mid_step_finishes_the_step_first(phase):
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        while gate.phase != phase:
            gate.step_phase()
            loop.until("paused")
        gate.stop(checkpoint=True)
        loop.thread.join(240)
        assert gate.completed == 1
    assert loop.stopped is not None
    assert loop.stopped.checkpoint


def test_stop_before_anything_has_happened_stops_at_once():
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        gate.stop()
        loop.thread.join(240)
        assert gate.completed == 0
    assert isinstance(loop.stopped, KeyboardInterrupt)


def test_stop_reaches_a_throttled_run():
    gate = Gate()
    gate.throttle(0.001)
    with running(gate) as loop:
        time.sleep(0.02)
        gate.stop()
        loop.thread.join(240)
    assert loop.stopped is not None


def test_after_the_end_nothing_is_taken():
    gate = Gate()
    gate.end()
    for control in (gate.pause, gate.resume, gate.step, gate.step_phase, gate.stop):
        with pytest.raises(Refusal):
            control()
    with pytest.raises(Refusal):
        gate.call_soon(lambda: None)


def test_work_runs_on_the_training_thread_between_steps():
    gate = Gate()
    with running(gate) as loop:
        thread, phase = gate.call_soon(lambda: (threading.current_thread(), gate.phase)).result(240)
        assert thread is loop.thread
        assert phase == "step"


def test_work_is_served_while_paused_and_may_be_allowed_in_mid_step():
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        between = gate.call_soon(lambda: gate.phase)
        assert gate.call_soon(lambda: gate.phase, mid_step=True).result(240) == "data"
        assert not between.done()
        gate.step()
        assert between.result(240) == "step"
        loop.until("paused")
        assert gate.call_soon(lambda: gate.completed).result(240) == 1
        assert gate.mode == "paused"


def test_faults_of_work_go_to_the_caller():
    gate = Gate()
    with running(gate):
        with pytest.raises(ZeroDivisionError):
            gate.call_soon(lambda: 1 / 0).result(240)
        assert gate.call_soon(lambda: "on").result(240) == "on"


def test_steps_requested_before_a_resumed_run_knows_its_step_are_counted_from_it():
    gate = Gate(paused=True)
    gate.step(3)
    gate.step()
    gate.continue_from(5)
    assert gate.run_to == 9
    gate.run_until(7)
    gate.continue_from(6)
    assert gate.run_to == 7


def test_between_steps_sees_every_step_and_its_faults_do_not_reach_the_loop():
    gate = Gate()
    steps, faults = [], []
    gate.after_step += [steps.append, lambda step: 1 / 0]
    gate.hooks.fault = lambda where, fault: faults.append(type(fault))
    for step in range(1, 4):
        gate.reached("step", step)
    assert steps == [1, 2, 3]
    assert faults == [ZeroDivisionError] * 3


def test_regular_work_is_done_after_multiples_and_costs_nothing_in_between():
    gate = Gate()
    gate.continue_from(7)
    threes, fours, entered = [], [], []

    @contextmanager
    def working():
        entered.append(gate.completed)
        yield

    gate.hooks.work_context = working
    gate.call_every([3, 5], threes.append)
    gate.call_every([4, 0], fours.append)
    gate.call_every([0], lambda step: 1 / 0)
    has_work_after = []
    for step in range(8, 17):
        if gate.has_work_after(step):
            has_work_after.append(step)
        gate.reached("step", step)
    assert threes == [9, 10, 12, 15]
    assert fours == [8, 12, 16]
    assert has_work_after == [8, 9, 10, 12, 15, 16]
    assert entered == [8, 9, 10, 12, 12, 15, 16]


def test_report_is_made_before_it_counts_as_paused_and_may_fail():
    gate = Gate(paused=True)
    modes = []

    def report(phase: str, step: int) -> None:
        modes.append((gate.mode, phase, step))
        raise RuntimeError

    gate.hooks.pausing = report
    with running(gate) as loop:
        loop.until("paused")
    assert modes == [("running", "data", 1)]


def test_time_spent_at_the_gate_is_counted_apart():
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        time.sleep(0.03)
        gate.step()
        loop.until("paused")
        assert gate.paused_s >= 0.03
        assert gate.idle_s >= gate.paused_s


def test_end_lets_a_paused_thread_go_and_cancels_work():
    gate = Gate(paused=True)
    with running(gate) as loop:
        loop.until("paused")
        work = gate.call_soon(lambda: None)
        gate.end()
        assert work.cancelled()


def test_a_resume_during_the_phase_report_is_not_lost():
    gate = Gate(paused=True)
    gate.hooks.pausing = lambda phase, step: gate.resume()
    with running(gate):
        until(lambda: gate.completed > 1, "steps are made")


def test_a_pause_during_the_phase_report_pauses_there():
    gate = Gate(paused=True)
    gate.hooks.pausing = lambda phase, step: gate.pause()
    with running(gate) as loop:
        loop.until("paused")
        assert gate.boundary == (1, 1)
        gate.step()
        loop.until("paused")
        assert (gate.completed, gate.phase) == (1, "step")
