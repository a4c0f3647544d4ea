"""No run is left behind unseen, and none is mistaken for another."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.starting import until
from tests.terminal.harness import Terminal
from tui_trainer.config.run_spec import (
    RunSpec,
    find_socket,
    new_socket_path,
    process_identity,
    read_state,
    write_spec,
)
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.record.sink_items import RunEnded
from tui_trainer.record.status_file import StatusFile
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import inspect_run
from tui_trainer.runs.registry import list_runs, live_socket


def remove(place: Path) -> None:
    """Remove a directory into which a run writes meanwhile."""

    def removed() -> bool:
        try:
            shutil.rmtree(place)
        except OSError:
            return False
        return True

    until(removed, f"{place} is removed")


def until_found_again(place: Path) -> None:
    """Wait until a run whose directory was removed has written its status there and listens."""
    until(lambda: read_state(place) and find_socket(place), "it listens again")


GPT = ("--threads", "1", "--steps", "100000", "--eval-batches", "1", "--sample-length", "8")


@pytest.mark.slow
def test_killing_the_app_leaves_a_run_that_is_found_and_ended_cleanly(runs):
    command = [sys.executable, "-m", "tui_trainer", "gpt", "--name", "gpt-kept", *GPT]
    with Terminal(command, env=runs.environment) as screen:
        until(lambda: screen.pump(0.05) and runs.reported("gpt-kept").step > 3, "it trains")
        os.kill(screen.pid, signal.SIGKILL)
    found = runs.ls()["gpt-kept"]
    try:
        assert found["state"] == "live"
        assert process_identity(found["pid"])
        before = runs.reported("gpt-kept").step
        until(lambda: runs.reported("gpt-kept").step > before + 5, "it trains on")
        os.kill(found["pid"], signal.SIGTERM)
        until(lambda: runs.reported("gpt-kept").ended, "it ends on SIGTERM")
        until(lambda: not process_identity(found["pid"]), "nothing is left of it")
    finally:
        if process_identity(found["pid"]):
            os.kill(found["pid"], signal.SIGKILL)
    ended = runs.ls()["gpt-kept"]
    assert ended["state"] == "stopped"
    place = runs.directory / "gpt-kept"
    assert list((place / "checkpoints").glob(f"step-{ended['step']:08}"))
    assert find_socket(place) is None


def test_only_one_of_two_gets_a_name(runs):
    (runs.directory.parent / "t.py").write_text("print('x')\n")
    command = [sys.executable, "-m", "tui_trainer", "run", "--name", "same"]
    both = [
        subprocess.Popen(
            [*command, str(runs.directory.parent / "t.py")],
            env=runs.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert sum("already exists" in text for text in errors) == 1
    assert len(list_runs(runs.directory)) == 1


def test_a_stale_socket_is_ignored(runs):
    runs.start("gpt-dead")
    runs.kill("gpt-dead")
    place = runs.directory / "gpt-dead"
    assert find_socket(place) is not None  # SIGKILL leaves it
    refused = runs.call("pause", "gpt-dead")
    assert refused.returncode == 1
    assert "gpt-dead has crashed" in refused.stderr
    with pytest.raises(RunError, match="gpt-dead has crashed"):
        live_socket(inspect_run(place))
    # A later run in this directory can listen in spite of it.
    again = new_socket_path(place)
    again.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(again))


def test_after_a_reboot_no_run_counts_as_live(runs, monkeypatch):
    """Another process may have the same pid, and even the same start time in clock ticks."""
    from tui_trainer.config import run_spec

    runs.start("gpt-before")
    place = runs.directory / "gpt-before"
    assert inspect_run(place).state == "live"
    monkeypatch.setattr(run_spec, "_boot_id", lambda: "another-boot")
    seen = inspect_run(place)
    assert seen.state == "crashed"
    assert "exited without recording an end" in seen.note


def test_a_run_whose_directory_others_can_write_to_is_listed_and_refused(runs):
    runs.start("gpt-open")
    place = runs.directory / "gpt-open"
    place.chmod(0o770)
    listed = runs.call("ls", "--json")
    assert [run["state"] for run in json.loads(listed.stdout)] == ["refused"]
    shown = runs.call("ls")
    assert "refused" in shown.stdout
    assert "others can write to" in shown.stdout
    for done in (listed, shown, *(runs.call(*asked) for asked in ASKED)):
        assert "others can write to" in done.stderr + done.stdout
        assert f"chmod go-w {place}" in done.stderr + done.stdout
    place.chmod(0o700)
    assert runs.ls()["gpt-open"]["state"] == "live"
    assert runs.call("stop").returncode == 0


ASKED = (("stop",), ("stop", "gpt-open"), ("show",), ("ls", "--live"))


def test_a_run_is_found_again_after_its_directory_was_removed(runs):
    process = runs.start("gpt-removed")
    place = runs.directory / "gpt-removed"
    remove(place)
    until_found_again(place)
    found = runs.ls()["gpt-removed"]
    assert (found["state"], found["title"]) == ("live", "fake")
    assert place.stat().st_mode & 0o777 == 0o700
    before = runs.reported("gpt-removed").step
    until(lambda: runs.reported("gpt-removed").step > before, "it trains on")
    until(lambda: "removed" in runs.call("show", "gpt-removed", "--json").stdout, "show reports it")
    done = runs.call("stop", "gpt-removed")
    assert done.returncode == 0, done.stderr
    assert process.wait(240) == 0
    assert runs.ls()["gpt-removed"]["state"] == "stopped"


def test_a_live_run_recreates_the_whole_runs_directory(runs):
    runs.start("gpt-removed")
    remove(runs.directory)
    until_found_again(runs.directory / "gpt-removed")
    assert runs.directory.stat().st_mode & 0o777 == 0o700
    assert runs.call("stop").returncode == 0


def test_an_ended_run_is_not_recreated(tmp_path):
    place = tmp_path / "gpt-over"
    write_spec(RunSpec(name=place.name, directory=str(place), task="gpt"))
    sink = StatusFile(place, RunInfo(place.name, "gpt"))
    sink.take([RunEnded(Status(state="crashed", reason="refused"))], Status())
    shutil.rmtree(place)
    sink.take([], Status(state="finished"))
    assert not place.exists()
