"""The small questions: how many steps, how fast, and what becomes of the run on leaving."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option


class NumberPrompt(ModalScreen[float | None]):
    """Asks for one number; escape gives None, an empty answer the number `empty`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel", id="prompt.cancel", tooltip="Leave as it is")
    ]

    def __init__(
        self, question: str, value: str = "", *, whole: bool = False, empty: float | None = None
    ) -> None:
        super().__init__()
        self._question, self._value = question, value
        self._whole, self._empty = whole, empty

    def compose(self) -> ComposeResult:
        """The question and a field."""
        with Vertical(classes="dialog"):
            yield Static(self._question, markup=False)
            yield Input(self._value, type="integer" if self._whole else "number", compact=True)
            yield Static("", id="prompt-fault", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Give the answer, if it is one."""
        text = event.value.strip()
        if not text:
            self.dismiss(self._empty)
            return
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if value > 0:
            self.dismiss(value)
        else:
            self.query_one("#prompt-fault", Static).update("a number above 0, or escape")


class TextPrompt(ModalScreen[str | None]):
    """Asks for a few words; escape or an empty answer gives None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel", id="text.cancel", tooltip="Leave as it is")
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """The question and a field."""
        with Vertical(classes="dialog"):
            yield Static(self._question, markup=False)
            yield Input(max_length=200, compact=True)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Give the answer."""
        self.dismiss(event.value.strip() or None)


class QuitDialog(ModalScreen[str | None]):
    """What becomes of a living run: `detach`, `stop`, `checkpoint` or None (stay)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Stay", id="quit.stay", tooltip="Go on watching"),
        Binding("d,q,x", "first", "Detach", id="quit.detach",
                tooltip="Leave: the run goes on, unless it trains inside the app"),
        Binding("s", "dismiss('stop')", "Stop", id="quit.stop", tooltip="End the run"),
        Binding("c", "dismiss('checkpoint')", "Checkpoint, stop", id="quit.checkpoint",
                tooltip="Write a checkpoint, then end the run"),
    ]  # fmt: skip

    DETACH = ("detach", "Detach", "the run goes on; attach again any time", "d")
    STOPS = (
        ("checkpoint", "Checkpoint and stop", "write a checkpoint, then end", "c"),
        ("stop", "Stop", "finish the running step, then end", "s"),
    )

    def __init__(self, ends_with_app: bool = False) -> None:
        """`ends_with_app`: the run cannot outlive the screen, so detaching is no choice."""
        super().__init__()
        self._ends = ends_with_app
        self.choices = self.STOPS if ends_with_app else (self.DETACH, *self.STOPS[::-1])

    def compose(self) -> ComposeResult:
        """The question and its answers."""
        with Vertical(classes="dialog"):
            yield Static("Leave this run?", classes="question")
            if self._ends:
                yield Static("[dim]It trains inside this app (--in-app), so leaving ends it.[/dim]")
            yield OptionList(
                *(
                    Option(f"[b]{key}[/b]  {title}  [dim]{what}[/dim]", id=choice)
                    for choice, title, what, key in self.choices
                )
            )
            yield Static("[dim]enter chooses, escape stays[/dim]")

    def action_first(self) -> None:
        """The gentlest way to leave."""
        self.dismiss(self.choices[0][0])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Give the answer."""
        self.dismiss(event.option.id)
