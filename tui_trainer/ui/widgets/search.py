"""The input line at the foot of a screen into which a filter or a search is typed."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message

from tui_trainer.ui.widgets.ordered_input import OrderedInput


class SearchInput(OrderedInput):
    """An input line that is hidden until `open`. Enter keeps the text, escape clears it, and either
    closes the line.

    `Input.Changed` is posted as the text is typed, `Closed` when the line is hidden again.
    """

    DEFAULT_CSS = """
    SearchInput { display: none; background: $panel; }
    SearchInput:focus { background: $panel; }
    SearchInput.-open { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "clear_and_close", "Clear", id="search.escape",
                tooltip="Clear the text and close the line"),
    ]  # fmt: skip

    class Closed(Message):
        """The line was closed with enter or escape."""

    def __init__(self, placeholder: str = "filter", *, id: str = "filter") -> None:
        super().__init__(placeholder=placeholder, id=id, compact=True)
        self.cursor_blink = False

    def open(self) -> None:
        """Show the line and give it the focus."""
        self.add_class("-open")
        self.focus()

    def action_clear_and_close(self) -> None:
        self.value = ""
        self._close()

    async def action_submit(self) -> None:
        self._close()

    def _close(self) -> None:
        self.remove_class("-open")
        self.post_message(self.Closed())
