"""Dialogs: a number, a note, a tensor, and what to do with the run on leaving."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.formatting import shape_text
from tui_trainer.protocol.inspection import TensorInfo, TensorList, TensorRef
from tui_trainer.ui.widgets.ordered_input import OrderedInput

MAX_NOTE_LENGTH = 200
KEYS_HINT = "[dim]enter: confirm, escape: cancel[/dim]"


class SnapshotDialog(ModalScreen[None]):
    """A dialog about the run, drawn with every snapshot."""

    def show(self, snapshot: Snapshot) -> None:
        """Draw `snapshot`."""
        raise NotImplementedError


class NumberPrompt(ModalScreen[float | None]):
    """Asks for a positive number. Escape returns None, an empty answer `empty`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel", id="prompt.cancel", tooltip="Change nothing")
    ]

    def __init__(
        self, question: str, value: str = "", *, whole: bool = False, empty: float | None = None
    ) -> None:
        super().__init__()
        self._question, self._value = question, value
        self._whole, self._empty = whole, empty

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(self._question, markup=False)
            yield OrderedInput(
                self._value, type="integer" if self._whole else "number", compact=True
            )
            yield Static("", classes="error", markup=False)
            yield Static(KEYS_HINT)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Return the number, or show that it is not valid."""
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
            self.query_one(".error", Static).update("enter a number above 0, or press escape")


class TextPrompt(ModalScreen[str | None]):
    """Asks for a line of text. Escape and an empty answer return None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel", id="text.cancel", tooltip="Change nothing")
    ]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question, self._value = question, value

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(self._question, markup=False)
            yield OrderedInput(
                self._value, max_length=MAX_NOTE_LENGTH, select_on_focus=False, compact=True
            )
            yield Static(f"\n{KEYS_HINT}")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip() or None)


QuitChoice = Literal["detach", "stop", "checkpoint"]


class QuitDialog(ModalScreen[QuitChoice | None]):
    """Asks what to do with a live run; None: stay."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Stay", id="quit.stay", tooltip="Stay in the app"),
        Binding("d,q,x", "default", "Detach", id="quit.detach",
                tooltip="Leave; the run continues, unless it trains inside the app"),
        Binding("s", "dismiss('stop')", "Stop", id="quit.stop", tooltip="End the run"),
        Binding("c", "dismiss('checkpoint')", "Checkpoint, stop", id="quit.checkpoint",
                tooltip="Write a checkpoint, then end the run"),
    ]  # fmt: skip

    DETACH = ("detach", "Detach", "the run continues; attach again any time", "d")
    STOP = ("stop", "Stop", "finish the current step, then end", "s")
    CHECKPOINT = ("checkpoint", "Checkpoint and stop", "write a checkpoint, then end", "c")

    def __init__(self, ends_with_app: bool = False) -> None:
        """`ends_with_app`: the run trains inside the app, so detaching is not offered."""
        super().__init__()
        self._ends_with_app = ends_with_app
        self.choices = (
            (self.CHECKPOINT, self.STOP)
            if ends_with_app
            else (self.DETACH, self.STOP, self.CHECKPOINT)
        )
        """The answers; the first one, which loses least, is the default."""

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Leave this run?", classes="question")
            if self._ends_with_app:
                yield Static("[dim]It trains inside this app (--in-app): leaving ends it.[/dim]")
            yield OptionList(
                *(
                    Option(f"[b]{key}[/b]  {title}  [dim]{help}[/dim]", id=choice)
                    for choice, title, help, key in self.choices
                )
            )
            yield Static("[dim]enter: choose, escape: stay[/dim]")

    def action_default(self) -> None:
        self.dismiss(cast(QuitChoice, self.choices[0][0]))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(cast(QuitChoice, event.option.id))


MAX_MATCHES = 200
"""Tensors that the dialog lists at a time."""
MAX_NAME_WIDTH = 52
"""Maximum number of cells of the column of names; what follows a longer name is not aligned."""


class TensorDialog(ModalScreen[TensorRef | None]):
    """Chooses a tensor by words of its name."""

    CSS = """
    TensorDialog .dialog { width: 84; }
    TensorDialog OptionList { max-height: 14; }
    TensorDialog .keys { color: $text-muted; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel", id="tensors.cancel",
                tooltip="Keep the tensor"),
        Binding("down", "to_list", "List", show=False, id="tensors.list",
                tooltip="To the list of tensors"),
    ]  # fmt: skip

    def __init__(self, tensors: TensorList) -> None:
        super().__init__()
        self._tensors = tensors
        self._matches: list[TensorInfo] = []

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Inspect a tensor", markup=False)
            yield OrderedInput(placeholder="words of its name: head grad", compact=True)
            yield OptionList(compact=True, markup=False)
            yield Static("enter: inspect, down: list, escape: cancel", classes="keys", markup=False)

    def on_mount(self) -> None:
        self._list("")
        self.query_one(Input).focus()

    def _list(self, text: str) -> None:
        words = text.casefold().split()
        found = [each for each in self._tensors.tensors if each.is_named(words)]
        self._matches = found[:MAX_MATCHES]
        options = self.query_one(OptionList)
        widest = max((cell_len(each.ref.text) for each in self._matches), default=0)
        width = min(widest, MAX_NAME_WIDTH)
        options.set_options([Option(_option(each, width)) for each in self._matches])
        options.display = bool(self._matches)
        if self._matches:
            options.highlighted = 0

    def on_input_changed(self, event: Input.Changed) -> None:
        self._list(event.value)

    def on_input_submitted(self) -> None:
        """Choose the highlighted tensor."""
        highlighted = self.query_one(OptionList).highlighted
        if self._matches:
            self.dismiss(self._matches[highlighted or 0].ref)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._matches[event.option_index].ref)

    def action_to_list(self) -> None:
        self.query_one(OptionList).focus()


def _option(tensor: TensorInfo, width: int) -> Content:
    """Name, shape and type; `width`: cells for the names."""
    shape = shape_text(tensor.shape)
    other = "".join(f"  = {name}" for name in tensor.also)
    gap = " " * (2 + max(0, width - cell_len(tensor.ref.text)))
    return Content.assemble(tensor.ref.text, (f"{gap}{shape:<12} {tensor.dtype}{other}", "dim"))
