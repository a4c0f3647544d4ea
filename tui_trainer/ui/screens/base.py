"""What every screen of a run has in common: it is shown snapshots, and draws only what changed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import textual.screen
from textual.screen import Screen

from tui_trainer.session.api import Snapshot
from tui_trainer.ui.compositor import TightCompositor

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
