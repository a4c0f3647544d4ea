"""`attach ssh://…` in a real pseudo-terminal."""

from __future__ import annotations

import sys

import pytest

from tests.runs.starting import until
from tests.ssh.sshd import only_ssh, our_ssh
from tests.terminal.harness import Terminal


@pytest.fixture
def terminal(runs, host):
    """Open `tui-trainer attach …` in a pseudo-terminal."""
    opened = []

    def begin(*arguments):
        command = [sys.executable, "-m", "tui_trainer", "attach", *arguments]
        opened.append(Terminal(command, env=runs.environment))
        return opened[-1]

    yield begin
    for each in opened:
        each.__exit__()


def test_choose_a_run_pause_it_and_reconnect(host, runs, terminal):
    runs.start("gpt-first")
    runs.start("gpt-second")
    screen = terminal("ssh://Box")
    screen.wait_for("which run? [1-2")
    assert "1  gpt-second" in screen.text()
    screen.press("9", "enter")
    screen.wait_for("a number or a name from the list")
    screen.press("2", "enter")
    screen.wait_for("running")
    screen.press("space")
    until(lambda: runs.reported("gpt-first").state == "paused", "paused from here")
    assert runs.reported("gpt-second").state == "running"
    with host.unresponsive():
        only_ssh().kill()
        screen.wait_until(
            lambda text: "lost" in text or "trying again" in text, "that the link is lost"
        )
        screen.press("space", "3")
        screen.wait_until(lambda text: "Clipping" not in text, "what follows the ignored key")
    screen.press("1")
    until(lambda: screen.pump() and len(our_ssh()) == 1, "another ssh")
    screen.wait_until(
        lambda text: "lost" not in text and "trying again" not in text and "paused" in text,
        "the pause over the new link",
    )
    screen.press("space")
    until(
        lambda: screen.pump(0.01) and runs.reported("gpt-first").state == "running",
        "resumed over the new link",
    )


def test_a_refusal_is_one_message_without_a_screen(host, runs, terminal):
    screen = terminal("ssh://Box/gpt-none")
    assert screen.wait_for_exit() == 1
    assert "Box: there is no run gpt-none" in screen.text()
    assert "Traceback" not in screen.text()
    screen.assert_restored()


def test_an_unknown_host_key_is_asked_about_before_the_screen(host, runs, terminal):
    (host.directory / "known").write_text("")
    runs.start("gpt-new")
    screen = terminal("ssh://Box/gpt-new")
    screen.wait_for("Are you sure you want to continue connecting")
    screen.press("yes", "enter")
    screen.wait_for("running")
