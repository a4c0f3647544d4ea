"""A row of switches such as `o ● stdout 12   c ○ clips 340`: a key, a state, a name; clickable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rich.segment import Segment
from textual import events
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

if TYPE_CHECKING:
    from tui_trainer.ui.app import TuiTrainerApp

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
        palette = cast("TuiTrainerApp", self.app).palette
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
