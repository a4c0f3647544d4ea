"""A form made of a task's options: the common ones at once, the others folded by group.

Every row is a label, an editor and, when something is wrong, a line below it that says what and how
to mend it. A value that differs from the preset is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Input, Static

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import Option
from tui_trainer.ui.panels.choice import Choice, Toggle

EMPTY_MEANS: Mapping[str, str] = {"data": "built in"}
"""What an empty field stands for, where it is not simply `automatic`."""


class FormRow(Vertical):
    """One option."""

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
    FormRow.-wrong .error { display: block; }
    FormRow.-wrong .label { color: $text-error; text-style: bold; }
    """

    class Changed(Message):
        """A value was changed by the person."""

    def __init__(self, name: str, editor: Widget, *, unit: str = "", help: str = "") -> None:
        super().__init__(id="row-" + name.replace(" ", "-"))
        self.option_name = name
        self.editor = editor
        self.help = help
        self.preset_value: str = self.value
        self._unit = unit

    def compose(self) -> ComposeResult:
        """Label, editor, unit; the error below."""
        with Horizontal():
            yield Static(self._label(), classes="label")
            yield self.editor
            if self._unit:
                yield Static(self._unit, classes="unit")
        yield Static("", classes="error", markup=False)

    @property
    def value(self) -> str:
        """What the editor holds."""
        if isinstance(self.editor, Choice | Input):
            return self.editor.value
        return ""

    @property
    def changed(self) -> bool:
        """Whether it differs from the preset's."""
        return self.value.strip() != self.preset_value

    def set_value(self, value: str, preset_value: str) -> None:
        """Put a value in, and say what the preset's is."""
        self.preset_value = preset_value
        assert isinstance(self.editor, Choice | Input)
        with self.prevent(Input.Changed):
            self.editor.value = value
        self._mark()

    def fault(self, error: ConfigurationError | None) -> None:
        """Show what is wrong, or that nothing is."""
        self.set_class(error is not None, "-wrong")
        if error is not None:
            hint = f" ({error.hint})" if error.hint else ""
            self.query_one(".error", Static).update(f"✗ {error.message}{hint}")

    def _label(self) -> str:
        return ("•" if self.changed else " ") + " " + self.option_name.replace("_", " ")

    def _mark(self) -> None:
        self.set_class(self.changed, "-changed")
        if self.is_mounted:
            self.query_one(".label", Static).update(self._label())

    def on_input_changed(self, event: Input.Changed) -> None:
        """Typed."""
        event.stop()
        self._edited()

    def on_choice_changed(self, event: Choice.Changed) -> None:
        """Chosen; the screen hears of it too."""
        self._edited()

    def _edited(self) -> None:
        self.fault(None)
        self._mark()
        self.post_message(self.Changed())


class Fold(Widget, can_focus=True):
    """A heading that hides and shows what is below it."""

    DEFAULT_CSS = """
    Fold { height: 1; width: 1fr; color: $text; text-style: bold; }
    Fold:focus { color: $block-cursor-foreground; background: $block-cursor-background; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "fold", "fold", id="fold.toggle", show=False,
                tooltip="Show or hide the options of this group"),
        Binding("right", "unfold(True)", "unfold", id="fold.open", show=False,
                tooltip="Show the options of this group"),
        Binding("left", "unfold(False)", "fold", id="fold.close", show=False,
                tooltip="Hide the options of this group"),
    ]  # fmt: skip

    open: reactive[bool] = reactive(False)

    def __init__(self, title: str, rows: Vertical, count: int) -> None:
        super().__init__(id="fold-" + title.lower().replace(" ", "-"))
        self.title, self.rows, self.count = title, rows, count
        self.help = f"{count} options: space shows or hides them"

    def render(self) -> str:
        """The heading."""
        sign = "▾" if self.open else "▸"
        return f"{sign} {self.title}  ({self.count})"

    def watch_open(self, open: bool) -> None:
        """Show or hide."""
        self.rows.display = open

    def action_fold(self) -> None:
        """The other way."""
        self.open = not self.open

    def action_unfold(self, open: bool) -> None:
        """Open or close."""
        self.open = open

    def on_click(self, event: events.Click) -> None:
        """As the key."""
        self.action_fold()


def editor_for(option: Option, value: str) -> Widget:
    """What an option is edited with."""
    name = f"option-{option.name}"
    if option.kind == "bool":
        return Toggle(value == "on", id=name)
    if option.choices:
        return Choice(option.choices, value, id=name)
    empty = EMPTY_MEANS.get(option.name, "automatic") if option.optional else ""
    classes = "-text" if option.kind == "str" else ""
    return still(Input(value, placeholder=empty, compact=True, id=name, classes=classes))


def still(field: Input) -> Input:
    """`field` with a cursor that does not blink: each blink would be bytes on an SSH line."""
    field.cursor_blink = False
    return field


def row_for(option: Option, value: str) -> FormRow:
    """The row of an option whose preset value is written `value`."""
    editor = editor_for(option, value)
    unit = option.unit if not option.choices and option.kind != "bool" else ""
    return FormRow(option.name, editor, unit=unit, help=option.help)


def open_faulty(rows: Iterable[FormRow], folds: Iterable[Fold]) -> FormRow | None:
    """Unfold the groups in which something is wrong; the first such row."""
    wrong = [row for row in rows if row.has_class("-wrong")]
    for fold in folds:
        if any(row in fold.rows.children for row in wrong):
            fold.open = True
    return wrong[0] if wrong else None
