"""What a screen may ask of the app that shows it.

Screens depend on this protocol, not on the app's module, so imports point one way: the app imports
screens, screens import panels, panels import widgets. What widgets may ask is `DrawingContext`.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from textual.dom import DOMNode
from textual.screen import Screen

from tui_trainer.client.api import OnLaunch, Session, Snapshot
from tui_trainer.protocol.messages import Action
from tui_trainer.ui.widgets.lines import DrawingContext


class AppContext(DrawingContext, Protocol):
    """The app, as far as its screens know it."""

    session: Session | None
    snapshot: Snapshot
    """The snapshot on screen."""
    on_launch: OnLaunch | None
    """Starts a run from the start screen; None where nothing can be started."""

    def command(self, action: Action) -> None:
        """Send a command to the run and show its answer."""

    def attach(self, session: Session) -> None:
        """Show the run of another session."""

    def action_go(self, mode: str) -> None:
        """Switch to the screen of `mode`."""

    def screen_resumed(self, screen: Screen[Any]) -> None:
        """Draw a screen that came to the front."""


def app_context(node: DOMNode) -> AppContext:
    """The app that shows `node`."""
    return cast(AppContext, node.app)
