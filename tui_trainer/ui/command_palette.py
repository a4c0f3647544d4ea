"""The command palette: every action by name, with what it does.

The bindings of the screen in front are listed automatically; commands without a key are defined
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from textual.command import DiscoveryHit, Hit, Hits, Provider

from tui_trainer.learn.demos import demo_texts
from tui_trainer.learn.page import titles
from tui_trainer.protocol import actions
from tui_trainer.protocol.actions import Action
from tui_trainer.ui.screens import SCREENS, AppContext, app_context

COMMANDS_WITHOUT_KEY: tuple[tuple[str, str, Action], ...] = (
    ("Full speed", "Remove the limit on steps per second", actions.Throttle(None)),
    ("Write a checkpoint", "At the next step boundary; training continues", actions.Checkpoint()),
    ("Take control", "Control the run from this screen; others watch", actions.TakeControl()),
    ("Stop the run", "Finish the current step, then end", actions.Stop()),
    ("Stop with a checkpoint", "Finish the step, write a checkpoint, end", actions.Stop(True)),
)
"""(name, help, action sent to the run)"""

THEME, PAGE, DEMO = "Theme ", "Learn: ", "Demo: "
"""Prefixes of the names of commands that only a search shows."""

PaletteCommand = tuple[str, str, Callable[[], object]]
"""(name, help, callback)"""


class ActionProvider(Provider):
    """Actions of the screen in front, the screens, commands to the run, and themes."""

    @property
    def _context(self) -> AppContext:
        return app_context(self.screen)

    def commands(self) -> Iterator[PaletteCommand]:
        """All commands that are available now."""
        yield from self._bound_actions()
        context = self._context
        for entry in SCREENS:
            if self.app.check_action("go", (entry.mode,)):
                go = partial(context.action_go, entry.mode)
                name = "Learn" if entry.mode == "learn" else f"Show {entry.title.lower()}"
                yield name, f"{entry.tooltip} (key {entry.key})", go
        replayed = context.snapshot.link.state == "replay"
        if context.session is not None and not replayed and not context.snapshot.status.ended:
            for name, help, action in COMMANDS_WITHOUT_KEY:
                yield name, help, partial(context.command, action)
        if context.session is not None and (replayed or context.snapshot.status.ended):
            yield "What next", "Replay, compare, report, or start again", context.leaving.ask_next
        for page, title in titles(context.language).items():
            yield f"{PAGE}{title}", "A page to learn from", partial(context.show_lesson, page)
        for demo, texts in demo_texts(context.language).items():
            start = partial(context.start_demo, demo)
            yield f"{DEMO}{demo}", f"{texts.title}: a guided run", start
        for name in sorted(self.app.available_themes):
            yield f"{THEME}{name}", "Colours of the screen", partial(self._set_theme, name)

    def _bound_actions(self) -> Iterator[PaletteCommand]:
        known: set[str] = set()
        # Bindings of the screen, which control the run, come before those of the focused widget.
        bindings = sorted(
            self.screen.active_bindings.values(), key=lambda active: active.node is not self.screen
        )
        for active in bindings:
            binding = active.binding
            if not active.enabled or binding.action in known or not binding.tooltip:
                continue
            if binding.action.startswith(("go(", "app.go(", "move(", "page(", "edge(")):
                continue
            known.add(binding.action)
            name = (binding.description or binding.tooltip).replace("_", " ")
            key = self.app.get_key_display(binding)
            run = partial(self.app.run_action, binding.action, active.node)
            yield name[:1].upper() + name[1:], f"{binding.tooltip} (key {key})", run

    def _set_theme(self, name: str) -> None:
        self.app.theme = name

    async def discover(self) -> Hits:
        """All commands but themes, pages and demos, shown before anything is typed."""
        for name, help, run in self.commands():
            if not name.startswith((THEME, PAGE, DEMO)):
                yield DiscoveryHit(name, run, help=help)

    async def search(self, query: str) -> Hits:
        """Commands that match by name or, with half the score, by help."""
        matcher = self.matcher(query)
        for name, help, run in self.commands():
            score = max(matcher.match(name), 0.5 * matcher.match(help))
            if score > 0:
                yield Hit(score, matcher.highlight(name), run, help=help)
