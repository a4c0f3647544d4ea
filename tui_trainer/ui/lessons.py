"""The pages of `tui-trainer learn` that explain what a screen shows."""

from __future__ import annotations

from typing import Any

from textual.screen import Screen

from tui_trainer.learn.catalog import PAGE_OF_PHASE
from tui_trainer.protocol.messages import Status
from tui_trainer.ui.widgets.lines import LineView

OF_SCREEN: dict[str, tuple[str, ...]] = {
    "dashboard": ("forward-backward", "updates"),
    "attention": ("qkv", "attention-scores", "residual-stream"),
    "parameters": ("gradient", "param-groups"),
    "samples": ("vit-arithmetic",),
    "log": ("loss-graph",),
    "findings": ("accumulation", "loss-graph", "clipping"),
    "ranks": ("device",),
    "inspect": ("scalar-tensor", "updates", "param-groups"),
    "autograd": ("loss-graph", "forward-backward", "gradient"),
    "attention_layer": ("attention-scores", "residual-stream", "qkv"),
    "parameter_groups": ("param-groups", "updates", "device"),
    "start": ("vit-arithmetic", "device"),
    "graph": ("scalar-tensor", "gradient", "forward-backward"),
    "compare": ("forward-backward", "updates"),
}
"""Pages by the mode of a screen. Widgets name their own pages in `LineView.lessons`."""
OF_ANY_SCREEN = ("forward-backward",)


def lessons_for(screen: Screen[Any], status: Status) -> tuple[str, ...]:
    """The pages about a screen, the nearest first: of the phase that a run is paused in, of the
    panel that has the focus, of the other panels in view, of the screen as a whole."""
    if screen.app.current_mode == "learn":
        return ()
    names: list[str] = []
    if status.state == "paused" and status.phase in PAGE_OF_PHASE:
        names.append(PAGE_OF_PHASE[status.phase])
    focused = screen.focused
    if focused is not None and focused.is_on_screen:
        for node in focused.ancestors_with_self:
            names += getattr(node, "lessons", ())
    for view in screen.query(LineView):
        if view.is_on_screen and view.display:
            names += view.lessons
    names += OF_SCREEN.get(screen.app.current_mode, OF_ANY_SCREEN)
    return tuple(dict.fromkeys(names))
