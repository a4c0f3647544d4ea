"""The command palette: every action by name, with what it does.

Made from the bindings of the screen in front, so an action that has a key is here by itself; the
few that have none are listed below. The app names it in `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider

from tui_trainer.protocol import messages
from tui_trainer.ui.screens.registry import PLACES

if TYPE_CHECKING:
    from tui_trainer.ui.app import TuiTrainerApp

KEYLESS: tuple[tuple[str, str, messages.Action], ...] = (
    ("Full speed", "Lift the limit on steps a second", messages.Throttle(None)),
    ("Write a checkpoint", "At the next step boundary; training goes on", messages.Checkpoint()),
    ("Take control", "Become the viewer that may command; others watch", messages.TakeControl()),
    ("Stop the run", "Finish the running step, then end", messages.Stop()),
    ("Stop with a checkpoint", "Finish the step, write a checkpoint, end", messages.Stop(True)),
)
"""Commands to the run that have no key of their own: name, help, action."""

Command = tuple[str, str, Callable[[], object]]


class ActionProvider(Provider):
    """Actions of the screen in front, the screens, commands to the run, and themes."""

    @property
    def _app(self) -> TuiTrainerApp:
        return cast("TuiTrainerApp", self.app)

    def commands(self) -> Iterator[Command]:
        """(name, help, what it calls) of everything that can be done now."""
        yield from self._bound()
        for place in PLACES:
            if self._app.check_action("go", (place.mode,)):
                go = partial(self._app.action_go, place.mode)
                yield f"Show {place.title.lower()}", f"{place.tooltip} (key {place.key})", go
        replayed = self._app.snapshot.link.state == "replay"
        if self._app.session is not None and not replayed and not self._app.snapshot.status.ended:
            for name, help, action in KEYLESS:
                yield name, help, partial(self._app.command, action)
        for name in sorted(self._app.available_themes):
            yield f"Theme {name}", "Colours of the screen", partial(self._set_theme, name)

    def _bound(self) -> Iterator[Command]:
        """What has a binding on the screen in front, unless it cannot be done now."""
        known: set[str] = set()
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if not active.enabled or binding.action in known or not binding.tooltip:
                continue
            if binding.action.startswith(("go(", "app.go(")):
                continue
            known.add(binding.action)
            name = (binding.description or binding.tooltip).replace("_", " ")
            key = self.app.get_key_display(binding)
            run = partial(self.app.run_action, binding.action, active.node)
            yield name[:1].upper() + name[1:], f"{binding.tooltip} (key {key})", run

    def _set_theme(self, name: str) -> None:
        self.app.theme = name

    async def discover(self) -> Hits:
        """Everything, before anything is typed; themes only when asked for."""
        for name, help, run in self.commands():
            if not name.startswith("Theme "):
                yield DiscoveryHit(name, run, help=help)

    async def search(self, query: str) -> Hits:
        """What matches, by name or by what it does."""
        matcher = self.matcher(query)
        for name, help, run in self.commands():
            score = max(matcher.match(name), 0.5 * matcher.match(help))
            if score > 0:
                yield Hit(score, matcher.highlight(name), run, help=help)
