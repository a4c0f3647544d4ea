"""What every screen of a run has in common: it is shown snapshots, and draws only what changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import textual.screen
from textual import events
from textual.app import ComposeResult
from textual.screen import Screen
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.ui.controls import ControlActions
from tui_trainer.ui.panels.header import HeaderLine
from tui_trainer.ui.textual_hacks import TightCompositor
from tui_trainer.ui.widgets.keys import KeyLine, TooSmall

if TYPE_CHECKING:
    from tui_trainer.ui.app import TuiTrainerApp


UPDATES_PER_SECOND = 250
"""How soon after one another parts of the screen may be drawn. Frames of the run are made in one
piece and are far rarer; but a key moves the cursor first, then changes what is said of its row, and
at Textual's 60 the second would wait 17 ms for nothing."""

if "TEXTUAL_FPS" not in os.environ:
    vars(textual.screen)["UPDATE_PERIOD"] = 1 / UPDATES_PER_SECOND


class RunScreen(Screen[Any]):
    """A screen of the app; `topics` are the on-request tables that it needs while it is shown."""

    topics: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self._compositor = TightCompositor()

    @property
    def trainer(self) -> TuiTrainerApp:
        """The app, typed."""
        return cast("TuiTrainerApp", self.app)

    def show(self, snapshot: Snapshot) -> None:
        """Draw `snapshot`. Called on the event loop, only when something is new."""
        raise NotImplementedError

    def on_screen_resume(self) -> None:
        """Shown again: what arrived meanwhile is drawn at once."""
        self.trainer.shown_again(self)


# ---- detail
# The base of the screens beside the dashboard: a header, what the screen shows, and the keys.


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
