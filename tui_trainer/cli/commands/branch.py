"""`branch`: a new run that goes on from where a live one is, with other settings."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators

from tui_trainer.cli.commands.common import RunsDir, cli_errors, flag, require_single_run
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.client.connection import RunClient
from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.live_settings import parse_changes
from tui_trainer.config.run_spec import read_spec, runs_directory
from tui_trainer.protocol.actions import Action, Back, Checkpoint
from tui_trainer.protocol.events import Notice
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.runs.checkpoints import checkpoint_steps
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
            help="name of the new run (default: that of the run and a number)",
            metavar="NAME",
            negative=(),
            show_default=False,
        ),
    ] = None,
    paused: Annotated[bool, flag("pause the new run before its first step")] = False,
    json: Annotated[bool, flag("print the new run as one JSON object")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """start a new run from where a live one is, with other settings"""
    changes = [each for each in given if "=" in each]
    names = [each for each in given if "=" not in each]
    if len(names) > 1:
        raise UsageError(f"{names[1]!r} is no change of a setting", "for example lr=3e-4")
    try:
        if changes:
            parse_changes(changes)
    except ConfigurationError as error:
        raise UsageError(error.message, error.hint) from error
    with cli_errors():
        found = require_single_run(names[0] if names else None, runs_dir)
        spec = read_spec(found.directory)
        if spec.is_script or spec.task == SCRIPT:
            raise CommandError(
                f"{found.name} trains a script, which resumes by its own means",
                "tui-trainer back RUN --to STEP goes on from an earlier state in the same run",
            )
        step = _saved(found, to)
    new = name or _free_name(found, runs_dir)
    command = [sys.executable, "-m", "tui_trainer", spec.task, "--detach", "--name", new]
    command += ["--resume", f"{found.directory}@{step}"]
    command += ["--paused"] * paused
    command += ["--runs-dir", str(runs_dir)] if runs_dir is not None else []
    command += ["--snapshots", str(spec.snapshots)] if spec.snapshots else []
    command += [part for change in changes for part in ("--set", change)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it could not be started"]
        raise CommandError(lines[0].removeprefix("tui-trainer: "))
    if json:
        document = {"run": new, "parent": found.name, "branch_step": step, "changes": changes}
        print(msgspec.json.encode(document).decode(), flush=True)
    else:
        with_changes = f" with {' '.join(changes)}" if changes else ""
        print(f"{new} goes on from step {step:,} of {found.name}{with_changes}", flush=True)
        print(f"tui-trainer compare {found.name} {new} overlays them", flush=True)
    return 0


def _saved(run: RunEntry, to: int | None) -> int:
    """The step of a checkpoint of where the run is, or of step `to`. Raises CommandError."""
    with RunClient.connect(run, "tui-trainer branch", read_only=False) as client:
        while client.poll().more:
            pass
        actions: list[Action] = [*([Back(to)] if to is not None else []), Checkpoint()]
        for action in actions:
            ack = client.command_in_control(action)
            if not ack.ok:
                raise CommandError(f"{run.name} refuses: {ack.message}", ack.hint)
            if isinstance(action, Back):
                _wait_until_at(client, to)
        while True:
            update = client.poll()
            for event in update.events:
                if isinstance(event, Notice) and event.kind == "checkpoint":
                    if event.level == "error" or event.step not in checkpoint_steps(run.directory):
                        raise CommandError(event.text)
                    return event.step
            if update.status.ended:
                raise CommandError(f"{run.name} has ended")
            time.sleep(POLL_EVERY_S)


def _wait_until_at(client: RunClient, step: int | None) -> None:
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


def _free_name(run: RunEntry, runs_dir: object) -> str:
    folder = run.directory.parent if runs_dir is None else runs_directory(str(runs_dir))
    number = 2
    while (folder / f"{run.name}-{number}").exists():
        number += 1
    return f"{run.name}-{number}"
