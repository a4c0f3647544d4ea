"""A script that makes quick steps and then does something else: all of them are recorded."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests import processes

_spec = importlib.util.spec_from_file_location("hosting", Path(__file__).parent / "test_host.py")
hosting = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hosting)
place = hosting.place
STEPS = 25


def call(place, *arguments):
    done = processes.run(
        [sys.executable, "-m", "tui_trainer", *arguments],
        env={**hosting.ENVIRONMENT, "TUI_TRAINER_RUNS_DIR": str(place.folder)},
        capture_output=True,
        text=True,
        timeout=240,
        torch=False,
    )
    assert done.returncode == 0 or "nothing was recorded" in done.stderr, done
    return done.stdout


def stored_steps(place):
    """The steps on disk: none before the run has created its store."""
    lines = call(place, "export", "--format", "jsonl", str(place.run)).splitlines()
    return len(hosting.of("step", map(json.loads, lines)))


@pytest.fixture
def asleep(place):
    place.folder.chmod(0o700)
    place.run.chmod(0o700)
    place.loop(steps=STEPS, after="import time; time.sleep(600)")
    process = place.process()
    yield place, process
    process.kill()
    process.wait()


def test_viewers_and_ls_see_the_last_step_of_a_script_that_sleeps(asleep):
    place, _ = asleep
    viewer = place.viewer()
    viewer.wait(lambda status: status.step == STEPS)
    assert viewer.status.state == "running"
    hosting.wait_for(lambda: json.loads(call(place, "ls", "--json"))[0]["step"] == STEPS)


def test_a_kill_loses_no_completed_step(asleep):
    place, process = asleep
    hosting.wait_for(lambda: stored_steps(place) == STEPS)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert stored_steps(place) == STEPS
