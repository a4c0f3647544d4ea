"""Which pages of `tui-trainer learn` are about what is on a screen."""

from __future__ import annotations

from typing import Any

from textual.screen import Screen

from tui_trainer.learn.catalog import PAGE_OF_PHASE, PAGES
from tui_trainer.protocol.messages import Status
from tui_trainer.ui.widgets.lines import LineView

OF_SCREEN: dict[str, tuple[str, ...]] = {
    "dashboard": ("loss-graph",),
    "attention": ("param-groups",),
    "parameters": ("param-groups", "accumulation"),
    "samples": ("loss-graph",),
    "log": ("loss-graph",),
    "help": ("loss-graph",),
    "findings": ("accumulation",),
    "ranks": ("accumulation",),
    "inspect": ("param-groups",),
    "start": ("loss-graph",),
    "learn": ("loss-graph",),
}
"""Pages by the mode of a screen; the panels name theirs themselves."""


def lessons_for(screen: Screen[Any], status: Status) -> tuple[str, ...]:
    """The pages about a screen, the nearest first: of the phase that a run is paused in, of the
    panel that has the focus, of the other panels in view, of the screen as a whole."""
    names: list[str] = []
    if status.state == "paused" and status.phase in PAGE_OF_PHASE:
        names.append(PAGE_OF_PHASE[status.phase])
    if screen.focused is not None:
        for node in screen.focused.ancestors_with_self:
            names += getattr(node, "lessons", ())
    for view in screen.query(LineView):
        if view.is_on_screen and view.display:
            names += view.lessons
    names += OF_SCREEN.get(screen.app.current_mode, ())
    return tuple(name for name in dict.fromkeys(names) if name in PAGES)
