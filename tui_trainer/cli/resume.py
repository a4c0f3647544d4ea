"""`--resume RUN`: the options of a run that continues from a checkpoint of another one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tui_trainer.cli.commands.common import cli_errors
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.options import RunOptions
from tui_trainer.config.training import from_flat, to_flat
from tui_trainer.protocol.schema import Scalar
from tui_trainer.runs.checkpoints import Branch, find_branch
from tui_trainer.tasks.definition import TaskDefinition

_LENGTH = ("steps", "epochs")


def resumed(
    task: TaskDefinition,
    preset: str | None,
    overrides: Mapping[str, Scalar],
    options: RunOptions,
) -> tuple[dict[str, Scalar], Branch]:
    """The parent's configuration with `overrides` applied, and the checkpoint to start from.

    Raises CommandError and ConfigurationError.
    """
    with cli_errors():
        branch = find_branch(options.resume or "", options.runs_dir)
    parent = branch.spec
    if parent.task != task.name:
        raise UsageError(
            f"{branch.run.name} trained {parent.task}, not {task.name}",
            f"tui-trainer {parent.task} --resume {branch.run.name}",
        )
    if preset is not None:
        raise UsageError(
            "--preset cannot be given with --resume",
            f"the options are those of {branch.run.name}; override single ones instead",
        )
    values: dict[str, Scalar] = dict(parent.configuration)
    if any(overrides.get(name) is not None for name in _LENGTH):
        values.update(dict.fromkeys(_LENGTH))
    values["data"] = _resolve_data(parent.working_directory, values.get("data"))
    configuration = to_flat(from_flat(task.config, {**values, **overrides}))
    total = configuration.get("steps")
    if isinstance(total, int) and total <= branch.step:
        raise CommandError(
            f"{branch.run.name} has already made all of its {branch.step:,} steps",
            f"--steps {branch.step * 2} continues it",
        )
    _print_start(branch)
    _print_schedule_note(parent.configuration, configuration)
    return configuration, branch


def _print_start(branch: Branch) -> None:
    reached = branch.run.reported.step
    beyond = f", which reached step {reached:,}" if reached > branch.step else ""
    print(f"continuing from step {branch.step:,} of {branch.run.name}{beyond}", file=sys.stderr)


def _print_schedule_note(before: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> None:
    """A learning rate that decays towards the end depends on where the end is."""
    schedule = now.get("schedule")
    moved = any(before.get(name) != now.get(name) for name in _LENGTH)
    if moved and schedule != "constant":
        print(
            f"note: the {schedule} schedule ends at another step than before, so its learning "
            "rates differ from those of a run of this length",
            file=sys.stderr,
        )


def _resolve_data(directory: str, data: Scalar) -> Scalar:
    """The parent's `--data`, relative to where the parent was started."""
    if isinstance(data, str) and directory and not os.path.isabs(data):
        there = Path(directory) / Path(data).expanduser()
        return str(there) if there.exists() else data
    return data
