"""A terminal that reads nothing for a while, and one on a slow connection."""

from __future__ import annotations

import fcntl
import re
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.starting import Runs, until
from tests.terminal.harness import COMMAND, Terminal
from tests.terminal.test_main_job import step_on, wait_for_step
from tui_trainer.config.run_spec import read_state

PAUSED = re.compile(r"paused +after (\w+)")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run without torch, which needs no core."""
    runs = Runs(tmp_path / "runs")
    runs.start("gpt-fake")
    yield runs.directory / "gpt-fake"
    runs.end()


def attach(run: Path, *options: str) -> Terminal:
    environment = {"TUI_TRAINER_RUNS_DIR": str(run.parent)}
    return Terminal([*COMMAND, "attach", run.name, *options], 120, 40, env=environment)


def state_of(run: Path) -> tuple[str, int]:
    state = read_state(run)
    assert state is not None
    return state.state, state.step


def wait_for_state(run: Path, wanted: str) -> int:
    """The step at which the run's state file satisfies the condition."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        state, step = state_of(run)
        if state == wanted:
            return step
        time.sleep(0.1)
    raise AssertionError(f"the run is {state_of(run)[0]}, not {wanted}")


def wait_until_full(terminal: Terminal) -> None:
    """Read nothing until the pseudo-terminal holds as much as it can: a few frames."""
    held, since = 0, time.monotonic()

    def full() -> bool:
        nonlocal held, since
        now = struct.unpack("i", fcntl.ioctl(terminal.fd, termios.FIONREAD, b"\0" * 4))
        if now[0] != held:
            held, since = now[0], time.monotonic()
        return held > 0 and time.monotonic() > since + 3.0

    until(full, "a full terminal")


def test_a_terminal_that_takes_nothing_holds_up_neither_training_nor_keys(run: Path) -> None:
    with attach(run) as terminal:
        wait_for_step(terminal, 5)
        # From here on nothing is read.
        wait_until_full(terminal)
        before = state_of(run)[1]
        until(lambda: state_of(run)[1] > before + 20, "training continues")
        terminal.press("space")  # the app still handles keys, though it cannot draw
        paused_at = wait_for_state(run, "paused")

        # Reading again: what is on the screen is whole, and of now.
        terminal.wait_for("paused")
        terminal.wait_until(lambda screen: step_on(screen) == paused_at, f"step {paused_at}")
        terminal.press("space")
        wait_for_step(terminal, paused_at + 3)
        terminal.press("q", "s")
        assert terminal.wait_for_exit() == 0
        terminal.assert_restored()


def test_leaving_does_not_wait_for_a_terminal_that_takes_nothing(run: Path) -> None:
    with attach(run) as terminal:
        wait_for_step(terminal, 5)
        wait_until_full(terminal)
        terminal.press("q", "d")
        deadline = time.monotonic() + 240
        while terminal.runs and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not terminal.runs
        assert state_of(run)[0] == "running"


def test_a_slow_line_is_sent_little_and_keys_show_at_once(run: Path) -> None:
    with attach(run, "--slow-link") as terminal:
        wait_for_step(terminal, 5)
        terminal.wait_for("slow link")
        terminal.settle(2.0)
        before, since = len(terminal.output), time.monotonic()
        wait_for_step(terminal, (step_on(terminal.text()) or 0) + 1)
        terminal.settle(6.0)
        sent = (len(terminal.output) - before) / (time.monotonic() - since)
        assert sent < 1200, f"{sent:.0f} bytes a second"

        terminal.press("space")
        before_key = terminal.find(PAUSED)[1]
        terminal.press("p")
        terminal.wait_until(
            lambda screen: (found := PAUSED.search(screen)) and found[1] != before_key,
            f"a pause after another phase than {before_key}",
        )
        terminal.press("q", "s")
        assert terminal.wait_for_exit() == 0
