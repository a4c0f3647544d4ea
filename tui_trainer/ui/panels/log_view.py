"""The merged log, drawn line by line: 5,000 lines cost what is in sight."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from textual.message import Message

from tui_trainer.ui import formatting
from tui_trainer.ui.panels.lines import Line, LinesView
from tui_trainer.ui.panels.log_model import STDERR, Entry, Log
from tui_trainer.ui.panels.plain import cut

TIME, STEP, TAG = 8, 7, 11
_LEVELS = {"error": "error", "warning": "warning"}


class LogView(LinesView):
    """Time, step, kind, text. Follows the end until scrolled away from it."""

    class Followed(Message):
        """Following was switched on or off, by key or by scrolling."""

    def __init__(self, log: Log, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.log_model = log
        self.follow = True
        self.since: float | None = None
        """Times are shown since this moment (seconds since the epoch); None: by the clock."""
        self.found: int | None = None
        """Place of the line that a search has found."""
        self.needle = ""
        self._shift = 0

    def count(self) -> int:
        """Lines that pass the filter."""
        return len(self.log_model.shown)

    def changed(self, first: int = 0) -> None:
        """New lines: follow them if asked."""
        super().changed(first)
        if self.follow:
            self.scroll_to(y=self.max_scroll_y, animate=False, immediate=True, force=True)

    def set_follow(self, follow: bool) -> None:
        """Follow the end, or stand still."""
        if follow != self.follow:
            self.follow = follow
            self.post_message(self.Followed())
        if follow:
            self.scroll_to(y=self.max_scroll_y, animate=False, immediate=True, force=True)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Scrolling up stops following; reaching the end takes it up again."""
        super().watch_scroll_y(old_value, new_value)
        at_end = new_value >= self.max_scroll_y
        if at_end != self.follow and (new_value < old_value or at_end):
            self.follow = at_end
            self.post_message(self.Followed())

    def shift(self, by: int) -> None:
        """Look further right (or back) in long lines, `by` half widths."""
        wanted = max(0, self._shift + by * (self._room() // 2))
        if wanted != self._shift:
            self._shift = wanted
            self.changed()

    def show_found(self, place: int | None) -> None:
        """Bring the line that a search has found into sight."""
        self.found = place
        if place is not None:
            self.set_follow(False)
            top = max(0, place - self.height // 2)
            self.scroll_to(y=top, animate=False, immediate=True, force=True)
        self.changed()

    # ------------------------------------------------------------ one line

    def _room(self) -> int:
        return max(10, self.width - TIME - STEP - TAG - 3)

    def line(self, index: int) -> Line:
        """One entry, cut to the width."""
        entry = self.log_model.shown[index]
        step = f"{entry.step:,}" if entry.step else ""
        strong = index == self.found
        level = _LEVELS.get(entry.level, "")
        tag = level or ("warning" if entry.kind == STDERR else "dim")
        return [
            (self._time(entry), "accent reverse" if strong else "faint"),
            (f" {step:>{STEP}} ", "dim"),
            (f"{cut(entry.tag, TAG - 1, self.glyphs.ellipsis):<{TAG}} ", tag),
            *self._marked(self._text(entry), level),
        ]

    def _text(self, entry: Entry) -> str:
        text = entry.text[self._shift :] if self._shift else entry.text
        return cut(text, self._room(), self.glyphs.ellipsis)

    def _time(self, entry: Entry) -> str:
        if self.since is not None:
            return formatting.duration(entry.time - self.since, TIME)
        try:
            return time.strftime("%H:%M:%S", time.localtime(entry.time))
        except (ValueError, OverflowError, OSError):  # no time at all: a damaged recording
            return " " * TIME

    def _marked(self, text: str, style: str) -> Iterator[tuple[str, str]]:
        """`text` with what is searched or filtered for in reverse video."""
        wanted = [re.escape(word) for word in (self.needle, self.log_model.text) if word]
        if not wanted:
            yield text, style
            return
        for place, piece in enumerate(re.split(f"({'|'.join(wanted)})", text, flags=re.IGNORECASE)):
            if piece:
                yield piece, "accent reverse" if place % 2 else style
