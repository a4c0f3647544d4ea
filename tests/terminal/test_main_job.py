"""The main job of a user: watch a GPT train, pause it, step it, resume it, leave."""

from __future__ import annotations

import re
from pathlib import Path

from tests.terminal.harness import COMMAND, Terminal
from tui_trainer.protocol import PHASES

GPT = [*COMMAND, "gpt", "--steps", "100000", "--device", "cpu", "--threads", "1"]
GPT += ["--eval-batches", "1", "--sample-length", "8"]


def step_on(screen: str) -> int | None:
    """The number of steps in the progress line."""
    found = re.search(r"step +([\d,]+)/", screen)
    return int(found[1].replace(",", "")) if found else None


def paused_after(screen: str) -> str:
    """The phase after which the run is paused, from the phase strip; "" while it runs."""
    found = re.search(r"step [\d,]+ after (\w+):", screen)
    return found[1] if found and "paused" in screen else ""


def wait_for_step(terminal: Terminal, least: int) -> int:
    """Wait until the run has made this many steps; return how many it has."""
    return int(
        terminal.wait_until(
            lambda screen: (made := step_on(screen)) is not None and made >= least and made,
            f"step {least} or more",
        )
    )


def wait_for_phase(terminal: Terminal, phase: str) -> None:
    terminal.wait_until(lambda screen: paused_after(screen) == phase, f"a pause after {phase}")


def test_watch_pause_step_resume_and_leave(runs: Path) -> None:
    with Terminal([*GPT, "--paused"], columns=120, rows=40, cold=True) as terminal:
        terminal.wait_for("paused")
        assert step_on(terminal.settle(1.0)) in (0, None), "it did not wait"
        terminal.press("s")
        wait_for_step(terminal, 1)
        assert step_on(terminal.settle(1.0)) == 1
        terminal.press("space")
        wait_for_step(terminal, 6)

        terminal.press("space")
        terminal.wait_for("paused")
        terminal.settle(1.0)
        stood = step_on(terminal.text())
        assert stood is not None
        assert step_on(terminal.settle(1.5)) == stood, "the step count does not stand still"

        # From the middle of a step, `s` completes that one; from then on each is a whole one.
        terminal.press("s")
        wait_for_step(terminal, stood + 1)
        for made in (2, 3):
            terminal.press("s")
            wait_for_step(terminal, stood + made)
        assert step_on(terminal.settle(1.0)) == stood + 3, "three keys, three steps"
        wait_for_phase(terminal, "step")

        terminal.resize(80, 24)
        for phase in PHASES:
            terminal.press("p")
            wait_for_phase(terminal, phase)
        wait_for_step(terminal, stood + 4)
        assert step_on(terminal.settle(0.7)) == stood + 4

        terminal.press("space")
        wait_for_step(terminal, stood + 10)
        assert not paused_after(terminal.text())

        terminal.press("q")
        terminal.wait_for("Leave this run?")
        terminal.press("s")
        assert terminal.wait_for_exit() == 0
        terminal.assert_restored()
        last = terminal.output.decode(errors="replace").splitlines()[-1]
        assert re.search(r"stopped at step [\d,]+, loss [\d.]+ · ", last), last
