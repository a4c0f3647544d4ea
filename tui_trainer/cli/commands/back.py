"""`back`: take a live run back to an earlier step."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators

from tui_trainer.cli.commands.common import (
    LiveRunName,
    RunsDir,
    cli_errors,
    flag,
    require_single_run,
)
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.client.connection import RunClient
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import parse_size
from tui_trainer.protocol.actions import Action, Back, KeepSnapshots
from tui_trainer.protocol.formatting import number
from tui_trainer.protocol.messages import Status
from tui_trainer.protocol.schema import SCRIPT, STEP

POLL_EVERY_S = 0.05


def back(
    run: LiveRunName = None,
    *,
    to: Annotated[
        int | None,
        Parameter(
            help="the step at whose end the run pauses (default: one step back)",
            metavar="STEP",
            negative=(),
            show_default=False,
            validator=validators.Number(gte=0, lt=2**63),
        ),
    ] = None,
    keep: Annotated[
        str | None,
        Parameter(
            help="keep snapshots to go back to from here on, in up to this much memory, such as "
            "1GB; 0: none",
            metavar="SIZE",
            negative=(),
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, flag("go back even if repeating the steps takes long")] = False,
    json: Annotated[bool, flag("print the resulting state as one JSON object")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """take a live run back to an earlier step, and pause it there"""
    if keep is not None and to is not None:
        raise UsageError("--keep and --to cannot be used together", "give one of them")
    with cli_errors():
        found = require_single_run(run, runs_dir)
        with RunClient.connect(found, "tui-trainer back", read_only=False) as client:
            status = _caught_up(client)
            action: Action = KeepSnapshots(_size(keep)) if keep is not None else Back(to, yes)
            info = client.snapshot.info
            is_task = info is not None and info.task != SCRIPT
            if isinstance(action, Back) and to is None and is_task:
                action = Back(max(-1, _one_back(status)), yes)
            ack = client.command_in_control(action)
            if not ack.ok:
                raise CommandError(f"{found.name} refuses: {ack.message}", ack.hint)
            if isinstance(action, Back) and action.step is not None and is_task:
                status = _wait(client, action.step)
            else:
                status = client.poll(0).status
            table = client.snapshot.history.table(STEP)
            loss = table.value_at("loss", status.step) if table is not None else None
    if json:
        document = {"run": found.name, "step": status.step, "state": status.state, "loss": loss}
        print(msgspec.json.encode({**document, "message": ack.message}).decode(), flush=True)
    else:
        print(f"{found.name}: {ack.message}", flush=True)
        shown = f", loss {number(loss, 0)}" if loss is not None else ""
        print(f"{found.name} {status.state} at step {status.step:,}{shown}", flush=True)
    return 0


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigurationError as error:
        raise UsageError(f"--keep: {error.message}", error.hint) from error


def _one_back(status: Status) -> int:
    """The default target: the previous step, or within a step the end of the last one."""
    return status.step if status.within_step else status.step - 1


def _caught_up(client: RunClient) -> Status:
    while (update := client.poll()).more:
        pass
    return update.status


def _wait(client: RunClient, step: int) -> Status:
    """Wait until the run is paused at `step`. Raises CommandError if it does not go back."""
    while True:
        update = client.poll()
        status = update.status
        arrived = status.state == "paused" and status.step == step and not status.waiting_for
        if not update.more and (status.ended or arrived):
            return status
        for event in update.events:
            text = getattr(event, "text", "")
            if text.startswith("the run stays where it is"):
                raise CommandError(text)
        time.sleep(POLL_EVERY_S)
