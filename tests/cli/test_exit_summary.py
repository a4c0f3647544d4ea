"""The last line and the exit status, from the session's snapshot and the run's files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tui_trainer.cli.screen import exit_status, exit_summary, final_outcome
from tui_trainer.client.api import Snapshot
from tui_trainer.config.run_spec import RunSpec, RunState
from tui_trainer.protocol.messages import Status

TASK = RunSpec(name="gpt-quiet-otter", directory="/runs/gpt-quiet-otter", task="gpt")
SCRIPT = RunSpec(name="script-tame-ibex", directory="/runs/script-tame-ibex", task="script")


@contextmanager
def process(code: str | None) -> Iterator[subprocess.Popen[bytes]]:
    """A run process that ended with `code`, or (None) one that is alive."""
    sleeping = "import time; time.sleep(60)"
    command = [sys.executable, "-c", sleeping if code is None else code]
    started = subprocess.Popen(command)
    if code is not None:
        started.wait()
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def seen(state: str, step: int = 5, reason: str = "") -> Snapshot:
    return Snapshot(status=Status(state=state, step=step, reason=reason))


def recorded(state: str, step: int, loss: float | None = None) -> RunState:
    return RunState(name="x", state=state, step=step, loss=loss)


@pytest.mark.parametrize(
    ("snapshot", "kept", "code", "line", "statuses"),
    [
        (seen("finished", 3000), None, "", "finished at step 3,000", (0, 0)),
        (
            seen("running", 7),
            recorded("finished", 9, 1.5),
            "",
            "finished at step 9, loss 1.500",
            (0, 0),
        ),
        (seen("stopping", 7), recorded("stopped", 8), "", "stopped at step 8", (0, 0)),
        (
            seen("crashed", 7, "ValueError: the seventh"),
            None,
            "raise SystemExit(1)",
            "crashed at step 7: ValueError: the seventh",
            (1, 1),
        ),
        (
            seen("running", 7),
            recorded("running", 6),
            "import os; os.kill(os.getpid(), 9)",
            "crashed at step 7: its process exited without writing its status (killed by signal 9)",
            (1, 137),
        ),
        (seen("finished", 4), None, "raise SystemExit(3)", "finished at step 4", (3, 3)),
        (
            seen("crashed", 0, "there is no file"),
            None,
            "raise SystemExit(2)",
            "could not start: there is no file",
            (2, 2),
        ),
        (
            seen("starting", 60),
            RunState(name="x", state="crashed", step=60, reason="no such device", refused=True),
            "raise SystemExit(2)",
            "could not start: no such device",
            (2, 2),
        ),
    ],
)
def test_a_run_that_has_ended(
    snapshot: Snapshot, kept: RunState | None, code: str, line: str, statuses: tuple[int, int]
) -> None:
    with process(code) as ended:
        outcome = final_outcome(snapshot, kept, ended)
    assert outcome.ended
    place = "" if outcome.refused else " · /runs/gpt-quiet-otter"
    assert exit_summary(TASK, outcome) == f"gpt-quiet-otter {line}{place}"
    assert (exit_status(TASK, outcome), exit_status(SCRIPT, outcome)) == statuses


@pytest.mark.parametrize(("state", "word"), [("running", "still training"), ("paused", "paused")])
def test_a_run_that_continues(state: str, word: str) -> None:
    with process(None) as living:
        outcome = final_outcome(seen(state, 12), recorded(state, 14, 2.0), living)
        line = exit_summary(TASK, outcome)
        assert f"{word} at step 14, loss 2.000; tui-trainer attach gpt-quiet-otter" in line
    assert not outcome.ended
    assert exit_status(TASK, outcome) == exit_status(SCRIPT, outcome) == 0


def test_a_reason_of_many_lines_stays_one_line() -> None:
    with process("raise SystemExit(1)") as ended:
        outcome = final_outcome(seen("crashed", 1, "one\n  two\n"), None, ended)
    assert "\n" not in exit_summary(TASK, outcome)
