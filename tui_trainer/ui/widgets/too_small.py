"""What stands in place of a screen that has no room."""

from __future__ import annotations

from collections.abc import Sequence

from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.ui.widgets.lines import Lines, Row


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
