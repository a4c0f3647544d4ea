"""The log as one list in time: what the script printed and what happened to the run.

Kept apart from its view, so that merging and filtering are tested without a screen. A snapshot
holds the newest lines and events; `Log.take` picks those it has not seen, by their dense ids.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import Clip, Event, LogLine, NonFinite, Notice
from tui_trainer.ui.panels.plain import clean

STDOUT, STDERR, EVENTS, CLIPS = "stdout", "stderr", "events", "clips"
KINDS = (STDOUT, STDERR, EVENTS, CLIPS)
KEPT = 8_000

T = TypeVar("T", LogLine, Event)


@dataclass(frozen=True, slots=True)
class Entry:
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


def from_line(line: LogLine) -> Entry:
    """What the script printed."""
    stream = STDERR if line.stream == STDERR else STDOUT
    return Entry(line.time, line.step, stream, stream, "info", clean(line.text), line.id)


def from_event(event: Event, info: RunInfo | None) -> Entry:
    """What happened, in words."""
    if isinstance(event, Clip):
        return Entry(event.time, event.step, CLIPS, "clip", "info", _clip(event, info), event.id)
    if isinstance(event, NonFinite):
        where = f" in {event.parameter}" if event.parameter else ""
        text = f"{event.quantity} became {event.value}{where}{event.seen}"
        return Entry(event.time, event.step, EVENTS, "non-finite", "error", text, event.id)
    return _notice(event)


def _notice(event: Notice) -> Entry:
    text = clean(event.text.replace("\n", " · "))
    if event.who:
        text += f"  ({event.who})"
    tag = event.kind.replace("_", " ")
    return Entry(event.time, event.step, EVENTS, tag, event.level, text, event.id)


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


class Log:
    """Entries in order of time, and the filtered view of them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.shown: list[Entry] = []
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

    def passes(self, entry: Entry) -> bool:
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


def _when(entry: Entry) -> tuple[float, str, int]:
    return entry.time, entry.kind, entry.order


def _unseen(items: Sequence[T], first: int) -> Sequence[T]:
    """The tail of `items`, whose ids grow, from id `first` on."""
    for back in count(1):
        if back > len(items) or items[-back].id < first:
            return items[len(items) - back + 1 :]
    return ()


def _merge(into: list[Entry], fresh: list[Entry]) -> int | None:
    """Merge sorted `fresh` into sorted `into`; the first place that changed."""
    if not fresh:
        return None
    place = bisect_right(into, _when(fresh[0]), key=_when)
    tail = into[place:]
    del into[place:]
    into += sorted([*tail, *fresh], key=_when) if tail else fresh
    return place
