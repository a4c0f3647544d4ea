"""The two lines at the top: which run this is and how it is, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.protocol import formatting as f
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.panels.base import Item, Panel
from tui_trainer.ui.widgets.lines import DrawingContext, Row

WIDE = 120
"""Columns from which the budget stands beside an own cost that exceeds it."""
OVER = 1.1
"""Times the budget: less is no excess, but the swing of a cost that is kept at it."""
FAR_OVER = 5.0
"""Times the budget: what deserves a warning colour. Steps of a few milliseconds are always over,
and nobody wants to look at a warning all day that only says so."""


class HeaderLine(Panel):
    """Title, name, state, what the run is doing or why it stands still; device and link at the
    right."""

    DEFAULT_CSS = "HeaderLine { height: 1; }"

    def rows(self, size: Size) -> Sequence[Row]:
        """One row. Where there is little room the device goes first, then the name, and last the
        words that say what the run does; title, state and link stay."""
        info, palette = self.snapshot.info, self.palette
        title = (info.title or info.name) if info else "tui-trainer"
        sign, word, style = self._state()
        state = f"{sign} {word:<8}"
        about = self._about()
        left = size.width - 2 - len(title) - 2 - len(state)
        link, link_style = self._link()
        left -= len(link)
        said = len(about) + 2 if about else 0
        name = self._run_name(left - min(said, 24))
        left -= len(name)
        facts = self._facts(left - max(said, 2), size.width >= WIDE)
        used = sum(len(segment.text) for segment in facts)
        about = truncate_middle(about, max(0, left - used - 2), self.glyphs.ellipsis)
        gap = max(1, left - used - len(about))
        return [
            [
                Segment(f" {title}", palette.strong),
                Segment(name, palette.dim),
                Segment("  ", palette.text),
                Segment(state, style),
                Segment(f" {about}", palette.text),
                Segment(" " * (gap - 1), palette.text),
                *facts,
                Segment(f"{link} ", link_style),
            ]
        ]

    def _run_name(self, room: int) -> str:
        """What to call the run by, for `tui-trainer attach`; unless the title says it."""
        info = self.snapshot.info
        if info is None or not info.name or info.name == info.title:
            return ""
        whole = f"  {info.name}"
        if len(whole) <= room:
            return whole
        return (
            f"  {truncate_middle(info.name, room - 2, self.glyphs.ellipsis)}" if room >= 14 else ""
        )

    def _state(self) -> tuple[str, str, Style]:
        status, link, palette, glyphs = (
            self.snapshot.status,
            self.snapshot.link,
            self.palette,
            self.glyphs,
        )
        if status.state == "crashed":
            return glyphs.failed, "crashed", palette.error
        if status.ended:
            return glyphs.ended, status.state, palette.accent
        if link.state in ("lost", "closed"):
            return glyphs.failed, "no link", palette.error
        if status.state == "paused":
            return glyphs.paused, "paused", palette.warning
        if status.state == "running":
            return glyphs.running, "running", palette.good
        return glyphs.waiting, status.state, palette.dim

    def _about(self) -> str:
        status = self.snapshot.status
        if said := cast("DrawingContext", self.app).status_message:
            return said
        if status.state == "paused":
            return f"after {status.phase}" if status.phase else status.reason
        if status.state == "starting":
            return status.waiting_for
        if status.run_to is not None and not status.ended:
            return f"to step {status.run_to:,}"
        if status.throttle is not None and not status.ended:
            return f"at most {status.throttle:g} steps/s"
        return ""

    def _memory(self) -> float | None:
        """Bytes on the accelerator, or of the training process where there is none."""
        history = self.snapshot.history.table(schema.MEMORY)
        latest = history.latest() if history is not None else None
        if latest is None:
            return None
        device, _, host = (float(value) for value in latest[1][:3])
        return device if device == device else host

    def _link(self) -> tuple[str, Style]:
        link = self.snapshot.link
        latency = f" {link.latency_ms:.0f} ms" if link.latency_ms and link.latency_ms >= 1 else ""
        style = self.palette.error if link.state in ("lost", "closed") else self.palette.dim
        if link.state == "closed" and self.snapshot.status.ended:
            style = self.palette.dim  # nothing is wrong: the run is over
        slow = " slow link" if cast("DrawingContext", self.app).link.slow else ""
        if link.state == "live" and link.message:  # nothing has come for a while
            return f"{link.message}{slow}", self.palette.warning
        return f"{self._role()}{slow}{latency}", style

    def _role(self) -> str:
        """Whether this screen steers: worth a word where there is more than one."""
        link, status = self.snapshot.link, self.snapshot.status
        if link.read_only:
            return "watching only"
        if link.state != "live" or status.controller is None or len(status.viewers) < 2:
            return link.state
        return "in control" if status.controller == link.viewer_id else "watching"

    def _facts(self, room: int, wide: bool) -> Row:
        """Device, memory and own cost, as many as fit: those that matter least go first."""
        info, dot = self.snapshot.info, f" {self.glyphs.separator} "
        facts: list[tuple[int, str]] = []
        style = self.palette.dim
        if info and info.device:
            device = info.device
            facts.append((3, device.kind))
            facts.append((5 if device.kind == "cpu" else 2, device.name))
            if device.threads:
                facts.append((4, f"{device.threads} thread{'' if device.threads == 1 else 's'}"))
        if (memory := self._memory()) is not None:
            facts.append((1, f.bytes_(memory, 0)))
        if (share := self.snapshot.status.cost_share) is not None:
            cost, budget = f"own cost {f.percent(share, 0, 2)}", info.budget if info else 0.0
            if 0 < budget * OVER < share:
                style = self.palette.warning if share > FAR_OVER * budget else self.palette.text
                cost += f" of {100 * budget:.3g}%" if wide else ""
            facts.append((0, cost))
        while facts and len(dot.join(text for _, text in facts)) + len(dot) > room:
            facts.remove(max(facts))
        row: Row = []
        for place, text in facts:
            row.append(Segment(text, self.palette.dim if place else style))
            row.append(Segment(dot, self.palette.dim))
        return row


class ProgressLine(Panel):
    """A bar and the figures: step, epoch, speed, elapsed and remaining time, memory, own cost."""

    DEFAULT_CSS = "ProgressLine { height: 1; }"

    def rows(self, size: Size) -> Sequence[Row]:
        """One row; the figures that matter least go first when there is no room."""
        palette = self.palette
        items = self._items()
        minimum = 12
        row: Row = []
        left = size.width - 2 - minimum
        for label, value, style in items:
            cost = len(label) + len(value) + 3
            if cost > left:
                break
            row += (
                Segment("  ", palette.text),
                Segment(value, style),
                Segment(f" {label}" if label else "", palette.dim),
            )
            left -= cost - (0 if label else 1)
        return [[Segment(" ", palette.text), *self._bar(minimum + max(0, left)), *row]]

    def _bar(self, width: int) -> Row:
        info, status, palette, glyphs = (
            self.snapshot.info,
            self.snapshot.status,
            self.palette,
            self.glyphs,
        )
        total = info.total_steps if info else None
        share = min(1.0, status.step / total) if total else 0.0
        done = int(share * width)
        return [
            Segment(glyphs.bar * done, palette.accent),
            Segment(glyphs.track * (width - done), palette.faint),
        ]

    def _items(self) -> list[Item]:
        info, status, palette = self.snapshot.info, self.snapshot.status, self.palette
        total = info.total_steps if info else None
        width = len(f"{total:,}") if total else 9
        steps = f"{status.step:,}".rjust(width) + (f"/{total:,}" if total else "")
        items: list[Item] = [("", f"step {steps}", palette.strong)]
        items.append(("steps/s", self._speed(), palette.text))
        items.append(("left", _clock(status.remaining_s), palette.text))
        items.append(("elapsed", _clock(status.elapsed_s), palette.text))
        if info and info.items_per_step:
            items.append((f"{info.item_unit}/s", f.count(status.items_per_second, 6), palette.text))
        if info and info.steps_per_epoch:
            items.insert(3, ("epoch", f"{status.epoch:6.2f}", palette.text))
        return items

    def _speed(self) -> str:
        speed = self.snapshot.status.steps_per_second
        if speed is None:
            return self.glyphs.missing.rjust(6)
        return f"{speed:6.1f}" if speed >= 1 else f"{speed:6.3f}"


def _clock(seconds: float | None) -> str:
    """As wide as minutes and seconds, or as hours, days: it grows once, not every minute."""
    return f.duration(seconds, 5 if seconds is None or seconds < 3600 else 8)


# ---- banner
# One line across the screen when the run has ended, crashed, or cannot be reached.


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


# ---- facts
# One dim line on the data: how many images or characters, batches per epoch, updates in all.


IN_HEADER = ("device", "threads")
"""Facts that the header says in its own words."""


class FactsLine(Panel):
    """What a task says of its data, as many facts as fit: counts first, in the task's order, then
    texts such as a path. A run that has nothing to say of it has no such line."""

    DEFAULT_CSS = """
    FactsLine { height: 1; display: none; }
    FactsLine.-known { display: block; }
    """

    def show(self, snapshot: Snapshot) -> None:
        """Take the room before the facts are known: nothing moves when they come."""
        info = snapshot.info
        to_come = info is not None and info.task != "script" and snapshot.status.state == "starting"
        self.set_class(bool(info and info.facts) or to_come, "-known")
        super().show(snapshot)

    def rows(self, size: Size) -> Sequence[Row]:
        """The one row."""
        palette, info = self.palette, self.snapshot.info
        row: Row = [Segment(" ", palette.text)]
        left = size.width - 2
        for name, value in facts_of(info) if info else ():
            between = f" {self.glyphs.separator} " if len(row) > 1 else ""
            cost = cell_len(f"{between}{name} {value}")
            if cost > left:
                break
            row.append(Segment(f"{between}{name} {value}", palette.dim))
            left -= cost
        return [row]


def facts_of(info: RunInfo) -> list[tuple[str, str]]:
    """The facts that are worth a line, in the order in which they are left out last."""
    facts = [(n, value) for n, value in info.facts.items() if n not in IN_HEADER]
    facts.sort(key=lambda fact: isinstance(fact[1], str))
    return [(strip_escapes(name), strip_escapes(f.scalar(value))) for name, value in facts]
