from __future__ import annotations

from itertools import pairwise

import pytest

from tests.ui import fake
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.frames import FAST, IDLE, SLOW, SLOWEST_S, FrameScheduler


def frames_and_bytes(pace: FrameScheduler, cost: int, seconds: float, keys: tuple[float, ...] = ()):
    """Run a clock for so long with frames of `cost` bytes; when they were drawn, and all bytes."""
    written, drawn, keys = 0, [], list(keys)
    for tick in range(int(4 * seconds)):
        now = tick / 4
        if keys and keys[0] <= now:
            keys.pop(0)
            pace.touched(now)
        if pace.due(now, written) <= 0.002:
            pace.drawn(now, written)
            drawn.append(now)
            written += cost
    return drawn, written


def test_small_frames_come_at_the_full_rate():
    drawn, _ = frames_and_bytes(FrameScheduler(FAST), cost=1500, seconds=20)
    assert len(drawn) == 80


@pytest.mark.parametrize("link", [FAST, SLOW])
@pytest.mark.parametrize("cost", [300, 1500, 3000, 6000])
def test_what_is_sent_stays_within_the_budget_whatever_a_frame_costs(link, cost):
    _, written = frames_and_bytes(FrameScheduler(link), cost, seconds=60)
    assert written <= 60 * link.bytes_per_second + cost


def test_a_frame_is_never_further_off_than_can_be_borne():
    drawn, _ = frames_and_bytes(FrameScheduler(SLOW), cost=10**6, seconds=50)
    assert all(b - a <= SLOWEST_S + 0.25 for a, b in pairwise(drawn))


def test_frames_become_rarer_when_nobody_is_there_and_a_key_brings_them_back():
    pace = FrameScheduler(FAST)
    drawn, _ = frames_and_bytes(pace, 500, seconds=1000, keys=(900.0,))

    def rate(start, stop):
        return sum(start <= at < stop for at in drawn) / (stop - start)

    (long, rarest), (short, rarer) = IDLE
    assert rate(0, short) == pytest.approx(4, abs=0.1)
    assert rate(short, long) == pytest.approx(4 / rarer, abs=0.1)
    assert rate(long, 900) == pytest.approx(4 / rarest, abs=0.1)
    assert rate(901, 950) == pytest.approx(4, abs=0.1)
    assert pace.polls_per_second(1000.0) == 4 / rarer


def test_a_key_draws_at_once_on_a_slow_line_and_asks_the_run_more_often_for_a_moment():
    pace = FrameScheduler(SLOW)
    pace.drawn(100.0, 0)
    assert pace.due(100.5, 4000) > 1
    pace.touched(100.5)
    assert pace.due(100.5, 4000) <= 0
    assert pace.polls_per_second(100.6) == FAST.frames_per_second
    assert pace.polls_per_second(105.0) == SLOW.frames_per_second


def test_a_terminal_that_is_behind_gets_less_and_recovers():
    pace = FrameScheduler(FAST)
    pace.drawn(0.0, 0)
    for _ in range(8):
        pace.waits()
    assert pace.due(0.0, 0) == pytest.approx(4.0)
    pace.touched(1.0)
    assert pace.due(1.0, 0) <= 0


async def until(pilot, condition):
    """Let the app's own clock draw until `condition` holds; the test's time limit is the bound."""
    while not condition():
        await pilot.pause(0.05)


async def test_the_app_draws_nothing_while_the_terminal_takes_nothing(monkeypatch):
    session = fake.fake_gpt(300)
    app = TuiTrainerApp(session)
    async with app.run_test(size=(120, 40)) as pilot:
        behind, waited = [5], []
        monkeypatch.setattr(FrameScheduler, "waits", lambda self: waited.append(self))
        monkeypatch.setattr("tui_trainer.ui.textual_hacks.waiting", lambda driver: behind[0])
        await until(pilot, lambda: waited)
        step = app.snapshot.status.step
        session.advance(5)
        asked = len(waited)
        await until(pilot, lambda: len(waited) > asked + 1)
        assert app.snapshot.status.step == step
        assert app._batch_count == 1  # what else changes waits as well
        behind[0] = 0
        await pilot.press("down")
        await until(pilot, lambda: app.snapshot.status.step != step)
        assert app._batch_count == 0
        assert app.snapshot.status.step == step + 5


async def test_the_run_is_asked_less_on_a_slow_line():
    session = fake.fake_gpt(300)
    app = TuiTrainerApp(session, slow_link=True)
    async with app.run_test(size=(120, 40)) as pilot:
        assert session.rate == FAST.frames_per_second  # it has just been opened
        app.pace._eager_until = 0.0
        await until(pilot, lambda: session.rate == SLOW.frames_per_second)
        assert app.animation_level == "none"


def test_what_must_not_wait_is_due_at_once() -> None:
    pace = FrameScheduler(FAST, 0.0)
    pace.drawn(100.0, 0)
    assert pace.due(100.1, 50_000) > 0
    pace.at_once()
    assert pace.due(100.1, 50_000) == 0
    pace.drawn(100.1, 50_000)
    assert pace.due(100.2, 90_000) > 0
