"""What the script printed and what happened to the run, merged in time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widget import Widget

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.formatting import count
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.header import FactsLine
from tui_trainer.ui.panels.log import Kind, LogModel, LogView
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.form import Chip, Chips, PromptLine
from tui_trainer.ui.widgets.text import Placeholder

_KIND_KEYS: tuple[tuple[Kind, str, str], ...] = (
    ("stdout", "o", "out"),
    ("stderr", "r", "err"),
    ("events", "v", "events"),
    ("clips", "c", "clips"),
)


class LogScreen(DetailScreen):
    """One list, filtered by kind and text, that follows the run."""

    CSS = """
    LogScreen Chips { margin: 0 1; }
    LogScreen LogView { height: 1fr; padding: 0 0 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/", id="log.filter",
                tooltip="Show only lines with a text; escape clears it"),
        Binding("ctrl+f", "find", "Find", id="log.find",
                tooltip="Search a text: every place is marked"),
        Binding("f3", "find_again(False)", "Next", id="log.find_next", show=False,
                tooltip="Go to the next place found"),
        Binding("shift+f3", "find_again(True)", "Previous", id="log.find_previous", show=False,
                tooltip="Go to the place found before"),
        Binding("f", "follow", "Follow", id="log.follow",
                tooltip="Follow new lines, or stand still"),
        Binding("o", "kind('stdout')", "stdout", id="log.stdout", show=False,
                tooltip="Show or hide what was printed"),
        Binding("r", "kind('stderr')", "stderr", id="log.stderr", show=False,
                tooltip="Show or hide what was printed to stderr"),
        Binding("v", "kind('events')", "Events", id="log.events", show=False,
                tooltip="Show or hide what happened to the run"),
        Binding("c", "kind('clips')", "Clips", id="log.clips", show=False,
                tooltip="Show or hide every step that was clipped"),
        Binding("w", "worst", "Warnings", id="log.warnings", show=False,
                tooltip="Show only warnings and errors, or everything"),
        Binding("T", "since", "Time", id="log.time", show=False,
                tooltip="Times by the clock, or since the start of the run"),
        Binding("left", "shift(-1)", "Left", id="log.left", show=False,
                tooltip="Look further left in long lines"),
        Binding("right", "shift(1)", "Right", id="log.right", show=False,
                tooltip="Look further right in long lines"),
        Binding("escape", "clear", "Clear", id="log.clear", show=False,
                tooltip="Clear filter and search"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.lines = LogModel()
        self._started_at: float | None = None
        self._run = ""

    def body(self) -> Iterable[Widget]:
        """What there is to know of the data; switches, lines, prompt, keys."""
        yield FactsLine()
        yield Chips()
        yield Placeholder()
        yield LogView(self.lines, id="lines")
        yield PromptLine()

    def on_mount(self) -> None:
        """Keys go to the lines."""
        self.view.focus()

    @property
    def view(self) -> LogView:
        """The lines."""
        return self.query_one(LogView)

    def show_body(self, snapshot: Snapshot) -> None:
        """Take in what is new."""
        self.query_one(FactsLine).show(snapshot)
        info = snapshot.info
        if info is not None and info.name != self._run:
            if self._run:  # the app was attached to another run
                self.lines.__init__()  # type: ignore[misc]
            self._run, self._started_at = info.name, info.started_at or None
        first = self.lines.update(snapshot.log, snapshot.events, info)
        if first is not None:
            self.view.lines_changed(first)
        self._show_state(snapshot)

    def _show_state(self, snapshot: Snapshot) -> None:
        lines = self.lines
        chips = [
            Chip(kind, key, f"{name} {count(lines.counts[kind], 0)}", kind in lines.kinds)
            for kind, key, name in _KIND_KEYS
        ]
        chips.append(Chip("follow", "f", "follow", self.view.follow))
        chips.append(Chip("worst", "w", "warnings", lines.warnings_only))
        if lines.text:
            chips.append(Chip("filter", "/", f"filter “{lines.text}”", True))
        self.query_one(Chips).show_chips(tuple(chips))
        placeholder = self.query_one(Placeholder)
        if lines.shown:
            placeholder.set_message("")
        elif lines.entries:
            hidden = len(lines.entries)
            placeholder.set_message(
                f"{hidden:,} lines are hidden", "escape clears the filter; o r v c: kinds"
            )
        else:
            placeholder.set_message(*placeholder_message(snapshot, "nothing was printed yet"))
        self.view.display = bool(lines.shown)

    # ------------------------------------------------------------ actions

    def action_filter(self) -> None:
        """Type a filter."""
        self.query_one(PromptLine).ask("filter", "filter")

    def action_find(self) -> None:
        """Type what to search."""
        self.query_one(PromptLine).ask("find", "find")

    def on_prompt_line_typed(self, event: PromptLine.Typed) -> None:
        """Filter and search act as they are typed."""
        if event.purpose == "filter":
            self._refilter(text=event.text)
        else:
            self._find(event.text)
        if event.done:
            self.view.focus()

    def _find(self, text: str) -> None:
        self.view.search_text = text
        start = (self.view.found or len(self.lines.shown)) + 1
        self.view.show_found(self.lines.find(text, start, backwards=True))

    def action_find_again(self, backwards: bool) -> None:
        """The next place, or the one before."""
        view = self.view
        start = view.found if view.found is not None else (0 if backwards else -1)
        view.show_found(self.lines.find(view.search_text, start, backwards))

    def action_follow(self) -> None:
        """Follow, or stand still."""
        self.view.set_follow(not self.view.follow)

    def action_kind(self, kind: Kind) -> None:
        """Show or hide a kind."""
        self._refilter(kinds=self.lines.kinds ^ {kind})

    def action_worst(self) -> None:
        """Only warnings and errors, or everything."""
        self._refilter(warnings_only=not self.lines.warnings_only)

    def action_clear(self) -> None:
        """Everything is shown again."""
        self.query_one(PromptLine).clear("filter")
        self.view.search_text = ""
        self.view.found = None
        self._refilter(text="", warnings_only=False)

    def action_since(self) -> None:
        """The other kind of time."""
        self.view.relative_to = self._started_at if self.view.relative_to is None else None
        self.view.lines_changed()

    def action_shift(self, by: int) -> None:
        """Right or left in long lines."""
        self.view.scroll_text(by)

    def _refilter(
        self,
        *,
        kinds: frozenset[Kind] | None = None,
        text: str | None = None,
        warnings_only: bool | None = None,
    ) -> None:
        self.lines.filter(kinds=kinds, text=text, warnings_only=warnings_only)
        self.view.found = None
        self.view.lines_changed()
        self._show_state(self.context.snapshot)

    def on_log_view_follow_changed(self) -> None:
        """Show whether it follows."""
        self._show_state(self.context.snapshot)

    def on_chips_pressed(self, event: Chips.Pressed) -> None:
        """As the key."""
        match event.name:
            case "worst":
                self.action_worst()
            case "follow":
                self.action_follow()
            case "filter":
                self.action_clear()
            case "stdout" | "stderr" | "events" | "clips" as kind:
                self.action_kind(kind)
