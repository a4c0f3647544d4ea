"""`pause`, `resume`, `step`, `stop`, `checkpoint` and `set`: control a live run without its screen.

Each command takes control of the run from any other viewer (all viewers see a notice), waits until
it has taken effect, and prints the state of the run on one line, or as one JSON object.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.text import Text

from tui_trainer.cli.commands.common import (
    LiveRunName,
    RunsDir,
    cli_errors,
    flag,
    require_single_run,
    run_and_changes,
)
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.run_summary import finite, nonfinite_text
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.client.connection import RunClient
from tui_trainer.history import History
from tui_trainer.protocol import actions, schema
from tui_trainer.protocol.actions import Action, ChangeSettings, UndoSettings
from tui_trainer.protocol.events import Event, Notice
from tui_trainer.protocol.formatting import counted, number, rough_duration
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.settings import ReadSettings, SettingList, setting_text
from tui_trainer.runs.checkpoints import CHECKPOINT_STATE, checkpoint_path
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry, inspect_run

POLL_EVERY_S = 0.05
MAX_STEPS = 10**12
MAX_DIGITS = 20
ANSWER_BYTES = 256 * 1024
"""Enough per answer to keep up with the events of a fast run."""
NoWait = Annotated[bool, flag("return as soon as the run has accepted the command")]
Json = Annotated[bool, flag("print the resulting state as one JSON object")]

Reached = Callable[[Status, "list[Event]"], bool]
"""Whether the command has taken effect, from the status and the events since."""


def pause(
    run: LiveRunName = None,
    *,
    no_wait: NoWait = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """pause a run at its next phase boundary"""
    return _execute("pause", actions.Pause(), _paused, run, no_wait, json, runs_dir)


def resume(
    run: LiveRunName = None,
    *,
    no_wait: NoWait = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """resume a paused run"""
    return _execute("resume", actions.Resume(), _running, run, no_wait, json, runs_dir)


def step(
    run: Annotated[
        str | None,
        Parameter(
            help="the run (default: the live one, if there is only one) and the number of steps "
            "(default: 1), in any order",
            show_default=False,
        ),
    ] = None,
    count: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *,
    phase: Annotated[bool, flag("only to the end of the next phase, such as backward")] = False,
    no_wait: NoWait = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """make one optimizer step, or N, then pause"""
    name, wanted = _run_and_count([each for each in (run, count) if each is not None])
    if phase and wanted != 1:
        raise UsageError("--phase goes to the end of one phase", "tui-trainer step RUN --phase")
    action = actions.StepPhase() if phase else actions.Step(wanted)
    return _execute("step", action, _paused, name, no_wait, json, runs_dir)


def stop(
    run: LiveRunName = None,
    *,
    checkpoint: Annotated[bool, flag("write a checkpoint first")] = False,
    no_wait: NoWait = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """finish the running step, then end the run"""
    action = actions.Stop(checkpoint=checkpoint)
    return _execute("stop", action, _ended, run, no_wait, json, runs_dir)


def checkpoint(
    run: LiveRunName = None,
    *,
    no_wait: NoWait = False,
    json: Json = False,
    runs_dir: RunsDir = None,
) -> int:
    """write a checkpoint at the next step boundary"""
    return _execute("checkpoint", actions.Checkpoint(), _written, run, no_wait, json, runs_dir)


def _execute(
    name: str,
    action: Action,
    reached: Reached,
    run: str | None,
    no_wait: bool,
    json: bool,
    runs: Path | None,
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
            loss = _loss(client.snapshot.history, status.step)
    if not json:
        print(_sentence(found.name, status, loss, no_wait), flush=True)
    path = None
    if not no_wait:
        notices = [event for event in since if isinstance(event, Notice)]
        about = [event for event in notices if event.kind == "checkpoint"]
        path = _written_checkpoint(action, found, status, about)
    if json:
        print(msgspec.json.encode(_state_object(found, status, loss, path)).decode(), flush=True)
    elif path is not None:
        print(path, flush=True)
    return 0


def _catch_up(client: RunClient) -> None:
    while client.poll(ANSWER_BYTES).more:
        pass


def _wait(client: RunClient, reached: Reached, since: list[Event], run: RunEntry) -> Status:
    """The status once `reached` holds; the events until then are added to `since`."""
    while True:
        try:
            update = client.poll(ANSWER_BYTES)
        except RunError:
            if (ended := _end_on_disk(run)) is not None:
                return ended
            raise
        since += update.events
        if not update.more and (update.status.ended or reached(update.status, since)):
            return update.status
        if not update.more:
            time.sleep(POLL_EVERY_S)


def _end_on_disk(run: RunEntry) -> Status | None:
    """How the run ended, if it exited before it could answer."""
    now = inspect_run(run.directory)
    if now is None or now.live:
        return None
    return Status(
        state=now.end_state, step=now.reported.step, reason=now.note, hint=now.reported.hint
    )


def _paused(status: Status, _: list[Event]) -> bool:
    return status.state == "paused"


def _running(status: Status, events: list[Event]) -> bool:
    """Whether the run is running, or has resumed and already paused at a breakpoint."""
    stopped = any(isinstance(event, Notice) and event.kind == "breakpoint" for event in events)
    return status.state == "running" or (status.state == "paused" and stopped)


def _ended(status: Status, _: list[Event]) -> bool:
    return status.ended


def _written(status: Status, events: list[Event]) -> bool:
    """Whether the checkpoint is written, or cannot be until the run is resumed."""
    reported = any(isinstance(event, Notice) and event.kind == "checkpoint" for event in events)
    return reported or (status.state == "paused" and status.phase != "step")


def _written_checkpoint(
    action: Action, run: RunEntry, status: Status, notices: list[Notice]
) -> Path | None:
    """The directory of the requested checkpoint; None where none was requested. Raises CommandError
    if it was not written."""
    failure = next((each.text for each in reversed(notices) if each.level == "error"), "")
    path = checkpoint_path(run.directory, status.step)
    match action:
        case actions.Stop(checkpoint=True):
            if not (path / CHECKPOINT_STATE).is_file():
                raise CommandError(failure or "the run has ended without writing a checkpoint")
        case actions.Checkpoint():
            if not notices and status.ended:
                raise CommandError(
                    "the run ended before the step was complete: no checkpoint was written"
                )
            if not notices:
                raise CommandError(
                    f"{run.name} has paused after {status.phase}, in the middle of a step",
                    "the checkpoint is written once the step is complete: tui-trainer step",
                )
            if failure:
                raise CommandError(failure)
            path = checkpoint_path(run.directory, notices[-1].step)
        case _:
            return None
    return path


def _loss(history: History, step: int) -> float | None:
    table = history.table(schema.STEP)
    return table.value_at("loss", step) if table is not None else None


def _state_object(
    run: RunEntry, status: Status, loss: float | None, path: Path | None
) -> dict[str, object]:
    """The object for `--json`. Its names are documented in docs/runs.md and do not change."""
    return {
        "run": run.name,
        "directory": str(Path(run.directory)),
        "state": status.state,
        "step": status.step,
        "phase": status.phase,
        "loss": finite(loss),
        "loss_text": nonfinite_text(loss),
        "reason": status.reason,
        "hint": status.hint,
        "checkpoint": None if path is None else str(path),
    }


def _sentence(name: str, status: Status, value: float | None, early: bool) -> str:
    loss = f", loss {number(value, 0)}" if value is not None else ""
    state = "accepted" if early else status.state
    elapsed = f", {rough_duration(status.elapsed_s)}" if status.elapsed_s else ""
    reason = f" ({status.reason})" if status.reason and not early else ""
    inside = status.within_step and not early
    phase = f", after {status.phase} of step {status.step + 1:,}" if inside else ""
    return f"{name} {state} at step {status.step:,}{phase}{loss}{elapsed}{reason}"


def _run_and_count(given: list[str]) -> tuple[str | None, int]:
    """Parse `RUN`, `N`, `RUN N` or `N RUN`."""
    counts = [each for each in given if each.isascii() and each.removeprefix("-").isdigit()]
    names = [each for each in given if each not in counts]
    if len(counts) > 1 or len(names) > 1:
        raise UsageError("step takes one run and one number", "tui-trainer step RUN 10")
    count = int(counts[0][:MAX_DIGITS]) if counts else 1
    if not 1 <= count <= MAX_STEPS:
        raise UsageError(f"step needs a number from 1 to {MAX_STEPS:,}")
    return (names[0] if names else None), count


def set_(
    *given: Annotated[
        str,
        Parameter(
            help="the run (default: the live one, if there is only one) and changes such as "
            "lr=3e-4, lr[1]=1e-3 (one parameter group), weight_decay=0.1, betas=0.9,0.95, clip=0.5 "
            "or off, batch_size=64, seed=7, freeze=blocks.0.*; without a change, the settings are "
            "listed",
            show_default=False,
        ),
    ],
    undo: Annotated[bool, flag("undo the latest change")] = False,
    json: Annotated[bool, flag("print the resulting settings as one JSON object")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """change settings of a live run at its next step boundary, or list them"""
    name, action = _parse(given, undo)
    with cli_errors():
        found = require_single_run(name, runs_dir)
        with RunClient.connect(found, "tui-trainer set", read_only=action is None) as client:
            if action is not None:
                ack = client.command_in_control(action)
                if not ack.ok:
                    raise CommandError(f"{found.name} refuses: {ack.message}", ack.hint)
                if not json:
                    print(f"{found.name}: {ack.message}", flush=True)
                    return 0
            settings = _settings(client, found)
    if json:
        print(msgspec.json.encode(_document(found, settings)).decode(), flush=True)
    else:
        print("\n".join(_listing(settings)), flush=True)
    return 0


def _parse(given: tuple[str, ...], undo: bool) -> tuple[str | None, Action | None]:
    """The run's name and the command. Raises UsageError."""
    run, _, changes = run_and_changes(given)
    if not undo:
        return run, ChangeSettings(changes) if changes else None
    if changes:
        raise UsageError("--undo takes no changes", "tui-trainer set RUN --undo")
    return run, UndoSettings()


def _settings(client: RunClient, run: RunEntry) -> SettingList:
    """Read the present settings. Raises CommandError."""
    answer = client.inspect(ReadSettings())
    if not isinstance(answer.result, SettingList):
        raise CommandError(f"{run.name}: {answer.message}", answer.hint)
    return answer.result


def _document(run: RunEntry, settings: SettingList) -> dict[str, object]:
    return {
        "run": run.name,
        "directory": str(Path(run.directory)),
        "settings": {each.name: each.value for each in settings.settings},
        "frozen_parameters": settings.frozen,
        "edits_to_undo": settings.edits,
        "waiting": list(settings.waiting),
    }


def _listing(settings: SettingList) -> list[str]:
    table = new_table(("setting", "value", ""), right=("value",))
    for each in settings.settings:
        table.add_row(Text(each.name), Text(setting_text(each.value)), Text(each.note))
    lines = [line.plain.rstrip() for line in table_lines(table)]
    if settings.frozen:
        lines.append(f"{counted(settings.frozen, 'parameter')} frozen")
    lines += [f"at the end of this step: {each}; --undo withdraws it" for each in settings.waiting]
    if settings.edits:
        lines.append(f"{counted(settings.edits, 'change')} can be undone: --undo")
    return lines
