"""Every key of every screen, the phases of a step, and what the quantities mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.ui.keys import key_groups
from tui_trainer.ui.panels.help import HelpBlock, HelpView, cadence_entries, help_blocks
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.form import PromptLine


class HelpScreen(DetailScreen):
    """Made from the bindings when it is opened, so it says what the keys really do."""

    CSS = """
    HelpScreen HelpView { height: 1fr; margin: 0 0 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/", id="help.filter",
                tooltip="Show only entries with a word; escape clears it"),
        Binding("escape", "back", "Back", id="help.back",
                tooltip="Clear the filter, or back to the dashboard"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._cadences: tuple[tuple[str, str], ...] = ()

    def body(self) -> Iterable[Widget]:
        """The text, and the line for the filter."""
        yield HelpView()
        yield PromptLine()

    def on_mount(self) -> None:
        """Show all of it."""
        self._show("")
        self.query_one(HelpView).focus()

    def show_body(self, snapshot: Snapshot) -> None:
        """Of a run the cadences are shown: anew when one of them has changed."""
        found = cadence_entries(snapshot.info)
        if found != self._cadences:
            self._cadences = found
            self._show(self.query_one(PromptLine).text("filter"))

    def _show(self, text: str) -> None:
        context = self.context
        every = help_blocks(key_groups(self.app), context.glyphs, context.snapshot.info)
        words = text.casefold().split()
        found = [
            HelpBlock(
                block.title,
                tuple(
                    entry
                    for entry in block.entries
                    if all(w in f"{block.title} {entry[0]} {entry[1]}".casefold() for w in words)
                ),
                block.style,
            )
            for block in every
        ]
        nothing = HelpBlock("Nothing found", (("", f"no entry has “{text}”: escape shows all"),))
        self.query_one(HelpView).show_blocks([b for b in found if b.entries] or [nothing])

    def action_filter(self) -> None:
        """Type words."""
        self.query_one(PromptLine).ask("filter", "filter")

    def on_prompt_line_typed(self, event: PromptLine.Typed) -> None:
        """Filter as it is typed."""
        self._show(event.text)
        if event.done:
            self.query_one(HelpView).focus()

    def action_back(self) -> None:
        """All of it again; when it is all there, leave."""
        prompt = self.query_one(PromptLine)
        if prompt.text("filter"):
            prompt.clear("filter")
            self._show("")
        else:
            self.context.action_go("dashboard")
