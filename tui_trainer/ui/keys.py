"""Every key of every screen, read from the bindings themselves, so that no list goes stale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from textual.app import App
from textual.binding import Binding, BindingType

from tui_trainer.ui.controls import CONTROL_BINDINGS
from tui_trainer.ui.screens import dialogs
from tui_trainer.ui.screens.registry import PLACES
from tui_trainer.ui.widgets.form import Choice, FoldRow, PromptLine
from tui_trainer.ui.widgets.table import VirtualTable


@dataclass(frozen=True)
class Key:
    """One action and the keys that do it."""

    keys: tuple[str, ...]
    """As they are written for people."""
    name: str
    help: str
    action: str


@dataclass(frozen=True)
class Group:
    """The keys of one place."""

    title: str
    keys: tuple[Key, ...]


def key_groups(app: App[Any]) -> tuple[Group, ...]:
    """Everything that has a binding: the app, the run, each screen, tables, forms, dialogs."""
    steering = {binding.id for binding in CONTROL_BINDINGS}
    bound = list(Binding.make_bindings(type(app).BINDINGS))
    through_time = [binding for binding in bound if (binding.id or "").startswith("replay.")]
    everywhere = [binding for binding in bound if binding not in through_time]
    groups = [
        Group("Steering the run", _keys(app, CONTROL_BINDINGS)),
        Group("Everywhere", _keys(app, [*everywhere, *_textual(app)])),
    ]
    if through_time:
        groups.insert(1, Group("Looking back", _keys(app, through_time)))
    for place in PLACES:
        module, _, name = place.where.partition(":")
        screen = getattr(import_module(f"tui_trainer.ui.screens.{module}"), name)
        own = [b for b in Binding.make_bindings(screen.BINDINGS) if b.id not in steering]
        if own:
            groups.append(Group(place.title, _keys(app, own)))
    for title, screen in getattr(app, "OWN_SCREENS", ()):
        groups.insert(1, Group(title, _keys(app, screen.BINDINGS)))
    groups.append(Group("In tables", _keys(app, VirtualTable.BINDINGS)))
    forms = [*Choice.BINDINGS, *FoldRow.BINDINGS, *PromptLine.BINDINGS]
    groups.append(Group("In forms and prompts", _keys(app, forms)))
    asked = [*dialogs.NumberPrompt.BINDINGS, *dialogs.QuitDialog.BINDINGS]
    groups.append(Group("When something is asked", _keys(app, asked)))
    return tuple(groups)


def _textual(app: App[Any]) -> list[BindingType]:
    """What Textual itself binds and is of use here: the command palette."""
    return [
        Binding(
            app.COMMAND_PALETTE_BINDING,
            "command_palette",
            "Palette",
            id="palette",
            tooltip="Every action by name",
        )
    ]


def _keys(app: App[Any], bindings: Iterable[BindingType]) -> tuple[Key, ...]:
    """One entry an action; several keys of the same binding are joined."""
    found: dict[tuple[str, str], Key] = {}
    for binding in Binding.make_bindings(bindings):
        which = (binding.id or binding.action, binding.action)
        display = app.get_key_display(binding)
        known = found.get(which)
        if known is not None:
            keys = known.keys if display in known.keys else (*known.keys, display)
            found[which] = Key(keys, known.name, known.help, known.action)
        else:
            text = binding.tooltip or binding.description
            found[which] = Key((display,), binding.description, text, binding.action)
    return tuple(found.values())
