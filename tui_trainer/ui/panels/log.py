"""The log: what the script printed and what happened to the run, as one filtered list in order of
time.

`LogModel` is kept apart from its view, so that merging and filtering are tested without a screen.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from textual.message import Message

from tui_trainer.protocol import formatting
from tui_trainer.protocol.events import (
    Clip,
    Event,
    Finding,
    Level,
    LogLine,
    NonFinite,
    Notice,
    Skipped,
)
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import strip_escapes, truncate, wrap
from tui_trainer.ui.widgets.lines import Row, ScrollingLines, Span

LogKind = Literal["stdout", "stderr", "events", "clips"]
KINDS: tuple[LogKind, ...] = get_args(LogKind)
MAX_ENTRIES = 8_000
"""Approximate number of entries that are kept; the oldest are dropped an eighth at a time."""
MAX_CLIP_SHARES = 2

T = TypeVar("T", LogLine, Event)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of the log."""

    time: float
    step: int
    kind: LogKind
    tag: str
    """Kind of the entry in at most ten letters: `stdout`, `clip`, `checkpoint`, …"""
    level: Level
    text: str
    id: int = field(default=0, compare=False)


def entry_of_line(line: LogLine) -> LogEntry:
    """The entry of a line that the script printed."""
    text = strip_escapes(line.text)
    return LogEntry(line.time, line.step, line.stream, line.stream, "info", text, line.id)


def entry_of_event(event: Event, info: RunInfo | None) -> LogEntry:
    """The entry of an event, in words."""
    if isinstance(event, Clip):
        text = _clip_text(event, info)
        return LogEntry(event.time, event.step, "clips", "clip", "info", text, event.id)
    if isinstance(event, NonFinite):
        return LogEntry(
            event.time, event.step, "events", "non-finite", "error", event.text, event.id
        )
    if isinstance(event, Skipped):
        text = f"before step {event.step:,}: {event.text}"
        return LogEntry(event.time, event.step, "events", "skipped", "warning", text, event.id)
    if isinstance(event, Finding):
        text = f"{event.title}: {event.text}"
        return LogEntry(event.time, event.step, "events", "finding", event.level, text, event.id)
    return _notice_entry(event)


def _notice_entry(event: Notice) -> LogEntry:
    text = strip_escapes(event.text.replace("\n", " · "))
    if event.who:
        text += f"  ({event.who})"
    tag = event.kind.replace("_", " ")
    return LogEntry(event.time, event.step, "events", tag, event.level, text, event.id)


def _clip_text(event: Clip, info: RunInfo | None) -> str:
    """`norm 3.2 over 1, scaled by 0.31: blocks.0.mlp.weight 60%, …`"""
    text = (
        f"{event.kind} {event.norm_before:.4g} over {event.max_norm:.4g}, "
        f"scaled by {event.scale:.3g}"
    )
    parameters = info.parameters if info else ()
    shares = [
        f"{parameters[index].name} {share:.0%}"
        for index, share in zip(event.parameters[:MAX_CLIP_SHARES], event.shares, strict=False)
        if index < len(parameters)
    ]
    return f"{text}: {', '.join(shares)}" if shares else text


class LogModel:
    """Entries in order of time, and the entries that pass the filter."""

    def __init__(self) -> None:
        self.entries: list[LogEntry] = []
        self.shown: list[LogEntry] = []
        self.counts: dict[LogKind, int] = dict.fromkeys(KINDS, 0)
        self.kinds: frozenset[LogKind] = frozenset(("stdout", "stderr", "events"))
        """Kinds that pass the filter. Clips are hidden at first, since there may be many."""
        self.warnings_only = False
        self.text = ""
        self._next_line = 0
        self._next_event = 0

    def update(
        self, lines: Sequence[LogLine], events: Sequence[Event], info: RunInfo | None
    ) -> int | None:
        """Add the lines and events that are new, by their ids. Returns the first index of `shown`
        that changed, or None."""
        new = [entry_of_line(line) for line in _from_id(lines, self._next_line)]
        new += [entry_of_event(event, info) for event in _from_id(events, self._next_event)]
        if lines:
            self._next_line = max(self._next_line, lines[-1].id + 1)
        if events:
            self._next_event = max(self._next_event, events[-1].id + 1)
        if not new:
            return None
        for entry in new:
            self.counts[entry.kind] += 1
        new.sort(key=_order)
        _merge(self.entries, new)
        first_changed = _merge(self.shown, [entry for entry in new if self.passes(entry)])
        return 0 if self._drop_oldest() else first_changed

    def filter(
        self,
        *,
        kinds: Iterable[LogKind] | None = None,
        text: str | None = None,
        warnings_only: bool | None = None,
    ) -> None:
        """Change what is shown; None leaves a criterion as it is."""
        self.kinds = self.kinds if kinds is None else frozenset(kinds)
        self.text = self.text if text is None else text.casefold()
        self.warnings_only = self.warnings_only if warnings_only is None else warnings_only
        self.shown = [entry for entry in self.entries if self.passes(entry)]

    def passes(self, entry: LogEntry) -> bool:
        """Whether an entry passes the filter."""
        if self.warnings_only and entry.level == "info":
            return False
        if entry.kind not in self.kinds:
            return False
        return not self.text or self.text in entry.text.casefold() or self.text in entry.tag

    def find(self, text: str, start: int, backwards: bool = False) -> int | None:
        """Index in `shown` of the next entry after `start` that contains `text`; the search wraps
        around at the end."""
        needle, count = text.casefold(), len(self.shown)
        if not needle:
            return None
        for distance in range(1, count + 1):
            index = (start - distance if backwards else start + distance) % count
            if needle in self.shown[index].text.casefold():
                return index
        return None

    def _drop_oldest(self) -> bool:
        excess = len(self.entries) - MAX_ENTRIES
        if excess <= MAX_ENTRIES // 8:
            return False
        newest_dropped = _order(self.entries[excess - 1])
        del self.entries[:excess]
        del self.shown[: bisect_right(self.shown, newest_dropped, key=_order)]
        return True


def _order(entry: LogEntry) -> tuple[float, str, int]:
    return entry.time, entry.kind, entry.id


def _from_id(items: Sequence[T], first: int) -> Sequence[T]:
    """The items with an id of at least `first`; `items` are in order of their ids."""
    return items[bisect_right(items, first - 1, key=lambda item: item.id) :]


def _merge(entries: list[LogEntry], new: list[LogEntry]) -> int | None:
    """Merge sorted entries into `entries`; returns the first index that changed, None for none."""
    if not new:
        return None
    index = bisect_right(entries, _order(new[0]), key=_order)
    tail = entries[index:]
    entries[index:] = sorted([*tail, *new], key=_order) if tail else new
    return index


TIME_WIDTH, STEP_WIDTH, TAG_WIDTH = 8, 7, 11
MIN_TEXT_WIDTH = 10
MAX_WRAPPED_LINES = 12
"""Maximum number of lines of one entry; `tui-trainer logs` prints longer ones in full."""


class LogView(ScrollingLines):
    """Time, step, tag and text of each entry. It follows the end until it is scrolled up."""

    class FollowChanged(Message):
        """Following was switched on or off, with a key or by scrolling."""

    def __init__(self, model: LogModel, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.model = model
        self.follow = True
        self.relative_to: float | None = None
        """Times are shown since this moment (seconds since the epoch); None: by the clock."""
        self.found: int | None = None
        """Index of the line that a search has found."""
        self.search_text = ""
        self.wraps = True
        """Whether texts that are longer than their column continue on the next lines."""
        self._places: list[tuple[int, int, str]] = []
        """For each line: (index of its entry in `shown`, number of the line within the entry,
        text)."""
        self._wrapped_at = 0
        """The width of the column when `_places` was made."""
        self._text_offset = 0
        """Characters of the texts that are scrolled out to the left, where they do not wrap."""

    def line_count(self) -> int:
        """Lines of the entries that pass the filter."""
        return len(self._places)

    def lines_changed(self, first: int = 0) -> None:
        """Lay out the entries from `first` on again, and scroll to the end when following."""
        width = self._text_width()
        if width != self._wrapped_at:
            self._wrapped_at, first = width, 0
        line = bisect_left(self._places, (first,))
        del self._places[line:]
        for index in range(first, len(self.model.shown)):
            text = self.model.shown[index].text
            if not self.wraps or len(text) <= width:
                self._places.append((index, 0, text))
                continue
            lines = wrap(text[: MAX_WRAPPED_LINES * width], width)
            if len(text) > MAX_WRAPPED_LINES * width:
                lines[-1] = truncate(f"{lines[-1]}{text[-width:]}", width, self.glyphs.ellipsis)
            self._places += [(index, number, part) for number, part in enumerate(lines)]
        super().lines_changed(line)
        if self.follow:
            self._scroll_to_line(self.max_scroll_y)

    def set_follow(self, follow: bool) -> None:
        """Follow new lines, or stay where the view is."""
        if follow != self.follow:
            self.follow = follow
            self.post_message(self.FollowChanged())
        if follow:
            self._scroll_to_line(self.max_scroll_y)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Scrolling up stops following; reaching the end resumes it."""
        super().watch_scroll_y(old_value, new_value)
        at_end = new_value >= self.max_scroll_y
        if at_end != self.follow and (new_value < old_value or at_end):
            self.follow = at_end
            self.post_message(self.FollowChanged())

    def toggle_wrap(self) -> None:
        """Wrap long texts, or cut them."""
        self.wraps, self._text_offset = not self.wraps, 0
        self.lines_changed()

    def scroll_text(self, by: int) -> None:
        """Show long texts further right, or further left, by half of their column."""
        if self.wraps:
            return
        offset = max(0, self._text_offset + by * (self._text_width() // 2))
        if offset != self._text_offset:
            self._text_offset = offset
            self.lines_changed()

    def show_found(self, index: int | None) -> None:
        """Scroll to the line that a search has found."""
        self.found = index
        if index is not None:
            self.set_follow(False)
            line = bisect_left(self._places, (index,))
            self._scroll_to_line(max(0, line - self.view_size.height // 2))
        self.lines_changed()

    def _scroll_to_line(self, y: int) -> None:
        self.scroll_to(y=y, animate=False, immediate=True, force=True)

    def _text_width(self) -> int:
        return max(MIN_TEXT_WIDTH, self.view_size.width - TIME_WIDTH - STEP_WIDTH - TAG_WIDTH - 3)

    def line(self, index: int) -> Row:
        """One entry, or a further part of its text."""
        index, part, text = self._places[index]
        entry = self.model.shown[index]
        text = truncate(text[self._text_offset :], self._text_width(), self.glyphs.ellipsis)
        if part:
            level_style = "text" if entry.level == "info" else entry.level
            margin = " " * (TIME_WIDTH + STEP_WIDTH + TAG_WIDTH + 3)
            return self.styled([(margin, "text"), *self._highlighted(text, level_style)])
        step = f"{entry.step:,}" if entry.step else ""
        level_style = "text" if entry.level == "info" else entry.level
        stderr_style = "warning" if entry.kind == "stderr" else "dim"
        tag_style = stderr_style if entry.level == "info" else level_style
        tag = truncate(entry.tag, TAG_WIDTH - 1, self.glyphs.ellipsis)
        return self.styled(
            [
                (self._time(entry), "accent reverse" if index == self.found else "dim"),
                (f" {step:>{STEP_WIDTH}} ", "dim"),
                (f"{tag:<{TAG_WIDTH}} ", tag_style),
                *self._highlighted(text, level_style),
            ]
        )

    def _time(self, entry: LogEntry) -> str:
        if self.relative_to is not None:
            return formatting.duration(entry.time - self.relative_to, TIME_WIDTH)
        try:
            return time.strftime("%H:%M:%S", time.localtime(entry.time))
        except (ValueError, OverflowError, OSError):  # a damaged recording
            return " " * TIME_WIDTH

    def _highlighted(self, text: str, style: str) -> Iterator[Span]:
        """`text` with the matches of the search and of the filter in reverse video."""
        wanted = [re.escape(word) for word in (self.search_text, self.model.text) if word]
        if not wanted:
            yield text, style
            return
        pieces = re.split(f"({'|'.join(wanted)})", text, flags=re.IGNORECASE)
        for number, piece in enumerate(pieces):
            yield piece, "accent reverse" if number % 2 else style
