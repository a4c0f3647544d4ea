"""All keys of all screens for the help, read from the bindings themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from textual.app import App
from textual.binding import Binding, BindingType

from tui_trainer.ui.screens import dialogs
from tui_trainer.ui.screens.base import CONTROL_BINDINGS
from tui_trainer.ui.screens.breakpoints import BreakpointList
from tui_trainer.ui.screens.registry import SCREENS
from tui_trainer.ui.widgets.form import ChoiceRow
from tui_trainer.ui.widgets.search import SearchInput
from tui_trainer.ui.widgets.table import VirtualTable


@dataclass(frozen=True)
class KeyHelp:
    """One action and the keys that trigger it."""

    keys: tuple[str, ...]
    """As displayed, such as `shift+f3`."""
    name: str
    help: str
    action: str


@dataclass(frozen=True)
class KeyGroup:
    """The keys of one screen or purpose."""

    title: str
    keys: tuple[KeyHelp, ...]


def key_groups(app: App[Any]) -> tuple[KeyGroup, ...]:
    """The keys of the app, of each screen, and of tables, forms and dialogs."""
    app_bindings = list(Binding.make_bindings(type(app).BINDINGS))
    replay = [binding for binding in app_bindings if (binding.id or "").startswith("replay.")]
    everywhere = [binding for binding in app_bindings if binding not in replay]
    groups = [
        KeyGroup("Controlling the run", _keys(app, CONTROL_BINDINGS)),
        KeyGroup("Everywhere", _keys(app, [*everywhere, _palette_binding(app)])),
    ]
    if replay:
        groups.insert(1, KeyGroup("Looking back", _keys(app, replay)))
    controls = {binding.id for binding in CONTROL_BINDINGS}
    for entry in SCREENS:
        bindings = Binding.make_bindings(entry.load().BINDINGS)
        own = [binding for binding in bindings if binding.id not in controls]
        if own:
            groups.append(KeyGroup(entry.title, _keys(app, own)))
    for title, screen in getattr(app, "OWN_SCREENS", ()):
        groups.insert(1, KeyGroup(title, _keys(app, screen.BINDINGS)))
    groups.append(KeyGroup("In tables", _keys(app, VirtualTable.BINDINGS)))
    forms = [*ChoiceRow.BINDINGS, *SearchInput.BINDINGS]
    groups.append(KeyGroup("In forms and prompts", _keys(app, forms)))
    groups.append(KeyGroup("In the list of breakpoints", _keys(app, BreakpointList.BINDINGS)))
    in_dialogs = [*dialogs.NumberPrompt.BINDINGS, *dialogs.QuitDialog.BINDINGS]
    groups.append(KeyGroup("In dialogs", _keys(app, in_dialogs)))
    return tuple(groups)


def _palette_binding(app: App[Any]) -> Binding:
    """Textual's own binding has no tooltip."""
    return Binding(
        app.COMMAND_PALETTE_BINDING,
        "command_palette",
        "Palette",
        id="palette",
        tooltip="Every action by name",
    )


def _keys(app: App[Any], bindings: Iterable[BindingType]) -> tuple[KeyHelp, ...]:
    """One entry for each action, with all of its keys."""
    found: dict[tuple[str, str], KeyHelp] = {}
    for binding in Binding.make_bindings(bindings):
        identity = (binding.id or binding.action, binding.action)
        display = app.get_key_display(binding)
        known = found.get(identity)
        if known is not None:
            keys = known.keys if display in known.keys else (*known.keys, display)
            found[identity] = KeyHelp(keys, known.name, known.help, known.action)
        else:
            text = binding.tooltip or binding.description
            found[identity] = KeyHelp((display,), binding.description, text, binding.action)
    return tuple(found.values())
