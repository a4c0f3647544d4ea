"""What a language model made of its prompt, newest first, the prompt marked."""

from __future__ import annotations

from collections.abc import Sequence

from tui_trainer.protocol.messages import TextSample
from tui_trainer.ui.panels.lines import Line, LinesView
from tui_trainer.ui.panels.plain import wrap

COMFORTABLE = 100
"""Longer rows are hard to read, however wide the terminal."""


class Continuations(LinesView):
    """Samples under each other, each with the step at which it was drawn."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.samples: tuple[TextSample, ...] = ()
        self._rows: list[Line] = []

    def show_samples(self, samples: Sequence[TextSample]) -> None:
        """Show `samples` (oldest first, as they came); nothing is done when they are shown."""
        newest_first = tuple(reversed(samples))
        if newest_first != self.samples:
            self.samples = newest_first
            self.changed()

    def changed(self, first: int = 0) -> None:
        """Lay the texts out for the present width."""
        self._rows = self._lay_out(min(self.width, COMFORTABLE))
        super().changed(first)

    def count(self) -> int:
        """Rows of all samples."""
        return len(self._rows)

    def line(self, index: int) -> Line:
        """One row of a sample."""
        return self._rows[index]

    def _lay_out(self, width: int) -> list[Line]:
        rows: list[Line] = []
        for place, sample in enumerate(self.samples):
            title = f"step {sample.step:,}" + ("  newest" if place == 0 else "")
            name = "accent bold" if place == 0 else "title"
            rest = " " + self.glyphs.rule * max(0, width - len(title) - 1)
            rows.append([(title, name), (rest, "faint")])
            rows += self._text(sample, width)
            rows.append([])
        return rows[:-1]

    def _text(self, sample: TextSample, width: int) -> list[Line]:
        """Rows of prompt and continuation, some of which hold the end of the one and the start of
        the other. A sampled text may or may not repeat its prompt."""
        body = sample.text
        if sample.prompt and body.startswith(sample.prompt):
            body = body[len(sample.prompt) :]
        prompt = wrap(sample.prompt, width) if sample.prompt.strip() else []
        if not prompt:
            return [[(row, "")] for row in wrap((sample.prompt + body).strip("\n"), width)]
        *whole, last = prompt
        rows: list[Line] = [[(row, "accent bold underline")] for row in whole]
        joined = wrap(last + body, width)
        for row in joined:
            known = min(len(last), len(row))
            rows.append([(row[:known], "accent bold underline"), (row[known:], "")])
            last = last[known:].lstrip(" ") if known < len(last) else ""
        return rows
