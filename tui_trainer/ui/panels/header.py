"""The two lines at the top: which run this is and how it is, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.protocol import tables
from tui_trainer.ui import formatting as f
from tui_trainer.ui.panels.base import Item, Panel
from tui_trainer.ui.widgets.lines import Row

if TYPE_CHECKING:
    from tui_trainer.ui.app import TuiTrainerApp


class HeaderLine(Panel):
    """Title, state, what the run is doing or why it stands still; device and link at the right."""

    DEFAULT_CSS = "HeaderLine { height: 1; }"

    def rows(self, size: Size) -> Sequence[Row]:
        """One row."""
        info, palette = self.snapshot.info, self.palette
        title = (info.title or info.name) if info else "tui-trainer"
        sign, word, style = self._state()
        left: Row = [
            Segment(f" {title} ", palette.strong),
            Segment(" ", palette.text),
            Segment(f"{sign} {word:<8}", style),
        ]
        used = sum(len(segment.text) for segment in left)
        about = self._about()
        right = self._right(size.width - used - 2 - min(len(about) + 2, 24))
        room = size.width - used - sum(len(segment.text) for segment in right) - 1
        about = f.shorten(about, max(0, room - 2), self.glyphs.ellipsis)
        left.append(Segment(f" {about}".ljust(max(0, room)), palette.dim))
        return [[*left, *right, Segment(" ", palette.text)]]

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
        if said := cast("TuiTrainerApp", self.app).said:
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
        history = self.snapshot.history.table(tables.MEMORY)
        latest = history.latest() if history is not None else None
        if latest is None:
            return None
        device, _, host = (float(value) for value in latest[1][:3])
        return device if device == device else host

    def _right(self, room: int) -> Row:
        info, link, palette = self.snapshot.info, self.snapshot.link, self.palette
        dot = f" {self.glyphs.separator} "
        parts: list[str] = []
        if info and info.device:
            parts.append(info.device.kind)
            parts.append(info.device.name)
            if info.device.threads:
                many = "" if info.device.threads == 1 else "s"
                parts.append(f"{info.device.threads} thread{many}")
        if (memory := self._memory()) is not None:
            parts.append(f.bytes_(memory, 0))
        if self.snapshot.status.cost_share is not None:
            parts.append(f"own cost {f.percent(self.snapshot.status.cost_share, 0, 2)}")
        latency = f" {link.latency_ms:.0f} ms" if link.latency_ms and link.latency_ms >= 1 else ""
        viewing = "watching only" if link.read_only else link.state
        parts.append(f"{viewing}{latency}")
        while len(parts) > 1 and len(dot.join(parts)) > room:
            parts.pop(-2)
        text = dot.join(parts)
        style = palette.error if link.state in ("lost", "closed") else palette.dim
        return [Segment(text, style)] if len(text) <= room else []


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
