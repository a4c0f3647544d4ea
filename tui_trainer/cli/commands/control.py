"""`pause`, `resume`, `step`, `stop` and `checkpoint`: for scripts, and for hands without a screen.

Each takes control of the run if another viewer holds it (all viewers are told), waits until what
was asked for has come about, and says in one line how the run is then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tui_trainer.cli.commands.common import (
    LiveRunName,
    RunsDir,
    cli_errors,
    flag,
    require_single_run,
)
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.client.connection import RunClient
from tui_trainer.history import History
from tui_trainer.protocol import messages, schema
from tui_trainer.protocol.formatting import number, rough_duration
from tui_trainer.protocol.messages import Action, Event, Notice, Status
from tui_trainer.runs.checkpoints import CHECKPOINTS, WHOLE
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run

LOOK_EVERY_S = 0.05
MOST_STEPS, DIGITS = 10**12, 20
"""As many steps as a run takes; digits that are read of a number that may be far longer."""
BYTES = 256 * 1024
"""Wanted with each answer: enough to keep up with what a fast run tells."""
NoWait = Annotated[bool, flag("return as soon as the run has accepted it")]

Reached = Callable[[Status, "list[Event]"], bool]
"""Whether what was asked for has come about, from the status and the events since."""


def pause(run: LiveRunName = None, *, no_wait: NoWait = False, runs_dir: RunsDir = None) -> int:
    """stop a run at its next phase boundary; resume goes on"""
    return _do("pause", messages.Pause(), _paused, run, no_wait, runs_dir)


def resume(run: LiveRunName = None, *, no_wait: NoWait = False, runs_dir: RunsDir = None) -> int:
    """let a paused run go on"""
    return _do("resume", messages.Resume(), _running, run, no_wait, runs_dir)


def step(
    run: Annotated[
        str | None,
        Parameter(
            help="the run (default: the live one, where there is one alone), and how many steps "
            "(default: 1): in any order",
            show_default=False,
        ),
    ] = None,
    count: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *,
    no_wait: NoWait = False,
    runs_dir: RunsDir = None,
) -> int:
    """make one optimizer step, or so many, then pause"""
    name, wanted = _run_and_count([each for each in (run, count) if each is not None])
    return _do("step", messages.Step(wanted), _paused, name, no_wait, runs_dir)


def stop(
    run: LiveRunName = None,
    *,
    checkpoint: Annotated[bool, flag("write a checkpoint first")] = False,
    no_wait: NoWait = False,
    runs_dir: RunsDir = None,
) -> int:
    """finish the running step, then end the run"""
    action = messages.Stop(checkpoint=checkpoint)
    return _do("stop", action, _ended, run, no_wait, runs_dir)


def checkpoint(
    run: LiveRunName = None, *, no_wait: NoWait = False, runs_dir: RunsDir = None
) -> int:
    """write a checkpoint at the next step boundary and go on"""
    return _do("checkpoint", messages.Checkpoint(), _written, run, no_wait, runs_dir)


# ---------------------------------------------------------------- doing


def _do(
    name: str, action: Action, reached: Reached, run: str | None, no_wait: bool, runs: Path | None
) -> int:
    with cli_errors():
        found = require_single_run(run, runs)
        with RunClient.connect(found, f"tui-trainer {name}", read_only=False) as client:
            _catch_up(client)
            ack = client.command_in_control(action)
            if not ack.ok:
                raise CommandError(f"{found.name} refuses: {ack.message}", ack.hint)
            since: list[Event] = []
            status = ack.status if no_wait else _wait(client, reached, since, found)
            print(_sentence(found.name, status, client.snapshot.history, no_wait), flush=True)
    if not no_wait:
        notices = [event for event in since if isinstance(event, Notice)]
        _check_checkpoint(action, found, status, [e for e in notices if e.kind == "checkpoint"])
    return 0


def _catch_up(client: RunClient) -> None:
    while client.poll(BYTES).more:
        pass


def _wait(client: RunClient, reached: Reached, since: list[Event], run: RunEntry) -> Status:
    """The status once `reached` holds; the events until then are added to `since`."""
    while True:
        try:
            update = client.poll(BYTES)
        except RunError:
            if (ended := _end_on_disk(run)) is not None:
                return ended
            raise
        since += update.events
        if not update.more and (update.status.ended or reached(update.status, since)):
            return update.status
        if not update.more:
            time.sleep(LOOK_EVERY_S)


def _end_on_disk(run: RunEntry) -> Status | None:
    """How the run ended, where it left before it could tell us."""
    now = inspect_run(run.directory)
    if now is None or now.live:
        return None
    return Status(
        state=now.end_state, step=now.reported.step, reason=now.note, hint=now.reported.hint
    )


def _paused(status: Status, _: list[Event]) -> bool:
    return status.state == "paused"


def _running(status: Status, _: list[Event]) -> bool:
    return status.state == "running"


def _ended(status: Status, _: list[Event]) -> bool:
    return status.ended


def _written(status: Status, events: list[Event]) -> bool:
    """Whether it is written, or cannot be for as long as nobody lets the run go on."""
    told = any(isinstance(event, Notice) and event.kind == "checkpoint" for event in events)
    return told or (status.state == "paused" and status.phase != "step")


def _check_checkpoint(action: Action, run: RunEntry, status: Status, told: list[Notice]) -> None:
    """Whether the checkpoint that was asked for is there, and where. Raises CommandError."""
    failure = next((each.text for each in reversed(told) if each.level == "error"), "")
    place = run.directory / CHECKPOINTS / f"step-{status.step:08}"
    match action:
        case messages.Stop(checkpoint=True):
            if not (place / WHOLE).is_file():
                raise CommandError(failure or "it has ended, and no checkpoint was written")
        case messages.Checkpoint():
            if not told and status.ended:
                raise CommandError("the run ended before its step did: no checkpoint was written")
            if not told:
                raise CommandError(
                    f"{run.name} has paused after {status.phase}, in the middle of a step",
                    "the checkpoint is written as soon as the step is made: tui-trainer step",
                )
            if failure:
                raise CommandError(failure)
            place = run.directory / CHECKPOINTS / f"step-{told[-1].step:08}"
        case _:
            return
    print(place, flush=True)


def _sentence(name: str, status: Status, history: History, early: bool) -> str:
    table = history.table(schema.STEP)
    latest = table.latest() if table is not None else None
    loss = f", loss {number(float(latest[1][0]), 0)}" if latest is not None else ""
    state = "accepted" if early else status.state
    elapsed = f", {rough_duration(status.elapsed_s)}" if status.elapsed_s else ""
    reason = f" ({status.reason})" if status.reason and not early else ""
    return f"{name} {state} at step {status.step:,}{loss}{elapsed}{reason}"


def _run_and_count(given: list[str]) -> tuple[str | None, int]:
    """From `RUN`, `N`, `RUN N` or `N RUN`."""
    counts = [each for each in given if each.isascii() and each.removeprefix("-").isdigit()]
    names = [each for each in given if each not in counts]
    if len(counts) > 1 or len(names) > 1:
        raise UsageError("step takes one run and one number", "tui-trainer step RUN 10")
    count = int(counts[0][:DIGITS]) if counts else 1
    if not 1 <= count <= MOST_STEPS:
        raise UsageError(f"step needs a number from 1 to {MOST_STEPS:,}")
    return (names[0] if names else None), count
