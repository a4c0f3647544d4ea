"""The installed tasks: the shipped ones, and those that other packages register."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from tui_trainer.cli import commands
from tui_trainer.cli.errors import CommandError, notify, unknown
from tui_trainer.protocol.schema import SCRIPT
from tui_trainer.tasks.definition import GROUP, TaskDefinition

SHIPPED = ("gpt", "vit")
RESERVED = ("run", "check", SCRIPT, *commands.COMMANDS, *commands.HIDDEN)
"""Names of commands, and the task of a user's own script."""


def _entries() -> dict[str, EntryPoint]:
    found = {each.name: each for each in entry_points(group=GROUP)}
    names = [name for name in SHIPPED if name in found]
    names += sorted(name for name in found if name not in SHIPPED and name not in RESERVED)
    return {name: found[name] for name in names}


def task_names() -> list[str]:
    """Names of all installed tasks, the shipped ones first, without importing them."""
    return list(_entries())


def load_task(name: str) -> TaskDefinition:
    """Load the task `name`. Raises CommandError."""
    entries = _entries()
    if name not in entries:
        raise unknown("task", name, entries)
    entry = entries[name]
    try:
        loaded = entry.load()
    except Exception as error:
        raise CommandError(
            f"the task {name} cannot be loaded: {type(error).__name__}: {error}",
            _installed_by(entry),
        ) from error
    if not isinstance(loaded, TaskDefinition):
        raise CommandError(
            f"the task {name} is a {type(loaded).__name__}, not a TaskDefinition",
            _installed_by(entry),
        )
    return loaded


def _installed_by(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist else "an unknown package"
    return f"it is {entry.value} of {package}"


def usable_tasks(names: Sequence[str]) -> list[TaskDefinition]:
    """Load the tasks in `names`; those that fail are reported on stderr."""
    tasks = []
    for name in names:
        try:
            tasks.append(load_task(name))
        except CommandError as error:
            notify(error.message, error.hint)
    return tasks
