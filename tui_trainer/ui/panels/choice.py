"""One of a few, in one line: `● light  ○ nanogpt-cpu  ○ gpt2`, by arrow key or mouse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget


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
