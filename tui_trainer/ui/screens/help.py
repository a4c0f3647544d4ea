"""The help: all keys, the phases of a step, and what the quantities mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Input

from tui_trainer.client.api import Snapshot
from tui_trainer.ui.keys import key_groups
from tui_trainer.ui.panels.help import HelpBlock, HelpView, cadence_entries, help_blocks
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.search import SearchInput


class HelpScreen(DetailScreen):
    """Made from the bindings when it is shown, so it lists what the keys really do."""

    CSS = """
    HelpScreen HelpView { height: 1fr; margin: 0 0 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/", id="help.filter",
                tooltip="Show only entries that contain these words; escape clears it"),
        Binding("escape", "back", "Back", id="help.back",
                tooltip="Clear the filter, or return to the dashboard"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._cadences: tuple[tuple[str, str], ...] = ()

    def body(self) -> Iterable[Widget]:
        yield HelpView()
        yield SearchInput()

    def on_mount(self) -> None:
        self._show_matches("")
        self.query_one(HelpView).focus()

    def show_body(self, snapshot: Snapshot) -> None:
        """The cadences are all that the help shows of a run."""
        found = cadence_entries(snapshot.info)
        if found != self._cadences:
            self._cadences = found
            self._show_matches(self.query_one(SearchInput).value)

    def _show_matches(self, text: str) -> None:
        context = self.context
        words = text.casefold().split()
        found = []
        for block in help_blocks(key_groups(self.app), context.glyphs, context.snapshot.info):
            entries = tuple(
                entry
                for entry in block.entries
                if all(w in f"{block.title} {entry[0]} {entry[1]}".casefold() for w in words)
            )
            if entries:
                found.append(HelpBlock(block.title, entries, block.style))
        nothing = HelpBlock("Nothing found", (("", f"no entry has “{text}”: escape shows all"),))
        self.query_one(HelpView).show_blocks(found or [nothing])

    def action_filter(self) -> None:
        self.query_one(SearchInput).open()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as the text is typed."""
        self._show_matches(event.value)

    def on_search_input_closed(self) -> None:
        self.query_one(HelpView).focus()

    def action_back(self) -> None:
        """Clear the filter; without one, return to the dashboard."""
        search = self.query_one(SearchInput)
        if search.value:
            search.value = ""
        else:
            self.context.action_go("dashboard")
