"""The line of keys at the foot of a screen: as many as fit, help always among them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.segment import Segment
from textual import events
from textual.geometry import Size

from tui_trainer.ui.widgets.lines import Lines, Row

LAST = ("?", "q")
"""Keys that stay however narrow the screen."""
FIRST = "replay."
"""Bindings whose identity begins so come before all others."""


class KeyLine(Lines):
    """Key and name of every binding meant to be shown; dimmed where it cannot be used now.

    Textual's own footer is built anew from widgets whenever a binding changes state; this one is a
    row of cells, so it costs nothing while it stays the same. A click presses the key.
    """

    DEFAULT_CSS = "KeyLine { height: 1; dock: bottom; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.renamed: dict[str, str] = {}
        """Binding id to the name it has now (`run.pause`: `Resume`)."""
        self._places: list[tuple[int, int, str]] = []

    def show(self) -> None:
        """Look at the bindings again."""
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        palette = self.palette
        entries = self._entries()
        last = [entry for entry in entries if entry[0] in LAST]
        others = [entry for entry in entries if entry[0] not in LAST]
        room = size.width - 1 - sum(_cells(entry) for entry in last)
        shown = []
        for entry in others:
            if _cells(entry) > room:
                break
            room -= _cells(entry)
            shown.append(entry)
        row: Row = [Segment(" ", palette.text)]
        self._places = []
        at = 1
        for key, name, action, enabled in [*shown, *last]:
            style = palette.accent if enabled else palette.faint
            row.append(Segment(key, style))
            row.append(Segment(f" {name}  ", palette.dim if enabled else palette.faint))
            width = _cells((key, name, action, enabled))
            self._places.append((at, at + width, action))
            at += width
        return [row]

    def _entries(self) -> list[tuple[str, str, str, bool]]:
        """(key as shown, name, key, whether it can be used now) in order of declaration; keys that
        move through a recording first, since there they are what one came for."""
        entries: dict[str, tuple[str, str, str, bool]] = {}
        active_ones = list(self.screen.active_bindings.values())
        active_ones.sort(key=lambda one: not (one.binding.id or "").startswith(FIRST))
        for active in active_ones:
            binding = active.binding
            if not binding.show or binding.system or binding.action in entries:
                continue
            key = self.app.get_key_display(binding)
            name = self.renamed.get(binding.id or "", binding.description)
            entries[binding.action] = (key, name, binding.key, active.enabled)
        return list(entries.values())

    def on_click(self, event: events.Click) -> None:
        """Press the key under the pointer."""
        for start, stop, key in self._places:
            if start <= event.x < stop:
                self.app.simulate_key(key.split(",")[0])


def _cells(entry: tuple[str, str, str, bool]) -> int:
    return len(entry[0]) + len(entry[1]) + 3


# ---- too_small
# What stands in place of a screen that has no room.


class TooSmall(Lines):
    """One clear line; the screen comes back when the terminal is made larger."""

    DEFAULT_CSS = "TooSmall { display: none; }"  # the rest is in app.tcss: it concerns siblings

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self._needed = f"{columns}×{rows}"

    def rows(self, size: Size) -> Sequence[Row]:
        """The longest way of saying it that fits."""
        sayings = (
            f"needs {self._needed} cells or more, this is {size.width}×{size.height}",
            f"needs {self._needed} or more",
            f"needs {self._needed}",
            "too small",
        )
        text = next((s for s in sayings if len(s) <= size.width), sayings[-1][: size.width])
        return [[Segment(text, self.palette.warning)]]
