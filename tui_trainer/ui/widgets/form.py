"""Rows of a form: a label, a control for one value, and below it an error in the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, RadioButton, RadioSet, Static

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.ui.widgets.ordered_input import OrderedInput


class _Choice(RadioButton):
    """A radio button that shows its state even without colour."""

    BUTTON_LEFT = BUTTON_RIGHT = ""
    BUTTON_INNER = "○"

    def watch_value(self) -> None:
        self.BUTTON_INNER = "●" if self.value else "○"
        super().watch_value()


class ChoiceRow(RadioSet, inherit_bindings=False):
    """Radio buttons in one line; the arrow keys choose at once."""

    DEFAULT_CSS = """
    ChoiceRow { layout: horizontal; height: 1; overflow-x: auto; overflow-y: hidden;
        scrollbar-size: 0 0; background: transparent; }
    ChoiceRow:focus { background-tint: $foreground 0%; }
    ChoiceRow > RadioButton { width: auto; color: $text-muted; margin-right: 1; }
    ChoiceRow > RadioButton > .toggle--button { background: transparent; color: $text-muted; }
    ChoiceRow > RadioButton.-on { color: $text-accent; text-style: bold; }
    ChoiceRow > RadioButton.-on > .toggle--button { background: transparent; color: $text-accent; }
    ChoiceRow:blur > RadioButton.-selected > .toggle--label { background: transparent; }
    ChoiceRow:focus > RadioButton.-selected > .toggle--label { background: transparent;
        color: $text-muted; text-style: none; }
    ChoiceRow:focus > RadioButton.-on > .toggle--label { text-style: bold;
        color: $block-cursor-foreground; background: $block-cursor-background; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "choose(-1)", "Previous", id="choice.previous", show=False,
                tooltip="Choose the previous value"),
        Binding("right,space", "choose(1)", "Next", id="choice.next", show=False,
                tooltip="Choose the next value; after the last one the first"),
    ]  # fmt: skip

    def __init__(self, choices: Sequence[str], value: str, *, id: str | None = None) -> None:
        self.choices = tuple(choices)
        self._buttons = [_Choice(choice, choice == value) for choice in choices]
        super().__init__(*self._buttons, id=id, compact=True)

    @property
    def value(self) -> str:
        """The chosen value; "" for none."""
        chosen = (c for c, button in zip(self.choices, self._buttons, strict=True) if button.value)
        return next(chosen, "")

    @value.setter
    def value(self, value: str) -> None:
        if value in self.choices:
            self._choose(self.choices.index(value))

    def action_choose(self, by: int) -> None:
        """Choose the next or previous value."""
        current = self.choices.index(self.value) if self.value else -by
        self._choose((current + by) % len(self.choices))

    def _choose(self, number: int) -> None:
        for other, button in enumerate(self._buttons):
            if other != number:
                with self.prevent(RadioButton.Changed):
                    button.value = False
        self._buttons[number].value = True
        self.call_after_refresh(self.scroll_to_widget, self._buttons[number], animate=False)


LABEL_WIDTH = 20
FIELD_WIDTH = 14
"""Width of a field for a number, which may have a unit after it."""


class FormRow(Vertical):
    """One value. A value that differs from its default is marked.

    The row draws its label and unit itself, since a form has some forty rows, and each further
    widget costs as much as the rest of a row.
    """

    DEFAULT_CSS = f"""
    FormRow {{ height: auto; color: $text-muted; }}
    FormRow > Input, FormRow > ChoiceRow {{ margin-left: {LABEL_WIDTH}; }}
    FormRow > Input {{ width: {FIELD_WIDTH}; background: $surface; }}
    FormRow > Input:focus {{ background: $panel; }}
    FormRow > Input.-text {{ width: 1fr; max-width: 60; }}
    FormRow > .error {{ height: auto; color: $text-error; padding-left: {LABEL_WIDTH}; }}
    """

    class Changed(Message):
        """The user changed the value."""

        def __init__(self, row: FormRow) -> None:
            super().__init__()
            self.row = row

    def __init__(
        self,
        name: str,
        editor: ChoiceRow | Input,
        *,
        default: str = "",
        unit: str = "",
        help: str = "",
    ) -> None:
        super().__init__(id="row-" + name.replace(" ", "-"))
        self.option_name = name
        self.editor = editor
        self.default = default
        self.help = help
        self._unit = unit
        self._error: Static | None = None

    def compose(self) -> ComposeResult:
        yield self.editor

    def render(self) -> Content:
        """The label before the field, and the unit after it."""
        style = "bold $text-accent" if self.changed else ""
        if self._error is not None:
            style = "bold $text-error"
        mark = "•" if self.changed else " "
        label = f"{mark} {self.option_name.replace('_', ' ')}"[:LABEL_WIDTH].ljust(LABEL_WIDTH)
        unit = " " * (FIELD_WIDTH + 1) + self._unit if self._unit else ""
        return Content.assemble((label, style), unit)

    @property
    def value(self) -> str:
        return self.editor.value

    @property
    def changed(self) -> bool:
        """Whether the value differs from the default."""
        return self.value.strip() != self.default

    def set_value(self, value: str, default: str) -> None:
        """Set value and default without a `Changed` message."""
        self.default = default
        with self.prevent(Input.Changed, RadioSet.Changed):
            self.editor.value = value
        self.refresh()

    def show_error(self, error: ConfigurationError | None) -> None:
        """Show an error in the value; None removes it."""
        if error is not None:
            hint = f" ({error.hint})" if error.hint else ""
            text = f"✗ {error.message}{hint}"
            if self._error is None:
                self._error = Static(text, classes="error", markup=False)
                self.mount(self._error)
            else:
                self._error.update(text)
        elif self._error is not None:
            self._error.remove()
            self._error = None
        else:
            return
        self.refresh()

    @on(Input.Changed)
    @on(RadioSet.Changed)
    def _edited(self, event: Message) -> None:
        event.stop()
        self.show_error(None)
        self.refresh()
        self.post_message(self.Changed(self))


def switch(on: bool, *, id: str) -> ChoiceRow:
    """`off` or `on`. Textual's `Switch` shows its state by color alone, in one line."""
    return ChoiceRow(("off", "on"), "on" if on else "off", id=id)


def text_field(value: str = "", *, id: str, placeholder: str = "", wide: bool = False) -> Input:
    """An input field whose cursor does not blink: over SSH each blink would be sent."""
    field = OrderedInput(
        value, placeholder=placeholder, compact=True, id=id, classes="-text" if wide else ""
    )
    field.cursor_blink = False
    return field
