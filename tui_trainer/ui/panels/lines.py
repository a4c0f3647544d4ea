"""A scrolling view whose lines are made only when they come into sight.

What the screens beside the dashboard stand on: a log of 5,000 lines or a matrix of 64 classes costs
what is visible, not what is there. Lines are cached as `Strip`s; `changed(first)` drops the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette

if TYPE_CHECKING:
    from tui_trainer.ui.app import TuiTrainerApp

Line = list[tuple[str, str]]
"""Pieces of text, each with a meaning of the palette and perhaps `bold`, `reverse` or `underline`
after it: `("✗ 3 is 8", "error reverse")`; "" is plain text."""


class LinesView(ScrollView, can_focus=True):
    """Base of the line views. A subclass says `count()` and `line(index)`."""

    DEFAULT_CSS = """
    LinesView { background: $background; scrollbar-size-vertical: 1; scrollbar-size-horizontal: 1; }
    """

    fits = True
    """Whether lines are laid out to the width of the view (so that it never scrolls sideways)."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._strips: dict[int, Strip] = {}
        self._styles: dict[str, Style] = {}
        self._styled: Palette | None = None

    # ------------------------------------------------------------ to be said by the subclass

    def count(self) -> int:
        """Number of lines at the present width."""
        raise NotImplementedError

    def line(self, index: int) -> Line | Strip:
        """The line at `index`, from 0."""
        raise NotImplementedError

    def line_width(self) -> int:
        """The widest line, where the view scrolls sideways."""
        return self.width

    # ------------------------------------------------------------ what it may call

    @property
    def width(self) -> int:
        """Cells that a line has."""
        return max(1, self.scrollable_content_region.width)

    @property
    def height(self) -> int:
        """Lines in sight."""
        return max(1, self.scrollable_content_region.height)

    @property
    def palette(self) -> Palette:
        """The styles of the theme in force."""
        return cast("TuiTrainerApp", self.app).palette

    @property
    def glyphs(self) -> Glyphs:
        """The signs in force."""
        return cast("TuiTrainerApp", self.app).glyphs

    def style(self, name: str) -> Style:
        """The style of a meaning, such as `dim` or `error reverse`."""
        found = self._styles.get(name)
        if found is None:
            meaning, *attributes = name.split() or ["text"]
            found = getattr(self.palette, meaning)
            found += Style.parse(" ".join(attributes)) if attributes else Style()
            self._styles[name] = found
        return found

    def changed(self, first: int = 0) -> None:
        """Lines from `first` on are new, or gone; those before are as they were."""
        if first <= 0:
            self._strips.clear()
            self._styles.clear()
        else:
            for index in [index for index in self._strips if index >= first]:
                del self._strips[index]
        width = self.width if self.fits else max(self.width, self.line_width())
        size = Size(width if not self.fits else 0, self.count())
        top, bottom = self.scroll_offset.y, self.scroll_offset.y + self.size.height
        if size != self.virtual_size:
            self.virtual_size = size
        if first <= top:
            self.refresh()
        elif first < bottom:
            for y in range(first - top, self.size.height):
                self.refresh_line(y)

    def refresh_line(self, y: int) -> None:
        """Draw one visible row again."""
        self.refresh(Region(0, y, self.size.width, 1))

    # ------------------------------------------------------------ Textual

    def on_mount(self) -> None:
        """Draw anew when the theme changes."""
        self.app.theme_changed_signal.subscribe(self, lambda _: self.call_later(self.changed))

    def on_resize(self) -> None:
        """Lay the lines out again."""
        self.changed()

    def render_line(self, y: int) -> Strip:
        """One visible row."""
        if self._styled is not self.palette:  # another theme
            self._styled = self.palette
            self._styles.clear()
            self._strips.clear()
        left, top = self.scroll_offset
        index = y + top
        if not 0 <= index < self.count():
            return Strip.blank(self.size.width, self.palette.text)
        strip = self._strips.get(index)
        if strip is None:
            made = self.line(index)
            if not isinstance(made, Strip):
                made = Strip([Segment(text, self.style(name)) for text, name in made if text])
            self._strips[index] = strip = made
        return strip.crop_extend(left, left + self.size.width, self.palette.text)
