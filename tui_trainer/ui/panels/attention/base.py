"""The base class of the views of an examined attention layer, and the bars in their tables."""

from __future__ import annotations

from tui_trainer.protocol.attention import (
    AttentionExamination,
)
from tui_trainer.ui.widgets.lines import LineView


class ExaminationView(LineView):
    """Draws a part of an examination from its top."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.found: AttentionExamination | None = None

    def show_attention(self, found: AttentionExamination | None) -> None:
        self.found = found
        self.update_rows()


def bar(share: float, glyph: str, width: int) -> str:
    """A bar of at most `width` cells."""
    return glyph * round(min(share, 1.0) * width) if share > 0 else ""
