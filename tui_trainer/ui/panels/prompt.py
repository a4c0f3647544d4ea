"""The line at the bottom into which a filter or a search is typed, as in a pager."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Input, Static

from tui_trainer.ui.panels.form import still


class PromptLine(Horizontal):
    """Hidden until `ask`; Enter keeps what was typed, Escape gives it up."""

    DEFAULT_CSS = """
    PromptLine { height: 1; display: none; background: $panel; }
    PromptLine.-open { display: block; layout: horizontal; }
    PromptLine > Static { width: auto; padding: 0 1; color: $text-accent; text-style: bold; }
    PromptLine > Input { width: 1fr; background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "give_up", "Clear", id="prompt.escape", tooltip="Clear it and go back"),
    ]

    class Typed(Message):
        """The text changes as it is typed; `done` when Enter or Escape ended it."""

        def __init__(self, purpose: str, text: str, done: bool) -> None:
            super().__init__()
            self.purpose, self.text, self.done = purpose, text, done

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.purpose = ""
        self._texts: dict[str, str] = {}

    def compose(self) -> ComposeResult:
        """What is asked, and the input."""
        yield Static("", markup=False)
        yield still(Input(compact=True))

    def ask(self, purpose: str, label: str) -> None:
        """Open for `purpose` (`filter`, `find`), with what was typed for it last."""
        self.purpose = purpose
        self.add_class("-open")
        self.query_one(Static).update(label)
        field = self.query_one(Input)
        with self.prevent(Input.Changed):
            field.value = self._texts.get(purpose, "")
        field.focus()

    def text(self, purpose: str) -> str:
        """What was typed for `purpose` last."""
        return self._texts.get(purpose, "")

    def clear(self, purpose: str) -> None:
        """Forget it."""
        self._texts.pop(purpose, None)

    def on_input_changed(self, event: Input.Changed) -> None:
        """As it is typed."""
        event.stop()
        self._texts[self.purpose] = event.value
        self.post_message(self.Typed(self.purpose, event.value, False))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter."""
        event.stop()
        self._close()

    def action_give_up(self) -> None:
        """Escape."""
        self._texts[self.purpose] = ""
        self._close()

    def _close(self) -> None:
        self.remove_class("-open")
        self.post_message(self.Typed(self.purpose, self._texts.get(self.purpose, ""), True))
