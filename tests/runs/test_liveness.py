from __future__ import annotations

import json
import os
import signal
import time

import msgspec
import pytest

from tests.runs.starting import until
from tui_trainer.config.run_spec import (
    RunState,
    machine_identity,
    process_identity,
    read_state,
    write_state,
)
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import determine_state, inspect_run
from tui_trainer.runs.registry import list_runs, live_socket, newest, resolve


def test_states_of_all_kinds(runs):
    runs.start("gpt-finished", steps=3)
    runs.start("gpt-running")
    runs.start("gpt-paused", start_paused=True)
    runs.start("gpt-killed")
    runs.start("gpt-sigterm")
    runs.kill("gpt-killed")
    runs.processes["gpt-sigterm"].send_signal(signal.SIGTERM)
    until(lambda: runs.reported("gpt-sigterm").ended, "SIGTERM is handled")
    until(lambda: runs.reported("gpt-finished").ended, "three steps are made")
    until(lambda: runs.reported("gpt-paused").state in ("paused", "starting"), "it waits")
    until(lambda: runs.reported("gpt-running").steps_per_second, "the speed has been measured")
    seen = runs.ls()
    states = {name: run["state"] for name, run in seen.items()}
    assert states.pop("gpt-paused") in ("paused", "live")
    assert states == {
        "gpt-finished": "finished",
        "gpt-running": "live",
        "gpt-killed": "crashed",
        "gpt-sigterm": "stopped",
    }
    assert seen["gpt-finished"]["step"] == 3
    assert seen["gpt-finished"]["loss"] == pytest.approx(1 / 3)
    assert seen["gpt-running"]["steps_per_second"] > 0
    assert seen["gpt-killed"]["step"] > 0
    assert seen["gpt-running"]["directory"] == str(runs.directory / "gpt-running")
    assert "exited without recording an end" in seen["gpt-killed"]["note"]


def test_ls_prints_a_table_and_live_runs_only(runs):
    runs.start("gpt-here")
    runs.start("gpt-dead")
    runs.kill("gpt-dead")
    done = runs.call("ls")
    assert done.stdout.startswith("RUN ")
    assert "gpt-here" in done.stdout
    assert "crashed" in done.stdout
    assert "\x1b" not in done.stdout
    alone = runs.call("ls", "--live").stdout
    assert "gpt-here" in alone
    assert "gpt-dead" not in alone


def test_no_runs_at_all(runs):
    assert json.loads(runs.call("ls", "--json").stdout) == []
    assert "no runs in" in runs.call("ls").stdout
    refused = runs.call("show")
    assert refused.returncode == 1
    assert "there are no runs yet" in refused.stderr


def test_a_run_is_found_by_name_prefix_and_directory(runs, monkeypatch):
    for name in ("gpt-quiet-otter", "gpt-quiet-owl", "vit-bold-hare"):
        runs.create(name)
    monkeypatch.setenv("TUI_TRAINER_RUNS_DIR", str(runs.directory))
    assert resolve("gpt-quiet-owl").name == "gpt-quiet-owl"
    assert resolve("vit").name == "vit-bold-hare"
    assert resolve(str(runs.directory / "vit-bold-hare")).name == "vit-bold-hare"
    monkeypatch.chdir(runs.directory)
    assert resolve("./vit-bold-hare").name == "vit-bold-hare"
    with pytest.raises(RunError, match="2 runs begin with gpt-quiet") as several:
        resolve("gpt-quiet")
    assert "gpt-quiet-otter" in several.value.hint
    with pytest.raises(RunError, match="there is no run gpt-quite-otter") as near:
        resolve("gpt-quite-otter")
    assert "gpt-quiet-otter" in near.value.hint
    with pytest.raises(RunError) as part:
        resolve("hare")
    assert "vit-bold-hare" in part.value.hint
    with pytest.raises(RunError, match="there is no run in"):
        resolve("/nowhere/at/all")
    with pytest.raises(RunError, match="is not a run's directory"):
        resolve(str(runs.directory))


def test_a_name_that_is_a_prefix_of_another_is_found(runs):
    runs.create("gpt")
    runs.create("gpt-2")
    assert resolve("gpt", runs.directory).name == "gpt"


def test_the_newest_live_run_is_taken(runs):
    runs.start("gpt-old")
    runs.start("gpt-new")
    runs.start("gpt-dead")
    runs.kill("gpt-dead")
    listed = list_runs(runs.directory)
    assert listed[0].name == "gpt-dead"
    assert newest(listed).name == "gpt-new"
    assert newest(listed, live=False).name == "gpt-dead"
    with pytest.raises(RunError, match="gpt-dead has crashed"):
        live_socket(listed[0])


def reported(**fields):
    known = {
        "name": "r",
        "state": "running",
        "pid": os.getpid(),
        "process": process_identity(os.getpid()),
        "machine": machine_identity(),
        "written_at": time.time(),
    }
    return RunState(**{**known, **fields})


def test_a_process_with_the_same_number_is_not_the_run():
    assert determine_state(reported())[0] == "live"
    assert determine_state(reported(state="paused"))[0] == "paused"
    assert determine_state(reported(process="another:1"))[0] == "crashed"
    assert determine_state(reported(process=""))[0] == "crashed"
    assert determine_state(reported(state="finished", process="another:1"))[0] == "finished"


def test_a_run_on_another_machine_is_judged_by_its_silence():
    assert determine_state(reported(machine="other-host", pid=1))[0] == "live"
    state, why = determine_state(
        reported(machine="other-host", host="far", written_at=time.time() - 100)
    )
    assert state == "crashed"
    assert "no sign of life from far" in why


def test_a_zombie_process_counts_as_gone(runs):
    process = runs.start("gpt-zombie")
    process.kill()
    until(lambda: process_identity(process.pid) == "", "the zombie counts as gone")
    assert process.returncode is None
    assert inspect_run(runs.directory / "gpt-zombie").state == "crashed"


def test_a_run_that_wrote_no_status(runs):
    path = runs.create("gpt-mute")
    assert inspect_run(path).state == "live"
    ahead = time.time() + 5  # as the clock of a file server may be
    os.utime(path / "run.json", (ahead, ahead))
    assert inspect_run(path).state == "live"
    long_ago = time.time() - 1000
    os.utime(path / "run.json", (long_ago, long_ago))
    assert inspect_run(path).state == "crashed"


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": 3}', b"\xff\xfe", b"[]"])
def test_an_unreadable_status_is_none(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    assert read_state(tmp_path) is None


def test_a_status_is_written_and_read_back(tmp_path):
    state = reported(step=7, loss=0.5, loss_text="", title="t")
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert msgspec.json.decode((tmp_path / "status.json").read_bytes())["step"] == 7


def test_a_runs_directory_that_others_can_write_to_is_refused(runs):
    runs.create("gpt-mine")
    runs.directory.chmod(0o777)
    refused = runs.call("ls")
    assert refused.returncode == 1
    assert "others can write to" in refused.stderr
    assert "chmod go-w" in refused.stderr
    runs.directory.chmod(0o700)
    (runs.directory / "gpt-mine").chmod(0o770)
    assert [run["state"] for run in runs.ls().values()] == ["refused"]
    with pytest.raises(RunError, match="others can write"):
        resolve(str(runs.directory / "gpt-mine"))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")
def test_other_users_files_are_refused(runs):
    runs.start("gpt-theirs")
    os.chown(runs.directory / "gpt-theirs" / "run.sock", 12345, -1)
    refused = runs.call("pause", "gpt-theirs")
    assert refused.returncode == 1
    assert "belongs to user 12345" in refused.stderr
    os.chown(runs.directory, 12345, -1)
    assert "belongs to user 12345" in runs.call("ls").stderr
