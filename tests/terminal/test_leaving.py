"""Every exit: the terminal is restored, the last line and the exit status are right."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.terminal.harness import COMMAND, Terminal
from tui_trainer.config.run_spec import RunState, process_identity, read_state

STEPS = r"step +[1-9][\d,]*(/[\d,]+)? .*steps/s"
"""The progress line of a run that has made steps."""


def change(script: Path, then: str) -> list[str]:
    """The command that trains with `script`, which does `then` after each step."""
    script.write_text(script.read_text().replace("# then", then))
    return [*COMMAND, "run", "--name", "mine", str(script)]


def last_line(terminal: Terminal) -> str:
    lines = terminal.output.decode(errors="replace").replace("\r", "").splitlines()
    return [line for line in lines if " · " in line][-1]


def soon(runs: Path, holds: Callable[[RunState], bool]) -> RunState:
    """Wait until the run's state file satisfies the condition."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        state = read_state(runs / "mine")
        if state is not None and holds(state):
            return state
        time.sleep(0.05)
    raise AssertionError(f"it never came; the last was {read_state(runs / 'mine')}")


def lives(state: RunState) -> bool:
    return process_identity(state.pid) == state.process


def test_a_script_that_raises_at_step_7(runs: Path, train: Path) -> None:
    command = change(train, "if step == 7: raise ValueError('the seventh')")
    with Terminal(command) as terminal:
        terminal.wait_for("crashed")
        terminal.wait_for("the seventh")
        terminal.wait_for("weight")  # the gradients measured so far
        terminal.press("q")
        assert terminal.wait_for_exit() == 1
        terminal.assert_restored()
        assert "crashed at step 7" in last_line(terminal)
        assert "the seventh" in last_line(terminal)


def test_detaching_leaves_the_run_to_itself(runs: Path, train: Path) -> None:
    with Terminal(change(train, "")) as terminal:
        terminal.find(STEPS)
        terminal.press("q")
        terminal.wait_for("Leave this run?")
        terminal.press("d")
        assert terminal.wait_for_exit() == 0
        terminal.assert_restored()
        assert "still training at step" in last_line(terminal)
    was = read_state(runs / "mine")
    assert was is not None
    assert lives(was)
    soon(runs, lambda state: state.step > was.step)
    os.kill(was.pid, signal.SIGTERM)
    soon(runs, lambda state: state.ended and not lives(state))


def test_sigterm_closes_only_the_screen(runs: Path, train: Path) -> None:
    with Terminal(change(train, "")) as terminal:
        terminal.find(STEPS)
        os.kill(terminal.pid, signal.SIGTERM)
        assert terminal.wait_for_exit() == 143
        terminal.assert_restored()
        assert "still training at step" in last_line(terminal)
    soon(runs, lives)


def test_a_hang_up_while_it_is_leaving_does_not_keep_it(runs: Path, train: Path) -> None:
    """As when a terminal emulator ends its child and closes: the kernel adds a SIGCONT."""
    with Terminal(change(train, "")) as terminal:
        terminal.find(STEPS)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCONT, signal.SIGHUP):
            os.kill(terminal.pid, number)
        assert terminal.wait_for_exit() in (129, 143)  # pending signals come in any order
    soon(runs, lives)


def test_a_fault_of_the_screen_is_kept_in_a_file(runs: Path, train: Path) -> None:
    spoilt = (
        "import tui_trainer.ui.app as app\n"
        "app.TuiTrainerApp.draw_frame = lambda self: 1 / 0\n"
        "from tui_trainer.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", spoilt, *change(train, "")[len(COMMAND) :]]
    with Terminal(command) as terminal:
        assert terminal.wait_for_exit() == 1
        terminal.assert_restored()
        output = terminal.output.decode(errors="replace")
        assert "the screen crashed" in output
        assert "Traceback" not in output
    assert "ZeroDivisionError" in (runs / "mine" / "app-crash.txt").read_text()
    soon(runs, lambda state: lives(state) and state.step > 0)


def test_a_terminal_that_is_far_too_small(runs: Path, train: Path) -> None:
    with Terminal(change(train, ""), columns=20, rows=5) as terminal:
        terminal.wait_until(str.strip, "anything at all")
        terminal.resize(80, 24)
        terminal.find(STEPS)
        terminal.press("q")
        terminal.wait_for("Leave this run?")
        terminal.press("s")
        assert terminal.wait_for_exit() == 0
        terminal.assert_restored()


def test_a_dumb_terminal_gets_lines(runs: Path) -> None:
    command = [*COMMAND, "gpt", "--steps", "3", "--threads", "1", "--sample-length", "8"]
    with Terminal(command, env={"TERM": "dumb"}) as terminal:
        assert terminal.wait_for_exit() == 0
        output = terminal.output.decode(errors="replace")
        assert "plain progress lines instead" in output
        assert not re.search(r"\x1b\[\?", output)


def test_control_c_while_lines_are_printed(runs: Path, train: Path) -> None:
    command = [*change(train, "")[:-1], "--plain", str(train)]
    with Terminal(command) as terminal:
        terminal.find(r"(?i)step +[1-9\d]")
        terminal.press("ctrl+c")
        assert terminal.wait_for_exit() != 0
        terminal.assert_restored()
        assert "tui_trainer" not in terminal.output.decode(errors="replace")
