"""Sends the terminal only the cells that changed.

Textual 8.2 sends a changed stretch of a line from the left edge of its widget on, once for each
stretch, and a colour sequence for every segment: 9 KB a frame for the 300 cells that change on the
dashboard at 120×40. Here each stretch begins where it begins, and colours are set only when they
change. Should a later Textual build its updates otherwise, its own way of sending them stands.
"""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segment
from textual._compositor import ChopsUpdate, Compositor

RESET = "\x1b[0m"


class TightUpdate(ChopsUpdate):
    """The same update in fewer bytes."""

    def render_segments(self, console: Console) -> str:
        """The escape sequences and text to write."""
        system = console._color_system
        out: list[str] = []
        current = ""
        for y, x1, x2 in self.spans:
            for end, (x, strip) in zip(self.chop_ends[y], self.chops[y].items(), strict=False):
                if strip is None or x >= x2 or end <= x1:
                    continue
                start = max(x, x1)
                out.append(f"\x1b[{y + 1};{start + 1}H")
                for segment in strip.crop(start - x, min(end, x2) - x):
                    text, style, control = segment
                    if control or (style is not None and style.link):
                        out.append(RESET + _plainly(segment, console))
                        current = ""
                        continue
                    codes = style._make_ansi_codes(system) if style and system else ""
                    if codes != current:
                        out.append(f"\x1b[0;{codes}m" if codes else RESET)
                        current = codes
                    out.append(text)
        if current:
            out.append(RESET)
        return "".join(out)


def _plainly(segment: Segment, console: Console) -> str:
    """What is rare is left to Rich."""
    text, style, control = segment
    if control or style is None:
        return text
    return style.render(text, color_system=console._color_system)


class TightCompositor(Compositor):
    """A compositor whose partial updates are `TightUpdate`s."""

    def render_partial_update(self) -> ChopsUpdate | None:
        """What changed since the last time."""
        update = super().render_partial_update()
        if type(update) is not ChopsUpdate:
            return update
        return TightUpdate(update.chops, update.spans, update.chop_ends)
