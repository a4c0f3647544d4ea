from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import msgspec
import pexpect
import psutil
import pytest

from tests.runs.starting import last_step, stored_step, until
from tui_trainer.cli.commands import doctor
from tui_trainer.cli.commands.doctor import LIBRARIES, OPTIONAL
from tui_trainer.cli.commands.logs import LogCopier
from tui_trainer.client.connection import RunClient
from tui_trainer.config.run_spec import LOG_FILE, write_state
from tui_trainer.protocol.actions import Mark, Pause, Resume
from tui_trainer.protocol.events import Notice
from tui_trainer.runs.boot_log import BOOT_LOG
from tui_trainer.runs.liveness import inspect_run


def test_pause_step_resume_stop(runs):
    runs.start("gpt-one")
    paused = runs.call("pause", "gpt-one")
    assert "gpt-one paused at step" in paused.stdout
    here = last_step(paused)
    until(lambda: runs.ls()["gpt-one"]["state"] == "paused", "ls shows paused")
    one = runs.call("step", "gpt-one")
    assert last_step(one) == here + 1
    for order in (("5", "gpt-one"), ("gpt-one", "5"), ("5",)):
        before = last_step(runs.call("pause"))
        assert last_step(runs.call("step", *order)) == before + 5
    assert "running at step" in runs.call("resume", "gpt").stdout
    stopped = runs.call("stop", "gpt-one")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped at step" in stopped.stdout
    until(lambda: runs.ls()["gpt-one"]["state"] == "stopped", "ls shows stopped")
    runs.processes["gpt-one"].wait(240)
    again = runs.call("pause", "gpt-one")
    assert again.returncode == 1
    assert "gpt-one has been stopped" in again.stderr


def test_the_resulting_state_as_one_json_object(runs):
    runs.start("gpt-one")
    paused = json.loads(runs.call("pause", "gpt-one", "--json").stdout)
    assert (paused["run"], paused["state"]) == ("gpt-one", "paused")
    one = json.loads(runs.call("step", "gpt-one", "--json").stdout)
    assert (one["step"], one["checkpoint"]) == (paused["step"] + 1, None)
    assert one["loss"] == pytest.approx(1 / one["step"], rel=1e-3)
    assert json.loads(runs.call("resume", "--json").stdout)["state"] == "running"
    kept = json.loads(runs.call("checkpoint", "gpt-one", "--json").stdout)
    assert Path(kept["checkpoint"]).parent.parent == runs.directory / "gpt-one"
    stopped = json.loads(runs.call("stop", "gpt-one", "--json").stdout)
    assert (stopped["state"], stopped["directory"]) == ("stopped", str(runs.directory / "gpt-one"))


def test_commands_do_not_guess_between_several(runs):
    runs.start("gpt-one")
    runs.start("gpt-two")
    refused = runs.call("pause")
    assert refused.returncode == 1
    assert "2 runs are live" in refused.stderr
    assert "gpt-one" in refused.stderr
    assert inspect_run(runs.directory / "gpt-one").state == "live"


@pytest.mark.parametrize("wrong", [("0",), ("1", "2"), ("a", "b"), ("-3",)])
def test_step_with_an_invalid_number(runs, wrong):
    refused = runs.call("step", *wrong)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_a_command_takes_control_and_all_see_it(runs):
    runs.start("gpt-held")
    run = inspect_run(runs.directory / "gpt-held")
    with RunClient.connect(run, "the holder", read_only=False) as holder:
        assert holder.command(Mark("mine")).ok
        assert holder.poll().status.controller == holder.viewer_id
        assert "paused" in runs.call("pause", "gpt-held").stdout
        until(lambda: holder.poll().status.state == "paused", "the holder sees the pause")
        notices = [e for e in holder.snapshot.events if isinstance(e, Notice)]
        shown = [e for e in notices if e.kind in ("command", "control")]
        assert [(e.kind, e.text) for e in shown] == [
            ("control", "take control"), ("command", "pause")
        ]  # fmt: skip
        assert all("tui-trainer pause" in e.who for e in shown)


def test_read_only_cannot_control(runs):
    runs.start("gpt-watched")
    run = inspect_run(runs.directory / "gpt-watched")
    with RunClient.connect(run, "watcher") as watcher:
        ack = watcher.command_in_control(Pause())
        assert not ack.ok
        assert "read-only" in ack.message
        assert watcher.poll().status.state == "running"


def test_checkpoint(runs):
    runs.start("gpt-kept")
    done = runs.call("checkpoint", "gpt-kept")
    assert done.returncode == 0, done.stderr
    assert list((runs.directory / "gpt-kept").glob("checkpoint-*"))


def test_show_of_a_live_run(runs):
    runs.start("gpt-seen")
    until(lambda: runs.reported("gpt-seen").step > 20, "some steps")
    text = runs.call("show", "gpt-seen", "--once").stdout
    assert "gpt-seen · fake" in text
    assert "grad norm" in text
    assert "█" in text
    seen = json.loads(runs.call("show", "gpt-seen", "--json").stdout)
    assert seen["name"] == "gpt-seen"
    assert seen["state"] == "live"
    assert seen["step"] > 20
    assert seen["loss"] == pytest.approx(1 / seen["step"], rel=1e-3)
    assert seen["grad_norm_preclip"] == pytest.approx(seen["step"] ** 0.5, rel=1e-3)
    assert seen["loss_curve"]["high"][0] > seen["loss_curve"]["high"][-1]
    assert seen["parameters"] == 30 * 16
    assert inspect_run(runs.directory / "gpt-seen").state == "live"


def test_show_of_a_crashed_run(runs):
    runs.start("gpt-dead")
    until(lambda: stored_step(runs.directory / "gpt-dead") > 50, "some steps are recorded")
    runs.kill("gpt-dead")
    done = runs.call("show", "gpt-dead")
    assert done.returncode == 0
    assert "grad norm" in done.stdout
    assert "crashed" in done.stdout
    assert "exited without recording an end" in done.stdout
    seen = json.loads(runs.call("show", "gpt-dead", "--json").stdout)
    assert seen["state"] == "crashed"
    assert seen["loss"] == pytest.approx(1 / seen["step"], rel=1e-3)
    assert len(seen["loss_curve"]["steps"]) > 20


def test_show_imports_neither_torch_nor_textual(runs):
    runs.start("gpt-light")
    code = (
        "import sys; from tui_trainer.cli.main import run; run(['show', '--once', 'gpt-light']);"
        "run(['ls']); print(sorted({'torch', 'textual'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=runs.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_logs_and_follow_until_the_end(runs):
    runs.start("gpt-logged", steps=40, seconds=0.02)
    following = runs.call("logs", "-f", "gpt-logged")
    assert following.returncode == 0, following.stderr
    lines = following.stdout.splitlines()
    assert lines == [f"step {i}" for i in range(1, 41)]
    assert runs.call("logs", "gpt-logged").stdout == following.stdout
    runs.create("gpt-mute")
    assert "has printed nothing" in runs.call("logs", "gpt-mute").stderr


SEGFAULTS = """
import ctypes, os, time
log = os.path.join(os.environ["TUI_TRAINER_RUNS_DIR"], "fallen", "log.txt")
print("about to fall", flush=True)
while not os.path.exists(log) or not os.path.getsize(log):
    time.sleep(0.02)  # another thread writes it
ctypes.string_at(0)
"""


def test_the_signal_that_killed_a_detached_run_is_reported(runs, tmp_path):
    script = tmp_path / "falls.py"
    script.write_text(SEGFAULTS)
    started = runs.call("run", "--detach", "--name", "fallen", str(script))
    assert started.returncode == 0, started.stderr
    following = runs.call("logs", "-f", "fallen")
    assert following.returncode == 0, following.stderr
    assert following.stdout == runs.call("logs", "fallen").stdout
    first, *rest = following.stdout.splitlines()
    assert first == "about to fall"
    assert rest[0] == "Fatal Python error: Segmentation fault"
    assert any("falls.py" in line for line in rest)
    seen = runs.ls()["fallen"]
    assert seen["state"] == "crashed"
    assert seen["note"].startswith("it died: Fatal Python error: Segmentation fault (")
    for asked in ("ls", "show"):
        assert "Segmentation fault" in runs.call(asked).stdout


def test_following_continues_from_the_boot_log_to_the_log(runs, capsysbinary):
    """The output before the log began may be longer than the log."""
    path = runs.create("gpt-boots")
    (path / BOOT_LOG).write_text("a warning of some library's, rather long\n")
    printed = LogCopier(inspect_run(path))
    printed.copy_new()
    (path / LOG_FILE).write_text("step 1\n")
    printed.copy_new()
    printed.copy_new()
    with open(path / LOG_FILE, "a") as log:
        log.write("step 2\n")
    printed.copy_new()
    assert capsysbinary.readouterr().out == (
        b"a warning of some library's, rather long\nstep 1\nstep 2\n"
    )


def test_rm(runs):
    runs.start("gpt-live")
    refused = runs.call("rm", "--yes", "gpt-live")
    assert refused.returncode == 1
    assert "gpt-live is live" in refused.stderr
    runs.kill("gpt-live")
    unasked = runs.call("rm", "gpt-live")
    assert unasked.returncode == 2
    assert "--yes" in unasked.stderr
    assert (runs.directory / "gpt-live").is_dir()
    shortened = runs.call("rm", "--yes", "gpt-l")
    assert shortened.returncode == 2
    assert "it is gpt-live" in shortened.stderr
    assert "removed gpt-live" in runs.call("rm", "-y", "gpt-live").stdout
    assert not (runs.directory / "gpt-live").exists()


def test_rm_waits_for_a_run_that_has_ended_and_is_about_to_leave(runs):
    process = runs.start("gpt-over", steps=30, start_paused=True)
    run = inspect_run(runs.directory / "gpt-over")
    with RunClient.connect(run, "one that does not fetch the end", read_only=False) as viewer:
        assert viewer.command(Resume()).ok
        until(lambda: runs.reported("gpt-over").ended, "it ends")
        os.kill(process.pid, signal.SIGSTOP)  # it lingers for as long as we like
        removing = subprocess.Popen(
            [sys.executable, "-m", "tui_trainer", "rm", "-y", "gpt-over"],
            env=runs.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "gpt-over has ended" in removing.stderr.readline()
        os.kill(process.pid, signal.SIGCONT)
    out, err = removing.communicate(timeout=240)
    assert removing.returncode == 0, err
    assert out == "removed gpt-over\n"


@pytest.mark.slow
def test_rm_asks_on_a_terminal(runs):
    runs.start("gpt-asked", steps=2)
    until(lambda: runs.reported("gpt-asked").ended, "it ends")
    for answer, left in (("n", True), ("y", False)):
        asking = pexpect.spawn(
            sys.executable,
            ["-m", "tui_trainer", "rm", "gpt-asked"],
            env=runs.environment,
            timeout=240,
        )
        asking.expect("remove it permanently")
        asking.sendline(answer)
        asking.expect(pexpect.EOF)
        assert (runs.directory / "gpt-asked").exists() is left


def test_rm_removes_only_runs(runs, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    (precious / "thesis.tex").write_text("x")
    refused = runs.call("rm", "--yes", str(precious))
    assert refused.returncode == 1
    assert "is not a run's directory" in refused.stderr
    os.symlink(precious, runs.create("gpt-linked") / "link")
    until(lambda: runs.call("rm", "-y", "gpt-linked") and True, "tried")
    assert (precious / "thesis.tex").exists()


def removal_refused(runs, what, why):
    done = runs.call("rm", "-y", str(what))
    assert done.returncode == 1, done.stdout
    assert why in done.stderr


def test_rm_never_takes_a_run_that_may_live(runs):
    place = runs.directory / "gpt-quiet"
    runs.start("gpt-quiet")
    lost = (place / "status.json").read_bytes()
    stopped = psutil.Process(runs.processes["gpt-quiet"].pid)
    stopped.suspend()  # no more state is written
    until(lambda: stopped.status() == psutil.STATUS_STOPPED, "it is stopped")
    (place / "status.json").write_bytes(b"")
    os.utime(place / "run.json", (1, 1))
    assert inspect_run(place).state == "crashed"  # according to its files
    removal_refused(runs, "gpt-quiet", "still answers on its socket")
    (place / "status.json").write_bytes(lost)
    runs.kill("gpt-quiet")
    elsewhere = msgspec.structs.replace(
        runs.reported("gpt-quiet"), machine="far", host="far", written_at=time.time() - 60
    )
    write_state(place, elsewhere)
    assert inspect_run(place).state == "crashed"
    removal_refused(runs, "gpt-quiet", "its last status came from far")
    write_state(place, msgspec.structs.replace(elsewhere, written_at=time.time() - 7200))
    assert runs.call("rm", "-y", "gpt-quiet").returncode == 0
    assert not place.exists()


def test_rm_takes_nothing_that_only_looks_like_a_run(runs, tmp_path):
    project = tmp_path / "project"
    project.mkdir(mode=0o700)
    (project / "status.json").write_text('{"name": "my deployment"}')
    (project / "thesis.tex").write_text("x")
    removal_refused(runs, project, "may not be a run")
    linked = runs.directory / "linked"
    linked.symlink_to(runs.create("gpt-kept"))
    os.utime(runs.directory / "gpt-kept" / "run.json", (1, 1))
    removal_refused(runs, "linked", "is a link")
    inside = runs.create("gpt-outer") / "gpt-inner"
    os.utime(runs.directory / "gpt-outer" / "run.json", (1, 1))
    inside.mkdir()
    (inside / "run.json").write_bytes((runs.directory / "gpt-outer" / "run.json").read_bytes())
    removal_refused(runs, "gpt-outer", "contains other runs")
    assert (project / "thesis.tex").exists()
    assert (runs.directory / "gpt-kept" / "run.json").exists()
    assert (inside / "run.json").exists()


@pytest.mark.slow
def test_doctor(runs, capsys, monkeypatch):
    done = runs.call("doctor", "--json", starts=True)
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert found["torch"]["level"] == "good"
    for name in (*LIBRARIES, *OPTIONAL, "git", "ssh"):
        assert name in found, name
    assert found["directory"]["value"].startswith(str(runs.directory))
    assert done.returncode == 0
    place = runs.create("gpt-open")
    place.chmod(0o770)
    assert any(f"chmod go-w {place}" in check.hint for check in doctor._storage(runs.directory))
    runs.directory.chmod(0o777)
    monkeypatch.setattr(doctor, "_training", lambda: iter(()))  # takes as long as PyTorch's import
    assert doctor.doctor(runs_dir=runs.directory) == 1
    assert "others can write to" in capsys.readouterr().out


def test_doctor_checks_all_declared_dependencies():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", each)[0] for each in declared["dependencies"]}
    assert names - {*LIBRARIES, *OPTIONAL} == {"torch"}  # which is asked in a process of its own
    for package, (source, _) in OPTIONAL.items():
        extra = re.search(r"\[(.+)\]", source)
        brought = declared["optional-dependencies"][extra[1]] if extra else [source]
        assert re.match(r"[\w-]+", brought[0])[0] == package


def test_doctor_distinguishes_required_from_optional_dependencies(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda package: "")
    monkeypatch.setenv("PATH", "/nowhere")
    found = {each.name: each for each in [*doctor._versions(), *doctor._optional()]}
    assert {found[name].level for name in LIBRARIES} == {"bad"}
    assert {found[name].level for name in (*OPTIONAL, "git", "ssh")} == {"note"}
    assert found["pyarrow"].hint == 'pip install "tui-trainer[parquet]"'
    assert "export --format parquet needs it" in found["pyarrow"].value
    assert "runs on other machines" in found["ssh"].value
