"""The screens, their keys and where they live; what is not on screen is imported after the first
paint, or when it is first shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual.screen import Screen


@dataclass(frozen=True)
class ScreenEntry:
    """One screen of the app."""

    mode: str
    key: str
    title: str
    where: str
    """`module:class` below `tui_trainer.ui.screens`."""
    tooltip: str

    def factory(self) -> Callable[[], Screen[Any]]:
        """What makes the screen, importing its module only then."""

        def make() -> Screen[Any]:
            made: Screen[Any] = getattr(self.load(), self.where.partition(":")[2])()
            return made

        return make

    def load(self) -> ModuleType:
        """Import its module."""
        return import_module(f"tui_trainer.ui.screens.{self.where.partition(':')[0]}")


PLACES = (
    ScreenEntry(
        "dashboard", "1", "Dashboard", "dashboard:DashboardScreen", "Everything at a glance"
    ),
    ScreenEntry(
        "attention", "2", "Attention", "attention:AttentionScreen", "Wq, Wk, Wv per layer and head"
    ),
    ScreenEntry(
        "parameters",
        "3",
        "Parameters",
        "parameters:ParametersScreen",
        "Every parameter, every column",
    ),
    ScreenEntry("samples", "4", "Samples", "samples:SamplesScreen", "What the model produces"),
    ScreenEntry("log", "5", "Log", "log:LogScreen", "Output of the script, events and commands"),
    ScreenEntry("help", "6", "Help", "help:HelpScreen", "Every key, and what the quantities mean"),
    ScreenEntry("start", "7", "Start", "start:StartScreen", "Choose what to train"),
)
