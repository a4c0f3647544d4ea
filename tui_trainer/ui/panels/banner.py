"""One line across the screen when the run has ended, crashed, or cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.session.api import Snapshot
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.widgets.lines import Row

BOLD = Style(bold=True)


class Banner(Panel):
    """Hidden while all is well. The history stays visible below it."""

    DEFAULT_CSS = """
    Banner { height: 1; display: none; }
    Banner.-shown { display: block; }
    Banner.-hinted { height: 2; }
    """

    def show(self, snapshot: Snapshot) -> None:
        """Appear when there is something to say."""
        self.snapshot = snapshot
        kind, _, hint = self._said()
        self.set_class(bool(kind), "-shown")
        self.set_class(bool(hint), "-hinted")
        self.update_rows()

    def _said(self) -> tuple[str, str, str]:
        """(kind, what happened, what to do)."""
        status, link = self.snapshot.status, self.snapshot.link
        if link.state == "replay" and link.message:  # how the run ended, the header has too
            return "warning", link.message, link.hint
        if status.state == "crashed" and status.refused:
            return "error", f"could not start: {status.reason}", status.hint
        if status.state == "crashed":
            return "error", f"crashed at step {status.step:,}: {status.reason}", status.hint
        if status.ended:
            reason = f": {status.reason}" if status.reason else ""
            return "end", f"{status.state} after {status.step:,} steps{reason}", status.hint
        if link.state == "lost":
            return "warning", link.message or "connection lost", link.hint
        if link.state == "closed":
            return "error", link.message or "the connection was closed", link.hint
        if status.recording:
            return "warning", status.recording, ""
        return "", "", ""

    def _cut(self, text: str, room: int) -> str:
        """A sentence is told from its beginning."""
        return text if len(text) <= room else f"{text[: max(0, room - 1)]}{self.glyphs.ellipsis}"

    def rows(self, size: Size) -> Sequence[Row]:
        """The sentence, and the hint below it."""
        kind, text, hint = self._said()
        palette = self.palette
        style = {"error": palette.error, "warning": palette.warning}.get(kind, palette.accent)
        sign = self.glyphs.ended if kind == "end" else self.glyphs.failed
        # An error's first line is what a person must read; the log has the rest.
        first = text.splitlines()[0] if text else ""
        room = size.width - 4
        rows: list[Row] = [[Segment(f" {sign} {self._cut(first, room)}", style + BOLD)]]
        if hint:
            rows.append([Segment(f"   {self._cut(' '.join(hint.split()), room)}", palette.dim)])
        return rows
