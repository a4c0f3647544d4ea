"""What the commands do: make the run, then show it in the way that this terminal allows."""

from __future__ import annotations

from tui_trainer.cli.directory import prepare
from tui_trainer.cli.options import RunOptions, StartOptions
from tui_trainer.cli.script import Script
from tui_trainer.cli.showing import Showing, showing_for
from tui_trainer.config.resolve import resolve, to_flat
from tui_trainer.protocol.describe import Scalar
from tui_trainer.tasks.definition import TaskDefinition


def start_task(
    task: TaskDefinition, preset: str | None, overrides: dict[str, Scalar], options: RunOptions
) -> int:
    """Train a task; returns the exit status. Raises ConfigurationError and CommandError."""
    configuration = resolve(task, preset, overrides)
    return 0


def start_script(script: Script, options: RunOptions) -> int:
    return 0


def start_screen(options: StartOptions) -> int:
    return 0
