"""`branch`: a new run that continues from the current step of a live one, with other settings."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators

from tui_trainer.cli.commands.common import (
    RunsDir,
    cli_errors,
    flag,
    require_single_run,
    run_and_changes,
)
from tui_trainer.cli.errors import CommandError
from tui_trainer.client.connection import RunClient
from tui_trainer.config.run_spec import read_spec
from tui_trainer.protocol.actions import Back, Branch
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.messages import Ack
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.runs.liveness import RunEntry

POLL_EVERY_S = 0.05


def branch(
    *given: Annotated[
        str,
        Parameter(
            help="the run (default: the live one, if there is only one) and changes for the new "
            "one, as for `set`: lr=3e-4 clip=0.5",
            show_default=False,
        ),
    ],
    to: Annotated[
        int | None,
        Parameter(
            help="go back to this step first, as `back` does",
            metavar="STEP",
            negative=(),
            show_default=False,
            validator=validators.Number(gte=1, lt=2**63),
        ),
    ] = None,
    name: Annotated[
        str | None,
        Parameter(
            help="name of the new run (default: the name of the run and a number)",
            metavar="NAME",
            negative=(),
            show_default=False,
        ),
    ] = None,
    paused: Annotated[bool, flag("pause the new run before its first step")] = False,
    json: Annotated[bool, flag("print the new run as one JSON object")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """start a new run from the current step of a live one, with other settings"""
    run, changes, parsed = run_and_changes(given)
    with cli_errors():
        found = require_single_run(run, runs_dir)
        step, new = _start(found, to, Branch(parsed, name or "", paused))
    if json:
        document = {"run": new, "parent": found.name, "branch_step": step, "changes": changes}
        print(msgspec.json.encode(document).decode(), flush=True)
    else:
        with_changes = f" with {' '.join(changes)}" if changes else ""
        print(f"{new} continues from step {step:,} of {found.name}{with_changes}", flush=True)
        print(f"tui-trainer compare {found.name} {new} overlays them", flush=True)
    return 0


def _start(run: RunEntry, to: int | None, asked: Branch) -> tuple[int, str]:
    """The step that the new run continues from, and its name. Raises CommandError."""
    with RunClient.connect(run, "tui-trainer branch", read_only=False) as client:
        while client.poll().more:
            pass
        if to is not None:  # checked first: no change may be refused once the run is rewound
            check = msgspec.structs.replace(asked, only_check=True)
            _accepted(run, client.command_in_control(check))
            _accepted(run, client.command_in_control(Back(to, confirmed=True)))
            info = client.snapshot.info
            if info is None or info.task != SCRIPT:
                _wait_until_at(client, to)
            else:  # its step numbers are not reset: the branch begins right after going back
                asked = msgspec.structs.replace(asked, back_to=to)
        begun = _accepted(run, client.command_in_control(asked))
        name = begun.message.split()[1]
        while True:
            update = client.poll()
            for event in update.events:
                if isinstance(event, Notice) and event.kind == "branch":
                    if event.level == "error":
                        raise CommandError(event.text)
                    return _branch_step(run, name, event.step), name
            if update.status.ended:
                raise CommandError(f"{run.name} has ended")
            time.sleep(POLL_EVERY_S)


def _branch_step(run: RunEntry, name: str, at: int) -> int:
    """The step that the branch continues from; `at` where that cannot be read."""
    try:
        return read_spec(run.directory.with_name(name)).branch_step or 0
    except (OSError, ValueError):
        return at


def _accepted(run: RunEntry, ack: Ack) -> Ack:
    if not ack.ok:
        raise CommandError(f"{run.name} refuses: {ack.message}", ack.hint)
    return ack


def _wait_until_at(client: RunClient, step: int) -> None:
    while True:
        update = client.poll()
        status = update.status
        if status.ended or (status.state == "paused" and status.step == step):
            return
        for event in update.events:
            text = getattr(event, "text", "")
            if text.startswith("the run stays where it is"):
                raise CommandError(text)
        time.sleep(POLL_EVERY_S)
