from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tests.ui import fake
from tests.ui.emulated_app import EmulatedApp
from tests.ui.screens import settle, text_of, until
from tui_trainer.protocol import actions
from tui_trainer.ui.app import TuiTrainerApp
from tui_trainer.ui.frames import (
    ACTIVE_POLLS_PER_SECOND,
    IDLE_INTERVALS,
    LOCAL_LINK,
    MAX_INTERVAL_S,
    SLOW_LINK,
    SSH_LINK,
    FrameScheduler,
    terminal_link,
)
from tui_trainer.ui.screens.dialogs import QuitDialog


def frames_and_bytes(
    scheduler: FrameScheduler, cost: int, seconds: float, keys: tuple[float, ...] = ()
) -> tuple[list[float], int]:
    """Run a clock with frames of `cost` bytes; when they were drawn, and all bytes."""
    written, drawn, pending = 0, [], list(keys)
    for tick in range(int(4 * seconds)):
        now = tick / 4
        if pending and pending[0] <= now:
            pending.pop(0)
            scheduler.input_received(now)
        if scheduler.seconds_until_due(now, written) <= 0.002:
            scheduler.frame_started(now, written)
            drawn.append(now)
            written += cost
    return drawn, written


def test_small_frames_come_at_the_full_rate() -> None:
    drawn, _ = frames_and_bytes(FrameScheduler(SSH_LINK), cost=1500, seconds=20)
    assert len(drawn) == 80


@pytest.mark.parametrize("link", [LOCAL_LINK, SSH_LINK, SLOW_LINK])
@pytest.mark.parametrize("cost", [300, 1500, 3000, 6000])
def test_output_stays_within_the_budget_whatever_a_frame_costs(link, cost) -> None:
    _, written = frames_and_bytes(FrameScheduler(link), cost, seconds=60)
    assert written <= 60 * link.bytes_per_second + cost


def test_frames_are_never_further_apart_than_the_maximum() -> None:
    drawn, _ = frames_and_bytes(FrameScheduler(SLOW_LINK), cost=10**6, seconds=50)
    assert all(b - a <= MAX_INTERVAL_S + 0.25 for a, b in pairwise(drawn))


def test_frames_become_rarer_without_input_and_a_key_brings_them_back() -> None:
    scheduler = FrameScheduler(SSH_LINK)
    drawn, _ = frames_and_bytes(scheduler, 500, seconds=1000, keys=(900.0,))

    def rate(start: float, stop: float) -> float:
        return sum(start <= at < stop for at in drawn) / (stop - start)

    (long, rarest), (short, rarer) = IDLE_INTERVALS
    assert rate(0, short) == pytest.approx(4, abs=0.1)
    assert rate(short, long) == pytest.approx(4 / rarer, abs=0.1)
    assert rate(long, 900) == pytest.approx(4 / rarest, abs=0.1)
    assert rate(901, 950) == pytest.approx(4, abs=0.1)
    assert scheduler.polls_per_second(1000.0) == 4 / rarer


def test_a_key_draws_at_once_on_a_slow_link_and_polls_faster_for_a_moment() -> None:
    scheduler = FrameScheduler(SLOW_LINK)
    scheduler.frame_started(100.0, 0)
    assert scheduler.seconds_until_due(100.5, 4000) > 1
    scheduler.input_received(100.5)
    assert scheduler.seconds_until_due(100.5, 4000) <= 0
    assert scheduler.polls_per_second(100.6) == ACTIVE_POLLS_PER_SECOND
    assert scheduler.polls_per_second(105.0) == SLOW_LINK.frames_per_second


def test_a_terminal_that_falls_behind_gets_fewer_frames_and_recovers() -> None:
    scheduler = FrameScheduler(SSH_LINK)
    scheduler.frame_started(0.0, 0)
    for _ in range(8):
        scheduler.back_off()
    assert scheduler.seconds_until_due(0.0, 0) == pytest.approx(4.0)
    scheduler.input_received(1.0)
    assert scheduler.seconds_until_due(1.0, 0) <= 0


def test_a_requested_frame_is_due_at_once() -> None:
    scheduler = FrameScheduler(SSH_LINK, 0.0)
    scheduler.frame_started(100.0, 0)
    assert scheduler.seconds_until_due(100.1, 50_000) > 0
    scheduler.request_frame()
    assert scheduler.seconds_until_due(100.1, 50_000) == 0
    scheduler.frame_started(100.1, 50_000)
    assert scheduler.seconds_until_due(100.2, 90_000) > 0


@pytest.mark.parametrize(
    ("slow_link", "environment", "link", "cell_updates"),
    [
        (False, {}, LOCAL_LINK, False),
        (False, {"SSH_CONNECTION": "10.0.0.1 50000 10.0.0.2 22"}, SSH_LINK, True),
        (False, {"SSH_TTY": "/dev/pts/1"}, SSH_LINK, True),
        (True, {}, SLOW_LINK, True),
        (True, {"TUI_TRAINER_CELL_UPDATES": "0"}, SLOW_LINK, False),
        (False, {"TUI_TRAINER_CELL_UPDATES": "1"}, LOCAL_LINK, True),
        (False, {"TUI_TRAINER_CELL_UPDATES": ""}, LOCAL_LINK, False),
    ],
)
def test_cells_are_sent_singly_where_it_pays(slow_link, environment, link, cell_updates) -> None:
    chosen = terminal_link(slow_link, environment)
    assert chosen.cell_updates is cell_updates
    assert chosen.bytes_per_second == link.bytes_per_second


async def test_the_app_draws_nothing_while_the_terminal_reads_nothing(monkeypatch) -> None:
    session = fake.fake_gpt(300)
    app = TuiTrainerApp(session)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.snapshot.status.step == 300, "the first frame")
        pending = [5]
        monkeypatch.setattr(
            "tui_trainer.ui.textual_hacks.pending_writes", lambda driver: pending[0]
        )
        # Other changes wait as well.
        await until(pilot, lambda: app._batch_count == 1, "nothing is sent")
        session.advance(5)
        await pilot.pause(0.6)  # more than two frames
        assert app.snapshot.status.step == 300
        assert app._batch_count == 1
        pending[0] = 0
        await pilot.press("down")
        await until(pilot, lambda: app._batch_count == 0, "changes are sent")
        await until(pilot, lambda: app.snapshot.status.step == 305, "the newest step")


async def test_what_changed_while_the_terminal_read_nothing_is_drawn_when_it_reads(
    monkeypatch,
) -> None:
    app = EmulatedApp(fake.fake_gpt(300), (120, 40))
    pending = [0]
    monkeypatch.setattr("tui_trainer.ui.textual_hacks.pending_writes", lambda driver: pending[0])
    async with app.run_test(size=(120, 40)) as pilot:
        await app.wait_until_drawn("● running")

        pending[0] = 5
        await until(pilot, lambda: app._batch_count == 1, "nothing is sent")
        app.command(actions.Pause())  # after its answer nothing changes any more
        await until(pilot, lambda: app.snapshot.status.state == "paused", "the answer")
        await settle(pilot)
        assert "● running" in app.drawn()
        pending[0] = 0
        await app.wait_until_drawn("‖ paused")

        pending[0] = 5
        await until(pilot, lambda: app._batch_count == 1, "nothing is sent")
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, QuitDialog), "the question")
        await settle(pilot)
        assert "Detach" not in app.drawn()
        pending[0] = 0
        await app.wait_until_drawn("Detach")

        pending[0] = 5
        await until(pilot, lambda: app._batch_count == 1, "nothing is sent")
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, QuitDialog), "the answer")
        await pilot.resize_terminal(120, 39)
        app.emulator.resize(39, 120)
        await settle(pilot)
        assert "Detach" in app.drawn()
        pending[0] = 0
        await app.wait_until_drawn(text_of(app))


async def test_a_requested_frame_does_not_wait_for_the_next_tick(monkeypatch) -> None:
    session = fake.fake_gpt(300)
    app = TuiTrainerApp(session, frames_per_second=4)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: app.snapshot.status.step == 300, "the first frame")
        clock = next(timer for timer in app._timers if timer._callback == app._tick)
        clock.stop()
        pending = [1]
        monkeypatch.setattr(
            "tui_trainer.ui.textual_hacks.pending_writes", lambda driver: pending[0]
        )
        monkeypatch.setattr("tui_trainer.ui.frames.MAX_CHECKS", 1_000_000)
        session._status(state="paused", phase="backward")
        session._changed()
        await until(pilot, lambda: app.backlog._checks > 1, "the output is looked at again")
        assert app.snapshot.status.state == "running"
        pending[0] = 0
        await until(pilot, lambda: app.snapshot.status.state == "paused", "the pause is drawn")


async def test_the_run_is_polled_less_on_a_slow_link() -> None:
    session = fake.fake_gpt(300)
    app = TuiTrainerApp(session, slow_link=True)
    async with app.run_test(size=(120, 40)) as pilot:
        scheduler = app.frame_scheduler
        assert scheduler._active_until > 0  # the app has just been opened
        scheduler._active_until = math.inf
        await until(pilot, lambda: session.rate == ACTIVE_POLLS_PER_SECOND, "the full rate")
        scheduler._active_until = 0.0
        await until(
            pilot, lambda: session.rate == SLOW_LINK.frames_per_second, "the rate of frames"
        )
        assert app.animation_level == "none"
