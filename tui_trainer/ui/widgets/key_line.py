"""The line of keys at the bottom of a screen, and the notice that a terminal is too small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.segment import Segment
from textual import events
from textual.geometry import Size

from tui_trainer.ui.widgets.lines import LineView, Row

ALWAYS_SHOWN = ("?", "q")
"""Keys that are shown however narrow the screen is."""
FIRST_ID_PREFIXES = ("demo.", "replay.")
"""Prefixes of the ids of bindings that come first, since they matter most in a guided run and in a
replay."""


@dataclass(frozen=True)
class KeyHint:
    """A key of the line: how it is displayed, its label, and whether it can be used now."""

    display: str
    label: str
    key: str
    enabled: bool

    @property
    def width(self) -> int:
        """Cells with the gap after it."""
        return len(self.display) + len(self.label) + 3


class KeyLine(LineView):
    """Key and label of every binding that is shown, dimmed while it cannot be used. A click presses
    the key.

    Textual's own footer composes its widgets again whenever a binding changes its state; a row of
    cells costs nothing while it stays the same.
    """

    DEFAULT_CSS = "KeyLine { height: 1; dock: bottom; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.labels: dict[str, str] = {}
        """Present labels by binding id, such as `Resume` for `run.pause`."""
        self._key_ranges: list[tuple[int, int, str]] = []
        """(start, stop, key) of the cells of each key on screen."""

    def rows(self, size: Size) -> Sequence[Row]:
        """As many keys as fit."""
        hints = self._hints()
        last = [hint for hint in hints if hint.display in ALWAYS_SHOWN]
        room = size.width - 1 - sum(hint.width for hint in last)
        shown = []
        for hint in hints:
            if hint in last:
                continue
            if hint.width > room:
                break
            room -= hint.width
            shown.append(hint)
        row: Row = [Segment(" ", self.palette.text)]
        self._key_ranges = []
        x = 1
        for hint in [*shown, *last]:
            row += self.styled(
                [
                    (hint.display, "accent" if hint.enabled else "dim"),
                    (f" {hint.label}  ", "dim"),
                ]
            )
            self._key_ranges.append((x, x + hint.width, hint.key))
            x += hint.width
        return [row]

    def _hints(self) -> list[KeyHint]:
        """The keys in the order in which they are bound, one for each action."""
        hints: dict[str, KeyHint] = {}
        active_bindings = sorted(
            self.screen.active_bindings.values(),
            key=lambda active: not (active.binding.id or "").startswith(FIRST_ID_PREFIXES),
        )
        for active in active_bindings:
            binding = active.binding
            if not binding.show or binding.system or binding.action in hints:
                continue
            label = self.labels.get(binding.id or "", binding.description)
            display = self.app.get_key_display(binding)
            hints[binding.action] = KeyHint(display, label, binding.key, active.enabled)
        return list(hints.values())

    def on_click(self, event: events.Click) -> None:
        """Press the key under the pointer."""
        for start, stop, key in self._key_ranges:
            if start <= event.x < stop:
                self.app.simulate_key(key.split(",")[0])


class TooSmall(LineView):
    """One line in place of a screen that the terminal is too small for."""

    DEFAULT_CSS = "TooSmall { display: none; }"  # the rest is in app.tcss: it concerns siblings

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self._needed = f"{columns}×{rows}"

    def rows(self, size: Size) -> Sequence[Row]:
        """The longest wording that fits."""
        wordings = (
            f"needs at least {self._needed} cells, this terminal has {size.width}×{size.height}",
            f"needs at least {self._needed}",
            f"needs {self._needed}",
            "too small",
        )
        text = next((text for text in wordings if len(text) <= size.width), wordings[-1])
        return [[Segment(text[: size.width], self.palette.warning)]]
