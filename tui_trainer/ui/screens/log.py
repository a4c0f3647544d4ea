"""The log: what the script printed and what happened to the run, merged in time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol.formatting import count
from tui_trainer.ui.panels.base import placeholder_message
from tui_trainer.ui.panels.header import FactsLine
from tui_trainer.ui.panels.log import LogKind, LogModel, LogView
from tui_trainer.ui.screens.base import CONTROL_BINDINGS, DetailScreen
from tui_trainer.ui.widgets.caption import Placeholder
from tui_trainer.ui.widgets.search import SearchInput

KINDS: tuple[tuple[LogKind, str, str], ...] = (
    ("stdout", "o", "out"),
    ("stderr", "r", "err"),
    ("events", "v", "events"),
    ("clips", "c", "clips"),
)
"""Kind of line, the key that shows or hides it, and its name."""


class LogScreen(DetailScreen):
    """One list of lines that follows the run, filtered by kind and text."""

    CSS = """
    LogScreen #toggles { height: 1; margin: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
    LogScreen LogView { height: 1fr; padding: 0 0 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/", id="log.filter",
                tooltip="Show only lines that contain a text; escape clears it"),
        Binding("ctrl+f", "find", "Find", id="log.find",
                tooltip="Search for a text and mark every match"),
        Binding("f3", "find_again(False)", "Next", id="log.find_next", show=False,
                tooltip="Go to the next match"),
        Binding("shift+f3", "find_again(True)", "Previous", id="log.find_previous", show=False,
                tooltip="Go to the previous match"),
        Binding("f", "follow", "Follow", id="log.follow",
                tooltip="Follow new lines, or stop following"),
        Binding("o", "kind('stdout')", "stdout", id="log.stdout", show=False,
                tooltip="Show or hide stdout"),
        Binding("r", "kind('stderr')", "stderr", id="log.stderr", show=False,
                tooltip="Show or hide stderr"),
        Binding("v", "kind('events')", "Events", id="log.events", show=False,
                tooltip="Show or hide the events of the run"),
        Binding("c", "kind('clips')", "Clips", id="log.clips", show=False,
                tooltip="Show or hide clipped steps"),
        Binding("w", "worst", "Warnings", id="log.warnings", show=False,
                tooltip="Show only warnings and errors, or everything"),
        Binding("d", "since", "Time", id="log.time", show=False,
                tooltip="Show the time of day, or the time since the run started"),
        Binding("z", "wrap", "Wrap", id="log.wrap",
                tooltip="Wrap long lines, or cut them and scroll with left and right"),
        Binding("left", "shift(-1)", "Left", id="log.left", show=False,
                tooltip="Scroll long lines to the left"),
        Binding("right", "shift(1)", "Right", id="log.right", show=False,
                tooltip="Scroll long lines to the right"),
        Binding("escape", "clear", "Clear", id="log.clear", show=False,
                tooltip="Clear filter and search"),
        *CONTROL_BINDINGS,
    ]  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.lines = LogModel()
        self._toggles: tuple[tuple[str, str, str, bool], ...] = ()
        self._started_at: float | None = None
        self._run = ""

    def body(self) -> Iterable[Widget]:
        yield FactsLine()
        toggles = Static(id="toggles")
        toggles.auto_links = False  # links keep the colours that they are given
        yield toggles
        yield Placeholder()
        yield LogView(self.lines, id="lines")
        yield SearchInput("filter", id="filter")
        yield SearchInput("find", id="find")

    def on_mount(self) -> None:
        self.view.focus()

    @property
    def view(self) -> LogView:
        """The list of lines."""
        return self.query_one(LogView)

    def show_body(self, snapshot: Snapshot) -> None:
        self.query_one(FactsLine).show(snapshot)
        info = snapshot.info
        if info is not None and info.name != self._run:
            if self._run:  # the app shows another run now
                self.lines.__init__()  # type: ignore[misc]
            self._run, self._started_at = info.name, info.started_at or None
        first = self.lines.update(snapshot.log, snapshot.events, info)
        if first is not None:
            self.view.lines_changed(first)
        self._show_state(snapshot)

    def _show_state(self, snapshot: Snapshot) -> None:
        self._show_toggles()
        lines, placeholder = self.lines, self.query_one(Placeholder)
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

    def _show_toggles(self) -> None:
        """The state of each filter with its key, such as `o ● out 12  r ○ err 340`."""
        lines = self.lines
        toggles = [
            (f"kind('{kind}')", key, f"{name} {count(lines.counts[kind], 0)}", kind in lines.kinds)
            for kind, key, name in KINDS
        ]
        toggles.append(("follow", "f", "follow", self.view.follow))
        toggles.append(("worst", "w", "warn", lines.warnings_only))
        if lines.text:
            toggles.append(("clear", "/", f"filter “{lines.text}”", True))
        if tuple(toggles) == self._toggles:
            return
        self._toggles = tuple(toggles)
        content = Content("  ").join(
            Content.from_markup(
                f"[@click=screen.{action}][$accent]$key[/] [{'$foreground' if on else '$tt-dim'}]"
                f"{'●' if on else '○'} $text[/][/]",
                key=key,
                text=text,
            )
            for action, key, text, on in toggles
        )
        self.query_one("#toggles", Static).update(content, layout=False)

    # ------------------------------------------------------------ actions

    def action_filter(self) -> None:
        self.query_one("#filter", SearchInput).open()

    def action_find(self) -> None:
        self.query_one("#find", SearchInput).open()

    @on(Input.Changed, "#filter")
    def filter_typed(self, event: Input.Changed) -> None:
        """Filter as the text is typed."""
        self._filter(text=event.value)

    @on(Input.Changed, "#find")
    def search_typed(self, event: Input.Changed) -> None:
        """Go to the last match as the text is typed."""
        self.view.search_text = event.value
        start = (self.view.found or len(self.lines.shown)) + 1
        self.view.show_found(self.lines.find(event.value, start, backwards=True))

    def on_search_input_closed(self) -> None:
        self.view.focus()

    def action_find_again(self, backwards: bool) -> None:
        """Go to the next or previous match."""
        view = self.view
        start = view.found if view.found is not None else (0 if backwards else -1)
        view.show_found(self.lines.find(view.search_text, start, backwards))

    def action_follow(self) -> None:
        self.view.set_follow(not self.view.follow)

    def action_kind(self, kind: LogKind) -> None:
        """Show or hide a kind of line."""
        self._filter(kinds=self.lines.kinds ^ {kind})

    def action_worst(self) -> None:
        """Show only warnings and errors, or everything."""
        self._filter(warnings_only=not self.lines.warnings_only)

    def action_clear(self) -> None:
        """Clear filter and search."""
        for line in self.query(SearchInput):
            with self.prevent(Input.Changed):
                line.value = ""
        self.view.search_text = ""
        self._filter(text="", warnings_only=False)

    def action_since(self) -> None:
        """Switch between the time of day and the time since the start."""
        self.view.relative_to = self._started_at if self.view.relative_to is None else None
        self.view.lines_changed()

    def action_wrap(self) -> None:
        """Wrap long lines, or cut them."""
        self.view.toggle_wrap()

    def action_shift(self, by: int) -> None:
        """Scroll long lines sideways."""
        self.view.scroll_text(by)

    def _filter(
        self,
        *,
        kinds: frozenset[LogKind] | None = None,
        text: str | None = None,
        warnings_only: bool | None = None,
    ) -> None:
        self.lines.filter(kinds=kinds, text=text, warnings_only=warnings_only)
        self.view.found = None
        self.view.lines_changed()
        self._show_state(self.context.snapshot)

    def on_log_view_follow_changed(self) -> None:
        """Show whether the view follows new lines."""
        self._show_state(self.context.snapshot)
