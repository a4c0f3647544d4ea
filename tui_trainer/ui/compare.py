"""The app over several recordings: one screen, and the help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tui_trainer.client.compare import ComparedRun
from tui_trainer.ui.app import TuiTrainerApp, choose_theme
from tui_trainer.ui.screens.compare import CompareScreen


class CompareApp(TuiTrainerApp):
    """Shows runs over each other."""

    OWN_SCREENS = (("Comparing", CompareScreen),)
    """For the help: screens that are no places of a single run."""

    def __init__(self, runs: Sequence[ComparedRun], **options: Any) -> None:
        super().__init__(None, start_mode="compare", **options)
        self.add_mode("compare", lambda: CompareScreen(runs))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Of a single run's screens there is only the help."""
        if action == "go" and parameters[0] not in ("help", "compare"):
            return False
        return super().check_action(action, parameters)

    def action_go(self, mode: str) -> None:
        """The help leads back to where it was opened."""
        super().action_go("compare" if mode == "dashboard" else mode)


def run_comparison(runs: Sequence[ComparedRun], *, ascii: bool = False) -> int:
    """Show them until the user leaves. Returns the exit code."""
    app = CompareApp(runs, ascii=ascii, theme_name=choose_theme())
    code = app.run()
    return app.return_code or (code if isinstance(code, int) else 0)
