"""The line with the names of the screens."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import schema
from tui_trainer.protocol.events import Finding
from tui_trainer.ui.panels.base import Panel
from tui_trainer.ui.panels.findings import STYLES as FINDING_STYLES
from tui_trainer.ui.panels.findings import warnings_of
from tui_trainer.ui.screens import SCREENS, ScreenEntry, ScreenMode, app_context
from tui_trainer.ui.widgets.lines import Row, Span


class ScreenTabs(Panel):
    """The screens with their keys, the one in front highlighted; a click switches. The tab of the
    findings has their number, in the colour of the worst."""

    DEFAULT_CSS = "ScreenTabs { height: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self._ranges: list[tuple[int, int, ScreenMode]] = []
        """(start, stop, mode) of the cells of each tab."""
        self._warnings: Sequence[Finding] = ()

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.events is not self.snapshot.events:
            self._warnings = warnings_of(snapshot)
        super().show(snapshot)

    def rows(self, size: Size) -> Sequence[Row]:
        """One row, with titles as long as there is room for."""
        entries = [entry for entry in SCREENS if self._offered(entry)]
        titles = [entry.title for entry in entries]
        if sum(len(title) + 4 for title in titles) + 4 > size.width:
            titles = [entry.short_title or entry.title for entry in entries]
        if sum(len(title) + 4 for title in titles) + 4 > size.width:
            titles = [
                title if entry.mode == self.app.current_mode else ""
                for entry, title in zip(entries, titles, strict=True)
            ]
        spans: list[Span] = [(" ", "text")]
        self._ranges = []
        x = 1
        for entry, title in zip(entries, titles, strict=True):
            label = f" {title}" if title else ""
            if entry.mode == self.app.current_mode:
                pieces: list[Span] = [(f" {entry.key}{label} ", "current")]
            else:
                pieces = [(f" {entry.key}", "accent"), (f"{label} ", "dim")]
            if entry.mode == "findings" and self._warnings:
                number = f"{len(self._warnings)} "
                pieces.append((number, f"{FINDING_STYLES[self._warnings[0].level]} bold"))
            width = sum(len(text) for text, _ in pieces)
            self._ranges.append((x, x + width, entry.mode))
            x += width
            spans += pieces
        return [self.styled(spans)]

    def _offered(self, entry: ScreenEntry) -> bool:
        """Whether a screen has a tab. The help, the pages and the autograd graph have keys
        elsewhere, and a tab only while they are in front; a run of one process has no ranks."""
        if entry.mode in ("help", "learn", "autograd"):
            return self.app.current_mode == entry.mode
        if entry.mode == "ranks" and self.app.current_mode != "ranks":
            info = self.snapshot.info
            if info is None or not any(table.name == schema.RANKS for table in info.tables):
                return False
        return bool(self.app.check_action("go", (entry.mode,)))

    def on_click(self, event: events.Click) -> None:
        """Switch to the screen under the pointer."""
        for start, stop, mode in self._ranges:
            if start <= event.x < stop:
                app_context(self).action_go(mode)
