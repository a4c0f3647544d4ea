from __future__ import annotations

import pytest

from tui_trainer.record.event_log import BoundedLog
from tui_trainer.record.throughput import RECENT_STEPS, Throughput


def run(throughput, steps, each=0.1, start=1000.0, first=1, own_ms=0.0):
    now = start
    for number in range(first, first + steps):
        now += each
        throughput.add(number, now, each * 1e3, own_ms, throughput.paused_s + throughput.excluded_s)
    return now


def test_speed_and_cost():
    throughput = Throughput()
    now = run(throughput, 50, own_ms=1.0)
    assert throughput.steps_per_second(now) == pytest.approx(10.0)
    assert throughput.elapsed_s(now) == pytest.approx(5.0)
    assert throughput.cost_share() == pytest.approx(0.01)
    assert throughput.remaining_s(100, now) == pytest.approx(10.0)


def test_the_longest_of_the_recent_steps():
    throughput = Throughput()
    assert throughput.longest_step_s == 0.0
    now = run(throughput, 1, each=8.0)
    now = run(throughput, 10, start=now, first=2)
    throughput.add(12, now + 0.1, float("nan"), 0.0, 0.0)
    assert throughput.longest_step_s == pytest.approx(8.0)
    run(throughput, RECENT_STEPS, start=now, first=13)
    assert throughput.longest_step_s == pytest.approx(0.1)


def test_the_first_steps_do_not_count_for_the_overhead():
    throughput = Throughput()
    now = run(throughput, 5, own_ms=40.0)
    assert throughput.cost_share() == pytest.approx(0.4)
    now = run(throughput, 3, start=now, first=6, own_ms=1.0)
    assert throughput.cost_share() == pytest.approx(0.01)
    run(throughput, 300, start=now, first=9, own_ms=2.0)
    assert throughput.cost_share() == pytest.approx(0.02)


def test_pauses_do_not_count():
    throughput = Throughput()
    now = run(throughput, 20)
    throughput.pause(now)
    assert throughput.elapsed_s(now + 3600) == pytest.approx(2.0)
    assert throughput.steps_per_second(now + 3600) == pytest.approx(10.0)
    throughput.resume(now + 3600)
    now = run(throughput, 20, start=now + 3600, first=21)
    assert throughput.steps_per_second(now) == pytest.approx(10.0)
    assert throughput.elapsed_s(now) == pytest.approx(4.0)


def test_evaluations_do_not_lower_the_speed_but_lengthen_the_remaining_time():
    throughput = Throughput()
    now = run(throughput, 20)
    throughput.excluded_s += 2.0
    now = run(throughput, 20, start=now + 2.0, first=21)
    assert throughput.steps_per_second(now) == pytest.approx(10.0)
    assert throughput.remaining_s(10, now) == pytest.approx(1.5)


def test_a_step_that_hangs_shows():
    throughput = Throughput()
    now = run(throughput, 20)
    assert throughput.steps_per_second(now + 60) < 0.5


def test_two_optimizers_in_one_step_count_once():
    throughput = Throughput()
    for number in range(1, 11):
        throughput.add(number, number * 0.1, 100.0, 1.0, 0.0)
        throughput.add(number, number * 0.1, 100.0, 1.0, 0.0)
    assert throughput.steps_per_second(1.0) == pytest.approx(10.0)
    assert throughput.cost_share() == pytest.approx(0.02)


def test_old_steps_leave_the_window():
    throughput = Throughput()
    now = run(throughput, 100, each=0.1, own_ms=5.0)
    now = run(throughput, 100, each=1.0, start=now, first=101, own_ms=5.0)
    assert throughput.steps_per_second(now) == pytest.approx(1.0)
    assert throughput.cost_share() == pytest.approx(0.005)


def test_a_log_bounded_by_size():
    log = BoundedLog(1000, max_size=100, size=len)
    for number in range(100):
        log.append("x" * 10 + str(number % 10))
    kept, more = log.since(0, 1000)
    assert not more
    assert sum(map(len, kept)) <= 100
    assert log.next_id == 100
    assert log.since(100, 10) == ((), False)
    newest, _ = log.since(99, 10)
    assert newest == ("x" * 10 + "9",)
    some, more = log.since(0, 1000, max_size=25)
    assert len(some) == 2
    assert more


def test_the_wait_of_a_lifted_limit_does_not_count():
    """At one step in ten seconds it is lifted four seconds after a step, while two more steps from
    before are still to be recorded."""
    throughput = Throughput()
    now = run(throughput, 3, each=10.0)
    lifted = now + 24.0
    throughput.restart_window(lifted)
    run(throughput, 2, each=10.0, start=now, first=4)
    assert throughput.steps_per_second() is None
    now = run(throughput, 4, each=0.1, start=lifted, first=6)
    assert throughput.steps_per_second(now) == pytest.approx(10.0)
    assert throughput.remaining_s(100, now) == pytest.approx(10.0)


def test_a_changed_limit_shows_at_once():
    throughput = Throughput()
    now = run(throughput, 50, each=1.0, own_ms=1.0)
    throughput.restart_window()
    assert throughput.steps_per_second(now) is None
    now = run(throughput, 3, each=0.1, start=now, first=51, own_ms=1.0)
    assert throughput.steps_per_second(now) == pytest.approx(10.0)
    assert throughput.remaining_s(100, now) == pytest.approx(10.0)
    assert throughput.cost_share() == pytest.approx(0.01)
