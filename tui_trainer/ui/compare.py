"""The app for `tui-trainer compare`: several recorded runs on one screen, and the help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tui_trainer.client.compare import ComparedRun
from tui_trainer.ui.app import TuiTrainerApp, choose_theme
from tui_trainer.ui.screens.compare import CompareScreen


class CompareApp(TuiTrainerApp):
    """Shows runs on top of each other."""

    OWN_SCREENS = (("Comparing", CompareScreen),)
    """Title and class, for the help: screens that are not in `SCREENS`."""

    def __init__(self, runs: Sequence[ComparedRun], **options: Any) -> None:
        super().__init__(None, start_mode="compare", **options)
        self.add_mode("compare", lambda: CompareScreen(runs))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Of the other screens only the help is of use here."""
        if action == "go" and parameters[0] not in ("help", "compare"):
            return False
        return super().check_action(action, parameters)

    def action_go(self, mode: str) -> None:
        """Switch the screen; where others return to the dashboard, return to the comparison."""
        super().action_go("compare" if mode == "dashboard" else mode)


def run_comparison(runs: Sequence[ComparedRun], *, ascii: bool = False) -> int:
    """Show the runs until the user leaves. Returns the exit code."""
    return CompareApp(runs, ascii=ascii, theme_name=choose_theme()).run_until_exit()
