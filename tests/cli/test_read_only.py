"""Looking back changes nothing in the directory of a run, ended or alive."""

from __future__ import annotations

import shutil

import pytest

from tests.recorded_runs import directory, fingerprint
from tests.runs.starting import stored_step, until
from tests.ui.screens import settle
from tui_trainer.client.replay import ReplaySession
from tui_trainer.protocol.events import Notice
from tui_trainer.store.schema import STORE_FILE
from tui_trainer.ui.replay_app import ReplayApp

ALL_KEYS = ("home", "space", ">", "end", "2", "3", "4", "5", "left", "c", "i", "z", "b")


async def look_through(path, keys=("home", "2")):
    """Press `keys` to open screens and to move the cursor; return the last step of the run."""
    replay = ReplaySession(path)
    app = ReplayApp(replay)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        for key in keys:
            await pilot.press(key)
            await settle(pilot)
        assert app.snapshot.link.message == ""
        return replay.last_step


async def test_a_finished_run(tmp_path):
    path = tmp_path / "calm"
    shutil.copytree(directory("calm"), path)
    before = fingerprint(path)
    assert await look_through(path, ALL_KEYS) == 30
    assert fingerprint(path) == before
    path.chmod(0o500)
    try:
        assert await look_through(path) == 30
    finally:
        path.chmod(0o700)


async def test_a_killed_run(runs):
    runs.start("gpt-killed", seconds=0.002)
    path = runs.directory / "gpt-killed"
    until(lambda: stored_step(path) > 200, "some steps are recorded")
    runs.kill("gpt-killed")
    assert (path / f"{STORE_FILE}-wal").stat().st_size  # what it did not live to put in order
    before = fingerprint(path)
    assert await look_through(path, ALL_KEYS) > 200
    assert fingerprint(path) == before
    replay = ReplaySession(path)
    assert replay.poll().status.state == "crashed"
    assert not replay.live
    replay.close()
    assert fingerprint(path) == before
    (path / f"{STORE_FILE}-shm").unlink()
    del before[f"{STORE_FILE}-shm"]
    assert await look_through(path) > 200
    assert fingerprint(path) == before


def recorded_pause(path):
    """The last step in the store of a run, once the store has the pause as well."""
    replay = ReplaySession(path)
    events, last_step = replay.poll().events, replay.last_step
    replay.close()
    paused = any(isinstance(each, Notice) and each.kind == "command" for each in events)
    return last_step if paused else None


async def test_a_living_run(runs):
    """A paused run writes nothing but, each second, its state; so what else changed, we changed.
    The index of the journal is shared memory by design, and no part of what is recorded."""
    runs.start("gpt-living", seconds=0.002)
    path = runs.directory / "gpt-living"
    until(lambda: runs.reported("gpt-living").step > 100, "it trains")
    assert runs.call("pause", "gpt-living").returncode == 0
    names = (STORE_FILE, "run.json", "log.txt")

    until(lambda: recorded_pause(path) == runs.reported("gpt-living").step, "the pause is recorded")
    before = fingerprint(path, names)
    assert await look_through(path, ALL_KEYS) > 90
    assert fingerprint(path, names) == before
    assert runs.call("resume", "gpt-living").returncode == 0
    here = runs.reported("gpt-living").step
    until(lambda: runs.reported("gpt-living").step > here + 50, "it trains on")
    replay = ReplaySession(path)
    assert replay.live
    first = replay.poll().status.step
    until(lambda: replay.poll().status.step > first, "its replay follows")
    replay.close()


def test_an_empty_recording_is_reported(tmp_path, runs):
    runs.create("gpt-empty")
    done = runs.call("replay", "gpt-empty")
    assert done.returncode == 2  # no terminal here
    assert "not a terminal" in done.stderr
    with pytest.raises(Exception, match="nothing was recorded"):
        ReplaySession(runs.directory / "gpt-empty")
