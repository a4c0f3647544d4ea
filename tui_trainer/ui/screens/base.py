"""What every screen of a run has in common: it is shown snapshots, and draws only what changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from textual.screen import Screen

from tui_trainer.session.api import Snapshot
from tui_trainer.ui.compositor import TightCompositor

if TYPE_CHECKING:
    from tui_trainer.ui.app import TuiTrainerApp


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
