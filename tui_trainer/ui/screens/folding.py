"""The base class of the screens whose panels become tabs where there is little room."""

from __future__ import annotations

from typing import ClassVar

from textual import events

from tui_trainer.ui.screens.base import MIN_SIZE, RunScreen
from tui_trainer.ui.widgets.tabs import TabLine


class FoldingScreen(RunScreen):
    """Shows all panels at once, or one at a time with tabs where not all of them fit."""

    DEFAULT_CSS = """
    FoldingScreen TabLine { display: none; }
    FoldingScreen.-folded TabLine { display: block; }
    """
    tabs: ClassVar[tuple[str, ...]]
    full_size: ClassVar[tuple[int, int]] = (100, 30)
    """Columns and rows from which all panels are shown at once."""

    def __init__(self) -> None:
        super().__init__()
        self._folded = False
        self._tab = 0

    def show_panels(self) -> None:
        """Show the panel of the tab, or all panels."""
        raise NotImplementedError

    def on_resize(self, event: events.Resize) -> None:
        """Choose between all panels and tabs."""
        width, height = event.size
        self.set_class(width < MIN_SIZE[0] or height < MIN_SIZE[1], "-too-small")
        self._folded = width < self.full_size[0] or height < self.full_size[1]
        self.set_class(self._folded, "-folded")
        self._show_tab()

    def choose_tab(self, number: int) -> None:
        self._tab = number
        self._show_tab()

    def _show_tab(self) -> None:
        self.show_panels()
        self.query_one(TabLine).choose(self._tab)
        self.call_after_refresh(lambda: self.show(self.context.snapshot))

    def action_tab(self, by: int) -> None:
        """Show the next or previous panel."""
        if self._folded:
            self.choose_tab((self._tab + by) % len(self.tabs))

    def on_tab_line_chosen(self, message: TabLine.Chosen) -> None:
        self.choose_tab(message.number)
