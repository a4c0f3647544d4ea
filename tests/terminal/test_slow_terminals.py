"""A terminal that takes nothing for a while, and one behind a slow line."""

from __future__ import annotations

import time
from pathlib import Path

from tests.terminal.harness import Terminal
from tests.terminal.test_main_job import GPT, step_on, wait_for_step
from tui_trainer.config.run_spec import read_state


def the_run(runs: Path) -> Path:
    return next(runs.iterdir())


def state_of(run: Path) -> tuple[str, int]:
    state = read_state(run)
    assert state is not None
    return state.state, state.step


def wait_for_state(run: Path, wanted: str) -> int:
    """The step at which the run's own record says that it is so."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        state, step = state_of(run)
        if state == wanted:
            return step
        time.sleep(0.1)
    raise AssertionError(f"the run is {state_of(run)[0]}, not {wanted}")


def test_a_terminal_that_takes_nothing_holds_up_neither_training_nor_keys(runs: Path) -> None:
    with Terminal(GPT, 120, 40, timeout=90) as terminal:
        wait_for_step(terminal, 5)
        run = the_run(runs)
        # From here on nobody reads: a few frames fill what the pseudo-terminal holds.
        before = state_of(run)[1]
        time.sleep(12)
        assert state_of(run)[1] > before, "training stood still"
        terminal.press("space")  # the app still hears, though it cannot show
        paused_at = wait_for_state(run, "paused")

        # Reading again: what is on the screen is whole, and of now.
        terminal.wait_for("paused")
        shown = step_on(terminal.settle(1.0))
        assert shown == paused_at
        terminal.press("space")
        wait_for_step(terminal, paused_at + 3)
        terminal.press("q", "s")
        assert terminal.wait_for_exit(30) == 0
        terminal.assert_restored()


def test_leaving_does_not_wait_for_a_terminal_that_takes_nothing(runs: Path) -> None:
    with Terminal(GPT, 120, 40, timeout=90) as terminal:
        wait_for_step(terminal, 5)
        run = the_run(runs)
        time.sleep(8)  # nobody reads from here on: what the pseudo-terminal holds is full
        terminal.press("q", "d")
        deadline = time.monotonic() + 30
        while terminal.child.isalive() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not terminal.child.isalive()
        assert state_of(run)[0] == "running"


def test_a_slow_line_is_sent_little_and_keys_show_at_once(runs: Path) -> None:
    with Terminal([*GPT, "--slow-link"], 120, 40, timeout=90) as terminal:
        wait_for_step(terminal, 5)
        terminal.wait_for("slow link")
        terminal.settle(5.0)
        before = len(terminal.output)
        terminal.settle(15.0)
        sent = (len(terminal.output) - before) / 15
        assert 0 < sent < 1200, f"{sent:.0f} bytes a second"

        terminal.press("space")
        terminal.wait_for("paused", timeout=5)
        terminal.press("p")
        terminal.find(r"step [\d,]+ after \w+: ", timeout=5)
        terminal.press("q", "s")
        assert terminal.wait_for_exit(30) == 0


def test_leaving_a_run_inside_the_app_says_that_it_ends(runs: Path) -> None:
    with Terminal([*GPT, "--in-app"], 80, 24, timeout=90) as terminal:
        wait_for_step(terminal, 3)
        terminal.press("q")
        terminal.wait_for("leaving ends it")
        assert "Detach" not in terminal.text()
        terminal.press("s")
        assert terminal.wait_for_exit(40) == 0
    assert state_of(the_run(runs))[0] == "stopped"
