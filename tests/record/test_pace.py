from __future__ import annotations

import pytest

from tui_trainer.record.events import BoundedLog
from tui_trainer.record.throughput import RECENT_STEPS, Throughput


def run(pace, steps, each=0.1, start=1000.0, first=1, own_ms=0.0):
    now = start
    for number in range(first, first + steps):
        now += each
        pace.add(number, now, each * 1e3, own_ms, pace.paused_s + pace.aside_s)
    return now


def test_speed_and_cost():
    pace = Throughput()
    now = run(pace, 50, own_ms=1.0)
    assert pace.steps_per_second(now) == pytest.approx(10.0)
    assert pace.elapsed_s(now) == pytest.approx(5.0)
    assert pace.cost_share() == pytest.approx(0.01)
    assert pace.remaining_s(100, now) == pytest.approx(10.0)


def test_the_longest_of_the_recent_steps():
    pace = Throughput()
    assert pace.longest_step_s == 0.0
    now = run(pace, 1, each=8.0)
    now = run(pace, 10, start=now, first=2)
    pace.add(12, now + 0.1, float("nan"), 0.0, 0.0)
    assert pace.longest_step_s == pytest.approx(8.0)
    run(pace, RECENT_STEPS, start=now, first=13)
    assert pace.longest_step_s == pytest.approx(0.1)


def test_the_first_steps_do_not_stand_for_what_watching_costs():
    pace = Throughput()
    now = run(pace, 5, own_ms=40.0)
    assert pace.cost_share() == pytest.approx(0.4)
    now = run(pace, 3, start=now, first=6, own_ms=1.0)
    assert pace.cost_share() == pytest.approx(0.01)
    run(pace, 300, start=now, first=9, own_ms=2.0)
    assert pace.cost_share() == pytest.approx(0.02)


def test_pauses_do_not_count():
    pace = Throughput()
    now = run(pace, 20)
    pace.pause(now)
    assert pace.elapsed_s(now + 3600) == pytest.approx(2.0)
    assert pace.steps_per_second(now + 3600) == pytest.approx(10.0)
    pace.resume(now + 3600)
    now = run(pace, 20, start=now + 3600, first=21)
    assert pace.steps_per_second(now) == pytest.approx(10.0)
    assert pace.elapsed_s(now) == pytest.approx(4.0)


def test_evaluations_do_not_slow_the_speed_but_lengthen_what_remains():
    pace = Throughput()
    now = run(pace, 20)
    pace.aside_s += 2.0
    now = run(pace, 20, start=now + 2.0, first=21)
    assert pace.steps_per_second(now) == pytest.approx(10.0)
    assert pace.remaining_s(10, now) == pytest.approx(1.5)


def test_a_step_that_hangs_shows():
    pace = Throughput()
    now = run(pace, 20)
    assert pace.steps_per_second(now + 60) < 0.5


def test_two_optimizers_in_one_step_count_once():
    pace = Throughput()
    for number in range(1, 11):
        pace.add(number, number * 0.1, 100.0, 1.0, 0.0)
        pace.add(number, number * 0.1, 100.0, 1.0, 0.0)
    assert pace.steps_per_second(1.0) == pytest.approx(10.0)
    assert pace.cost_share() == pytest.approx(0.02)


def test_old_steps_leave_the_window():
    pace = Throughput()
    now = run(pace, 100, each=0.1, own_ms=5.0)
    now = run(pace, 100, each=1.0, start=now, first=101, own_ms=5.0)
    assert pace.steps_per_second(now) == pytest.approx(1.0)
    assert pace.cost_share() == pytest.approx(0.005)


def test_journal_by_weight():
    journal = BoundedLog(1000, weight=100, weigh=len)
    for number in range(100):
        journal.append("x" * 10 + str(number % 10))
    kept, more = journal.since(0, 1000)
    assert not more
    assert sum(map(len, kept)) <= 100
    assert journal.next_id == 100
    assert journal.since(100, 10) == ((), False)
    newest, _ = journal.since(99, 10)
    assert newest == ("x" * 10 + "9",)
    some, more = journal.since(0, 1000, weight=25)
    assert len(some) == 2
    assert more
