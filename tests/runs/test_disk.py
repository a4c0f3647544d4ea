"""A run whose disk is full: training continues, the screen reports it, recording resumes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.runs.starting import stored_step, until
from tui_trainer.client.connection import RunClient
from tui_trainer.runs.liveness import inspect_run
from tui_trainer.store.reader import StoredHistory

NOBODY_UID = 65534
SMALL = 8192
"""Maximum bytes of a file: enough for the status of the run, too few for a commit. Its output grows
for as long as a test takes, and goes elsewhere."""


def seen(runs, name):
    """The status that a viewer receives."""
    with RunClient.connect(inspect_run(runs.directory / name), "test") as talk:
        return talk.poll().status


def assert_training_continues(runs, name):
    before = seen(runs, name).step
    until(lambda: seen(runs, name).step > before + 20, "training continues")


def until_stored(runs, name, step):
    """Wait until that step is in the store: a kill may take what was made since."""
    until(lambda: stored_step(runs.directory / name) >= step, f"step {step} is stored")


def assert_whole(runs, name, at_least):
    """Every step is in the store, including those made during the trouble."""
    table = StoredHistory(runs.directory / name).tables[0]
    steps = [int(step) for step in table.tail(table.rows)[0]]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] >= at_least


def test_a_full_disk(runs):
    process = runs.start("gpt-full", seconds=0.02, log_file=os.devnull)
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL, hard))
    until(lambda: "not recording" in seen(runs, "gpt-full").recording, "the status reports it")
    assert_training_continues(runs, "gpt-full")
    shown = json.loads(runs.call("show", "gpt-full", "--json").stdout)
    assert "training continues" in shown["recording"]
    assert shown["state"] == "live"
    assert "not recording" in runs.call("show", "gpt-full", "--once").stdout
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: not seen(runs, "gpt-full").recording, "recording resumes")
    step = seen(runs, "gpt-full").step
    until_stored(runs, "gpt-full", step + 50)
    runs.kill("gpt-full")
    assert_whole(runs, "gpt-full", step)


def test_pages_overwritten_with_noise(runs):
    process = runs.start("gpt-noise", seconds=0.01, log_file=os.devnull)
    until(lambda: runs.reported("gpt-noise").step > 100, "some rows")
    place = runs.directory / "gpt-noise"
    # SQLite's cache hides the damage until it has to read again.
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL, hard))
    until(lambda: "not recording" in seen(runs, "gpt-noise").recording, "it is closed")
    for name in ("history.sqlite", "history.sqlite-wal"):
        with contextlib.suppress(FileNotFoundError):  # a journal goes with its last connection
            (place / name).write_bytes(os.urandom((place / name).stat().st_size))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: "damaged" in seen(runs, "gpt-noise").recording, "the status reports it")
    assert_training_continues(runs, "gpt-noise")
    assert list(place.glob("damaged-*"))
    step = seen(runs, "gpt-noise").step
    until_stored(runs, "gpt-noise", step + 50)
    runs.kill("gpt-noise")
    assert_whole(runs, "gpt-noise", step)  # the damaged part was written again from memory


def test_a_removed_store(runs):
    runs.start("gpt-bereft", seconds=0.002)
    until(lambda: runs.reported("gpt-bereft").step > 600, "some chunks")
    # The database last: until then the run does not begin another one.
    for path in sorted((runs.directory / "gpt-bereft").glob("history.sqlite*"), reverse=True):
        path.unlink()
    until(lambda: "removed" in seen(runs, "gpt-bereft").recording, "the status reports it")
    step = seen(runs, "gpt-bereft").step
    until_stored(runs, "gpt-bereft", step + 50)
    runs.kill("gpt-bereft")
    assert_whole(runs, "gpt-bereft", step)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="root may become another user"
)
@pytest.mark.slow
def test_permissions_as_an_unprivileged_user():
    """Root may write anywhere, so the tests of refusals run as the user `nobody`."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        os.mkdir(f"{place}/own")
        os.chown(f"{place}/own", NOBODY_UID, NOBODY_UID)
        done = subprocess.run(
            [
                *("setpriv", f"--reuid={NOBODY_UID}", f"--regid={NOBODY_UID}", "--clear-groups"),
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"),
                *("-o", "addopts=-q", f"--basetemp={place}/own/tmp", "-rA"),
                *("-k", "read_only", "tests/store/test_store.py"),
            ],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HOME": f"{place}/own", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if "Permission denied" in done.stderr and not done.stdout:
            pytest.skip("another user cannot read this checkout")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone may become another user")
def test_a_directory_that_the_user_may_not_write_to():
    """Training continues, the status reports it, and the steps of that time are recorded later."""
    with tempfile.TemporaryDirectory() as place:
        os.chown(place, NOBODY_UID, NOBODY_UID)
        done = subprocess.run(
            [sys.executable, "-m", "tests.runs.as_unprivileged_user", place],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
        seen = json.loads(line)
        assert "not recording" in seen["status"]
        assert "training continues" in seen["status"]
        assert seen["files while read-only"] == ["run.json"]
        run = Path(place) / "gpt-shut"
        steps = StoredHistory(run).tables[0].tail(10**6)[0].tolist()
        assert steps == list(range(1, len(steps) + 1)), "steps from before are missing"
        assert len(steps) >= seen["ended at"] > seen["resumed at"] + 50
        assert inspect_run(run).state == "stopped"
