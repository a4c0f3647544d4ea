"""The base of the screens beside the dashboard: a header, what the screen shows, and the keys."""

from __future__ import annotations

from collections.abc import Iterable

from textual import events
from textual.app import ComposeResult
from textual.widget import Widget

from tui_trainer.session.api import Snapshot
from tui_trainer.ui.controls import ControlActions
from tui_trainer.ui.panels.header import HeaderLine
from tui_trainer.ui.screens.base import RunScreen
from tui_trainer.ui.widgets.keys import KeyLine
from tui_trainer.ui.widgets.too_small import TooSmall

ROOM = (40, 10)
"""Columns and rows below which nothing can be shown sensibly."""


class DetailScreen(ControlActions, RunScreen):
    """A screen from which the run can be steered as from the dashboard: its bindings end with
    `CONTROL_BINDINGS`."""

    def compose(self) -> ComposeResult:
        """Header, body, footer."""
        yield TooSmall(*ROOM)
        yield HeaderLine()
        yield from self.body()
        yield KeyLine()

    def body(self) -> Iterable[Widget]:
        """What the screen shows between the header and the keys."""
        raise NotImplementedError

    def show(self, snapshot: Snapshot) -> None:
        """The header, then what the screen shows."""
        self.query_one(HeaderLine).show(snapshot)
        self.show_body(snapshot)
        self.show_keys()

    def show_keys(self) -> None:
        """The keys at the foot, dimmed where they cannot be used now."""
        self.query_one(KeyLine).show()

    def on_descendant_focus(self) -> None:
        """Other keys where the focus is elsewhere."""
        self.call_after_refresh(self.show_keys)

    def show_body(self, snapshot: Snapshot) -> None:
        """Draw what changed."""
        raise NotImplementedError

    def on_resize(self, event: events.Resize) -> None:
        """Say so where there is no room."""
        width, height = event.size
        self.set_class(width < ROOM[0] or height < ROOM[1], "-too-small")
