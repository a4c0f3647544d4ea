"""A form made of a task's options: the common ones at once, the others folded by group.

Every row is a label, an editor and, when something is wrong, a line below it that says what and how
to mend it. A value that differs from the preset is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from rich.segment import Segment
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input, Static

from tui_trainer.config.errors import ConfigurationError
from tui_trainer.config.options import Option
from tui_trainer.ui.widgets.lines import DrawingContext

# ---- choice
# One of a few, in one line: `● light  ○ nanogpt-cpu  ○ gpt2`, by arrow key or mouse.


class Choice(Widget, can_focus=True):
    """Radio buttons in a row; where the row is too narrow it scrolls to the chosen one."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"choice--chosen", "choice--other", "choice--focused"}
    DEFAULT_CSS = """
    Choice { height: 1; width: 1fr; }
    Choice > .choice--chosen { color: $text-accent; text-style: bold; }
    Choice > .choice--focused { color: $block-cursor-foreground;
        background: $block-cursor-background; text-style: bold; }
    Choice > .choice--other { color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "previous", id="choice.previous", show=False,
                tooltip="Choose the one before"),
        Binding("right,space", "move(1)", "next", id="choice.next", show=False,
                tooltip="Choose the next one, going round at the end"),
    ]  # fmt: skip

    value: reactive[str] = reactive("")

    class Changed(Message):
        """Another one was chosen."""

        def __init__(self, choice: Choice, value: str) -> None:
            super().__init__()
            self.choice = choice
            self.value = value

        @property
        def control(self) -> Choice:
            """The choice, for `@on(…, selector)`."""
            return self.choice

    def __init__(self, choices: Sequence[str], value: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.choices = tuple(choices)
        self.set_reactive(Choice.value, value)

    def action_move(self, by: int) -> None:
        """Choose the one before or after."""
        if self.choices:
            place = self.choices.index(self.value) if self.value in self.choices else -by
            self._choose(self.choices[(place + by) % len(self.choices)])

    def _choose(self, value: str) -> None:
        if value != self.value:
            self.value = value
            self.post_message(self.Changed(self, value))

    def _pieces(self) -> list[tuple[str, str]]:
        """(text, value) of each choice, with the gap that follows it."""
        chosen, other = "●", "○"
        return [(f"{chosen if c == self.value else other} {c}  ", c) for c in self.choices]

    def _left(self) -> int:
        """Cells scrolled away so that the chosen one is in sight."""
        end = 0
        for text, value in self._pieces():
            end += len(text)
            if value == self.value:
                break
        return max(0, end - self.size.width)

    def render_line(self, y: int) -> Strip:
        """The row."""
        if y:
            return Strip.blank(self.size.width, self.rich_style)
        chosen = "choice--focused" if self.has_focus else "choice--chosen"
        styles = {
            True: self.rich_style + self.get_component_rich_style(chosen, partial=True),
            False: self.rich_style + self.get_component_rich_style("choice--other", partial=True),
        }
        segments = []
        for text, value in self._pieces():
            segments.append(Segment(text.rstrip(), styles[value == self.value]))
            segments.append(Segment("  ", self.rich_style))
        left = self._left()
        return Strip(segments).crop_extend(left, left + self.size.width, self.rich_style)

    def on_click(self, event: events.Click) -> None:
        """Choose the one under the mouse."""
        at = event.x + self._left()
        for text, value in self._pieces():
            if at < len(text):
                self._choose(value)
                return
            at -= len(text)


class Toggle(Choice):
    """On or off."""

    def __init__(self, value: bool, *, id: str | None = None) -> None:
        super().__init__(("off", "on"), "on" if value else "off", id=id)


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


class FoldRow(Widget, can_focus=True):
    """A heading that hides and shows what is below it."""

    DEFAULT_CSS = """
    FoldRow { height: 1; width: 1fr; color: $text; text-style: bold; }
    FoldRow:focus { color: $block-cursor-foreground; background: $block-cursor-background; }
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
    return fixed_row(Input(value, placeholder=empty, compact=True, id=name, classes=classes))


def fixed_row(field: Input) -> Input:
    """`field` with a cursor that does not blink: each blink would be bytes on an SSH line."""
    field.cursor_blink = False
    return field


def row_for(option: Option, value: str) -> FormRow:
    """The row of an option whose preset value is written `value`."""
    editor = editor_for(option, value)
    unit = option.unit if not option.choices and option.kind != "bool" else ""
    return FormRow(option.name, editor, unit=unit, help=option.help)


def open_faulty(rows: Iterable[FormRow], folds: Iterable[FoldRow]) -> FormRow | None:
    """Unfold the groups in which something is wrong; the first such row."""
    wrong = [row for row in rows if row.has_class("-wrong")]
    for fold in folds:
        if any(row in fold.rows.children for row in wrong):
            fold.open = True
    return wrong[0] if wrong else None


# ---- chips
# A row of switches such as `o ● stdout 12   c ○ clips 340`: a key, a state, a name; clickable.


GAP = 2


@dataclass(frozen=True)
class Chip:
    """One switch."""

    name: str
    key: str
    """The key that does the same."""
    text: str
    on: bool


class Chips(Widget):
    """Shows `chips`; what a click means is the screen's to say."""

    DEFAULT_CSS = """
    Chips { height: 1; width: 1fr; background: $background; }
    """

    class Pressed(Message):
        """A chip was clicked."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chips: tuple[Chip, ...] = ()

    def show_chips(self, chips: tuple[Chip, ...]) -> None:
        """Show these; nothing is drawn when they are shown."""
        if chips != self.chips:
            self.chips = chips
            self.refresh()

    def _widths(self) -> list[tuple[Chip, int]]:
        return [(chip, len(chip.key) + len(chip.text) + 3 + GAP) for chip in self.chips]

    def render_line(self, y: int) -> Strip:
        """The row."""
        palette = cast("DrawingContext", self.app).palette
        segments: list[Segment] = []
        for chip in self.chips:
            sign = "●" if chip.on else "○"
            segments += [
                Segment(chip.key, palette.accent),
                Segment(f" {sign} {chip.text}", palette.text if chip.on else palette.dim),
                Segment(" " * GAP, palette.text),
            ]
        return Strip(segments).adjust_cell_length(self.size.width, palette.text)

    def on_click(self, event: events.Click) -> None:
        """Say which was clicked."""
        at = event.x
        for chip, width in self._widths():
            if at < width - GAP and at >= 0:
                self.post_message(self.Pressed(chip.name))
                return
            at -= width


# ---- prompt
# The line at the bottom into which a filter or a search is typed, as in a pager.


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
        yield fixed_row(Input(compact=True))

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
