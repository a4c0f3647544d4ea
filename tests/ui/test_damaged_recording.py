"""The screens of a damaged recording show the rest, and report that something is missing."""

from __future__ import annotations

import os
import shutil
import sqlite3

import pytest

from tests.store.test_damaged import damage
from tests.ui import test_replay
from tests.ui.test_replay import opened, press, settle, text_of
from tui_trainer.store.schema import STORE_FILE
from tui_trainer.ui.screens import SCREENS

SEEDS = int(os.environ.get("TUI_TRAINER_TEST_DAMAGES", "2"))
recorded = test_replay.recorded
"""The fixture, which pytest finds by its name here."""


@pytest.fixture
def copied(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "quiet-otter")


async def visit(app, replay):
    """Every screen, at the end and in the middle; returns what the dashboard shows."""
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        for step in (replay.last_step, 500):
            replay.seek(step)
            app.draw_frame()
            for place in SCREENS:
                if place.mode != "start":
                    await press(pilot, place.key)
        await press(pilot, SCREENS[0].key)
        return text_of(app)


async def test_the_screen_reports_unreadable_parts(copied):
    with sqlite3.connect(copied / STORE_FILE) as connection:
        connection.execute("UPDATE meta SET value = x'ff'")
        connection.execute("UPDATE description SET data = x'ff'")
        connection.execute("UPDATE event SET data = x'ff' WHERE kind = 'clip'")
    connection.close()
    app, replay, _ = opened(copied)
    shown = await visit(app, replay)
    assert "part of the recording cannot be read: the run's description, its last state" in shown
    assert "events" in shown
    assert "500" in shown


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.slow
async def test_no_damage_reaches_the_event_loop(copied, seed):
    damage(copied / STORE_FILE, seed)
    app, replay, _ = opened(copied)
    await visit(app, replay)


async def test_damage_while_the_recording_is_open_is_reported(copied):
    """As for a live run, whose recording is read again each second."""
    app, replay, clock = opened(copied)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        with sqlite3.connect(copied / STORE_FILE) as connection:
            connection.execute("UPDATE series SET description = x'ff'")
            connection.execute("UPDATE tail SET data = x'ff'")
            connection.execute("UPDATE meta SET value = x'ff'")
        connection.close()
        replay._refresh(clock())
        app.draw_frame()
        await settle(pilot)
        assert "part of the recording cannot be read" in text_of(app)
