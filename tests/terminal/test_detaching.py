"""Closing a terminal does not end its run."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from tests.runs.starting import Runs, last_step, slow_down, until
from tests.terminal.harness import Terminal

GPT = ("--threads", "1", "--steps", "100000", "--eval-batches", "1", "--sample-length", "8")
GPT += ("--layers", "2", "--heads", "2", "--width", "32", "--block-size", "16", "--batch-size", "8")


@pytest.fixture
def runs(tmp_path):
    """A runs directory with fake runs."""
    made = Runs(tmp_path / "runs")
    yield made
    made.end()


@pytest.fixture
def terminal(runs):
    """Open the command in a pseudo-terminal."""
    opened = []

    def begin(*arguments, **options):
        command = [sys.executable, "-m", "tui_trainer", *arguments]
        opened.append(Terminal(command, env=runs.environment, **options))
        return opened[-1]

    yield begin
    for each in opened:
        each.__exit__()
    for state in runs.ls().values():
        if state["state"] in ("live", "paused"):
            os.kill(state["pid"], signal.SIGKILL)


def test_detach_prints_the_name_and_the_run_continues(runs):
    done = runs.call("gpt", "--detach", *GPT)
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    assert re.fullmatch(r"gpt-[a-z]+-[a-z]+", name)
    until(lambda: runs.reported(name).step > 5, "it trains")
    assert runs.ls()[name]["state"] == "live"
    assert os.getsid(runs.ls()[name]["pid"]) == runs.ls()[name]["pid"]
    stopped = runs.call("stop", "--checkpoint", name)
    assert stopped.returncode == 0, stopped.stderr
    assert runs.ls()[name]["state"] == "stopped"


def test_detach_shows_nothing_else(runs):
    refused = runs.call("gpt", "--detach", "--json")
    assert refused.returncode == 2
    assert "--detach" in refused.stderr
    assert runs.ls() == {}


def test_hang_up_leaves_the_run_going(runs, terminal):
    first = terminal("gpt", "--name", "gpt-kept", *GPT)
    first.wait_for("running")
    until(lambda: runs.reported("gpt-kept").step > 5, "it trains")
    first.hang_up()
    first.wait_for_exit()
    slow_down(runs.directory / "gpt-kept")
    before = runs.reported("gpt-kept").step
    until(lambda: runs.reported("gpt-kept").step > before + 20, "it trains on")
    assert runs.ls()["gpt-kept"]["state"] == "live"
    second = terminal("attach")
    second.wait_for("running")
    second.press("space")
    until(lambda: runs.reported("gpt-kept").state == "paused", "the new screen controls it")
    second.wait_for("‖ paused")  # space resumes where the screen shows the pause
    second.press("space")
    until(lambda: runs.reported("gpt-kept").state == "running", "it is running again")


def test_read_only_attach_cannot_pause(runs, terminal):
    runs.start("gpt-watched")
    screen = terminal("attach", "--read-only", "gpt-watched")
    screen.wait_for("running")
    screen.press("space")
    before = runs.reported("gpt-watched").step
    until(lambda: runs.reported("gpt-watched").step > before + 50, "it continues")
    assert runs.reported("gpt-watched").state == "running"


def test_in_app_trains_and_is_stopped_by_keys(runs, terminal):
    screen = terminal("gpt", "--in-app", "--name", "gpt-inside", *GPT)
    screen.wait_for("running")
    until(lambda: runs.reported("gpt-inside").step > 5, "it trains")
    assert runs.ls()["gpt-inside"]["pid"] == screen.pid
    here = last_step(runs.call("pause", "gpt-inside"))
    assert last_step(runs.call("step", "2", "gpt-inside")) == here + 2
    screen.press("q")
    screen.wait_for("leaving ends it")
    assert "Detach" not in screen.text()
    screen.press("c")
    assert screen.wait_for_exit() == 0
    screen.assert_restored()
    stopped = runs.ls()["gpt-inside"]
    assert stopped["state"] == "stopped"
    checkpoints = runs.directory / "gpt-inside" / "checkpoints"
    assert (checkpoints / f"step-{stopped['step']:08}").is_dir()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_in_app_ends_cleanly_on_a_signal(runs, terminal, number):
    """SIGHUP is what comes when its terminal is closed."""
    screen = terminal("gpt", "--in-app", "--name", "inside", *GPT)
    until(lambda: screen.pump(0.01) and runs.reported("inside").step > 3, "it trains")
    os.kill(screen.pid, number)
    screen.wait_for_exit()
    screen.assert_restored()
    state = runs.reported("inside")
    assert state.state == "stopped"
    assert (runs.directory / "inside" / "checkpoints" / f"step-{state.step:08}").is_dir()


def test_in_app_is_not_for_scripts(runs, tmp_path):
    (tmp_path / "train.py").write_text("print('x')\n")
    refused = runs.call("run", "--in-app", str(tmp_path / "train.py"))
    assert refused.returncode == 2
    assert "--in-app does not work with a script" in refused.stderr


def test_attach_without_a_terminal(runs):
    refused = runs.call("attach")
    assert refused.returncode == 2
    assert "not a terminal" in refused.stderr


def test_show_keeps_showing_on_a_terminal(runs, terminal):
    runs.start("gpt-short", steps=150, start_paused=True)
    shown = terminal("show", "gpt-short")
    shown.wait_for("paused")
    assert runs.call("resume", "--no-wait", "gpt-short").returncode == 0
    shown.wait_for("finished")
    assert shown.wait_for_exit() == 0


@pytest.mark.parametrize("home", [(), ("--in-app",)])
def test_a_refused_start_is_reported_and_leaves_nothing(runs, terminal, home):
    opened = terminal("gpt", "--device", "cuda:99", "--name", "gpt-nowhere", *home)
    opened.wait_for("crashed")
    opened.press("q")
    assert opened.wait_for_exit() == 2
    text = opened.text()
    assert "could not start: " in text
    assert "cuda:99" in text
    assert list(runs.directory.iterdir()) == []
