"""Rows of a form: a label, a control for one value, and below it what is wrong with the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Input, RadioButton, RadioSet, Static

from tui_trainer.config.errors import ConfigurationError


class _Choice(RadioButton):
    """A radio button whose state shows without colour, too."""

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
        """The chosen one."""
        chosen = (c for c, button in zip(self.choices, self._buttons, strict=True) if button.value)
        return next(chosen, "")

    @value.setter
    def value(self, value: str) -> None:
        if value in self.choices:
            self._choose(self.choices.index(value))

    def action_choose(self, by: int) -> None:
        """Choose the next or previous one."""
        current = self.choices.index(self.value) if self.value else -by
        self._choose((current + by) % len(self.choices))

    def _choose(self, number: int) -> None:
        for other, button in enumerate(self._buttons):
            if other != number:
                with self.prevent(RadioButton.Changed):
                    button.value = False
        self._buttons[number].value = True
        self.call_after_refresh(self.scroll_to_widget, self._buttons[number], animate=False)


class FormRow(Vertical):
    """One value. A value that differs from its default is marked."""

    DEFAULT_CSS = """
    FormRow { height: auto; }
    FormRow > Horizontal { height: 1; }
    FormRow .label { width: 20; color: $text-muted; }
    FormRow.-changed .label { color: $text-accent; text-style: bold; }
    FormRow Input { width: 14; background: $surface; }
    FormRow Input:focus { background: $panel; }
    FormRow Input.-text { width: 1fr; max-width: 60; }
    FormRow .unit { width: auto; color: $text-muted; padding: 0 1; }
    FormRow .error { display: none; height: auto; color: $text-error; padding-left: 20; }
    FormRow.-invalid .error { display: block; }
    FormRow.-invalid .label { color: $text-error; text-style: bold; }
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

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield Static(self._label(), classes="label")
            yield self.editor
            if self._unit:
                yield Static(self._unit, classes="unit")
        yield Static("", classes="error", markup=False)

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
        self._mark_changed()

    def show_error(self, error: ConfigurationError | None) -> None:
        """Show what is wrong with the value, or that nothing is."""
        self.set_class(error is not None, "-invalid")
        if error is not None:
            hint = f" ({error.hint})" if error.hint else ""
            self.query_one(".error", Static).update(f"✗ {error.message}{hint}")

    def _label(self) -> str:
        return ("•" if self.changed else " ") + " " + self.option_name.replace("_", " ")

    def _mark_changed(self) -> None:
        self.set_class(self.changed, "-changed")
        if self.is_mounted:
            self.query_one(".label", Static).update(self._label())

    @on(Input.Changed)
    @on(RadioSet.Changed)
    def _edited(self, event: Message) -> None:
        event.stop()
        self.show_error(None)
        self._mark_changed()
        self.post_message(self.Changed(self))


def switch(on: bool, *, id: str) -> ChoiceRow:
    """`off` or `on`. Textual's `Switch` shows its state by color alone, in one line."""
    return ChoiceRow(("off", "on"), "on" if on else "off", id=id)


def text_field(value: str = "", *, id: str, placeholder: str = "", wide: bool = False) -> Input:
    """An input field whose cursor does not blink: over SSH each blink would be sent."""
    field = Input(
        value, placeholder=placeholder, compact=True, id=id, classes="-text" if wide else ""
    )
    field.cursor_blink = False
    return field
