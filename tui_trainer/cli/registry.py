"""The tasks that are installed: ours, and any package's that registers one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from tui_trainer.cli import commands
from tui_trainer.cli.errors import CommandError, say, unknown
from tui_trainer.tasks.definition import GROUP, TaskDefinition

OURS = ("gpt", "vit")
RESERVED = ("run", "script", *commands.COMMANDS, *commands.HIDDEN)
"""Names that mean something else: commands, and `script`, the task of a user's own script."""


def _entries() -> dict[str, EntryPoint]:
    found = {each.name: each for each in entry_points(group=GROUP)}
    names = [name for name in OURS if name in found]
    names += sorted(name for name in found if name not in OURS and name not in RESERVED)
    return {name: found[name] for name in names}


def task_names() -> list[str]:
    """Every task that is installed, ours first; nothing of them is imported."""
    return list(_entries())


def load_task(name: str) -> TaskDefinition:
    """The task called `name`. Raises CommandError when it cannot be loaded."""
    entries = _entries()
    if name not in entries:
        raise unknown("task", name, entries)
    entry = entries[name]
    try:
        loaded = entry.load()
    except Exception as fault:
        raise CommandError(
            f"the task {name} cannot be loaded: {type(fault).__name__}: {fault}",
            _installed_by(entry),
        ) from fault
    if not isinstance(loaded, TaskDefinition):
        raise CommandError(
            f"the task {name} is no TaskDefinition but {type(loaded).__name__}",
            _installed_by(entry),
        )
    return loaded


def _installed_by(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist else "an unknown package"
    return f"it is {entry.value} of {package}"


def usable_tasks(names: Sequence[str]) -> list[TaskDefinition]:
    """Those of `names` that can be loaded; of each other one, one line to stderr."""
    tasks = []
    for name in names:
        try:
            tasks.append(load_task(name))
        except CommandError as fault:
            say(fault.message, fault.hint)
    return tasks
