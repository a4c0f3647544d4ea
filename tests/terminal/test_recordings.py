"""The two commands with a screen, in a real pseudo-terminal."""

from __future__ import annotations

import os
import sys

import pytest

from tests.recorded_runs import directory, fingerprint, home
from tests.terminal.harness import Terminal

pytestmark = pytest.mark.slow


def opened(*arguments: str) -> Terminal:
    environment = {**os.environ, "TUI_TRAINER_RUNS_DIR": str(home() / "runs")}
    return Terminal([sys.executable, "-m", "tui_trainer", *arguments], env=environment)


def test_replay_from_the_command_line() -> None:
    before = fingerprint(directory("calm"))
    with opened("replay", "calm") as terminal:
        terminal.wait_for("step 30/30")
        terminal.press("\x1b[H")
        terminal.wait_for("step  0/30")
        terminal.press("right")
        terminal.wait_for("step  1/30")
        terminal.press("q")
        terminal.wait_for("calm shown at step 1 of 30")
        assert terminal.wait_for_exit() == 0
    assert fingerprint(directory("calm")) == before


def test_compare_from_the_command_line() -> None:
    with opened("compare", "calm", "eager") as terminal:
        terminal.wait_for("Training loss")
        terminal.press("t")
        terminal.wait_for("by time")
        terminal.press("q")
        assert terminal.wait_for_exit() == 0


@pytest.mark.parametrize("command", ["replay", "report", "export"])
def test_a_missing_run(command: str) -> None:
    more = ("--format", "csv") if command == "export" else ()
    with opened(command, "missing", *more) as terminal:
        terminal.wait_for("there is no run missing")
        assert terminal.wait_for_exit() == 1
