"""The log as one list in time: what the script printed and what happened to the run.

Kept apart from its view, so that merging and filtering are tested without a screen. A snapshot
holds the newest lines and events; `Log.take` picks those it has not seen, by their dense ids.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from textual.message import Message

from tui_trainer.protocol import formatting
from tui_trainer.protocol.messages import Clip, Event, LogLine, NonFinite, Notice
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import strip_escapes, truncate
from tui_trainer.ui.widgets.lines import Line, LinesView

STDOUT, STDERR, EVENTS, CLIPS = "stdout", "stderr", "events", "clips"
KINDS = (STDOUT, STDERR, EVENTS, CLIPS)
KEPT = 8_000

T = TypeVar("T", LogLine, Event)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of the merged log."""

    time: float
    step: int
    kind: str
    """One of `KINDS`."""
    tag: str
    """What it is, in at most ten letters: `stdout`, `clip`, `checkpoint`, …"""
    level: str
    """`info`, `warning` or `error`."""
    text: str
    order: int = field(default=0, compare=False)


def from_line(line: LogLine) -> LogEntry:
    """What the script printed."""
    stream = STDERR if line.stream == STDERR else STDOUT
    return LogEntry(line.time, line.step, stream, stream, "info", strip_escapes(line.text), line.id)


def from_event(event: Event, info: RunInfo | None) -> LogEntry:
    """What happened, in words."""
    if isinstance(event, Clip):
        return LogEntry(event.time, event.step, CLIPS, "clip", "info", _clip(event, info), event.id)
    if isinstance(event, NonFinite):
        where = f" in {event.parameter}" if event.parameter else ""
        text = f"{event.quantity} became {event.value}{where}{event.seen}"
        return LogEntry(event.time, event.step, EVENTS, "non-finite", "error", text, event.id)
    return _notice(event)


def _notice(event: Notice) -> LogEntry:
    text = strip_escapes(event.text.replace("\n", " · "))
    if event.who:
        text += f"  ({event.who})"
    tag = event.kind.replace("_", " ")
    return LogEntry(event.time, event.step, EVENTS, tag, event.level, text, event.id)


def _clip(event: Clip, info: RunInfo | None) -> str:
    how = "value" if event.kind == "value" else "norm"
    text = f"{how} {event.norm_before:.4g} over {event.max_norm:.4g}, scaled by {event.scale:.3g}"
    names = info.parameters if info else ()
    shares = [
        f"{names[place].name} {share:.0%}"
        for place, share in zip(event.parameters[:2], event.shares, strict=False)
        if place < len(names)
    ]
    return f"{text}: {', '.join(shares)}" if shares else text


class LogModel:
    """Entries in order of time, and the filtered view of them."""

    def __init__(self) -> None:
        self.entries: list[LogEntry] = []
        self.shown: list[LogEntry] = []
        self.counts = dict.fromkeys(KINDS, 0)
        self.kinds = frozenset((STDOUT, STDERR, EVENTS))
        """Clips are many: shown when asked for."""
        self.worst_only = False
        self.text = ""
        self._next_line = 0
        self._next_event = 0

    def take(
        self, lines: Sequence[LogLine], events: Sequence[Event], info: RunInfo | None
    ) -> int | None:
        """Take in what is new. Returns the first place of `shown` that changed, or None."""
        fresh = [from_line(line) for line in _unseen(lines, self._next_line)]
        fresh += [from_event(event, info) for event in _unseen(events, self._next_event)]
        if lines:
            self._next_line = max(self._next_line, lines[-1].id + 1)
        if events:
            self._next_event = max(self._next_event, events[-1].id + 1)
        if not fresh:
            return None
        for entry in fresh:
            self.counts[entry.kind] += 1
        fresh.sort(key=_when)
        _merge(self.entries, fresh)
        first = _merge(self.shown, [entry for entry in fresh if self.passes(entry)])
        return 0 if self._forget_oldest() else first

    def filter(
        self,
        *,
        kinds: Iterable[str] | None = None,
        text: str | None = None,
        worst_only: bool | None = None,
    ) -> None:
        """Change what is shown."""
        self.kinds = self.kinds if kinds is None else frozenset(kinds)
        self.text = self.text if text is None else text.casefold()
        self.worst_only = self.worst_only if worst_only is None else worst_only
        self.shown = [entry for entry in self.entries if self.passes(entry)]

    def passes(self, entry: LogEntry) -> bool:
        """Whether the filter lets `entry` through."""
        if self.worst_only and entry.level == "info":
            return False
        if entry.kind not in self.kinds:
            return False
        return not self.text or self.text in entry.text.casefold() or self.text in entry.tag

    def find(self, text: str, start: int, backwards: bool = False) -> int | None:
        """Place in `shown` of the next entry with `text` after `start`, going round at the ends."""
        needle, size = text.casefold(), len(self.shown)
        if not needle:
            return None
        places = range(1, size + 1)
        for step in places:
            place = (start - step if backwards else start + step) % size
            if needle in self.shown[place].text.casefold():
                return place
        return None

    def _forget_oldest(self) -> bool:
        extra = len(self.entries) - KEPT
        if extra <= KEPT // 8:
            return False
        gone = self.entries[extra - 1]
        del self.entries[:extra]
        del self.shown[: bisect_right(self.shown, _when(gone), key=_when)]
        return True


def _when(entry: LogEntry) -> tuple[float, str, int]:
    return entry.time, entry.kind, entry.order


def _unseen(items: Sequence[T], first: int) -> Sequence[T]:
    """The tail of `items`, whose ids grow, from id `first` on."""
    for back in count(1):
        if back > len(items) or items[-back].id < first:
            return items[len(items) - back + 1 :]
    return ()


def _merge(into: list[LogEntry], fresh: list[LogEntry]) -> int | None:
    """Merge sorted `fresh` into sorted `into`; the first place that changed."""
    if not fresh:
        return None
    place = bisect_right(into, _when(fresh[0]), key=_when)
    tail = into[place:]
    del into[place:]
    into += sorted([*tail, *fresh], key=_when) if tail else fresh
    return place


# ---- log_view
# The merged log, drawn line by line: 5,000 lines cost what is in sight.


TIME, STEP, TAG = 8, 7, 11
_LEVELS = {"error": "error", "warning": "warning"}


class LogView(LinesView):
    """Time, step, kind, text. Follows the end until scrolled away from it."""

    class Followed(Message):
        """Following was switched on or off, by key or by scrolling."""

    def __init__(self, log: LogModel, *, id: str | None = None) -> None:
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
            (f"{truncate(entry.tag, TAG - 1, self.glyphs.ellipsis):<{TAG}} ", tag),
            *self._marked(self._text(entry), level),
        ]

    def _text(self, entry: LogEntry) -> str:
        text = entry.text[self._shift :] if self._shift else entry.text
        return truncate(text, self._room(), self.glyphs.ellipsis)

    def _time(self, entry: LogEntry) -> str:
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
