"""The whole story of a run that outlives everything that looks at it."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from tests.runs.starting import last_step, until
from tests.ssh.sshd import our_ssh
from tests.terminal.harness import Terminal


@pytest.fixture
def terminal(runs):
    """Open the command in a pseudo-terminal."""
    opened = []

    def begin(*arguments):
        command = [sys.executable, "-m", "tui_trainer", *arguments]
        opened.append(Terminal(command, env=runs.environment, timeout=60))
        return opened[-1]

    yield begin
    for each in opened:
        each.__exit__()


def test_a_run_outlives_its_terminals_and_its_links(host, runs, terminal):
    started = runs.call("gpt", "--detach", "--threads", "1", "--steps", "100000")
    assert started.returncode == 0, started.stderr
    name = started.stdout.strip()
    until(lambda: runs.said(name).step > 5, "it trains")
    process = runs.said(name).pid
    try:
        here = terminal("attach", name)
        here.wait_for("running")
        here.hang_up()
        here.wait_for_exit()
        before = runs.said(name).step
        until(lambda: runs.said(name).step > before + 10, "it trains on after the hang-up")

        there = terminal("attach", f"ssh://Box/{name}")
        there.wait_for("running")
        there.press("space")
        until(lambda: there.pump(0.01) and runs.said(name).state == "paused", "paused over ssh")
        until(our_ssh, "the ssh of the screen")[0].kill()
        there.wait_until(lambda text: "trying again" in text or "lost" in text, "the loss, said")
        there.hang_up()
        there.wait_for_exit()
        assert runs.ls()[name]["state"] == "paused"

        again = terminal("attach", f"ssh://Box/{name}")
        again.wait_for("paused")
        here_step = last_step(runs.call("step", "1", name))
        assert last_step(runs.call("resume", "--no-wait", name)) >= here_step
        again.wait_for("running")
        until(lambda: runs.said(name).step > here_step + 10, "it trains on")
    finally:
        os.kill(process, signal.SIGKILL)
    until(lambda: runs.ls()[name]["state"] == "crashed", "ls says crashed")
    said = runs.said(name)
    shown = json.loads(runs.call("show", name, "--json").stdout)
    assert shown["state"] == "crashed"
    assert shown["step"] >= said.step
    # The store misses at most the last second, here taken threefold.
    drawn = shown["loss_curve"]["steps"]
    assert drawn[0] == 1
    assert drawn[-1] + (drawn[1] - drawn[0]) >= said.step - 3 * said.steps_per_second
